"""System programs that some tests need: looked up by name, skipped by name, required where CI says so."""

from __future__ import annotations

import os
import shutil

import pytest

REQUIRE = "KATANA_REQUIRE_SYSTEM"  # set by .ci/run, which installs them


def need(program: str) -> str:
    """The program's path. Skips the test where it is not installed; fails it where REQUIRE is set."""
    found = shutil.which(program)
    if found is not None:
        return found
    if os.environ.get(REQUIRE):
        pytest.fail(f"{program} is not installed, and {REQUIRE} is set")
    pytest.skip(f"{program} is not installed")
