"""One role in this process, on a real Redis."""

from __future__ import annotations

import fcntl
import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from run_folders import evaluation, fill, write_lines
from samples import Run

from common.config import Config, load
from common.files import write_text
from common.pretrained import PACKAGE_ROOT
from common.rids import rid_of
from common.runfiles.lines import read_lines
from ops.reach.embedded import EmbeddedRedis
from ops.run import roles
from ops.run.roles import RUN_KEY, run_role

MODELS = {name: {"model": str(PACKAGE_ROOT / "ops" / "models" / name)} for name in ("student", "teacher")}


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A role sets its own handlers: restore them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_feeder_that_died_while_it_closed_the_run_continues_after_a_restart(
    embedded_redis: EmbeddedRedis, start: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(
        embedded_redis,
        redis={"url": embedded_redis.url, "broker_url": embedded_redis.broker_url},
        name="closed",
        **MODELS,
    )
    for number in range(3):
        run.admit(rid_of(number))
    run.lease("feeder").advance("state", "ended")
    run.lease("feeder").drop()  # killed here: none of these three is booked
    run.config.run_dir.mkdir()
    write_text(run.config.run_dir / "config.yaml", run.config.to_yaml())
    monkeypatch.setenv(RUN_KEY, run.plane.run_key)
    assert run_role("feeder", run.config) == 0
    lines = list(read_lines(run.config.run_dir / "rollouts.jsonl"))
    assert [(line["rid"], line["reason"]) for line in lines] == [(rid_of(number), "run_end") for number in range(3)]
    assert run.ledger() == {"admitted": 3, "dropped:run_end": 3}
    assert run.entries("prompts") == []


# --- at the end of a run ---


@pytest.fixture
def over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The config of a run that has ended on a cluster, with its folder; the last version is already evaluated."""
    monkeypatch.delenv(RUN_KEY, raising=False)
    monkeypatch.setattr("ops.run.evaluator.follow", lambda *_: None)
    (tmp_path / "small").mkdir()
    config = load(fill(tmp_path / "small") / "config.yaml")
    return config.model_copy(update={"runs_dir": str(tmp_path)})


def test_on_a_cluster_the_evaluator_writes_the_report_with_its_last_result(over: Config) -> None:
    folder = over.run_dir
    write_lines(folder / "eval.jsonl", [evaluation(0, 0.25), evaluation(2, 0.75)])
    roles._evaluator(over, None, threading.Event())  # type: ignore[arg-type]
    summary = json.loads((folder / "summary.json").read_text())
    assert [line["avg@k"] for line in summary["eval"]] == [0.25, 0.75]
    page = (folder / "report.html").read_text()
    assert "0.250" in page and "0.750" in page


def test_under_katana_run_the_evaluator_writes_no_report(over: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUN_KEY, "small-1")
    roles._evaluator(over, None, threading.Event())  # type: ignore[arg-type]
    assert (over.run_dir / "summary.json").is_file()
    assert not (over.run_dir / "report.html").exists()


@pytest.mark.parametrize(("name", "text"), [("metrics.jsonl", '{"step": 1}\n'), ("eval.jsonl", "{oops\n")])
def test_a_damaged_folder_is_logged_and_fails_no_role(
    over: Config, caplog: pytest.LogCaptureFixture, name: str, text: str
) -> None:
    (over.run_dir / name).write_text(text)
    roles._sum_up(over.run_dir)
    assert "cannot write summary or report of" in caplog.text
    assert not (over.run_dir / "report.html").exists()


def test_a_role_waits_while_another_writes_the_summary(over: Config) -> None:
    """Feeder and evaluator may write at the same time; the one that read first must not write last."""
    with (over.run_dir / ".report.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = threading.Thread(target=roles._sum_up, args=(over.run_dir,))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        assert not (over.run_dir / "summary.json").exists()
    waiting.join(60)
    assert (over.run_dir / "report.html").is_file()


def test_a_role_waits_while_redis_has_lost_the_run_and_joins_when_its_feeder_has_reopened_it(
    embedded_redis: EmbeddedRedis, start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(
        embedded_redis,
        redis={"url": embedded_redis.url, "broker_url": embedded_redis.broker_url},
        name="reopened",
        **MODELS,
    )
    monkeypatch.setenv(RUN_KEY, run.plane.run_key)
    config = run.client.get(run.key("config"))
    run.client.delete(run.key("config"), run.key("run"))
    looks: list[int] = []
    get = redis.Redis.get

    def looking(client: redis.Redis, name: str) -> object:
        if name == run.key("config"):
            looks.append(1)
            if len(looks) == 3:  # its feeder has started
                run.client.set(run.key("config"), config)
                run.client.set(run.key("run"), "ended")
        return get(client, name)

    monkeypatch.setattr(redis.Redis, "get", looking)
    assert run_role("arbiter", run.config) == 0
    assert len(looks) == 3


def test_a_role_gives_up_when_no_feeder_reopens_the_run(
    embedded_redis: EmbeddedRedis,
    start: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = start(
        embedded_redis,
        redis={"url": embedded_redis.url, "broker_url": embedded_redis.broker_url},
        liveness={"redis_wait_s": 0.3},
        name="forgotten",
        **MODELS,
    )
    monkeypatch.setenv(RUN_KEY, run.plane.run_key)
    run.client.delete(run.key("config"), run.key("run"))
    assert run_role("arbiter", run.config) == 1
    assert "its feeder opens it again" in caplog.text
