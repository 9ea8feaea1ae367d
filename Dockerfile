# One image for every role of a cluster. Two targets, which differ in torch alone:
#
#     docker build --target cpu -t katana:cpu .        # the last stage, so also what a plain `docker build .` makes
#     docker build --target gpu -t katana:gpu .
#
# docker-compose.yml builds both by itself; docs/operating.md says the rest. To pin the base image by its digest as
# well: --build-arg PYTHON_IMAGE=python:3.11.13-slim-bookworm@sha256:…, as `docker buildx imagetools inspect` shows it.
ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm

# --- what both builds begin with ---------------------------------------------------------------------------------
FROM ${PYTHON_IMAGE} AS build
# Where pip looks; empty: its own defaults. A mirror: PIP_INDEX_URL. No network: a folder of wheels that the build can
# see, PIP_FIND_LINKS=/that/folder and PIP_NO_INDEX=1.
ARG PIP_INDEX_URL=
ARG PIP_FIND_LINKS=
ARG PIP_NO_INDEX=
ENV PIP_INDEX_URL=${PIP_INDEX_URL} PIP_FIND_LINKS=${PIP_FIND_LINKS} PIP_NO_INDEX=${PIP_NO_INDEX} \
    PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/katana/bin:$PATH
WORKDIR /src
RUN python3 -m venv /opt/katana
COPY constraints.txt pyproject.toml ./
# Optional parts (extras of pyproject.toml) with spaces between them, as the trackers: tensorboard wandb.
ARG EXTRAS=
# The dependencies by themselves, so that a change of the code does not fetch them again.
RUN EXTRAS="$EXTRAS" python -c "import os, tomllib; \
project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = [project['optional-dependencies'][name] for name in os.environ['EXTRAS'].split()]; \
print(*sum(extras, project['dependencies']), sep='\n')" > requirements.txt

# torch without CUDA, a fifth of the size; empty: from the index of its own project.
FROM build AS build-cpu
ARG TORCH_CPU_INDEX_URL=
RUN pip install --index-url "${TORCH_CPU_INDEX_URL:-https://download.pytorch.org/whl/cpu}" -c constraints.txt torch \
    && pip install -c constraints.txt -r requirements.txt
COPY . .
RUN pip install --no-deps .

# torch as PyPI has it, with CUDA's libraries beside it: of the host it needs the driver alone.
FROM build AS build-gpu
RUN pip install -c constraints.txt -r requirements.txt
COPY . .
RUN pip install --no-deps .

# --- what runs: no compiler, no pip cache, no root ---------------------------------------------------------------
FROM ${PYTHON_IMAGE} AS runtime
# A fresh named volume takes owner and rights of the folder that it covers: hence a folder for each.
RUN groupadd --gid 10001 katana \
    && useradd --uid 10001 --gid katana --no-create-home --home-dir /tmp --shell /usr/sbin/nologin katana \
    && for name in redis feeder rollout teacher arbiter learner evaluator operator exporter; do \
           install -d -o katana -g katana "/secrets/$name"; \
       done \
    && install -d -o katana -g katana /runs
COPY ops/docker/katana-role ops/docker/make-secrets /usr/local/bin/
COPY ops/redis/users.acl /etc/katana/
# Files come with the rights of the checkout, which a umask of 027 or 077 keeps from user 10001.
RUN chmod 0755 /usr/local/bin/katana-role /usr/local/bin/make-secrets /etc/katana && chmod 0644 /etc/katana/users.acl
# The file system is read-only, the only place to write is /tmp; nothing is fetched from a hub at run time.
ENV PATH=/opt/katana/bin:$PATH HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
WORKDIR /runs
USER 10001:10001
EXPOSE 9464
STOPSIGNAL SIGTERM
ENTRYPOINT ["katana-role"]
CMD ["--help"]

FROM runtime AS gpu
COPY --from=build-gpu /opt/katana /opt/katana

FROM runtime AS cpu
COPY --from=build-cpu /opt/katana /opt/katana
