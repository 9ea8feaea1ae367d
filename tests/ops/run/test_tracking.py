"""Trackers: points from growing files, files for the official readers, and failures that do not affect the run."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import run_folders
from samples import make_config

from common.config import ConfigError
from common.runfiles import lines as runfiles_lines
from common.runfiles.making import lock
from common.runfiles.records import Step
from ops.run import tracking
from ops.run.summary import write_summary
from ops.run.tracking import (
    Follower,
    News,
    TensorBoard,
    TrackedPoint,
    Tracker,
    Tracking,
    WeightsAndBiases,
    missing,
    show_new,
)


def installed(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")


def step_line(step: int, *, loss: float | None = None, version: int | None = None) -> dict[str, Any]:
    return run_folders.step_line(
        step,
        policy_version=step if version is None else version,
        loss=1 / step if loss is None else loss,
        kl=0.5,
        tokens_trained_total=100 * step,
        unix_s=1000.0 + step,
    )


def rollout_line(arm: str, generated: int, version: int, **changes: Any) -> dict[str, Any]:
    tokens = dict.fromkeys(("tokens_generated", "tokens_kept", "tokens_trained"), generated)
    others = {"threshold": None, "policy_version_last": version, "correct": None}
    return run_folders.line(rid="r", arm=arm, **(tokens | others | changes))


def eval_line(step: int, right: float) -> dict[str, Any]:
    return run_folders.evaluation(step, right) | {"pass@k": 2 * right, "mean_length": 32.0}


def append(path: Path, *lines: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def cut_back(folder: Path, step: int) -> None:
    """Replace the file, as `Lines.open_cut_back` does."""
    path, draft = folder / "metrics.jsonl", folder / "metrics.tmp"
    kept = [line for line in path.read_text().splitlines(keepends=True) if json.loads(line)["step"] <= step]
    draft.write_text("".join(kept))
    os.replace(draft, path)


def shown(news: News, kind: str) -> list[tuple[int, dict[str, float]]]:
    return [(point.step, point.values) for point in news.points if point.kind == kind]


def steps(news: News, kind: str = "train") -> list[int]:
    return [step for step, _ in shown(news, kind)]


def rest(follower: Follower) -> News:
    """All remaining points, including the open one."""
    points: list[TrackedPoint] = []
    while (news := follower.look(over=True)).more:
        points += news.points
    return News(points + news.points, news.restarted, more=False)


def show_rest(tracker: Tracker, follower: Follower) -> None:
    while show_new(tracker, follower, over=True):
        pass
    tracker.close()


# --- from files to points ----------------------------------------------------------------------------------------


def test_every_name_is_a_field_that_the_learner_writes() -> None:
    assert {name for names in tracking._STEP.values() for name in names} <= set(Step.__dataclass_fields__)


def test_complete_lines_of_a_growing_folder_are_shown_once(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    assert follower.look() == News([], restarted=True, more=False)
    append(tmp_path / "metrics.jsonl", step_line(1, loss=0.75))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step_line(2))[:20])
    news = follower.look()
    assert (steps(news), news.restarted, news.more) == ([1], False, True)
    values = news.points[0].values
    assert values["train/loss"] == 0.75
    assert values["train/learning_rate"] == 1e-3
    assert values["perf/tokens_trained_total"] == 100
    assert news.points[0].unix_s == 1001.0
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step_line(2))[20:] + "\n")
    append(tmp_path / "eval.jsonl", eval_line(0, 0.25))
    news = follower.look()
    assert steps(news) == [2]
    assert shown(news, "eval") == [
        (0, {"eval/avg@4": 0.25, "eval/pass@4": 0.5, "eval/completion_length": 32.0, "eval/eos_rate": 1.0})
    ]
    assert follower.look().points == []


def test_several_updates_on_a_batch_show_how_far_the_last_one_was(tmp_path: Path) -> None:
    reuse = {"iterations": 3, "loss": 0.5, "kl": 0.25, "ratio_mean": 1.0, "ratio_max": 4.0}
    alone = reuse | dict.fromkeys(("loss", "kl", "ratio_mean", "ratio_max"))
    append(
        tmp_path / "metrics.jsonl",
        {**step_line(1), "reuse": reuse},
        {**step_line(2), "reuse": alone | {"iterations": 1}},
    )
    first, second = (
        {name: value for name, value in point.values.items() if "reuse" in name}
        for point in Follower(tmp_path).look().points
    )
    assert first == {"train/reuse_iterations": 3.0, "train/reuse_kl": 0.25, "train/reuse_ratio_max": 4.0}
    assert second == {"train/reuse_iterations": 1.0}


def test_after_a_learner_cut_back_everything_is_shown_again(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    append(tmp_path / "metrics.jsonl", *(step_line(step) for step in (1, 2, 3)))
    append(tmp_path / "eval.jsonl", eval_line(0, 0.25))
    assert steps(follower.look()) == [1, 2, 3]
    cut_back(tmp_path, 1)
    append(tmp_path / "metrics.jsonl", step_line(2, loss=9.0, version=4))
    news = follower.look()
    assert news.restarted
    assert [(step, values["train/loss"]) for step, values in shown(news, "train")] == [(1, 1.0), (2, 9.0)]
    assert steps(news, "eval") == [0]


def test_the_figures_of_rollouts_by_hand(tmp_path: Path) -> None:
    """Version 0: treated 40, 20 kept, cut; control 80. Version 1: treated 20, whole. Saving: 1 - 30 / 80."""
    append(tmp_path / "metrics.jsonl", step_line(1), step_line(2))
    append(
        tmp_path / "rollouts.jsonl",
        rollout_line("treated", 40, 0, tokens_kept=20, finish_reason="kl_trap", threshold=0.5, correct=False),
        rollout_line("control", 80, 0, correct=True),
        rollout_line("treated", 999, 0, ending="dropped", reason="run_end"),
        rollout_line("treated", 999, 0, ending="dead", reason="rollout"),
        rollout_line("treated", 20, 1, ended_unix_s=77.0),
    )
    follower = Follower(tmp_path)
    first, second = shown(rest(follower), "rollout")
    assert first == (
        0,
        {
            "rollout/completion_length": 60.0,
            "rollout/completion_length_treated": 40.0,
            "rollout/completion_length_control": 80.0,
            "rollout/kept_ratio": 100 / 120,
            "rollout/accuracy": 0.5,
            "rollout/length_saving": 0.5,
            "kat/cut_rate": 1.0,
            "kat/threshold": 0.5,
        },
    )
    assert second[0] == 1
    assert second[1]["rollout/length_saving"] == 1 - 30 / 80
    assert second[1]["kat/cut_rate"] == 0.0
    assert "rollout/completion_length_control" not in second[1]


def test_the_last_saving_is_the_one_in_the_summary(tmp_path: Path) -> None:
    draw = random.Random(0)
    arms = ["treated", "treated", "treated", "control"]
    lines = [
        rollout_line(draw.choice(arms), draw.randint(1, 200), index // 10, active=index > 40) for index in range(200)
    ]
    lines[150] |= {"ending": "dropped", "reason": "stale"}
    lines[160] |= {"ending": "dropped", "reason": "lost"}
    append(tmp_path / "rollouts.jsonl", *lines)
    append(tmp_path / "metrics.jsonl", *(step_line(step) for step in range(1, 20)))
    follower = Follower(tmp_path)
    points = shown(rest(follower), "rollout")
    assert points[-1][1]["rollout/length_saving"] == write_summary(tmp_path).length_saving.ratio
    assert [step for step, _ in points] == list(range(20))


@pytest.mark.parametrize("seed", range(10))
def test_points_do_not_depend_on_when_the_files_are_read(tmp_path: Path, seed: int) -> None:
    """Weights every second step, announcements without a step, stragglers: read at any moments, or at once."""
    draw = random.Random(seed)
    live = Follower(tmp_path)
    seen: list[TrackedPoint] = []
    version = 0
    for step in range(1, 30):
        version += (step % 2 == 0) + (draw.random() < 0.1)
        for _ in range(draw.randint(0, 4)):
            arm, length = draw.choice(["treated", "control"]), draw.randint(1, 99)
            append(tmp_path / "rollouts.jsonl", rollout_line(arm, length, max(0, version - draw.randint(0, 2))))
            if draw.random() < 0.3:
                seen += live.look().points
        append(tmp_path / "metrics.jsonl", step_line(step, version=version))
    seen += rest(live).points
    late = Follower(tmp_path)
    at_once = rest(late).points

    def sorted_by_kind(points: list[TrackedPoint]) -> list[TrackedPoint]:
        return sorted(points, key=lambda point: point.kind)

    assert sorted_by_kind(seen) == sorted_by_kind(at_once)
    assert len({point.step for point in at_once if point.kind == "rollout"}) > 5


def test_a_long_run_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [step_line(step) for step in range(1, 9)]
    monkeypatch.setattr(runfiles_lines, "_AT_ONCE", 2 * len(json.dumps(lines[0])))
    append(tmp_path / "metrics.jsonl", *lines)
    follower = Follower(tmp_path)
    looks = [follower.look(over=True) for _ in range(4)]
    assert [steps(news) for news in looks] == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert not follower.look(over=True).more


# --- TensorBoard -------------------------------------------------------------------------------------------------


def make_reader(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder))


def scalars(reader: Any, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in reader.Reload().Scalars(tag)]


def test_tensorboard_shows_what_was_written_and_drops_what_was_cut_back(tmp_path: Path) -> None:
    installed("tensorboard")
    run, board = tmp_path, tmp_path / "tensorboard"
    follower, tracker = Follower(run), TensorBoard(board)
    append(run / "metrics.jsonl", step_line(1, loss=0.5), step_line(2, loss=0.25), step_line(3, loss=0.125))
    append(run / "eval.jsonl", eval_line(0, 0.25))
    show_new(tracker, follower)
    looking_on = make_reader(board)
    assert scalars(looking_on, "train/loss") == [(1, 0.5), (2, 0.25), (3, 0.125)]
    assert scalars(looking_on, "eval/avg@4") == [(0, 0.25)]
    assert looking_on.Scalars("train/loss")[0].wall_time == 1001.0

    cut_back(run, 1)
    append(run / "metrics.jsonl", step_line(2, loss=0.75))
    show_rest(tracker, follower)
    for reader in (looking_on, make_reader(board)):
        assert scalars(reader, "train/loss") == [(1, 0.5), (2, 0.75)]
        assert scalars(reader, "eval/avg@4") == [(0, 0.25)]


def test_a_resumed_run_shows_every_step_once_and_leaves_two_files(tmp_path: Path) -> None:
    installed("tensorboard")
    board = tmp_path / "tensorboard"
    board.mkdir()
    (board / "events.out.tfevents.1.other").write_bytes(b"")  # somebody else's
    looking_on = make_reader(board)
    for step in (1, 2, 3, 4):
        append(tmp_path / "metrics.jsonl", step_line(step, loss=step / 8))
        follower, tracker = Follower(tmp_path), TensorBoard(board)
        show_rest(tracker, follower)
        for reader in (looking_on, make_reader(board)):
            assert scalars(reader, "train/loss") == [(done, done / 8) for done in range(1, step + 1)]
    assert len(list(board.glob("*.katana"))) == 2
    assert (board / "events.out.tfevents.1.other").exists()


# --- Weights & Biases --------------------------------------------------------------------------------------------

_BLOCK = 32768


def wandb_records(path: Path) -> Iterator[Any]:
    """Records of a .wandb file: seven bytes of header, then LevelDB's log format around protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while place + 7 <= len(data):
        if _BLOCK - place % _BLOCK < 7:
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    """What was sent to W&B, file after file, without its own additions."""
    rows = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for record in wandb_records(path):
            if record.WhichOneof("record_type") == "history":
                items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                rows.append({name: json.loads(text) for name, text in items.items() if not name.startswith("_")})
    return rows


