"""`katana trace`: the files of a run's processes as one, the shares of their time, the picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from samples import make_config

from common.runfiles.tracing import ProcessTrace, TracedProcess, TracedSpan, TracedStage
from ops.cli.main import main
from ops.trace.events import events_of
from ops.trace.shares import TimeShares, shares_between

FEEDER = [
    TracedProcess("feeder", "test", "a", 11, 1_000),
    TracedSpan("admitting", "work", 1_100, 50),
    TracedStage("r1", "admitted", 1_120),
    TracedSpan("booking", "work", 9_000, 50),
    TracedStage("r1", "booked", 9_010),
]
ROLLOUT = [
    TracedProcess("rollout", "test", "b", 11, 1_500),
    TracedSpan("beat take", "redis", 1_700, 80),
    TracedSpan("exchange", "work", 1_600, 300, {"free": 4}),
    TracedStage("r1", "taken", 1_850),
    TracedStage("r1", "chunk", 1_860, {"seq": 0}),
]
LEARNER = [
    TracedProcess("learner", "test", "a", 12, 900),
    *(
        TracedSpan("step", "work", at, 500, {"step": number})
        for number, at in enumerate((2_000, 4_000, 8_000), start=1)
    ),
    TracedStage("r1", "trained", 8_100),
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    config = make_config(tmp_path)
    (config.run_dir / "trace").mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    for name, lines in (("learner-0", LEARNER), ("rollout-0", ROLLOUT), ("feeder-0", FEEDER)):
        put(config.run_dir, name, lines)
    return config.run_dir


def put(run: Path, name: str, lines: list[Any]) -> None:
    text = "".join(json.dumps(line.to_json()) + "\n" for line in lines)
    (run / "trace" / f"{name}.jsonl").write_text(text)


def merged(run: Path) -> list[dict[str, Any]]:
    assert main(["trace", str(run)]) == 0
    events: list[dict[str, Any]] = json.loads((run / "trace.json").read_text())["traceEvents"]
    return events


def test_processes_stand_along_the_data_path_with_their_spans(run: Path) -> None:
    events = merged(run)
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    ranks = {event["pid"]: event["args"]["sort_index"] for event in events if event["name"] == "process_sort_index"}
    assert [names[pid] for pid in sorted(names, key=lambda pid: ranks[pid])] == [
        "rollouts",
        "feeder-0",
        "rollout-0",
        "learner-0",
    ]
    labels = {names[event["pid"]]: event["args"]["labels"] for event in events if event["name"] == "process_labels"}
    assert labels == {"feeder-0": "a, pid 11", "rollout-0": "b, pid 11", "learner-0": "a, pid 12"}
    slices = [event for event in events if event["ph"] == "X" and names[event["pid"]] == "rollout-0"]
    assert [(one["name"], one["cat"], one["ts"], one["dur"]) for one in slices] == [
        ("rollout-0", "process", 600, 400),
        ("exchange", "work", 700, 300),
        ("beat take", "redis", 800, 80),
    ]
    assert slices[1]["args"] == {"free": 4}


def test_a_rollout_is_slices_of_its_stages_and_an_arrow_through_the_processes(run: Path) -> None:
    events = merged(run)
    slices = [(one["ph"], one["name"], one["ts"]) for one in events if one.get("cat") == "rollout" and one["ph"] != "n"]
    assert slices == [
        ("b", "r1", 220),
        ("b", "waits for a writer", 220),
        ("e", "waits for a writer", 950),
        ("b", "is written", 950),
        ("e", "is written", 7_200),
        ("b", "waits for its booking", 7_200),
        ("e", "waits for its booking", 8_110),
        ("e", "r1", 8_110),
    ]
    points = [(one["name"], one["args"]) for one in events if one["ph"] == "n"]
    assert points == [("admitted", {}), ("taken", {}), ("chunk", {"seq": 0}), ("trained", {}), ("booked", {})]
    arrows = [one for one in events if one.get("cat") == "flow"]
    assert [one["ph"] for one in arrows] == ["s", "t", "t", "t", "f"]
    spans = [one for one in events if one["ph"] == "X"]
    for arrow in arrows:  # an arrow is drawn from one span to another
        inside = [one for one in spans if one["pid"] == arrow["pid"] and one["cat"] == "work"]
        assert any(one["ts"] <= arrow["ts"] <= one["ts"] + one["dur"] for one in inside), arrow


def test_a_rollout_that_is_not_booked_ends_with_its_last_stage() -> None:
    stages = [TracedStage("r1", "admitted", 10), TracedStage("r1", "taken", 30), TracedStage("r1", "chunk", 70)]
    trace = ProcessTrace("feeder-0", TracedProcess("feeder", "test", "a", 1, 0), [], stages, 0, False)
    slices = [event for event in events_of([trace]) if event.get("cat") == "rollout" and event["ph"] in "be"]
    opened = [event["name"] for event in slices if event["ph"] == "b"]
    closed = [event["name"] for event in slices if event["ph"] == "e"]
    assert sorted(opened) == sorted(closed) == ["is written", "r1", "waits for a writer"]
    assert {event["ts"] for event in slices if event["ph"] == "e"} == {30, 70}


def of_spans(*spans: TracedSpan) -> ProcessTrace:
    return ProcessTrace("one-0", TracedProcess("one", "test", "a", 1, 100), list(spans), [], 0, False)


def test_shares_count_redis_inside_work_as_redis_and_work_inside_a_wait_as_work() -> None:
    trace = of_spans(
        TracedSpan("exchange", "work", 100, 40),
        TracedSpan("beat", "redis", 110, 10),
        TracedSpan("waiting for a batch", "wait", 140, 50),
        TracedSpan("reading", "work", 150, 20),
        TracedSpan("fields", "redis", 190, 10),
    )
    assert shares_between(trace, 100, 200) == TimeShares(pytest.approx(0.5), pytest.approx(0.2), pytest.approx(0.3))
    assert shares_between(trace, 0, 150) == TimeShares(pytest.approx(0.6), pytest.approx(0.2), pytest.approx(0.2))
    assert shares_between(trace, 300, 400) == TimeShares(0.0, 0.0, 1.0)


def test_the_picture_has_a_row_for_each_process(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.png"
    assert main(["trace", str(run), "--png", str(path), "--steps", "2"]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    assert not (run / "trace.json").exists()
    with Image.open(path) as picture:
        three = picture.size
    for number in range(1, 4):
        put(run, f"rollout-{number}", [ROLLOUT[0], TracedSpan("an engine step", "work", 3_000, 900)])
    assert main(["trace", str(run), "--png", str(path), "--out", str(tmp_path / "t.json")]) == 0
    with Image.open(path) as picture:
        assert picture.size[0] == three[0] and picture.size[1] > three[1]
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]


def test_without_learner_steps_the_last_seconds_are_drawn(run: Path, tmp_path: Path) -> None:
    (run / "trace" / "learner-0.jsonl").unlink()
    assert main(["trace", str(run), "--png", str(tmp_path / "trace.png")]) == 0
    assert (tmp_path / "trace.png").stat().st_size > 0


@pytest.mark.parametrize("what", ["no run", "no trace", "no place"])
def test_bad_input_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    arguments, words = ["trace", str(run)], "cannot be written"
    if what == "no run":
        arguments, words = ["trace", str(tmp_path / "nothing")], "not a run's folder"
    elif what == "no trace":
        for path in (run / "trace").iterdir():
            path.unlink()
        words = "`trace: true`"
    else:
        arguments += ["--out", str(tmp_path / "nowhere" / "t.json")]
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_damaged_lines_and_full_files_are_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (run / "trace" / "rollout-0.jsonl").open("a") as file:
        file.write('nonsense\n{"full":5,"at_us":2000}\n')
    merged(run)
    told = capsys.readouterr().out
    assert "rollout-0: 1 damaged lines left out" in told
    assert "rollout-0: full" in told
