"""A pulse tells long work from a hang."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import pytest

from common.pulse import Pulse

EVERY_S, TURN_S = 0.01, 0.1


def until(what: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.002)


class Said:
    """What a pulse says, counted."""

    def __init__(self, busy_s: float = 60.0) -> None:
        self.times = 0
        self.pulse = Pulse(self._say, every_s=EVERY_S, turn_s=TURN_S, busy_s=busy_s)

    def _say(self) -> None:
        self.times += 1

    def again(self, times: int = 3) -> None:
        """Wait until it has said so several times more."""
        wanted = self.times + times
        until(lambda: self.times >= wanted)

    def silent(self) -> None:
        """Wait until it says nothing for several heartbeats."""

        def still() -> bool:
            before = self.times
            time.sleep(10 * EVERY_S)
            return self.times == before

        until(still)


def test_a_worker_at_declared_work_lives_although_its_loop_does_not_come_round() -> None:
    said = Said()
    with said.pulse as pulse, pulse.busy("scoring"):
        time.sleep(3 * TURN_S)
        said.again()


def test_a_loop_that_hangs_without_a_word_falls_silent_and_lives_again_when_it_comes_round(
    caplog: pytest.LogCaptureFixture,
) -> None:
    said = Said()
    with said.pulse as pulse:
        said.again(1)
        said.silent()
        assert not pulse.lives
        pulse.turn()
        said.again(1)
    [record] = [one for one in caplog.records if one.levelno == logging.ERROR]
    assert "no more heartbeats" in record.getMessage()


def test_work_that_never_ends_is_a_hang_and_named(caplog: pytest.LogCaptureFixture) -> None:
    said = Said(busy_s=0.2)
    with said.pulse as pulse, pulse.busy("reading weights"):
        said.again(1)
        said.silent()
        assert not pulse.lives
    assert "hangs in reading weights" in caplog.text


def test_work_within_work_does_not_shorten_it() -> None:
    said = Said()
    with said.pulse as pulse, pulse.busy("a shift"):
        with pulse.busy("a forward"):
            pulse.turn()
        time.sleep(3 * TURN_S)
        said.again()


def test_after_the_end_nothing_is_said() -> None:
    said = Said()
    with said.pulse:
        said.again(1)
    before = said.times
    time.sleep(5 * EVERY_S)
    assert said.times == before
