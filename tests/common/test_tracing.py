"""The trace's writer: what it writes, when it does not, and what is left after a kill."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from samples import make_config

from common import tracing
from common.config import Config
from common.pulse import Pulse
from common.runfiles.tracing import TracedProcess, TracedSpan, TracedStage, TraceFull, read_traces


def traced(folder: Path, **changes: Any) -> Config:
    return make_config(folder, trace=True, **changes)


def lines_of(config: Config, name: str) -> list[dict[str, Any]]:
    path = config.run_dir / "trace" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_without_the_key_nothing_is_written(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with tracing.of_role(config, "arbiter"), tracing.span("judging", rollouts=1):
        tracing.note(tokens=3)
        tracing.stage("r1", "verdict")
    assert not config.run_dir.exists()
    assert tracing.span("one") is tracing.span("another")  # nothing is made for a span


def test_spans_nest_and_facts_go_to_the_innermost(tmp_path: Path) -> None:
    config = traced(tmp_path)
    with tracing.of_role(config, "rollout"):
        with tracing.span("an engine step", tokens=8):
            with tracing.span("prefill"):
                tracing.note(rows=2)
            tracing.note(rows=5)
        tracing.stage("r1", "chunk", seq=3)
    [one] = read_traces(config.run_dir)
    assert (one.name, one.process.role, one.process.run, one.process.pid) == (
        "rollout-0",
        "rollout",
        "test",
        os.getpid(),
    )
    outer, inner = one.spans
    assert (outer.span, outer.kind, outer.facts) == ("an engine step", "work", {"tokens": 8, "rows": 5})
    assert (inner.span, inner.facts) == ("prefill", {"rows": 2})
    assert one.process.at_us <= outer.at_us <= inner.at_us <= inner.end_us <= outer.end_us
    [stage] = one.stages
    assert (stage.rid, stage.stage, stage.facts) == ("r1", "chunk", {"seq": 3})
    assert outer.end_us <= stage.at_us == one.end_us
    assert not (one.full or one.damaged)


def test_after_the_role_nothing_is_written_and_a_restart_has_a_file_of_its_own(tmp_path: Path) -> None:
    config = traced(tmp_path)
    for name in ("first", "second"):
        with tracing.of_role(config, "feeder"), tracing.span(name):
            pass
        tracing.stage("r1", "booked")
    with tracing.of_role(config, "teacher"):
        pass
    found = list(read_traces(config.run_dir))
    assert [one.name for one in found] == ["feeder-0", "feeder-1", "teacher-0"]
    assert [[span.span for span in one.spans] for one in found] == [["first"], ["second"], []]


def test_a_span_that_an_error_ends_is_written(tmp_path: Path) -> None:
    config = traced(tmp_path)
    with pytest.raises(ZeroDivisionError), tracing.of_role(config, "learner"), tracing.span("step"):
        _ = 1 / 0
    [one] = read_traces(config.run_dir)
    assert [span.span for span in one.spans] == ["step"]


def test_declared_work_is_a_span_and_other_threads_are_not_in_the_trace(tmp_path: Path) -> None:
    config = traced(tmp_path)

    def beside() -> None:
        with tracing.span("beside"):
            tracing.note(rows=1)
            tracing.stage("r1", "taken")

    with tracing.of_role(config, "teacher"), Pulse(beside, every_s=9, turn_s=9, busy_s=9).busy("scoring"):
        other = threading.Thread(target=beside)
        other.start()
        other.join()
    [one] = read_traces(config.run_dir)
    assert [(span.span, span.facts) for span in one.spans] == [("scoring", {})]
    assert one.stages == []


def test_a_file_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(tracing, "MOST_EVENTS", 5)
    config = traced(tmp_path)
    with caplog.at_level(logging.WARNING), tracing.of_role(config, "rollout"):
        for _ in range(20):
            with tracing.span("an engine step"):
                pass
    [one] = read_traces(config.run_dir)
    assert len(one.spans) == 4  # the first line is the process
    assert one.full
    assert lines_of(config, "rollout-0")[-1]["full"] == 5
    assert caplog.text.count("full") == 1


def test_a_disk_that_refuses_ends_the_trace_and_not_the_work(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = traced(tmp_path)
    with caplog.at_level(logging.WARNING), tracing.of_role(config, "rollout"):
        assert tracing._writer is not None and tracing._writer._file is not None
        tracing._writer._file.close()
        tracing._writer._file = FileIO("/dev/full", "w")
        for _ in range(2000):
            tracing.stage("r1", "chunk")
    assert os.strerror(errno.ENOSPC) in caplog.text
    (tmp_path / "file").write_text("")
    elsewhere = traced(tmp_path / "file")
    with caplog.at_level(logging.WARNING), tracing.of_role(elsewhere, "rollout"), tracing.span("step"):
        pass
    assert caplog.text.count("trace of this process") == 2


KILLED = """
import os, signal, sys
from pathlib import Path
from common import tracing
from common.config import load
with tracing.of_role(load(Path(sys.argv[1])), sys.argv[2]):
    for number in range(3000):
        with tracing.span("an engine step", rows=number):
            tracing.stage(f"r{number}", "chunk")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_write_at_the_same_time_and_what_a_kill_tore_is_passed_over(tmp_path: Path) -> None:
    config = traced(tmp_path)
    source = tmp_path / "config.yaml"
    source.write_text(config.to_yaml())
    started = [subprocess.Popen([sys.executable, "-c", KILLED, str(source), "rollout"]) for _ in range(2)]
    assert [process.wait(60) for process in started] == [-signal.SIGKILL] * 2
    torn = config.run_dir / "trace" / "rollout-0.jsonl"
    with torn.open("ab") as file:
        file.write(b'{"span":"an engine st')
    first, second = read_traces(config.run_dir)
    assert {first.process.pid, second.process.pid} == {process.pid for process in started}
    for one in (first, second):
        assert one.damaged == 0
        assert len(one.spans) > 2000  # the rest was in memory
        assert [span.facts["rows"] for span in one.spans] == list(range(len(one.spans)))


def test_a_damaged_line_is_counted_and_a_file_without_its_first_line_is_left_out(tmp_path: Path) -> None:
    config = traced(tmp_path)
    with tracing.of_role(config, "arbiter"), tracing.span("judging"):
        pass
    folder = config.run_dir / "trace"
    with (folder / "arbiter-0.jsonl").open("a") as file:
        file.write('{"span":"judging"}\nnonsense\n{"other":1}\n')
    (folder / "arbiter-1.jsonl").write_text("")
    [one] = read_traces(config.run_dir)
    assert (one.damaged, len(one.spans)) == (3, 1)


@pytest.mark.parametrize(
    "record",
    [
        TracedProcess("rollout", "demo", "host", 7, 1000),
        TracedSpan("step", "work", 1000, 20, {"rows": 3}),
        TracedStage("r1", "taken", 1000),
        TraceFull(5, 1000),
    ],
    ids=lambda record: type(record).__name__,
)
def test_a_line_is_read_as_it_was_written(record: Any) -> None:
    assert type(record).from_json(json.loads(json.dumps(record.to_json()))) == record
