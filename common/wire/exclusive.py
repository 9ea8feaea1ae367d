"""A lock that one rollout worker of a run holds at a time: on a vLLM server whose weights it swaps."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    token, end = secrets.token_hex(8), threading.Event()

    def call(mode: Literal["take", "drop"]) -> scripts.Call[Leased]:
        return scripts.exclusive(what, token, int(held_s * 1000), mode)

    def renew() -> None:
        while not end.wait(held_s / 4):
            plane.once(call("take"))

    def held() -> bool:
        return plane.call(call("take")) is Leased.OK

    while not held():
        if pause(_AGAIN_S):
            raise Stopping
    thread = threading.Thread(target=renew, name=f"holds {what}", daemon=True)
    thread.start()
    try:
        yield held
    finally:
        end.set()
        thread.join()
        plane.once(call("drop"))
