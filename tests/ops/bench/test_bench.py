"""What the benches say, on something small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from samples import make_config

from actors.engine import ScoreRequest
from common.pretrained import PACKAGE_ROOT
from common.rids import rid_of
from ops.bench import speed as bench
from ops.bench.arbiter import arbiter
from ops.bench.bus import bus
from ops.bench.learner import learner, trajectory_of
from ops.bench.recorded import record
from ops.bench.replayed import ReplayedDecoder, ReplayedScorer
from ops.bench.score import score
from ops.cli.main import main


def test_a_head_is_measured_both_ways_by_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_HEAD", (16, 40))
    found = bench.head(make_config(tmp_path), 2)
    assert (found["hidden_size"], found["vocab_size"]) == (16, 40)
    assert list(found["rows"]) == [1, 8, 32, 256]
    for row in found["rows"].values():
        assert all(0 < one["min"] <= one["median"] <= one["max"] for one in row.values())
        assert row.keys() == {"bfloat16", "float32", "ratio"}


def test_a_teacher_is_measured_by_rollouts_in_flight(tmp_path: Path) -> None:
    models = {"student": {"model": "ops/models/student"}, "teacher": {"model": "ops/models/teacher", "slots": 4}}
    config = make_config(tmp_path, **models, rollout={"max_completion_length": 24, "chunk_tokens": 4})
    found = score(config, 1)
    assert list(found["rollouts_in_flight"]) == [4, 5, 8]
    again = {
        (count, name): row["forwarded_again_per_token"]["median"]
        for count, rows in found["rollouts_in_flight"].items()
        for name, row in rows.items()
    }
    assert again[4, "fixed"] == again[4, "growing"] == 0.0
    assert again[8, "growing"] < again[8, "fixed"] and again[8, "fixed"] > 1.0


def test_the_arbiter_is_measured_on_recorded_rollouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ops.bench.arbiter._RECORDED", 3)
    monkeypatch.setattr("ops.bench.arbiter._IN_FLIGHT", 5)
    models = {"student": {"model": "ops/models/student"}, "teacher": {"model": "ops/models/teacher"}}
    rollout = {"max_completion_length": 24, "chunk_tokens": 4, "slots": 2}
    found = arbiter(make_config(tmp_path, **models, rollout=rollout, termination={"policy": "kat"}), 1)
    assert (found["policy_name"], found["rollouts_in_flight"], found["chunk_tokens"]) == ("kat", 5, 4)
    assert found["threshold"] > 0
    for figure in (*found["step"].values(), *found["policy"].values()):
        assert 0 < figure["min"] <= figure["median"] <= figure["max"]
    assert set(found["figures"]) <= {f"{part}.{name}" for part in ("step", "policy") for name in found[part]}


SHIPPED = {"student": {"model": "ops/models/student"}, "teacher": {"model": "ops/models/teacher"}}
SHORT = {"max_completion_length": 24, "chunk_tokens": 4, "slots": 2}


def test_replayed_engines_give_what_was_recorded(tmp_path: Path) -> None:
    recorded = record(make_config(tmp_path, **SHIPPED, rollout=SHORT), 3)
    assert all(rollout.chunks[-1].chunk.finish for rollout in recorded)
    decoder, scorer = ReplayedDecoder(recorded, 4, None), ReplayedScorer(recorded, 4)
    for number in (0, 4):  # of the recorded ones, the first and the second
        decoder.add(rid_of(number), recorded[0].prompt, seed=0, max_new_tokens=24, generated=np.zeros(0, np.int32))
    first = [decoder.step(), decoder.step()]
    assert [chunk.key for chunk in first[0]] == [rid_of(0), rid_of(4)]
    of_second = [chunk for closed in first for chunk in closed if chunk.key == rid_of(4)]
    assert [chunk.start for chunk in of_second] == [one.chunk.start for one in recorded[1].chunks[:2]]
    for chunk, one in zip(of_second, recorded[1].chunks, strict=False):
        assert np.array_equal(chunk.tokens, one.chunk.tokens)
        request = ScoreRequest(chunk.key, recorded[1].prompt, chunk.start, chunk.tokens, chunk.support_ids)
        assert scorer.score([request]) == [one.scored]
        assert scorer.cached(chunk.key) == chunk.start + len(chunk.tokens)
    decoder.hold(rid_of(0))
    assert {chunk.key for chunk in decoder.step()} <= {rid_of(4)}
    with pytest.raises(KeyError):
        scorer.score([ScoreRequest(rid_of(4), recorded[1].prompt, 0, np.ones(9, np.int32), np.ones((9, 1), np.int32))])


def test_a_rate_is_offered_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = record(make_config(tmp_path, **SHIPPED, rollout=SHORT), 2)
    now = [100.0]
    monkeypatch.setattr("ops.bench.replayed.time.monotonic", lambda: now[0])
    decoder = ReplayedDecoder(recorded, 4, 10.0)
    for number in range(4):
        decoder.add(rid_of(number), recorded[0].prompt, seed=0, max_new_tokens=24, generated=np.zeros(0, np.int32))
    assert decoder.step() == []
    now[0] += 0.25
    assert [chunk.key for chunk in decoder.step()] == [rid_of(0), rid_of(1)]
    now[0] += 0.25
    assert [chunk.key for chunk in decoder.step()] == [rid_of(2), rid_of(3), rid_of(0)]  # the longest waiting first


@pytest.mark.slow
def test_the_bus_is_measured_through_real_roles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_RECORDED": 3, "_WARM_UP_S": 0.5, "_MEASURE_S": 2.0}.items():
        monkeypatch.setattr(f"ops.bench.bus.{name}", value)
    config = make_config(tmp_path, **SHIPPED, rollout=SHORT, learner={"batch_size": 2})
    found = bus(config, 2, rate=20.0)
    assert (found["rate"], found["slots"], found["workers"]) == (20.0, 2, {"rollout": 1, "teacher": 1})
    assert found["chunks_per_s"]["min"] > 0
    assert 0 < found["mean_chunk_tokens"] <= 4
    for name in ("scored", "seen", "verdict"):
        assert 0 < found[f"{name}_ms_p50"]["min"] <= found[f"{name}_ms_p99"]["max"]
    for name in (
        "cpu_us_rollout",
        "cpu_us_teacher",
        "cpu_us_arbiter",
        "cpu_us_redis",
        "redis_bytes_in",
        "redis_bytes_out",
    ):
        assert found[name]["max"] > 0
    explained = {name.partition("_ms")[0] for name in found["figures"]}
    assert explained == {"chunks_per_s", "scored", "seen", "verdict", "cpu_us", "redis_bytes"}


def test_a_learner_is_measured_on_recorded_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ops.bench.learner._STEPS", 2)
    config = make_config(tmp_path, **SHIPPED, rollout=SHORT, learner={"batch_size": 2})
    found = learner(config, 2)
    assert (found["batch_size"], found["tokens_a_step"] > 0, found["peak_memory_mb"] > 0) == (2, True, True)
    for name in ("tokens_per_s", "gradients_per_s"):
        assert 0 < found[name]["min"] <= found[name]["median"] <= found[name]["max"]
    assert set(found["figures"]) <= set(found)


def test_a_recorded_rollout_is_a_whole_trajectory(tmp_path: Path) -> None:
    config = make_config(tmp_path, **SHIPPED, rollout=SHORT)
    [rollout] = record(config, 1)
    found = trajectory_of(rollout, 0, config)
    assert found.tokens.tolist() == [token for one in rollout.chunks for token in one.chunk.tokens.tolist()]
    assert len(found.tokens) == rollout.tokens == found.generated
    assert (found.finish_reason, found.prompt is rollout.prompt) == (rollout.chunks[-1].chunk.finish, True)


# Measurements, each in a process of its own: the first one is started as ever, the others are forked, since starting
# one means importing torch.
PIECES = """
import json, os, sys, tempfile
from dataclasses import asdict
from ops.bench import pieces
from pathlib import Path
from common.config import load
started = pieces._in_a_process
def forked(what, shape, repeats):
    with tempfile.TemporaryFile() as file:
        if not (child := os.fork()):
            os.dup2(file.fileno(), 1)
            pieces._main(what, json.dumps(asdict(shape)), str(repeats))
            sys.stdout.flush()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        file.seek(0)
        return json.loads(file.read())
