"""The C++ compiler of this machine, which torch needs to compile for a CPU. No torch."""

from __future__ import annotations

import os
import shutil


def has_cpp_compiler() -> bool:
    """Whether there is one: CXX, g++ or clang++."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))
