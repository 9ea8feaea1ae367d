"""The lock on a thing that rollout workers share: one holder, kept alive, lost by who is silent."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

import pytest
from samples import Run

from common.wire import scripts
from common.wire.exclusive import exclusively, numbered
from common.wire.plane import Stopping


def sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def test_one_holds_it_and_the_next_waits(run: Run) -> None:
    order = []
    inside = threading.Event()

    def other() -> None:
        inside.wait(10)
        with exclusively(run.plane, "server", sleep):
            order.append("other")

    thread = threading.Thread(target=other)
    thread.start()
    with exclusively(run.plane, "server", sleep) as mine, exclusively(run.plane, "another server", sleep):
        inside.set()
        time.sleep(0.3)
        assert mine()
        order.append("first")
    thread.join(10)
    assert order == ["first", "other"]
    assert not run.client.exists(run.key("exclusive:server"))


def test_a_holder_is_kept_while_it_lives_and_replaced_when_silent(run: Run) -> None:
    with exclusively(run.plane, "server", sleep, held_s=0.4) as mine:
        time.sleep(1.0)
        assert run.plane.call(scripts.exclusive("server", "other", 1000, "take")) is scripts.Leased.HELD
        assert mine()
        # As if this process had been stopped for longer than it is held.
        run.client.hset(run.key("exclusive:server"), "token", "other")
        assert not mine()
    assert run.client.hget(run.key("exclusive:server"), "token") == b"other", "nobody drops what another holds"
    assert run.plane.call(scripts.exclusive("server", "silent", 1, "take")) is scripts.Leased.HELD
    wait = time.monotonic() + 5
    while run.plane.call(scripts.exclusive("server", "silent", 1, "take")) is scripts.Leased.HELD:
        assert time.monotonic() < wait
    with exclusively(run.plane, "server", sleep) as mine:
        assert mine()


def test_who_is_to_stop_does_not_wait_for_it(run: Run) -> None:
    assert run.plane.call(scripts.exclusive("server", "other", 60_000, "take")) is scripts.Leased.OK
    with pytest.raises(Stopping), exclusively(run.plane, "server", lambda seconds: True):
        pass


def test_workers_have_the_lowest_numbers_that_are_free(run: Run) -> None:
    with ExitStack() as others, numbered(run.plane) as first:
        numbers = [others.enter_context(numbered(run.plane)) for _ in range(3)]
        assert [first, *numbers] == [0, 1, 2, 3]
        with numbered(run.plane) as last:
            assert last == 4
        with numbered(run.plane) as again:
            assert again == 4
        others.close()
        with numbered(run.plane) as again:
            assert again == 1
    assert not [*run.client.scan_iter(run.key("exclusive:*"))]


def test_a_number_is_kept_while_its_worker_lives_and_free_when_it_is_silent(run: Run) -> None:
    assert run.plane.call(scripts.exclusive("number-0", "killed", 300, "take")) is scripts.Leased.OK
    with numbered(run.plane, held_s=0.4) as number:
        assert number == 1
        time.sleep(1.0)
        with numbered(run.plane) as other:
            assert other == 0, "the killed one's"
            with numbered(run.plane) as third:
                assert third == 2, "1 is held"
