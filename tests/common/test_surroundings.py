"""Variables that were set for other programs do not break ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COUNT = "from common import metrics; metrics.learner_steps.inc(); metrics.learner_step_seconds.observe(1.0)"
DRAW = (
    "import ops.report, io; from matplotlib.figure import Figure; "
    "from matplotlib.backends.backend_agg import FigureCanvasAgg; "
    "FigureCanvasAgg(Figure()).print_png(io.BytesIO())"
)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", ["PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"])
def test_metrics_of_several_processes_in_files_are_not_ours(tmp_path: Path, name: str) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        done = run(COUNT, **{name: str(folder)})
        assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", ["Qt4Agg", "module://nowhere", ""])
def test_pictures_need_no_backend(backend: str) -> None:
    done = run(DRAW, MPLBACKEND=backend)
    assert done.returncode == 0, done.stderr
