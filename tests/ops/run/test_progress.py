"""The progress that `katana run` prints, by steps or by tokens, and the estimated time left, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folders import step_line
from samples import make_config

from common.wire.connect import connect
from common.wire.plane import new_run_key, open_plane
from ops.reach.embedded import EmbeddedRedis
from ops.run.progress import RunProgress


def line(step: int, generated: int) -> str:
    return json.dumps(step_line(step, loss=0.25, tokens_generated=generated)) + "\n"


def first_figures(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The first figure of each line."""
    return [one.split("] ")[1].split("  ")[0] for one in capsys.readouterr().out.splitlines()]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("ops.run.progress.time.monotonic", lambda: now[0])
    return now


def begin(folder: Path, server: EmbeddedRedis, budget: int | None) -> tuple[RunProgress, Path]:
    config = make_config(folder, learner={"max_steps": 200, "max_generated_tokens": budget})
    config.run_dir.mkdir(parents=True)
    return RunProgress(config, open_plane(config, connect(server.url), "none")), config.run_dir / "metrics.jsonl"


def test_without_a_budget_progress_is_by_steps(
    tmp_path: Path, embedded_redis: EmbeddedRedis, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    progress, path = begin(tmp_path, embedded_redis, None)
    assert progress._figures()["left"] == "–"
    path.write_text(line(1, 999))
    progress.update()
    clock[0] += 10
    path.write_text(line(1, 999) + line(11, 9999))
    progress.update()
    figures = progress._figures()
    assert (figures["step"], figures["left"]) == ("11 / 200", "about 189 s")  # a step a second
    assert first_figures(capsys) == ["step 11 / 200"]


def test_each_of_several_teachers_has_its_threshold_on_show(tmp_path: Path, embedded_redis: EmbeddedRedis) -> None:
    teachers = {"teacher": None, "teachers": {"math": {"model": "a"}, "code": {"model": "b"}}}
    config = make_config(tmp_path, **teachers, data={"teacher_key": "kind"})
    config.run_dir.mkdir(parents=True)
    plane = open_plane(config, connect(embedded_redis.url), new_run_key("progress"))
    progress = RunProgress(config, plane)
    progress._ask()
    assert progress._figures()["threshold"] == "inactive (0 of 4 minima)"
    plane.client.set(plane.key("threshold:math"), "0.25")
    plane.client.set(plane.key("threshold:code"), "inactive")
    progress._ask()
    assert progress._figures()["threshold"] == "math 2.50e-01 nats"
    plane.client.set(plane.key("threshold:code"), "2.5")
    progress._ask()
    assert progress._figures()["threshold"] == "math 2.50e-01 nats, code 2.50e+00 nats"


def test_with_a_budget_progress_and_time_left_are_by_tokens(
    tmp_path: Path, embedded_redis: EmbeddedRedis, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    progress, path = begin(tmp_path, embedded_redis, 10_000)
    for step, generated in ((1, 1000), (2, 1400), (3, 3000)):
        with path.open("a") as file:
            file.write(line(step, generated))
        progress.update()
        clock[0] += 5
    figures = progress._figures()
    assert figures["step"] == "3 / 200, 3,000 / 10,000 tokens generated"
    assert figures["left"] == "about 35 s"  # 2,000 tokens in 10 s
    # At every twentieth: 1,400 is in the same one as 1,000 was
    assert first_figures(capsys) == [
        "step 1 / 200, 1,000 / 10,000 tokens generated",
        "step 3 / 200, 3,000 / 10,000 tokens generated",
    ]


def test_the_limit_that_is_nearer_counts(tmp_path: Path, embedded_redis: EmbeddedRedis, clock: list[float]) -> None:
    progress, path = begin(tmp_path, embedded_redis, 1_000_000)
    for step in (10, 20):
        path.write_text(line(step, 100 * step))
        progress.update()
        clock[0] += 5
    assert progress._figures()["left"] == "about 90 s"
