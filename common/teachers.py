"""What is named after a teacher: streams, queues, rosters. '' is the one teacher of a run that has no name for it.

With one teacher every name is as it was before there could be several, so that a run under way is continued.
"""

from __future__ import annotations

import re

ROLE = "teacher"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
ALLOWED = "up to 32 letters, digits, '-' and '_', of which the first is a letter or a digit"


def is_name(text: str) -> bool:
    """Whether a teacher may be called so."""
    return _NAME.fullmatch(text) is not None


def called(name: str) -> str:
    """A teacher in messages: "teacher", or of several "teacher math"."""
    return f"teacher {name}" if name else ROLE


def section(name: str) -> str:
    """Its section of the config."""
    return f"teachers.{name}" if name else ROLE


def process(name: str) -> str:
    """What the processes of its workers are named after, before their numbers; also the Celery queue of their tasks."""
    return f"{ROLE}-{name}" if name else ROLE


def of(name: str, thing: str) -> str:
    """The name in Redis of a thing that each teacher has: "minima", or of several "minima:math"."""
    return f"{thing}:{name}" if name else thing


def lane(name: str, shard: int) -> str:
    """A shard of its chunks: "3", or of several "math:3"; the stream is `chunks:{lane}`."""
    return f"{name}:{shard}" if name else str(shard)


def in_lane(stream: str) -> tuple[str, str]:
    """Of a stream of chunks the lane and the teacher: "chunks:math:3" is "math:3" of math."""
    found = stream.partition(":")[2]
    return found, found.rpartition(":")[0]
