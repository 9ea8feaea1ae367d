"""Variables that were set for other programs do not break ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
COUNT = "from common import metrics; metrics.learner_steps.inc(); metrics.learner_step_seconds.observe(1.0)"
DRAW = (
    "import ops.report.command, io; from matplotlib.figure import Figure; "
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


@pytest.mark.parametrize("first", ["", "from celery import Celery; "])
def test_settings_of_another_celery_are_not_ours(first: str) -> None:
    """Also of a worker that is started as `celery -A actors.app worker`. Each of them alone would be noticed."""
    ask = "app.loader.import_default_modules(); print(app.conf.broker_url, app.conf.result_backend)"
    others = {
        "CELERY_CONFIG_MODULE": "nothing_here",
        "CELERY_LOADER": "nothing.here",
        "CELERY_BROKER_URL": "redis://nowhere:1/0",
        "CELERY_RESULT_BACKEND": "nowhere://",
    }
    done = run(f"{first}from actors.app import app; {ask}", **others)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["redis://localhost:6379/1", "None"]


def test_another_encoding_of_the_locale_changes_no_file_and_no_message(tmp_path: Path) -> None:
    """PYTHONUTF8=0 keeps Python from turning the C locale into UTF-8 by itself, as it does not with a Latin-1 one."""
    config = tmp_path / "größe.yaml"
    shipped = (ROOT / "ops" / "experiments" / "demo.yaml").read_text(encoding="utf-8")
    config.write_text(f"# Größe η\n{shipped}", encoding="utf-8")
    done = subprocess.run(
        [Path(sys.executable).parent / "katana", "check", config],
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        cwd=ROOT,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "η 0.6" in done.stdout.decode("utf-8")
