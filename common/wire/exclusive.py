"""Locks that one rollout worker of a run holds at a time: on a vLLM server whose weights it swaps, on its number."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Literal

from common.wire import scripts
from common.wire.plane import Plane, Stopping
from common.wire.scripts import Leased

HELD_S = 15.0  # a holder that is silent for so long has lost it
_AGAIN_S = 0.1


@contextmanager
def exclusively(
    plane: Plane, what: str, pause: Callable[[float], bool], held_s: float = HELD_S
) -> Iterator[Callable[[], bool]]:
    """Hold the lock on `what`; gives a function that says whether it is still held.

    `pause` waits so many seconds, and says whether the worker is to stop. A thread renews the lock meanwhile: a process
    that is stopped or dead loses it after `held_s`. What is done with it should be done right after asking whether it
    is held. Raises Stopping.
    """
    lock = _Lock(plane, what, held_s)
    while not lock.held():
        if pause(_AGAIN_S):
            raise Stopping
    with lock.kept():
        yield lock.held


@contextmanager
def numbered(plane: Plane, held_s: float = HELD_S) -> Iterator[int]:
    """Hold the lowest number, from 0, that no other worker of the run holds; gives it.

    So n workers that begin one after the other have 0 to n - 1, and one that replaces another gets its number (that of
    a dead one `held_s` later).
    """
    for number in count():
        lock = _Lock(plane, f"number-{number}", held_s)
        if lock.held():
            break
    with lock.kept():
        yield number


class _Lock:
    def __init__(self, plane: Plane, what: str, held_s: float) -> None:
        self._plane, self._what, self._held_s = plane, what, held_s
        self._token = secrets.token_hex(8)

    def held(self) -> bool:
        """Take it, or say that it is held still."""
        return self._plane.call(self._call("take")) is Leased.OK

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Renew it inside, and let it go in the end."""
        end = threading.Event()

        def renew() -> None:
            while not end.wait(self._held_s / 4):
                self._plane.once(self._call("take"))

        thread = threading.Thread(target=renew, name=f"holds {self._what}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()
            self._plane.once(self._call("drop"))

    def _call(self, mode: Literal["take", "drop"]) -> scripts.Call[Leased]:
        return scripts.exclusive(self._what, self._token, int(self._held_s * 1000), mode)
