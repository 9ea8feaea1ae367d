"""Leases: one process at a time acts as feeder, arbiter or learner, and its scripts are refused once another does."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import redis

from common import metrics
from common.files import locked
from common.wire import scripts
from common.wire.entries import age_order
from common.wire.plane import Plane, RedisUnavailable, RunGone, Stopping
from common.wire.scripts import Call, Entry, Fenced, Leased

_ADOPT_AT_A_TIME = 500
R = TypeVar("R")


class LeaseLost(RuntimeError):
    """Another process holds this role's lease: this one must not write any more."""


class Lease:
    """The right of one process to act in a role.

    Its token goes into every script of that role, and is the holder's consumer name in its stream. With several data
    servers it is held on each: whoever lacks one of them has lost it, and who waits for one does not act on the others.
    """

    def __init__(self, plane: Plane, role: str, lease_s: float) -> None:
        self.token = secrets.token_hex(8)
        self._plane, self._role, self._ms = plane, role, int(lease_s * 1000)
        self._renew_at = self._adopt_at = 0.0

    def acquire(self, stop: threading.Event, wait_s: float = 30.0) -> None:
        """Wait for the lease. Raises LeaseLost when another process keeps it, Stopping when asked to stop."""
        began = time.monotonic()
        # One server after the other, so that of two that come at the same time the one which has the home gets all.
        while not all(self._plane.call(self._call("take", place)) is Leased.OK for place in self._plane.places):
            if time.monotonic() - began > wait_s + self._ms / 1000:
                raise LeaseLost(f"another {self._role} is at work on this run")
            if stop.wait(0.1):
                raise Stopping
        self._renew_at = time.monotonic() + self._ms / 3000

    def keep(self) -> None:
        """Called at every iteration: renew when a third of the lease is over. Raises LeaseLost."""
        metrics.turned(self._role)
        if time.monotonic() >= self._renew_at:
            self._renew()

    def _renew(self) -> None:
        calls = [self._call("renew", place) for place in self._plane.places]
        if any(answer is not Leased.OK for answer in self._plane.call_all(calls)):
            raise LeaseLost(f"another {self._role} took over this run")
        self._renew_at = time.monotonic() + self._ms / 3000

    def beat(self) -> None:
        """Renew once, from a thread, while the holder's loop may be busy with one long operation. If another process
        has the lease, this does nothing, and the loop notices."""
        metrics.turned(self._role)
        for place in self._plane.places:
            self._plane.once(self._call("renew", place))

    @contextlib.contextmanager
    def exclusively(self, path: Path) -> Iterator[None]:
        """Hold the lock on a file, with the lease checked inside: for a holder's writes to the run's folder.

        Redis fences its own writes, a disk does not. A former holder that was paused either has the lock, and its
        successor waits for it, or it finds here that it has lost the lease. Raises LeaseLost.
        """
        with locked(path, self.keep):
            self._renew()
            yield

    def call(self, call: Fenced[R]) -> R:
        """A script of this role alone; a lease that merely ran out is renewed. Raises LeaseLost."""
        return self.call_all([call])[0]

    def call_all(self, calls: Sequence[Fenced[R]]) -> list[R]:
        """Like `call`, for each of these in their order, in one round trip."""
        replies: list[R] = []
        for _ in range(3):
            fenced = [call.by(self._role, self.token) for call in calls[len(replies) :]]
            for reply in self._plane.call_all(fenced):
                if reply is None:
                    break  # those after a refusal may have been run, and are fenced: all are run again, in order
                replies.append(reply)
            if len(replies) == len(calls):
                return replies
            self._renew()
        raise LeaseLost(f"the lease of the {self._role} cannot be kept: calls take longer than it lasts")

    def advance(self, what: Literal["step", "covered", "learning", "state"], value: str | int) -> None:
        # Every server has the state, because scripts look at it; the run's is the home's, which is the last to change.
        places = reversed(self._plane.places) if what == "state" else (0,)
        self.call_all([scripts.advance(what, value, place) for place in places])

    def adopt(self, stream: str, group: str) -> list[Entry]:
        """Take over the pending entries of former holders of this lease, in the stream's order.

        Called at the start, and about once a second (`adoption_due`): a former holder that was paused may still read.
        """
        self._adopt_at = time.monotonic() + 1.0
        failed = self._plane.failed_calls
        found: list[Entry] = []
        for place in self._plane.places:
            while True:
                entries = self.call(scripts.adopt(stream, group, _ADOPT_AT_A_TIME, place))
                found += entries
                if len(entries) < _ADOPT_AT_A_TIME:
                    break
        if self._plane.failed_calls != failed:
            # A call whose reply was lost may have made entries ours, which the next one does not name.
            self._plane.read_again(stream, self.token)
        return sorted(found, key=lambda one: age_order(one[0]))

    @property
    def adoption_due(self) -> bool:
        return time.monotonic() >= self._adopt_at

    def drop(self) -> None:
        with contextlib.suppress(redis.exceptions.RedisError, OSError, RunGone, RedisUnavailable, Stopping):
            self._plane.call_all([self._call("drop", place) for place in self._plane.places])

    def _call(self, mode: Literal["take", "renew", "drop"], place: int) -> Call[Leased]:
        return scripts.lease(self._role, self.token, self._ms, mode, place)
