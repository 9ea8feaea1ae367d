"""A waker says that an entry has come, and takes nothing; what becomes of its connection does no harm."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from samples import Run

from common.wire.connect import connect
from common.wire.wake import Waker, wait_for_any
from ops.reach.embedded import EmbeddedRedis


@pytest.fixture
def run(embedded_redis: EmbeddedRedis, start: Callable[..., Run]) -> Run:
    return start(embedded_redis)


@pytest.fixture
def waker(run: Run) -> Iterator[Waker]:
    waker = Waker(run.client)
    yield waker
    waker.close()


def woken(waker: Waker, wait_s: float = 2.0) -> bool:
    wait_for_any([waker], wait_s)
    return waker.answered()


def test_it_answers_what_comes_after_the_question_and_takes_nothing(run: Run, waker: Waker) -> None:
    keys = [run.key("scores"), run.key("finished")]
    run.client.xadd(keys[0], {"rid": "before"})
    assert not waker.asks(keys) and waker.ask(keys) and waker.asks(keys)
    assert not woken(waker, 0.05)
    for key in keys:
        run.client.ping()  # the server has come to the question
        run.client.xadd(key, {"rid": "after"})
        assert woken(waker) and not waker.asks(keys)
        assert waker.ask(keys)
    assert not woken(waker, 0.05)
    assert [run.client.xlen(key) for key in keys] == [2, 1]
    assert run.pending("scores") == run.pending("finished") == 0
    came = run.plane.read("arbiter", "a", ["scores"], count=10, block_s=0.0)
    assert [values[b"rid"] for _, (_, values) in came] == [b"before", b"after"]


def test_an_open_question_stays_and_one_about_other_streams_replaces_it(run: Run, waker: Waker) -> None:
    assert waker.ask([run.key("scores")])
    socket = waker.socket
    assert waker.ask([run.key("scores")])
    assert waker.socket is socket
    assert waker.ask([run.key("finished")])
    run.client.xadd(run.key("scores"), {"rid": "r"})
    assert not woken(waker, 0.05)
    run.client.xadd(run.key("finished"), {"rid": "r"})
    assert woken(waker)


def test_a_server_that_ends_ends_the_wait_and_is_asked_again_when_it_is_back(own_redis: EmbeddedRedis) -> None:
    client: Any = connect(own_redis.url)
    waker = Waker(client)
    assert waker.ask(["s"])
    began = time.monotonic()
    os.kill(own_redis.pid, signal.SIGKILL)
    assert woken(waker, 20.0)
    assert time.monotonic() - began < 10.0
    assert not waker.ask(["s"])
    own_redis.stop()
    own_redis.start()
    assert waker.ask(["s"])
    client.xadd("s", {"a": "b"})
    assert woken(waker)
    waker.close()


def test_a_connection_that_never_answers_is_replaced(run: Run, waker: Waker) -> None:
    assert waker.ask([run.key("scores")])
    socket, waker._asked_at = waker.socket, time.monotonic() - 60.0
    assert waker.ask([run.key("scores")])
    assert waker.socket is not socket