@pytest.fixture
def wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    installed("wandb")
    import wandb

    home = tmp_path / "home"
    home.mkdir()
    for name, value in {
        "HOME": home,
        "WANDB_CACHE_DIR": home,
        "WANDB_CONFIG_DIR": home,
        "WANDB_DATA_DIR": home,
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)

    def refuse(*_: Any) -> None:
        raise AssertionError("a connection to another machine")

    monkeypatch.setattr(socket, "create_connection", refuse)
    yield
    wandb.teardown()  # its process


@pytest.mark.slow
@pytest.mark.usefixtures("wandb_offline")
def test_wandb_offline_holds_every_step_once_over_a_resume(tmp_path: Path) -> None:
    from wandb import teardown

    config = make_config(tmp_path)
    run = config.run_dir
    append(run / "metrics.jsonl", step_line(1, loss=0.5), step_line(2, loss=0.25))
    append(run / "eval.jsonl", eval_line(0, 0.25))
    follower, tracker = Follower(run), WeightsAndBiases(config, "test-0a1b2c3d")
    show_new(tracker, follower)
    cut_back(run, 1)
    append(run / "metrics.jsonl", step_line(2, loss=0.75), step_line(3, loss=0.125))
    show_rest(tracker, follower)

    append(run / "metrics.jsonl", step_line(4, loss=0.0625))
    time.sleep(1.1)  # W&B names its folders by the second
    follower, tracker = Follower(run), WeightsAndBiases(config, "test-0a1b2c3d")
    show_rest(tracker, follower)

    teardown()  # W&B's process writes its file to the end, as when a feeder ends

    rows = wandb_history(run)
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == [
        (1, 0.5),
        (2, 0.25),  # sent before it was cut back, and not changed
        (3, 0.125),
        (4, 0.0625),
    ]
    assert [row for row in rows if "eval/avg@4" in row] == [
        {
            "step": 0,
            "eval/avg@4": 0.25,
            "eval/pass@4": 0.5,
            "eval/completion_length": 32.0,
            "eval/eos_rate": 1.0,
        }
    ]
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == ["run-test-0a1b2c3d.wandb"] * 2
    runs = [record.run for record in wandb_records(files[0]) if record.WhichOneof("record_type") == "run"]
    sent = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert (runs[0].project, runs[0].display_name) == ("katana", "test")
    assert sent["learner"]["learning_rate"] == config.learner.learning_rate
    axes = [r.metric for r in wandb_records(files[0]) if r.WhichOneof("record_type") == "metric"]
    assert ("*", "step") in {(axis.glob_name, axis.step_metric) for axis in axes}


