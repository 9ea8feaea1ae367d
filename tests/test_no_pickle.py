"""No data of Katana's becomes code: nothing is unpickled, evaluated, or loaded with code from a model's folder."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest
from whole_run import WholeRun

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


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.xdist_group("whole run")
def test_no_process_of_a_run_unpickles_anything(whole_run: WholeRun) -> None:
    lines = whole_run.unpickled
    print(Counter(tuple(line[:3]) for line in lines))
    started = {line[1] for line in lines if line[0] == "started" and len(line) > 1}
    assert {"run", "feeder", "rollout", "teacher", "arbiter", "learner", "evaluator"} <= started
    assert [line for line in lines if line[0] != "started"] == []
