"""What teachers forwarded for each token scored, read from the metrics that they serve."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, start_http_server

from common.metrics import TARGETS
from ops.bench.counts import TeacherCounts


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_tokens_forwarded_are_counted_over_all_teachers_and_from_a_time_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ops.bench.counts._EVERY_S", 0.05)
    (tmp_path / TARGETS).mkdir()
    counters, servers = [], []
    for number in range(2):
        registry = CollectorRegistry()
        scored = Counter("katana_decode_tokens_total", "", ["role"], registry=registry).labels("teacher")
        rebuilt = Counter("katana_rebuilt_tokens_total", "", registry=registry)
        server, thread = start_http_server(0, "127.0.0.1", registry)
        servers.append((server, thread))
        group = {"targets": [f"127.0.0.1:{server.server_port}"], "labels": {"job": "teacher", "run": "bench"}}
        (tmp_path / TARGETS / f"bench--teacher-{number}.json").write_text(json.dumps([group]))
        counters.append((scored, rebuilt))
    with TeacherCounts(tmp_path / "bench") as counts:
        counters[0][0].inc(100)
        counters[0][1].inc(50)
        wait_until(lambda: counts._looks != [] and counts._looks[-1][1:] == (100, 50))
        servers[0][0].shutdown()  # this one ends: what it has counted stays
        between = time.time()
        counters[1][0].inc(300)
        counters[1][1].inc(30)
        wait_until(lambda: counts._looks[-1][1:] == (400, 80))
    assert counts.forwarded_per_scored() == pytest.approx(1.2)
    assert counts.forwarded_per_scored(between) == pytest.approx(1.1)
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_run_without_teachers_has_no_such_figure(tmp_path: Path) -> None:
    with TeacherCounts(tmp_path / "bench") as counts:
        pass
    with pytest.raises(RuntimeError, match=r"no teacher of .*bench served metrics"):
        counts.forwarded_per_scored()
