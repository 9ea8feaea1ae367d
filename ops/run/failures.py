"""When `katana run` gives a role up: by what the role did since it last failed, not by the clock.

A large model needs a minute to load, so failures that nothing mends may come far apart; a machine whose processes are
killed again and again may still get its work done.
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
"""Failures of one child in a row, with no progress of its role between them, that are answered by another start."""


@dataclass(slots=True)
class Failures:
    """Failures of one child since its role last got on."""

    count: int = 0
    mark: Hashable = None

    def one_more(self, mark: Hashable) -> bool:
        """Count a failure at which the role stood at `mark` (None: Redis did not say). True: it is to be given up."""
        if mark is not None and mark != self.mark:
            self.count, self.mark = 0, mark
        self.count += 1
        return self.count > MOST


def mark_of(role: str, plane: Plane, folder: Path) -> Hashable:
    """How far a role has come, as only that role moves it: equal means no progress, different means some (also where
    Redis has lost its data). None where Redis does not answer."""
    try:
        return _MARKS[role](plane, folder)
    except (redis.exceptions.RedisError, OSError):
        return None


def _of_policy(name: str) -> Callable[[Plane, Path], Hashable]:
    return lambda plane, _: ("policy", name, plane.client.hget(plane.key("policy"), name))


def _of_stream(name: str) -> Callable[[Plane, Path], Hashable]:
    """The last entry that was ever added: what was taken off again counts too."""

    def mark(plane: Plane, _: Path) -> Hashable:
        if not plane.client.exists(plane.key(name)):
            return ("stream", name, b"")
        facts: Any = plane.client.xinfo_stream(plane.key(name))
        return ("stream", name, facts["last-generated-id"])

    return mark


def _of_feeder(plane: Plane, _: Path) -> Hashable:
    ledger = plane.client.hgetall(plane.key("ledger"))
    return ("feeder", plane.client.get(plane.key("cursor")), tuple(sorted(ledger.items())))


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