# --- beside the run ----------------------------------------------------------------------------------------------


def wait_until(true: Callable[[], bool], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_POLL_S", 0.02)
    monkeypatch.setattr(tracking, "_RETRY_S", 0.05)


@pytest.mark.usefixtures("quick")
def test_the_thread_follows_and_shows_everything_at_the_end(tmp_path: Path) -> None:
    installed("tensorboard")
    config = make_config(tmp_path)
    run, reader = config.run_dir, make_reader(config.run_dir / "tensorboard")
    append(run / "metrics.jsonl", step_line(1))
    with Tracking(config, "test-1", ["tensorboard"]):
        wait_until(lambda: len(list(run.glob("tensorboard/*.katana"))) == 1)
        wait_until(lambda: "train/loss" in reader.Reload().Tags()["scalars"])
        append(run / "metrics.jsonl", step_line(2))
        append(run / "rollouts.jsonl", rollout_line("treated", 40, 2))
    assert scalars(reader, "train/kl") == [(1, 0.5), (2, 0.5)]
    assert scalars(reader, "rollout/completion_length") == [(2, 40.0)]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("track-")]


@pytest.mark.usefixtures("quick")
def test_a_folder_without_write_permission_does_no_harm_and_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    installed("tensorboard")
    config = make_config(tmp_path)
    run = config.run_dir
    append(run / "metrics.jsonl", step_line(1))
    (run / "tensorboard").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, "katana.tracking"), Tracking(config, "test-1", ["tensorboard"]):
        wait_until(lambda: "the run continues" in caplog.text)
        (run / "tensorboard").unlink()
        wait_until(lambda: len(list(run.glob("tensorboard/*.katana"))) == 1)
    assert scalars(make_reader(run / "tensorboard"), "train/kl") == [(1, 0.5)]


