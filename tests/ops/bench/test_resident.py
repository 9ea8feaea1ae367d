"""What a process is said to have taken at most is its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from common.pretrained import PACKAGE_ROOT
from ops.bench.resident import forget_peak, peak_mb

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only the most so far is known")
_CHILD = 'from ops.bench.resident import peak_mb; print(peak_mb("cpu"))'


def test_a_process_does_not_inherit_the_most_of_the_one_that_started_it() -> None:
    ballast = b"x" * (900 << 20)
    done = subprocess.run([sys.executable, "-c", _CHILD], cwd=PACKAGE_ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < len(ballast) / (1 << 20) < peak_mb("cpu")


def test_what_was_freed_before_is_forgotten() -> None:
    assert b"x" * (200 << 20)
    before = forget_peak("cpu")
    taken = b"x" * (100 << 20)
    del taken
    assert 90 < peak_mb("cpu") - before < 150
