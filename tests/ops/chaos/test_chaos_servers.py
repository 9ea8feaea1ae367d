"""A run's vLLM servers as the harness finds them: real processes under a worker's guard."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from vllm_servers import STANDIN, wait_until

from actors.vllm.server import OwnServer
from common.config import Vllm
from ops.chaos.servers import VllmServer, servers_of

STUDENT = Path(__file__).parents[3] / "ops" / "models" / "student"
COMMAND = [*STANDIN, "--model", "{model}", "--port", "{port}", "--enable-scale-out"]


@pytest.mark.slow
def test_a_server_that_a_worker_has_started_is_found_and_asked() -> None:
    settings, own = Vllm(command=COMMAND), OwnServer(tuple(COMMAND), STUDENT)
    assert servers_of(settings, [os.getpid()]) == []
    own.start()
    try:
        wait_until(lambda: servers_of(settings, [os.getpid()]))
        (server,) = servers_of(settings, [os.getpid()])
        assert (server.url, server.worker) == (own.url, os.getpid())
        wait_until(lambda: server.label())
        assert (server.label(), server.generated()) == ("default", 0)
        assert server.processes() == [server.pid]
        assert server.engine() is None
        assert servers_of(settings, [os.getppid()]) == []  # of another worker
        assert servers_of(None, [os.getpid()]) == []
    finally:
        own.end()
    wait_until(lambda: not servers_of(settings, [os.getpid()]))
    assert server.label() == ""
    assert server.generated() == 0
    assert server.processes() == []


def test_what_a_server_has_started_belongs_to_it() -> None:
    engine = "import time, sys; sys.argv[0]; time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {engine!r}, 'VLLM::EngineCore'])"
    command = [sys.executable, "-c", code, "--port={port}"]
    own = OwnServer(tuple(command), STUDENT)
    own.start()
    try:
        settings = Vllm(command=command)
        wait_until(lambda: [one for one in servers_of(settings, [os.getpid()]) if one.engine() is not None])
        (server,) = servers_of(settings, [os.getpid()])
        assert set(server.processes()) == {server.pid, server.engine()}
        assert server.engine() != server.pid
        assert server.url == own.url
    finally:
        own.end()
    assert server.processes() == []


def test_servers_that_are_there_already_have_no_process_here() -> None:
    settings = Vllm(urls=["http://127.0.0.1:9", "http://127.0.0.1:10"])
    found = servers_of(settings, [os.getpid()])
    assert found == [VllmServer("http://127.0.0.1:9"), VllmServer("http://127.0.0.1:10")]
    assert found[0].processes() == []
