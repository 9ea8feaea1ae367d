"""The fault harness without its processes: schedules, tables, what it refuses."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from samples import Run, make_config, make_divergence

from actors.books import rid_of
from common.config import ConfigError, load
from common.messages import ChunkTokens, MessageError, ScoreDivergence
from common.weights import BadWeights, WeightsRef, publish, verified
from ops.chaos import faults, harness
from ops.chaos.cluster import Cluster, RunEnded, Stage
from ops.chaos.faults import KINDS, Kind, Scene
from ops.chaos.harness import chaos
from ops.chaos.records import Violation
from ops.chaos.recovery import moved
from ops.chaos.schedule import Fault, Result, schedule
from ops.chaos.table import describe, percentile
from ops.cli import main
from ops.embedded import EmbeddedRedis

ALL = ("chunks", "scores", "verdicts", "trained", "admitted")
CHAOS = Path(__file__).parents[2] / "ops" / "experiments" / "chaos.yaml"


def test_a_schedule_is_a_function_of_its_seed() -> None:
    kinds = list(KINDS)
    assert schedule(3, 100, kinds) == schedule(3, 100, kinds)
    assert schedule(3, 100, kinds) != schedule(4, 100, kinds)


def test_every_kind_is_drawn_as_often_as_any_other_and_a_quarter_alone_in_front() -> None:
    drawn = schedule(0, 10 * len(KINDS) + 5, list(KINDS))
    counts = Counter(fault.kind for fault in drawn)
    assert set(counts) == set(KINDS)
    assert sorted(set(counts.values())) == [10, 11]
    assert Counter(fault.kind for fault in drawn if fault.alone) == dict.fromkeys(KINDS, 2)
    places = [fault.alone for fault in drawn]
    assert places == sorted(places, reverse=True)


def test_few_faults_of_all_kinds_all_overlap() -> None:
    assert not any(fault.alone for fault in schedule(0, len(KINDS), list(KINDS)))


def test_the_kinds_that_the_design_names_are_there() -> None:
    roles = ("rollout", "teacher", "arbiter", "learner", "feeder")
    wanted = {f"{what}-{role}" for what in ("kill", "term", "pause") for role in roles}
    wanted |= {f"redis-{what}" for what in ("kill", "lose", "pause", "full")}
    wanted |= {f"net-{what}" for what in ("delay", "duplicate", "swap", "cut")}
    wanted |= {f"malformed-{stream}" for stream in ("prompts", "chunks", "scores", "trajectories", "finished")}
    wanted |= {"poison-rollout", "slow-teacher", "torn-checkpoint", "torn-weights", "clock-shift"}
    assert set(KINDS) == wanted


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--kinds", "kill-rolout"), "unknown kind 'kill-rolout'; known: kill-rollout"),
        (("--set", "redis.url=redis://localhost:1/0"), "leave it unset"),
        (("--set", "checkpoints.keep=2"), "checkpoints.keep"),
    ],
)
def test_what_it_cannot_work_with_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
) -> None:
    assert main(["chaos", str(CHAOS), "--set", f"runs_dir={tmp_path}", *flags]) == 2
    assert said in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_model_that_cannot_be_used_is_refused_before_anything_starts(tmp_path: Path) -> None:
    student = tmp_path / "student"
    student.mkdir()
    (student / "config.json").write_text("{}")
    config = load(CHAOS, [f"runs_dir={tmp_path}", f"student.model={student}"])
    with pytest.raises(ConfigError, match="no vocab_size"):
        chaos(config, seed=0, faults=1, kinds=["kill-feeder"])
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


@pytest.mark.parametrize(
    "command",
    [("soak", "--minutes", "-3"), ("soak", "--minutes", "inf"), ("chaos", "--calm", "0"), ("chaos", "--faults", "0")],
)
def test_no_time_and_no_faults_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    name, *flags = command
    with pytest.raises(SystemExit) as ended:
        main([name, str(CHAOS), "--set", f"runs_dir={tmp_path}", *flags])
    assert ended.value.code == 2
    assert "expected" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_percentiles_are_of_nearest_rank() -> None:
    assert percentile([3.0], 0.95) == 3.0
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.0
    assert percentile([float(value) for value in range(1, 21)], 0.95) == 19.0


def test_a_table_counts_what_was_injected_and_survived_and_says_the_seed() -> None:
    faults_ = [
        Fault("kill-feeder", True, 1, injected=True, survived=True, recovery_s=2.0),
        Fault("kill-feeder", True, 2, injected=True, survived=True, recovery_s=4.0),
        Fault("redis-kill", False, 3, injected=True, survived=False),
        Fault("redis-kill", False, 4, note="missed"),
    ]
    result = Result(7, faults_, [Violation("every fault is recovered from", "", "redis-kill")], wall_s=120.0)
    text = describe([result])
    assert "| kill-feeder | 2 | 2 | 2 | 2.0 | 4.0 |" in text
    assert "| redis-kill | 1 | 0 | 0 |  |  |" in text
    assert "3 faults of 2 kinds, seeds 7, 2 minutes: 1 violations." in text


def test_a_stage_has_moved_when_all_that_matters_has_grown() -> None:
    before = Stage(b"1-0", b"1-0", b"1-0", 1.0, 5)
    now = Stage(b"2-0", b"1-0", b"1-0", 1.0, 6)
    assert moved(before, now, ("chunks", "admitted"))
    assert not moved(before, now, ("chunks", "scores"))
    assert moved(Stage(b"9-9", b"0-0", b"9-2", 0.0, 0), Stage(b"10-0", b"1-0", b"9-10", 1.0, 1), ALL)


@pytest.mark.parametrize("name", ["chunks", "scores", "verdicts", "trained", "admitted"])
def test_what_a_loss_or_a_truncated_record_takes_back_is_no_progress(name: str) -> None:
    full, empty = Stage(b"2-0", b"2-0", b"2-0", 2.0, 6), Stage(b"0-0", b"0-0", b"0-0", 0.0, 0)
    assert not moved(full, empty, (name,))
    assert moved(empty, full, (name,))


def test_a_loss_of_redis_puts_at_stake_what_is_open_and_what_comes_next(
    embedded_redis: EmbeddedRedis, start: Callable[..., Run]
) -> None:
    run = start(embedded_redis)
    run.admit("r000000001")
    cluster = SimpleNamespace(config=run.config, plane=run.plane, key=run.key, open_rollouts=lambda: {"r000000001"})
    run.client.delete(run.key("cursor"))
    assert faults._at_stake(cast(Any, cluster)) == {"r000000001"}
    run.client.set(run.key("cursor"), 7)
    count = 2 * (run.config.learner.max_staleness + 1) * run.config.learner.batch_size
    assert faults._at_stake(cast(Any, cluster)) == {"r000000001", *map(rid_of, range(7, 7 + count))}


def test_once_it_is_being_ended_no_fault_goes_on_and_redis_stays_away(tmp_path: Path) -> None:
    cluster = Cluster(load(CHAOS, [f"runs_dir={tmp_path}"]))
    cluster.__exit__()
    for act in (cluster.restart_redis, cluster.check_alive, lambda: cluster.spend_restart("feeder")):
        with pytest.raises(RunEnded, match="being ended"):
            act()
    assert not cluster.redis.running()


def test_a_fault_that_fails_in_a_way_of_its_own_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise ValueError("not like this")

    monkeypatch.setattr(harness, "_GAP_S", 0.001)
    monkeypatch.setitem(KINDS, "redis-full", Kind("redis-full", fail))
    result = Result(0, [Fault("redis-full", False, 1)])
    harness._inject_all(cast(Any, SimpleNamespace()), Scene(), result, 0.0)
    assert result.violations == [Violation("the harness works", "", "redis-full: ValueError: not like this")]
    assert not result.faults[0].injected


def test_what_was_begun_is_ended_when_a_start_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(load(CHAOS, [f"runs_dir={tmp_path}"]))

    def fail(*_: str) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(cluster, "launch", fail)
    with pytest.raises(OSError, match="no more"), cluster:
        pass
    assert not cluster.redis.running()
    assert not cluster._sockets.exists()


def test_what_is_broken_on_purpose_is_refused_by_the_decoders(
    embedded_redis: EmbeddedRedis, start: Callable[..., Run]
) -> None:
    run = start(embedded_redis)
    run.admit("r1")
    run.take()
    run.chunk("r1")
    run.score("r1")
    record = run.plane.rollout("r1")
    seen = set()
    for seed in range(60):
        name, value, how = faults._broken(random.Random(seed), record)
        seen.add(how)
        if name.startswith("d:"):
            with pytest.raises(MessageError):
                ScoreDivergence.decode(value)
        elif how == "tokens cut off in the middle":
            with pytest.raises(MessageError):
                ChunkTokens.decode(value)
        elif name.startswith("t:"):
            assert (ChunkTokens.decode(value).tokens == 1 << 30).all()
    assert len(seen) == 6
    with pytest.raises(MessageError):
        ScoreDivergence.decode(faults._not_a_number(0))
    assert make_divergence().encode() != faults._not_a_number(0)


def test_torn_weights_are_not_what_was_announced(tmp_path: Path) -> None:
    ref = publish(tmp_path, 1, lambda path: path.write_bytes(b"x" * 1000) and None)
    for seed in range(8):
        (tmp_path / ref.file).write_bytes(b"x" * 1000)
        assert verified(tmp_path, ref)
        faults._tear(tmp_path / ref.file, random.Random(seed))
        with pytest.raises(BadWeights):
            verified(tmp_path, WeightsRef(1, ref.file, ref.sha256))


def test_the_config_of_the_harness_is_valid_and_keeps_the_default_liveness() -> None:
    assert load(CHAOS).liveness == make_config(Path("x"), liveness={}).liveness.__class__()
    with pytest.raises(ConfigError):
        load(CHAOS, ["liveness.claim_s=1"])
