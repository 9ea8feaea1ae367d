"""Katana's packages are found before others of the same name.

`common` or `ops` is what many people call a folder of their own, and Python looks into the working directory (with
`-m`) and along PYTHONPATH first. Only a process of Katana's asks for this: whoever tests a policy with `common` alone
still finds modules as before.
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
    """From now on this process finds the packages of NAMES where this file lies."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def is_ours(module: str | None) -> bool:
    """Whether a module's name belongs to Katana, so that no other one of that name can be imported."""
    return module is not None and module.partition(".")[0] in NAMES


def environment() -> dict[str, str]:
    """For a process that is started from here by `python -m`: it finds what this one finds.

    By itself it would look into the working directory first, where the command `katana` does not look at all.
    """
    places = [os.path.abspath(place) for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    here = os.getcwd()
    if here not in places and os.pathsep not in here and (here in sys.path or "" in sys.path):
        places.insert(0, here)
    return os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(places)}
