"""`katana top` and `katana watch` on a real run: in its middle by its own Redis and ports, at its end by its folder."""

from __future__ import annotations

import base64
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_run import SMALL, finish, read, start, wait_for_steps

from common.config import Config, ConfigError, load
from common.metrics import TARGETS
from ops.live.top import top
from ops.live.watch import watch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
Out = pytest.CaptureFixture[str]
ROLES = {"feeder", "arbiter", "learner", "rollout", "teacher", "evaluator"}


def look(config: Config, source: Path, capsys: Out) -> dict[str, Any]:
    assert top(config, source, interval_s=1.0, once=True, as_json=True) == 0
    [line] = capsys.readouterr().out.splitlines()
    value: dict[str, Any] = json.loads(line)
    return value


def watched(config: Config, source: Path, rid: str, capsys: Out, *, follow: bool = False) -> dict[str, Any]:
    assert watch(config, source, rid, as_json=True, follow=follow) == 0
    value: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return value


def check_at_work(seen: dict[str, Any]) -> None:
    """Everyone is seen, by lease, port or heartbeat; what flows has a speed."""
    assert (seen["redis"], seen["metrics"], seen["state"]) == ("", "", "open")
    alive = {role["name"] for role in seen["roles"] if role["alive"]}
    assert alive == ROLES, seen["roles"]
    for role in seen["roles"]:
        assert role["ports"] == 1, role
        assert role["turned_s"] < 60, role
    assert {worker["role"] for worker in seen["workers"]} == {"rollout", "teacher"}
    assert seen["tokens_per_s"]["written"] > 0
    assert seen["tokens_per_s"]["scored"] > 0
    assert seen["tokens_per_s"]["trained"] > 0
    assert seen["step"] >= 3
    assert seen["lag_versions"] >= 0
    assert 0 < seen["redis_used_bytes"] < seen["redis_max_bytes"]
    assert seen["ledger"]["admitted"] > 0
    assert seen["dead_letters"] == 0
    assert len(seen["verdicts"]) == 8
    assert all(verdict["text"] or verdict["behind"] for verdict in seen["verdicts"])


def test_a_real_run_is_seen_while_it_goes_on_and_when_it_is_over(tmp_path: Path, capsys: Out) -> None:
    process = start(tmp_path, settings=(*SMALL, "learner.max_steps=12", "feeder.record_audit=true"))
    folder = tmp_path / "e2e"
    source = folder / "config.yaml"
    try:
        wait_for_steps(folder, 3, process, timeout_s=240)
        config = load(source)
        seen = look(config, source, capsys)
        check_at_work(seen)
        # A verdict that top shows is the one that watch shows.
        verdict = seen["verdicts"][0]
        rollout = watched(config, source, verdict["rid"], capsys)
        assert (rollout["keep"], rollout["finish_reason"]) == (verdict["kept"], verdict["reason"])
        assert "".join(token["text"] for token in rollout["tokens"] if token["kept"]).endswith(verdict["text"])
        # One that is admitted now is followed to its verdict.
        newest = str(look(config, source, capsys)["ledger"]["admitted"] - 1)
        followed = watched(config, source, newest, capsys, follow=True)
        assert followed["finish_reason"] != "open"
        assert followed["chunks"]
    finally:
        if process.poll() is None and not (folder / "metrics.jsonl").exists():
            process.send_signal(signal.SIGTERM)
        code, output = finish(process)
    assert code == 0, output
    check_over(config, source, capsys)


def check_over(config: Config, source: Path, capsys: Out) -> None:
    """What the folder tells is told: the saving of the summary, and every rollout as it was booked."""
    folder = config.run_dir
    seen = look(config, source, capsys)
    assert "is stopped" in seen["redis"]
    assert not any(role["alive"] for role in seen["roles"])
    summary = json.loads((folder / "summary.json").read_text())
    assert seen["saving"]["ratio"] == summary["length_saving"]["ratio"]
    assert seen["step"] == summary["steps"]
    assert not list((folder.parent / TARGETS).glob("*.json"))
    for trace in read(folder / "traces.jsonl")[::20]:
        rollout = watched(config, source, trace["rid"], capsys)
        divergence = np.frombuffer(base64.b64decode(trace["divergence"]), "<f4").tolist()
        assert [token["divergence"] for token in rollout["tokens"]] == divergence
        assert (rollout["keep"], rollout["trigger"]) == (trace["keep"], trace["trigger"])
        assert rollout["prompt"].endswith("?")
        assert rollout["chunks"]
    with pytest.raises(ConfigError, match=r"no rollout r000999999 .* booked are, lowest to highest, r0"):
        watch(config, source, "999999", as_json=False, follow=False)
