"""The fault harness without its processes: schedules, tables, what it refuses."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from samples import Run, make_config, make_divergence

from common.config import ConfigError, load
from common.rids import rid_of
from common.wire.messages import ChunkTokens, MessageError, ScoreDivergence, ScoreView
from common.wire.weights import BadWeights, WeightsRef, publish, verified
from ops.chaos import faults, harness
from ops.chaos.cluster import Cluster, Missed, RunEnded, Stage
from ops.chaos.faults import KINDS, Kind, Scene, kinds_for
from ops.chaos.harness import chaos
from ops.chaos.records import Violation
from ops.chaos.recovery import moved
from ops.chaos.schedule import ChaosResult, Fault, schedule
from ops.chaos.table import describe, percentile
from ops.cli.main import main
from ops.reach.embedded import EmbeddedRedis
from ops.reach.left_over import left_by_harness

HOLDER = """
import sys, threading, time
from pathlib import Path
from common.config import load
from ops.chaos.cluster import Cluster
cluster = Cluster(load(Path(sys.argv[1]), [f"runs_dir={sys.argv[2]}"]))
asking = threading.Thread(target=cluster.restart_redis)
asking.start()
cluster.serve(lambda: not asking.is_alive())
print(cluster.redis.pid, flush=True)
time.sleep(60)
"""
ALL = ("chunks", "scores", "verdicts", "trained", "admitted")
CHAOS = Path(__file__).parents[3] / "ops" / "experiments" / "chaos.yaml"


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
    wanted |= {f"redis-{what}" for what in ("kill", "lose", "pause", "full", "small")}
    wanted |= {f"net-{what}" for what in ("delay", "duplicate", "swap", "cut")}
    wanted |= {f"malformed-{stream}" for stream in ("prompts", "chunks", "scores", "trajectories", "finished")}
    wanted |= {f"poison-{what}" for what in ("rollout", "write", "score", "step")}
    wanted |= {"slow-teacher", "torn-checkpoint", "torn-weights", "clock-shift", "nursery-kill", "kill-rank"}
    wanted |= {"kill-rewarded"}
    several = {"data-server-kill", "data-server-lose"}
    servers = {"kill-vllm", "pause-vllm", "stale-vllm"}
    wanted |= several | {"teacher-away"} | servers
    assert set(KINDS) == wanted
    ranks, rewards = "learner.nproc_per_node=2", ("reward.mode=grpo", "data.num_generations=4")
    vllm = ("rollout.engine=vllm", 'rollout.vllm.command=[serve, "{port}"]')
    every = fitting(ranks, *rewards, teachers=2)
    assert set(KINDS) - every == several | servers
    assert fitting(ranks, *rewards, *vllm, teachers=2) - every == servers
    urls = (vllm[0], "rollout.vllm.urls=[http://127.0.0.1:9]")
    assert fitting(ranks, *rewards, *urls, teachers=2) - every == {"stale-vllm"}
    assert every - fitting(*rewards, teachers=2) == {"kill-rank"}
    assert every - fitting(ranks, teachers=2) == {"kill-rewarded"}
    assert every - fitting(ranks, *rewards) == {"teacher-away"}
    assert several | {"kill-arbiter", "redis-kill"} <= set(kinds_for(load(CHAOS, rewards), 3)) < set(KINDS)


def fitting(*sets: str, teachers: int = 1) -> set[str]:
    """The kinds for a run of chaos.yaml with these settings."""
    config = load(CHAOS, sets)
    if teachers > 1:
        several = {f"t{number}": config.only_teacher for number in range(teachers)}
        config = config.model_copy(update={"teacher": None, "teachers": several})
    return set(kinds_for(config))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--kinds", "kill-rolout"), "unknown kind 'kill-rolout'; known: kill-rollout"),
        (("--kinds", "kill-rank"), "kill-rank needs learner.nproc_per_node 2 or more, found 1"),
        (("--kinds", "kill-rewarded"), "kill-rewarded needs reward.mode grpo or reinforce_leave_one_out, found none"),
        (("--kinds", "teacher-away"), "teacher-away needs teachers of two or more, found one teacher"),
        (("--kinds", "stale-vllm"), "stale-vllm needs rollout.engine vllm, found slots"),
        (
            ("--kinds", "kill-vllm", "--set", "rollout.engine=vllm", "--set", "rollout.vllm.urls=[http://127.0.0.1:9]"),
            "kill-vllm needs rollout.vllm.command: a server that the run starts, and starts again; found urls",
        ),
        (("--kinds", "data-server-kill"), "data-server-kill needs --servers 2 or more, found --servers 1"),
        (("--servers", "3", "--kinds", "redis-lose"), "redis-lose needs --servers 1, found --servers 3"),
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
    result = ChaosResult(7, faults_, [Violation("every fault is recovered from", "", "redis-kill")], wall_s=120.0)
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


def test_redis_started_again_for_a_fault_ends_with_a_harness_that_is_killed(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", HOLDER, str(CHAOS), str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert holder.stdout is not None
    with holder.stdout:
        pid = int(holder.stdout.readline())
        assert "redis-server" in Path(f"/proc/{pid}/cmdline").read_text()
        holder.kill()
        holder.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "redis-server outlived the harness"
        time.sleep(0.05)


def test_who_waits_for_redis_is_told_that_nobody_serves_any_more(tmp_path: Path) -> None:
    cluster = Cluster(load(CHAOS, [f"runs_dir={tmp_path}"]))

    def interrupted() -> bool:
        raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(cluster.restart_redis)
        with pytest.raises(KeyboardInterrupt):
            cluster.serve(interrupted)
        with pytest.raises(RunEnded, match="being ended"):
            asked.result(10)
    cluster.__exit__()
    assert not cluster.redis.running()


def test_a_redis_that_does_not_start_is_told_to_the_fault_that_asked(tmp_path: Path) -> None:
    cluster = Cluster(load(CHAOS, [f"runs_dir={tmp_path}"]))
    cluster.redis = EmbeddedRedis(tmp_path / "redis", maxmemory_mb=32, server="/bin/false")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(cluster.restart_redis)
        cluster.serve(asked.done)
        with pytest.raises(RuntimeError, match="ended at once"):
            asked.result()
    cluster.__exit__()


# --- what is left of its runs ---


def leave(tmp_path: Path, mark: str, name: str = "demo") -> tuple[Path, str]:
    """A run's folder as the harness leaves it, its socket gone; the url of its Redis."""
    folder, url = tmp_path / name, f"unix://{tmp_path}/katana-x1/redis.sock?db=0"
    (tmp_path / "katana-x1").mkdir(exist_ok=True)
    config = make_config(tmp_path, name=name, redis={"url": url, "broker_url": url.replace("db=0", "db=1")})
    folder.mkdir()
    (folder / "config.yaml").write_text(config.to_yaml())
    (folder / "run.json").write_text('{"run_key": "demo-1"}')
    if mark == "beside":
        (tmp_path / f"{name}.redis").mkdir()
        (tmp_path / f"{name}.redis" / "config.yaml").write_text(config.to_yaml())
    elif mark:
        (folder / mark).write_text("{}")
    return folder, url