def first(*asked):
    pieces._in_a_process = forked
    return started(*asked)
pieces._in_a_process = first
sizes = {"vocab_size": 4000, "hidden_size": 16, "tokens": 4096, "compared_tokens": 2048}
print(json.dumps(pieces.pieces(load(Path(sys.argv[1])), 1, **sizes)))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_logits_in_pieces_are_measured_beside_whole_ones(tmp_path: Path) -> None:
    source = tmp_path / "config.yaml"
    source.write_text(make_config(tmp_path).to_yaml())
    command = [sys.executable, "-c", PIECES, str(source)]
    done = subprocess.run(command, cwd=PACKAGE_ROOT, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for dtype in ("float32", "bfloat16"):
        ours, beside, scores = (found[dtype][name] for name in ("in_pieces", "beside_whole_logits", "scores"))
        assert 0.0 < ours["memory_share"] < 1.0 < beside["whole"]["memory_share"]
        assert ours["logits_mb"] == scores["logits_mb"] == 4 * 4096 * 4000 / (1 << 20)
        assert scores["memory_share"] < 1.0
        assert beside["ratio"]["median"] == beside["in_pieces_s"]["median"] / beside["whole_s"]["median"]


def test_the_shape_of_pieces_is_for_pieces_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "engine", "--tokens", "5"]) == 2
    assert "--tokens, --compared-tokens are for bench pieces alone" in capsys.readouterr().err