@pytest.mark.usefixtures("quick")
def test_after_a_failure_while_writing_it_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a full disk: every second flush fails, three times."""
    installed("tensorboard")
    config = make_config(tmp_path)
    run, failures = config.run_dir, [False, True, False, True, False, True]
    flush = TensorBoard.flush

    def failing(self: TensorBoard) -> None:
        if failures and failures.pop(0):
            raise OSError(28, "No space left on device")
        flush(self)

    monkeypatch.setattr(TensorBoard, "flush", failing)
    with Tracking(config, "test-1", ["tensorboard"]):
        for step in range(1, 200):
            append(run / "metrics.jsonl", step_line(step))
            time.sleep(0.02)
            if not failures:
                break
    assert not failures
    assert [found for found, _ in scalars(make_reader(run / "tensorboard"), "train/kl")] == [*range(1, step + 1)]


@pytest.mark.usefixtures("quick")
def test_of_two_feeders_one_tracks(tmp_path: Path) -> None:
    installed("tensorboard")
    config = make_config(tmp_path)
    board = config.run_dir / "tensorboard"
    board.mkdir(parents=True)
    held = lock(board)
    append(config.run_dir / "metrics.jsonl", step_line(1))
    with Tracking(config, "test-1", ["tensorboard"]):
        time.sleep(0.2)
        assert not list(board.glob("*.katana"))
        held.close()
        wait_until(lambda: len(list(board.glob("*.katana"))) == 1)
    held = lock(board)
    with Tracking(config, "test-1", ["tensorboard"]):
        pass  # ends although it never had the folder
    held.close()


def test_a_tracker_that_hangs_does_not_keep_the_feeder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed("tensorboard")
    released = threading.Event()
    monkeypatch.setattr(tracking, "_FINISH_S", 0.2)
    monkeypatch.setattr(TensorBoard, "begin", lambda self: released.wait(30.0))
    monkeypatch.setattr(TensorBoard, "flush", lambda self: None)
    began = time.monotonic()
    with Tracking(make_config(tmp_path), "test-1", ["tensorboard"]) as hanging:
        pass
    assert time.monotonic() - began < 5
    released.set()
    wait_until(lambda: not any(thread.is_alive() for thread in hanging._threads))


def test_waiting_for_the_last_evaluation(tmp_path: Path) -> None:
    installed("tensorboard")
    config = make_config(tmp_path)
    note = config.run_dir / "eval" / "v00000003.json"
    note.parent.mkdir(parents=True)
    note.write_text("{}")
    stop = threading.Event()
    with Tracking(config, "test-1", []) as nobody:
        nobody.wait_for_evaluations(stop)
    with Tracking(config, "test-1", ["tensorboard"]) as one:
        began = time.monotonic()
        one.wait_for_evaluations(stop, within_s=0.2)
        assert 0.2 < time.monotonic() - began < 5
        threading.Timer(0.4, note.unlink).start()
        one.wait_for_evaluations(stop)
        assert not note.exists()


def test_a_missing_package_is_reported_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(tracking, "version", absent)
    assert missing([]) == []
    assert missing(["wandb"]) == [
        "tracking: wandb is not installed: pip install 'katana-distill[wandb]', or remove it from the list"
    ]
    with pytest.raises(ConfigError, match=r"pip install 'katana-distill\[tensorboard\]'"):
        Tracking(make_config(tmp_path), "test-1", ["tensorboard"])
    assert not (tmp_path / "test").exists()


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="allowed: tensorboard, wandb"):
        tracking.make_tracker("mlflow", make_config(tmp_path), "test-1")
