"""Commands are packed into the bytes that redis-py packs them into, and a real Redis takes them."""

from __future__ import annotations

from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from redis.connection import Encoder, PythonRespSerializer
from samples import Run

from common.wire.packing import CommandPacker

THEIRS = PythonRespSerializer(6000, Encoder("utf-8", "strict", False).encode)
names = st.sampled_from(["EVALSHA", "CONFIG GET", b"HMGET", b"SCRIPT LOAD", "hello"])
arguments = st.one_of(st.text(), st.binary(), st.integers(-(2**70), 2**70), st.floats(), st.binary(min_size=7000))


@given(names, st.lists(arguments, max_size=12))
def test_a_command_has_the_bytes_that_redis_py_gives_it(name: Any, args: list[Any]) -> None:
    assert b"".join(CommandPacker().pack(name, *args)) == b"".join(THEIRS.pack(name, *args))


@pytest.mark.parametrize("odd", [bytearray(b"ab"), memoryview(b"ab"), type("Text", (str,), {})("ab")])
def test_what_redis_py_takes_besides_is_taken(odd: Any) -> None:
    assert CommandPacker().pack("GET", odd) == [b"*2\r\n$3\r\nGET\r\n$2\r\nab\r\n"]


@pytest.mark.parametrize("wrong", [None, True, [], object()])
def test_what_redis_py_refuses_is_refused(wrong: Any) -> None:
    with pytest.raises(redis.DataError):
        CommandPacker().pack("GET", wrong)


def test_the_connections_of_a_run_use_it(run: Run) -> None:
    for client in (run.client, run.plane._reader):
        connection = client.connection_pool.make_connection()
        assert isinstance(connection._command_packer, CommandPacker)
    value = bytes(range(256)) * 100
    run.client.set(run.key("config"), value)
    assert run.client.get(run.key("config")) == value
