"""No data of Katana's becomes code: nothing is unpickled, evaluated, or loaded with code from a model's folder."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from common.pretrained import PACKAGE_ROOT

PACKAGES = ("common", "actors", "learner", "ops")
SOURCES = sorted(path for package in PACKAGES for path in (PACKAGE_ROOT / package).rglob("*.py"))
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle"}
BUILTINS = {"eval", "exec", "compile", "__import__", "execfile"}
CALLS = {
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "np.load",
    "numpy.load",
    "os.system",
    "os.popen",
}
KEYWORDS = {"trust_remote_code", "allow_pickle", "shell"}
# Runs the sitecustomize.py that it hides, a file on Python's own path, as Python itself would; in chaos runs only.
ALLOWED = {"ops/chaos/shim/sitecustomize.py": ["exec()", "compile()"]}


def findings(source: str) -> list[str]:
    """What in a source could turn data into code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"import {name}" for name in names if name.partition(".")[0] in MODULES]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [f"{name}()"] if name in BUILTINS | CALLS else []
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                found += [f"{keyword.arg}="] if keyword.arg in KEYWORDS and not off else []
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE_ROOT)))
def test_no_source_unpickles_or_evaluates(path: Path) -> None:
    assert findings(path.read_text()) == ALLOWED.get(path.relative_to(PACKAGE_ROOT).as_posix(), [])


def test_the_search_finds_what_it_looks_for() -> None:
    wrong = """
import pickle, os.path
from joblib import load
import torch
torch.load(path)
model.eval()
eval(text)
yaml.load(text, Loader=L)
yaml.safe_load(text)
from_pretrained(x, trust_remote_code=True)
from_pretrained(x, trust_remote_code=False)
"""
    assert findings(wrong) == [
        "import pickle",
        "import joblib",
        "torch.load()",
        "eval()",
        "yaml.load()",
        "trust_remote_code=",
    ]


# Put in front of every Python process of a run: writes down each class that an unpickler looks up, and who asked.
_HOOK = """
import os, sys, traceback

def _hook(event, arguments):
    if event == "pickle.find_class":
        asked = [f"{frame.filename}:{frame.name}" for frame in traceback.extract_stack()[:-1]]
        line = "\\t".join([" ".join(sys.argv[1:2]), f"{arguments[0]}.{arguments[1]}", *reversed(asked)]) + "\\n"
        with open(os.environ["KATANA_TEST_UNPICKLED"], "a") as log:
            log.write(line)

sys.addaudithook(_hook)
with open(os.environ["KATANA_TEST_UNPICKLED"], "a") as log:
    log.write("\\t".join(["started", *sys.argv[1:2]]) + "\\n")
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_process_of_a_run_unpickles_anything(tmp_path: Path) -> None:
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(_HOOK)
    log = tmp_path / "unpickled"
    given = (
        *("learner.max_steps=3", "learner.batch_size=16", "checkpoints.every_steps=1", "rollout.slots=16"),
        *("eval.every_steps=2", "eval.problems=4", f"runs_dir={tmp_path}"),
    )
    flags = [flag for item in given for flag in ("--set", item)]
    done = subprocess.run(
        [sys.executable, "-m", "ops.cli", "run", "ops/experiments/demo.yaml", *flags, "--name", "run"],
        cwd=PACKAGE_ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "hook"), "KATANA_TEST_UNPICKLED": str(log)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split("\t") for line in log.read_text().splitlines()]
    print(Counter(tuple(line[:3]) for line in lines))
    started = {line[1] for line in lines if line[0] == "started" and len(line) > 1}
    assert {"run", "feeder", "rollout", "teacher", "arbiter", "learner", "evaluator"} <= started
    assert [line for line in lines if line[0] != "started"] == []
