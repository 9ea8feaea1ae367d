"""What `katana run` says of how far it is, by steps or by tokens; how long it will take, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from samples import make_config

from common.wire.connect import connect
from common.wire.plane import open_plane
from ops.reach.embedded import EmbeddedRedis
from ops.run.progress import RunProgress


def line(step: int, generated: int) -> str:
    return json.dumps({"step": step, "idle_ratio": 0.5, "loss": 0.25, "tokens_generated": generated}) + "\n"


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
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


def test_without_a_budget_steps_say_how_far_it_is(
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
    assert said(capsys) == ["step 11 / 200"]


def test_with_a_budget_tokens_do_and_the_time_left_follows_them(
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
    assert said(capsys) == [
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
