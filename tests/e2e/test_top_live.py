"""`katana top` and `katana watch` on a real run: in its middle by its own Redis and ports, at its end by its folder."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
from real_runs import read
from whole_run import WholeRun, snapshot, watched

from common.config import ConfigError
from common.metrics import TARGETS
from ops.live.watch import watch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
ROLES = {"feeder", "arbiter", "learner", "rollout", "teacher", "evaluator"}


def test_a_real_run_is_seen_while_it_goes_on(whole_run: WholeRun) -> None:
    """Everyone is seen, by lease, port or heartbeat; what flows has a speed."""
    seen = whole_run.middle
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
    # A verdict that top shows is the one that watch shows.
    verdict, rollout = seen["verdicts"][0], whole_run.verdict
    assert (rollout["keep"], rollout["finish_reason"]) == (verdict["kept"], verdict["reason"])
    assert "".join(token["text"] for token in rollout["tokens"] if token["kept"]).endswith(verdict["text"])
    assert whole_run.followed["finish_reason"] != "open"
    assert whole_run.followed["chunks"]


def test_of_a_run_that_is_over_is_told_what_its_folder_tells(whole_run: WholeRun) -> None:
    """The saving of the summary, and every rollout as it was booked."""
    folder, source, config = whole_run.folder, whole_run.source, whole_run.config
    seen = snapshot(config, source)
    assert "is stopped" in seen["redis"]
    assert not any(role["alive"] for role in seen["roles"])
    summary = json.loads((folder / "summary.json").read_text())
    assert seen["saving"]["ratio"] == summary["length_saving"]["ratio"]
    assert seen["step"] == summary["steps"]
    assert not list((folder.parent / TARGETS).glob("*.json"))
    for trace in read(folder / "traces.jsonl")[::20]:
        rollout = watched(config, source, trace["rid"])
        divergence = np.frombuffer(base64.b64decode(trace["divergence"]), "<f4").tolist()
        assert [token["divergence"] for token in rollout["tokens"]] == divergence
        assert (rollout["keep"], rollout["trigger"]) == (trace["keep"], trace["trigger"])
        assert rollout["prompt"].endswith("?")
        assert rollout["chunks"]
    with pytest.raises(ConfigError, match=r"no rollout r000999999 .* booked are, lowest to highest, r0"):
        watch(config, source, "999999", as_json=False, follow=False)
