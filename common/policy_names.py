"""The names that `termination.policy` may give, by their form alone. Imports nothing of anybody's."""

from __future__ import annotations

import difflib
import re

BUILT_IN = (
    "none",
    "fixed",
    "scheduled",
    "random",
    "random_matched",
    "kat",
    "kat_absolute",
    "kat_inverse",
)
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


class PolicyError(ValueError):
    """A policy that cannot be used. The message says what is wrong and what is allowed."""


def check(name: str) -> None:
    """Raises PolicyError unless it is a policy's name or has the form of a custom one."""
    if name in BUILT_IN or _MODULE.fullmatch(name):
        return
    near = difflib.get_close_matches(name, BUILT_IN, n=1)
    hint = f" (the nearest is {near[0]!r})" if near else ""
    allowed = f"{', '.join(BUILT_IN)}, or package.module:ClassName"
    raise PolicyError(f"no such policy{hint}; allowed: {allowed}; found {name[:80]!r}")
