"""Katana's packages are found before others of the same name.

Many users have a folder called `common` or `ops`, and Python searches the working directory (with
`-m`) and PYTHONPATH first. Only Katana's own processes call this: a test of a policy that imports `common` alone
finds modules as before.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

NAMES = frozenset({"actors", "common", "learner", "ops"})
_ROOT = str(Path(__file__).absolute().parents[1])


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(fullname, [_ROOT], target) if path is None and fullname in NAMES else None


def find_first() -> None:
    """From now on this process imports the packages of NAMES from the source tree of this file."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def is_ours(module: str | None) -> bool:
    """Whether a module's name belongs to Katana, so that no other one of that name can be imported."""
    return module is not None and module.partition(".")[0] in NAMES


def environment() -> dict[str, str]:
    """Environment for a child started by `python -m`: it imports the same modules as this process.

    Otherwise it would search the working directory first, which the command `katana` does not search at all.
    """
    places = [os.path.abspath(place) for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    here = os.getcwd()
    if here not in places and os.pathsep not in here and (here in sys.path or "" in sys.path):
        places.insert(0, here)
    return os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(places)}
