"""The names that `termination.policy` accepts, by their form alone: nothing is imported here.

A built-in policy is named by a word, a custom one by its file, `my/policy.py:ClassName`, or by a module on the Python
path, `package.module:ClassName`.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

BUILT_IN = (
    "none",
    "fixed",
    "scheduled",
    "random",
    "random_matched",
    "repetition",
    "kat",
    "kat_absolute",
    "kat_inverse",
    "entropy",
    "margin_change",
    "adaptive",
)
OF_WINDOWS = ("kat", "kat_absolute", "kat_inverse", "entropy")
"""Judged by means of windows of the divergence, or of the entropy."""
CALIBRATED = ("kat", "kat_inverse", "entropy")
"""Judged by a quantile of those of earlier rollouts, and not active before there are enough."""
READS_VIEW = ("entropy", "margin_change")
"""Those that read more of a token than its id and its divergence."""
_FORMS = "path/to/file.py:ClassName, or package.module:ClassName"
_FILE = re.compile(r"(?:.*/)?[^/]+\.py:[A-Za-z_][A-Za-z0-9_]*")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


class PolicyError(ValueError):
    """A policy that cannot be used. The message says what is wrong and what is allowed."""


def check(name: str) -> None:
    """Raises PolicyError unless it is a policy's name or has the form of a custom one."""
    if name in BUILT_IN or _FILE.fullmatch(name) or _MODULE.fullmatch(name):
        return
    near = difflib.get_close_matches(name, BUILT_IN, n=1)
    hint = f" (the nearest is {near[0]!r})" if near else ""
    raise PolicyError(f"no such policy{hint}; allowed: {', '.join(BUILT_IN)}, {_FORMS}; found {name[:80]!r}")


def may_read_view(name: str) -> bool:
    """Whether a policy of this name may read the view of a token: a custom one may."""
    return name in READS_VIEW or name not in BUILT_IN


def split(name: str) -> tuple[str, str]:
    """File or module of a custom policy, and its class."""
    where, _, class_name = name.rpartition(":")
    return where, class_name


def in_file(name: str) -> bool:
    """Whether it is a custom policy named by its file."""
    return _FILE.fullmatch(name) is not None


def same(one: str, other: str) -> bool:
    """Whether two names mean the same policy. A file may have moved: file name and class are compared."""
    if in_file(one) and in_file(other):
        return os.path.basename(one) == os.path.basename(other)
    return one == other


def located(name: str, folder: Path) -> str:
    """The name with the absolute path of its file, which is in `folder` or else in the working directory.

    Other names stay as they are. A file that is in neither gets a path in `folder`; the error comes with the import.
    """
    if not in_file(name):
        return name
    where, class_name = split(name)
    places = [os.path.abspath(base / where) for base in (folder, Path())]
    found = next((place for place in places if os.path.isfile(place)), places[0])
    return f"{found}:{class_name}"
