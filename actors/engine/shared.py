"""What the writers of a run share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Shared:
    """What the writers of a run share, and how this one waits.

    run: the run's key, another one for each start of it. weights: the run's folder of weights. number: which of the
    run's workers at work this one is: the lowest number from 0 that none of the others has, until its task ends.
    exclusively: for a name, a lock that one worker of the run has at a time; inside it, the function that it
    gives says whether this one still has it. pause: sleep so many seconds, the worker staying alive; True if it is to
    stop.
    """

    run: str
    weights: Path
    number: Callable[[], int]
    exclusively: Callable[[str], AbstractContextManager[Callable[[], bool]]]
    pause: Callable[[float], bool]
