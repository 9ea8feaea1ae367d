"""What the writers of a run share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Shared:
    """What the writers of a run share, and how this one waits.

    run: the run's key, another one for each start of it. weights: the run's folder of weights. worker: this worker's
    name. exclusively: for a name, a lock that one worker of the run has at a time; inside it, the function that it
    gives says whether this one still has it. pause: sleep so many seconds, the worker staying alive; True if it is to
    stop.
    """

    run: str
    weights: Path
    worker: str
    exclusively: Callable[[str], AbstractContextManager[Callable[[], bool]]]
    pause: Callable[[float], bool]