@pytest.mark.parametrize("mark", ["beside", "chaos.json", "soak.json"])
def test_a_run_of_the_harness_is_cleaned_without_its_redis(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mark: str
) -> None:
    folder, url = leave(tmp_path, mark)
    if mark == "soak.json":  # a killed harness leaves its socket, on which nobody listens
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(tmp_path / "katana-x1" / "redis.sock"))
    assert main(["clean", str(folder)]) == 0
    told = capsys.readouterr().out
    assert url in told
    assert "gone" in told
    assert [path.name for path in tmp_path.iterdir()] == ["katana-x1"]


def test_of_another_run_with_that_name_nothing_is_removed(tmp_path: Path) -> None:
    """`demo` was moved to `demo.1`, and a later run is at `demo`; another is named as the harness's folder would be."""
    leave(tmp_path, "beside")
    older, _ = leave(tmp_path, "chaos.json", name="other")
    (tmp_path / "other.redis").mkdir()
    (tmp_path / "other.redis" / "config.yaml").write_text((older / "config.yaml").read_text())
    (tmp_path / "other.redis" / "run.json").write_text('{"run_key": "other.redis-1"}')
    assert main(["clean", str(older)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo", "demo.redis", "katana-x1", "other.redis"]


@pytest.mark.parametrize("how", ["no mark", "listening", "elsewhere", "tcp", "other beside"])
def test_a_redis_that_is_merely_away_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    folder, _ = leave(tmp_path, {"no mark": "", "other beside": "beside"}.get(how, "chaos.json"))
    text = (folder / "config.yaml").read_text().replace("redis_wait_s: 20.0", "redis_wait_s: 0.3")
    if how == "elsewhere":
        text = text.replace("katana-x1", "var")
    elif how == "other beside":
        text = text.replace("katana-x1", "katana-x2")
    elif how == "tcp":
        text = text.replace(f"unix://{tmp_path}/katana-x1/redis.sock?db=", "redis://127.0.0.1:1/")
    (folder / "config.yaml").write_text(text)
    with socket.socket(socket.AF_UNIX) as server:
        if how == "listening":
            server.bind(str(tmp_path / "katana-x1" / "redis.sock"))
            server.listen(0)
        assert not left_by_harness(folder, load(folder / "config.yaml"))[0]
    if how != "listening":
        assert main(["clean", str(folder)]) == 2
        assert "Redis does not answer" in capsys.readouterr().err
        assert folder.exists()


def test_a_fault_that_fails_in_a_way_of_its_own_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise ValueError("not like this")

    monkeypatch.setattr(harness, "_GAP_S", 0.001)
    monkeypatch.setitem(KINDS, "redis-full", Kind("redis-full", fail))
    result = ChaosResult(0, [Fault("redis-full", False, 1)])
    harness._inject_all(Cluster(load(CHAOS, [f"runs_dir={tmp_path}"])), Scene(), result, 0.0)
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


@pytest.mark.parametrize("views", [False, True])
def test_what_is_broken_on_purpose_is_refused_by_the_decoders(
    embedded_redis: EmbeddedRedis, start: Callable[..., Run], views: bool
) -> None:
    run = start(embedded_redis, feeder={"record_views": views})
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
        elif name.startswith("v:"):
            with pytest.raises(MessageError):
                ScoreView.decode(value)
        elif how == "tokens cut off in the middle":
            with pytest.raises(MessageError):
                ChunkTokens.decode(value)
        elif name.startswith("t:"):
            assert (ChunkTokens.decode(value).tokens == 1 << 30).all()
    assert len(seen) == 6 + views
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


@pytest.mark.parametrize(("what", "field"), [("write", "verdict"), ("score", "verdict"), ("step", "settled")])
def test_what_is_made_unusable_must_be_dead_of_it(
    embedded_redis: EmbeddedRedis,
    start: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    field: str,
) -> None:
    run = start(embedded_redis)
    run.judged("r1") if what == "step" else run.admit("r1")
    cluster: Any = SimpleNamespace(
        plane=run.plane,
        poison=tmp_path,
        open_rollouts=lambda: {"r1"},
        check_open=lambda: None,
        patience=lambda seconds: seconds,
    )
    scene = faults.Scene()

    def strike(found: str | None) -> str:
        scene.poisoned.clear()
        if found:
            monkeypatch.setattr(
                cluster, "check_open", lambda: run.client.hset(run.key("rollout:r1"), field, found) and None
            )
        return KINDS[f"poison-{what}"].inject(cluster, random.Random(0), scene, 0)

    monkeypatch.setattr(faults, "_DEAD_S", 0.2)
    with pytest.raises(TimeoutError, match="r1 is not dead"):
        strike(None)
    assert (tmp_path / f"{what}-r1").exists()
    assert scene.poisoned == {"r1"}
    assert strike("dead") == "r1 dead"
    run.client.hdel(run.key("rollout:r1"), field)
    with pytest.raises(Missed, match="had ended before"):
        strike("another")
    mark = tmp_path / f"{what}-r1"
    assert not mark.exists()
    if what == "step":
        run.client.hdel(run.key("rollout:r1"), field)
        monkeypatch.setattr(
            cluster,
            "check_open",
            lambda: run.client.hset(run.key("rollout:r1"), field, "dropped") and mark.write_text("7\n8\n8\n") and None,
        )
        with pytest.raises(TimeoutError, match="2 learners failed on r1, and it ended as dropped"):
            strike(None)
