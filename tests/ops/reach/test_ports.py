"""Metrics ports: what answers is read, what does not is said, whatever it is that answers."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from common.metrics import TARGETS
from ops.reach.ports import Served, Target, parse, scrape, targets


@pytest.fixture
def serving() -> Iterator[Callable[[bytes], str]]:
    """`serving(body)`: the address of a server that answers everything with it."""
    servers: list[HTTPServer] = []

    def begin(body: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"127.0.0.1:{server.server_port}"

    yield begin
    for server in servers:
        server.shutdown()
        server.server_close()


def one(address: str) -> Served:
    [served] = scrape([Target("p", "rollout", address)])
    return served


def write(folder: Path, name: str, value: object) -> None:
    beside = folder.parent / TARGETS
    beside.mkdir(exist_ok=True)
    (beside / f"{folder.name}--{name}").write_text(value if isinstance(value, str) else json.dumps(value))


def test_values_by_name_and_labels() -> None:
    registry = CollectorRegistry()
    tokens = Counter("tokens_total", "", ["role", "run"], namespace="katana", registry=registry)
    tokens.labels("rollout", "a").inc(3)
    tokens.labels("teacher", "a").inc(4)
    Gauge("threshold", "", namespace="katana", registry=registry).set(float("nan"))
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    try:
        served = one(f"127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert served.trouble == ""
    assert served.value("katana_tokens_total", role="teacher") == 4
    assert served.value("katana_tokens_total") == 7
    assert served.value("katana_tokens_total", role="learner") is None
    assert served.value("katana_threshold") is None
    assert served.value("katana_absent") is None


def test_only_our_own_series_are_kept() -> None:
    assert set(parse("python_info 1\nkatana_a 2\n")) == {"katana_a"}


def test_a_port_that_nobody_serves(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening
        served = one(f"127.0.0.1:{taken.getsockname()[1]}")
    assert served.trouble.startswith("does not answer")
    assert served.value("katana_a") is None
    assert scrape([]) == []


@pytest.mark.parametrize("body", [b"<html>", b"katana_a{b=", b"\xff\xfe", b"katana_a one\n", b'katana_a{b="c" 1\n'])
def test_what_is_no_exposition(serving: Callable[[bytes], str], body: bytes) -> None:
    assert one(serving(body)).trouble.startswith("does not serve metrics")


def test_an_answer_without_end_is_not_read_to_its_end(serving: Callable[[bytes], str]) -> None:
    assert one(serving(b"#" * (5 << 20))).trouble == "answers with more than 4 MB"


def test_one_that_never_answers_does_not_hold_up_the_others(serving: Callable[[bytes], str]) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        addresses = [f"127.0.0.1:{mute.getsockname()[1]}", serving(b"katana_a 1\n")]
        first, second = scrape([Target("p", "x", address) for address in addresses], timeout_s=0.2)
    assert first.trouble.startswith("does not answer")
    assert second.value("katana_a") == 1


def test_targets_are_what_processes_wrote_into_the_folder(tmp_path: Path) -> None:
    assert targets(tmp_path / "run") == []
    write(tmp_path / "run", "rollout-1.json", [{"targets": ["127.0.0.1:9464"], "labels": {"job": "rollout"}}])
    write(tmp_path / "run", "feeder-1.json", [{"targets": ["host-1:1"], "labels": {"job": "feeder"}}])
    write(tmp_path / "run", "feeder-1.tmp", "[")
    other = [{"targets": ["host-2:1"], "labels": {"job": "feeder", "run": "run--feeder"}}]
    write(tmp_path / "run--feeder", "feeder-1.json", other)
    assert targets(tmp_path / "run") == [
        Target("feeder-1", "feeder", "host-1:1"),
        Target("rollout-1", "rollout", "127.0.0.1:9464"),
    ]


@pytest.mark.parametrize(
    "value",
    ["[", "7", '["x"]', '[{"targets": ["a:1"]}]', '[{"targets": [7], "labels": {"job": "x"}}]', "[" * 100_000]
    + [
        f'[{{"targets": ["{address}"], "labels": {{"job": "x"}}}}]'
        for address in ("a", "a:b", "a/b:1", "u@a:1", "a:1/x")
    ],
)
def test_files_that_are_no_target_are_passed_over(tmp_path: Path, value: str) -> None:
    write(tmp_path / "run", "a.json", value)
    write(tmp_path / "run", "b.json", [{"targets": ["b:2"], "labels": {"job": "x"}}])
    assert targets(tmp_path / "run") == [Target("b", "x", "b:2")]


def test_many_targets_are_not_all_asked(tmp_path: Path) -> None:
    for number in range(70):
        write(tmp_path / "run", f"{number:03}.json", [{"targets": [f"a:{number}"], "labels": {"job": "x"}}])
    assert len(targets(tmp_path / "run")) == 64
