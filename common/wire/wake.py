"""Waiting for entries of several servers at once: one blocking read can wait at one server only.

A waker asks its server to answer when an entry comes, with a plain XREAD, which takes nothing: unlike a reply of a
group's read, its reply may be left unread, or be lost, and no entry is pending for anyone by it.
"""

from __future__ import annotations

import contextlib
import selectors
import time
from collections.abc import Sequence
from typing import Any

import redis

_ASKED_FOR_S = 10.0  # the server answers after this in any case
_OVERDUE_S = 15.0  # a connection without an answer for so long is broken
_BROKEN = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError)


class Waker:
    """Tells when an entry has come to one of some streams of one server. It has a connection of its own."""

    def __init__(self, client: Any) -> None:
        self._connection = client.connection_pool.make_connection()
        self._keys: tuple[str, ...] = ()  # of the question that is open; none is, without any
        self._asked_at = 0.0

    def asks(self, keys: Sequence[str]) -> bool:
        """Whether the question about these streams is open."""
        return self._keys == tuple(keys)

    def ask(self, keys: Sequence[str]) -> bool:
        """Have the server say when an entry comes to one of these streams from now on; a question that is open stays.
        False if it cannot be asked: then nothing is known. Raises redis-py's ResponseError."""
        wanted, now = tuple(keys), time.monotonic()
        if self._keys and (self._keys != wanted or now - self._asked_at > _OVERDUE_S):
            self.close()
        if self._keys:
            return True
        block_ms = int(_ASKED_FOR_S * 1000)
        try:
            self._connection.connect()
            self._connection.send_command(
                "XREAD", "BLOCK", block_ms, "COUNT", 1, "STREAMS", *wanted, *"$" * len(wanted)
            )
        except _BROKEN:
            self.close()
            return False
        self._keys, self._asked_at = wanted, now
        return True

    def answered(self) -> bool:
        """Whether the server has answered, or the connection has ended; then it may be asked again."""
        try:
            # TLS sends bytes of its own: what can be received need not be an answer.
            if self._keys and self._connection.can_read(timeout=0):
                self._connection.read_response()
                self._keys = ()
        except _BROKEN:
            self.close()
        return not self._keys

    @property
    def socket(self) -> Any:
        return self._connection._sock  # redis-py has no other name for it

    def close(self) -> None:
        """Drop the question and the connection."""
        self._keys = ()
        with contextlib.suppress(*_BROKEN):
            self._connection.disconnect()


def wait_for_any(wakers: Sequence[Waker], wait_s: float) -> None:
    """Wait until one of them may have an answer, at most `wait_s` seconds. All have been asked."""
    with selectors.DefaultSelector() as selector:
        for waker in wakers:
            selector.register(waker.socket, selectors.EVENT_READ)
        selector.select(wait_s)
