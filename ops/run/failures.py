"""When `katana run` gives up on a role: after repeated failures without progress, however far apart they are.

A large model takes a minute to load, so permanent failures may be far apart. A role that is killed again and again may
still make progress.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from common.runfiles.names import EVALUATIONS
from common.wire.plane import Plane

MOST = 5
"""How many failures of one child in a row, without progress of its role, are answered by a restart."""


@dataclass(slots=True)
class Failures:
    """Failures of one child since its role last made progress."""

    count: int = 0
    mark: Hashable = None

    def one_more(self, mark: Hashable) -> bool:
        """Count a failure; `mark` is the role's progress (None: unknown). True: do not restart the child."""
        if mark is not None and mark != self.mark:
            self.count, self.mark = 0, mark
        self.count += 1
        return self.count > MOST


def mark_of(role: str, plane: Plane, folder: Path) -> Hashable:
    """A mark of a role's progress, which only this role changes. Equal marks mean no progress, different marks mean
    some, also after Redis lost its data. None if Redis does not answer."""
    try:
        return _MARKS[role](plane, folder)
    except (redis.exceptions.RedisError, OSError):
        return None


def _of_policy(name: str) -> Callable[[Plane, Path], Hashable]:
    return lambda plane, _: ("policy", name, *(part.client.hget(part.key("policy"), name) for part in plane.parts))


def _of_stream(name: str) -> Callable[[Plane, Path], Hashable]:
    """The last entry that was ever added, on each server; a removed entry counts too."""

    def last(part: Plane) -> bytes:
        if not part.client.exists(part.key(name)):
            return b""
        facts: Any = part.client.xinfo_stream(part.key(name))
        return bytes(facts["last-generated-id"])

    def mark(plane: Plane, _: Path) -> Hashable:
        return ("stream", name, *map(last, plane.parts))

    return mark


def _of_feeder(plane: Plane, _: Path) -> Hashable:
    ledgers = [tuple(sorted(part.client.hgetall(part.key("ledger")).items())) for part in plane.parts]
    return ("feeder", *(part.client.get(part.key("cursor")) for part in plane.parts), *ledgers)


def _of_evaluator(_: Plane, folder: Path) -> Hashable:
    path = folder / EVALUATIONS
    return ("evaluator", path.stat().st_size if path.exists() else 0)


_MARKS: dict[str, Callable[[Plane, Path], Hashable]] = {
    "learner": _of_policy("step"),
    "rollout": _of_policy("generated"),
    "teacher": _of_stream("scores"),
    "arbiter": _of_stream("trajectories"),
    "feeder": _of_feeder,
    "evaluator": _of_evaluator,
}
