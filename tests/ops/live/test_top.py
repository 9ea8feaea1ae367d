"""`katana top` on a real Redis with real ports: what it sees, says of what it cannot see, and that it only reads."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
from rich.console import Console
from run_folders import step_line
from samples import Run, fenced, make_config, make_verdict, remove_run, start_run

from actors.books import Booking, Books, line_of
from common.config import Config, ConfigError
from common.files import write_json, write_text
from common.metrics import TARGETS
from common.pretrained import find_model, load_tokenizer
from common.runfiles.lines import Lines, Tail, an_object, read_lines
from common.runfiles.records import BookLine, Wall
from common.wire.connect import connect
from ops.live.growth import Folder, Rate
from ops.live.snapshot import Observer, RecentVerdict, Snapshot, Stream, as_dict
from ops.live.top import picture, top
from ops.reach.embedded import EmbeddedRedis
from ops.stats.saving import length_saving

ROOT = Path(__file__).parents[3]
SHIPPED = {"student": {"model": "ops/models/student"}, "teacher": {"model": "ops/models/teacher"}}

PATIENT = {"heartbeat_s": 60.0, "claim_s": 200.0}  # workers count as alive for three heartbeats


def at(config: Config, url: str | None) -> Config:
    return config.model_copy(update={"redis": config.redis.model_copy(update={"url": url})})


@pytest.fixture
def observe() -> Iterator[Callable[..., Observer]]:
    """`observe(config)`: an observer that is closed after the test."""
    observers: list[Observer] = []

    def begin(config: Config, source: Path = Path("some.yaml")) -> Observer:
        observers.append(Observer(config, source))
        return observers[-1]

    yield begin
    for observer in observers:
        observer.close()


@pytest.fixture
def shown(any_redis: EmbeddedRedis, start: Callable[..., Run]) -> tuple[Run, Config]:
    """A run on each supported Redis, with the shipped models, and its config with that Redis's address."""
    run = start(any_redis, **SHIPPED, liveness=PATIENT)
    return run, at(run.config, any_redis.url)


def ids_of(text: str) -> list[int]:
    return list(load_tokenizer(find_model("ops/models/student"))(text, add_special_tokens=False)["input_ids"])


def judge(run: Run, rid: str, text: str, *, keep: int, **changes: Any) -> None:
    """Carry a rollout of this text to its verdict."""
    ids = ids_of(text)
    run.admit(rid)
    run.take()
    run.chunk(rid, tokens=ids, finish="eos")
    run.score(rid, values=[0.5] * len(ids))
    values = {"tokens": np.array(ids, np.int32), "divergence": np.full(len(ids), 0.5, np.float32), "keep": keep}
    body = make_verdict(rid, **values | {"trigger": len(ids), "train": keep, "generated": len(ids)} | changes)
    entries = run.score_entries()
    answer = run.lease("arbiter").call(fenced("verdict", rid, body.encode(), keep, 0, "", 4, "0.25", "", *entries))
    assert answer == [b"ok"]


def rendered(snapshot: Snapshot, width: int = 120) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(picture(snapshot, width))
    return capture.get()


def in_terminal(config: Config, call: str, awaited: str, typed: bytes) -> tuple[str, int]:
    """Make a call in a process that has a terminal; when `awaited` is on it, type. Returns all output, and the code."""
    path = config.run_dir.parent / "some.yaml"
    path.write_text(config.to_yaml())
    program = f"""
import sys
from pathlib import Path
from common.config import load
from ops.live.top import top
from ops.live.watch import watch
path = Path({str(path)!r})
config = load(path)
try:
    sys.exit({call})
except KeyboardInterrupt:
    sys.exit(130)
"""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 120))
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env=os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor"},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    seen = b""
    try:
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while data := os.read(ours, 65536):
                seen += data
                if typed and awaited.encode() in seen:
                    os.write(ours, typed)
                    typed = b""
        return seen.decode(), process.wait(30)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_each_of_several_teachers_has_its_threshold_and_its_chunks(
    any_redis: EmbeddedRedis, start: Callable[..., Run], observe: Callable[..., Observer]
) -> None:
    model = {"model": "ops/models/teacher"}
    several = {"teacher": None, "teachers": {"plain": model, "shifted": model}, "data": {"teacher_key": "dialect"}}
    run = start(any_redis, student=SHIPPED["student"], **several, liveness=PATIENT)
    for rid, teacher in (("r1", "plain"), ("r2", "shifted"), ("r3", "shifted")):
        run.admit(rid, teacher=teacher)
    run.take()
    for rid in ("r1", "r2", "r3"):
        run.chunk(rid)
    run.client.set(run.key("threshold:plain"), "0.25")
    run.client.rpush(run.key("minima:plain"), "0.5", "0.25")
    snapshot = observe(at(run.config, any_redis.url)).look()
    assert snapshot.threshold_of == {"plain": 0.25, "shifted": None} and snapshot.threshold_nats is None
    assert snapshot.minima == 2
    assert {name: one.outstanding for name, one in snapshot.streams.items() if name.startswith("chunks")} == {
        "chunks of plain": 1,
        "chunks of shifted": 2,
    }
    text = rendered(snapshot)
    assert "plain 2.50e-01, shifted inactive" in text and "chunks of shifted" in text


# --- what grows ---


def test_a_rate_is_the_growth_of_all_that_were_seen_twice() -> None:
    rate = Rate(window_s=10)
    assert rate.total() is None
    rate.note("a", 0, 100)
    assert rate.of("a") is None
    rate.note("a", 2, 120)
    rate.note("b", 2, 5)
    assert (rate.of("a"), rate.total()) == (10, 10)
    rate.note("b", 4, 9)
    assert rate.total() == 12
    rate.keep(["b"])
    assert rate.total() == 2


def test_a_rate_forgets_what_is_older_than_its_window_and_begins_anew_with_its_counter() -> None:
    rate = Rate(window_s=10)
    for second in range(21):
        rate.note("a", second, 100 if second > 5 else 0)
    assert rate.of("a") == 0
    rate.note("a", 21, 3)  # another process under the same name
    assert rate.of("a") is None
    rate.note("a", 21, 3)  # the same heartbeat once more
    rate.note("a", 23, 7)
    assert rate.of("a") == 2


def write_books(folder: Path, arms: str) -> None:
    """A booked rollout for each letter of `arms`; treated ones have 3 + n tokens, control 10 + n."""
    books = Books(folder, record_traces=True)
    for number, letter in enumerate(arms):
        arm = "treated" if letter == "t" else "control"
        verdict = make_verdict(f"r{number:09d}", arm=arm, problem=number // 3)
        generated = number + (3 if letter == "t" else 10)
        line = line_of(
            verdict, ending="trained", reason="", generated=generated, staleness=0, active=True, correct=None
        )
        books.write([Booking(line, verdict)])
    books.close()


def test_the_saving_is_the_one_of_the_summary_and_grows_with_the_books(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.read()
    assert (folder.saving().ratio, folder.cut_rate()) == (None, None)
    write_books(tmp_path, "ttct")
    folder.read()
    first = folder.saving()
    assert first.ratio == pytest.approx(1 - ((3 + 4 + 6) / 3) / 12)
    assert (first.rollouts, first.source) == (4, "books")
    write_books(tmp_path, "ttctctct")
    folder.read()
    folder._due_at = 0.0
    lines = list(read_lines(tmp_path / "rollouts.jsonl", BookLine.from_json))
    expected = length_saving(lines, resamples=500)
    assert (folder.saving().ratio, folder.saving().low) == (expected.ratio, expected.low)
    assert folder.saving().rollouts == 8
    assert folder.cut_rate() == 1.0


def test_steps_give_the_speed_of_training_while_they_come(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    now = time.time()
    steps = [step_line(n, tokens_trained=100, unix_s=now - 20 + 10 * n) for n in range(1, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    folder.read()
    assert folder.trained_per_s() == pytest.approx(10)
    assert folder.last_step is not None and folder.last_step.staleness_mean == 0.5
    old = [step | {"unix_s": now - 1000} for step in steps]
    write_text(tmp_path / "metrics.jsonl", "".join(json.dumps(step) + "\n" for step in old))  # cut back
    folder.read()
    assert folder.trained_per_s() is None


def test_a_tail_reads_on_and_passes_over_what_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    tail = Tail(path, an_object)
    assert tail.read() == []
    path.write_bytes(b'{"a": 1}\n{"a"')
    assert tail.read() == [{"a": 1}]
    with path.open("ab") as file:
        file.write(b': 2}\n\xff\n7\n{"a": 3}\n')
    assert tail.read() == [{"a": 2}, {"a": 3}]
    assert (tail.read(), tail.broken, tail.renewed) == ([], 2, 0)
    path.write_bytes(b'{"a": 9}\n')  # cut back
    assert (tail.read(), tail.renewed) == ([{"a": 9}], 1)


def test_the_last_lines_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert Lines(path, Wall).last(100) == []
    path.write_text("".join(f'{{"wall_s": {n}}}\n' for n in range(100)) + '{"wall_s": ')
    assert Lines(path, Wall).last(50) == [Wall(98), Wall(99)]
    assert len(Lines(path, Wall).last(1 << 20)) == 100


# --- what it sees ---


def test_a_run_that_has_just_begun(shown: tuple[Run, Config], observe: Callable[..., Observer]) -> None:
    run, config = shown
    snapshot = observe(config).look()
    assert (snapshot.redis, snapshot.state, snapshot.run_key) == ("", "open", run.plane.run_key)
    assert set(snapshot.streams) == {"prompts", "chunks", "scores", "trajectories", "finished"}
    assert all(stream == Stream(0, None) for stream in snapshot.streams.values())
    assert snapshot.metrics.startswith("not reachable")
    assert {role.name for role in snapshot.roles if role.alive} == set()
    assert snapshot.verdicts == []
    assert "none yet" in rendered(snapshot)


def test_what_waits_and_who_lives(shown: tuple[Run, Config], observe: Callable[..., Observer]) -> None:
    run, config = shown
    for rid in ("r1", "r2", "r3"):
        run.admit(rid)
    run.take(count=1)
    run.chunk("r1")
    run.plane.fail("", "scores", "junk", max_attempts=1)
    observer = observe(config)
    run.plane.seen("w1", role="rollout", slots=8, writing=3, tokens=100, busy="0.750", version=2)
    run.plane.seen("w2", role="teacher", tokens=40, busy="nonsense")
    run.client.zadd(run.key("workers"), {"w9": 1.0})  # seen long ago
    observer.look()
    time.sleep(0.05)
    run.plane.seen("w1", role="rollout", slots=8, writing=3, tokens=150, busy="0.750", version=2)
    snapshot = observer.look()
    assert snapshot.streams["prompts"].outstanding == 3
    assert snapshot.streams["chunks"].outstanding == 1
    assert snapshot.streams["prompts"].oldest_pending_s is not None
    assert snapshot.streams["chunks"].oldest_pending_s is None
    assert (snapshot.ledger["admitted"], snapshot.open_rollouts, snapshot.dead_letters) == (3, 3, 1)
    writer, teacher = snapshot.workers
    assert (writer.id, writer.busy, writer.slots, writer.writing, writer.version) == ("w1", 0.75, 8, 3, 2)
    assert writer.tokens_per_s is not None
    assert snapshot.tokens_per_s["written"] == writer.tokens_per_s
    assert 0 < writer.tokens_per_s <= 1000  # 50 tokens in at least 0.05 s
    assert (teacher.role, teacher.busy, teacher.slots) == ("teacher", None, None)
    alive = {role.name for role in snapshot.roles if role.alive}
    assert alive == {"feeder", "rollout", "teacher"}
    [feeder] = [role for role in snapshot.roles if role.name == "feeder"]
    assert feeder.lease_left_s is not None
    assert 0 < feeder.lease_left_s <= 600
    assert snapshot.redis_used_bytes
    assert snapshot.redis_max_bytes == 256 << 20
    text = rendered(snapshot)
    assert "3 admitted = 0 trained + 0 dropped + 0 dead + 3 open" in text
    assert re.search(r"w1 +rollout +75% +3 of 8 +2 ", text)


def test_verdicts_show_before_they_are_trained(shown: tuple[Run, Config], observe: Callable[..., Observer]) -> None:
    run, config = shown
    judge(run, "r000000000", "12+7=19#19", keep=4)
    time.sleep(0.01)
    whole = len(ids_of("5+5=10#10"))
    judge(run, "r000000001", "5+5=10#10", keep=whole, finish_reason="eos", cut=False, arm="control")
    observer = observe(config)
    second, first = observer.look().verdicts
    assert (first.rid, first.arm, first.reason) == ("r000000000", "treated", "kl_trap")
    assert (first.kept, first.generated) == (4, len(ids_of("12+7=19#19")))
    assert (first.text, first.behind) == ("12+7=", "19#19")
    assert (second.rid, second.reason, second.text, second.behind) == ("r000000001", "eos", "5+5=10#10", "")
    for entry in run.trajectories().items():
        run.settle(*entry)
    run.book("r000000000", "trained")
    assert [one.rid for one in observer.look().verdicts] == ["r000000001", "r000000000"]  # they stay in sight


def test_booked_verdicts_come_from_the_folder(shown: tuple[Run, Config], observe: Callable[..., Observer]) -> None:
    _, config = shown
    write_books(config.run_dir, "tct")
    snapshot = observe(config).look()
    assert [one.rid for one in snapshot.verdicts] == ["r000000002", "r000000001", "r000000000"]
    assert [one.generated for one in snapshot.verdicts] == [5, 11, 3]
    assert snapshot.saving.ratio is not None


def test_junk_in_redis_is_not_shown_and_ends_nothing(
    shown: tuple[Run, Config], observe: Callable[..., Observer]
) -> None:
    run, config = shown
    judge(run, "r1", "1+1=2", keep=3)
    run.client.hset(run.key("rollout:r1"), "verdict", b"\xff")
    run.client.xadd(run.key("trajectories"), {"rid": "../../x"})
    run.client.xadd(run.key("trajectories"), {"other": "x"})
    run.client.xadd(run.key("trajectories"), {"rid": "r77"})
    run.client.set(run.key("threshold"), "much")
    run.client.hset(run.key("policy"), mapping={"version": "x", "step": "-1"})
    run.client.hset(run.key("ledger"), "admitted", "some")
    run.client.delete(run.key("scores"))
    run.client.set(run.key("scores"), "no stream")
    run.plane.seen("w1\x1b[2J", role="rollout\x1b[2J", tokens="x")
    snapshot = observe(config).look()
    assert snapshot.verdicts == []
    assert (snapshot.threshold_nats, snapshot.policy_version) == (None, None)
    assert "scores" not in snapshot.streams
    assert "\x1b" not in rendered(snapshot)
    json.dumps(as_dict(snapshot), allow_nan=False)


def test_control_characters_of_a_text_do_not_reach_the_terminal() -> None:
    judged = RecentVerdict("r1", "treated", "kl_trap", 2, 9, True, None, "a\x1b[31mb\u202ec\n", "d\x07")
    snapshot = Snapshot(0.0, "x\x1b[2J", "", "", "", verdicts=[judged])
    text = rendered(snapshot)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\u202e" not in text
    assert r"a\x1b[31mb\u202ec\n ✂ d\x07" in text


@pytest.mark.parametrize("width", [20, 60, 200])
def test_a_picture_fits_its_width(shown: tuple[Run, Config], observe: Callable[..., Observer], width: int) -> None:
    run, config = shown
    judge(run, "r000000000", "12+7=19#19", keep=4)
    text = rendered(observe(config).look(), width)
    assert max(map(len, text.splitlines())) <= width


def test_a_picture_fits_its_height(shown: tuple[Run, Config], observe: Callable[..., Observer]) -> None:
    run, config = shown
    observer = observe(config)
    run.plane.seen("w1", role="rollout", tokens=1, busy="0.5")
    for number in range(8):
        judge(run, f"r{number:09d}", "1+1=2", keep=3)
    snapshot = observer.look()
    console = Console(width=120, color_system=None)
    for height, verdicts in ((24, 4), (200, 8)):
        with console.capture() as capture:
            console.print(picture(snapshot, 120, height))
        lines = capture.get().splitlines()
        assert len(lines) <= height
        assert sum(line.startswith("r0000") for line in lines) == verdicts


@pytest.mark.slow
def test_in_a_terminal_the_screen_is_given_back_on_ctrl_c(shown: tuple[Run, Config], tmp_path: Path) -> None:
    run, config = shown
    judge(run, "r000000000", "12+7=19#19", keep=4)
    text, code = in_terminal(config, "top(config, path, interval_s=0.2, once=False, as_json=False)", "12+7=", b"\x03")
    assert code == 130, text
    on, off = text.index("\x1b[?1049h"), text.rindex("\x1b[?1049l")
    assert on < text.index("katana top") < off
    assert "katana top" in text[off:]  # what was seen last stays


@pytest.mark.slow
@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_a_rollout_in_a_terminal_is_coloured(
    shown: tuple[Run, Config], monkeypatch: pytest.MonkeyPatch, no_color: str, coloured: bool
) -> None:
    run, config = shown
    judge(run, "r000000000", "12+7=19#19", keep=4)
    monkeypatch.setenv("NO_COLOR", no_color)
    text, code = in_terminal(config, "watch(config, path, '0', as_json=False, follow=True)", "kl_trap", b"")
    assert code == 0, text
    assert ("\x1b[38;2;" in text or "48;2;" in text) == coloured
    assert ("1[0.5]" in text) == (not coloured)


# --- metrics ports ---


@pytest.fixture
def serve(shown: tuple[Run, Config]) -> Iterator[Callable[..., CollectorRegistry]]:
    """`serve(role)`: a process of that role with a port of its own, and its file beside the run's folder."""
    servers = []

    def begin(role: str) -> CollectorRegistry:
        registry = CollectorRegistry()
        server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
        servers.append((server, thread))
        run = shown[1].run_dir
        folder = run.parent / TARGETS
        folder.mkdir(parents=True, exist_ok=True)
        value = [{"targets": [f"127.0.0.1:{server.server_port}"], "labels": {"job": role}}]
        write_json(folder / f"{run.name}--{role}-1.json", value)
        return registry

    yield begin
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


def test_ports_tell_ages_and_speeds(
    shown: tuple[Run, Config], observe: Callable[..., Observer], serve: Callable[..., CollectorRegistry]
) -> None:
    _, config = shown
    writer, feeder, arbiter = serve("rollout"), serve("feeder"), serve("arbiter")
    turned = Gauge("loop_timestamp_seconds", "", ["role"], namespace="katana", registry=writer)
    turned.labels("rollout").set(time.time() - 100)
    tokens = Counter("decode_tokens_total", "", ["role"], namespace="katana", registry=writer)
    Gauge("kat_cut_rate", "", namespace="katana", registry=arbiter).set(0.25)
    lengths = {"treated": (40.0, 4.0), "control": (100.0, 5.0)}  # means 10 and 20
    for part, place in (("sum", 0), ("count", 1)):
        gauge = Gauge(f"rollout_length_tokens_{part}", "", ["arm", "reason"], namespace="katana", registry=feeder)
        for arm, values in lengths.items():
            gauge.labels(arm, "eos").set(values[place])
    silent = [{"targets": ["127.0.0.1:1"], "labels": {"job": "learner"}}]
    write_json(config.run_dir.parent / TARGETS / "test--learner-1.json", silent)
    observer = observe(config)
    tokens.labels("rollout").inc(10)
    began = time.monotonic()
    observer.look()
    time.sleep(0.1)
    tokens.labels("rollout").inc(50)
    snapshot = observer.look()
    assert snapshot.metrics == ""
    written = snapshot.tokens_per_s["written"]
    assert written is not None
    assert 50 / (time.monotonic() - began) < written <= 500  # 50 tokens in at least 0.1 s
    roles = {role.name: role for role in snapshot.roles}
    assert roles["rollout"].turned_s is not None
    assert 100 <= roles["rollout"].turned_s < 200
    assert (roles["rollout"].ports, roles["learner"].ports, roles["learner"].silent) == (1, 0, 1)
    assert snapshot.cut_rate == 0.25
    assert (snapshot.saving.ratio, snapshot.saving.low, snapshot.saving.source) == (0.5, None, "metrics")
    text = rendered(snapshot)
    assert "50.0% (metrics: no interval)" in text
    assert "0 answer, 1 do not" in text


# --- what is away ---


def test_a_redis_that_goes_away_and_comes_back(
    own_redis: EmbeddedRedis, tmp_path: Path, observe: Callable[..., Observer]
) -> None:
    run = start_run(connect(own_redis.url), make_config(tmp_path, **SHIPPED))
    config = at(run.config, own_redis.url)
    write_books(config.run_dir, "tct")
    observer = observe(config)
    assert observer.look().redis == ""
    own_redis.stop()
    away = observer.look()
    assert away.redis.startswith("Redis does not answer")
    assert away.saving.ratio is not None  # the folder is still there
    assert "redis: Redis does not answer" in rendered(away)
    assert not any(role.alive for role in away.roles)
    own_redis.start()
    assert observer.look().state == "open"
    remove_run(run)
    gone = observer.look()
    assert "does not know the run" in gone.redis or "has no run" in gone.redis
    assert json.loads(json.dumps(as_dict(gone)))["state"] == "?"


def test_a_run_begun_anew_under_its_name_is_found(
    shown: tuple[Run, Config], observe: Callable[..., Observer], any_redis: EmbeddedRedis
) -> None:
    run, config = shown
    judge(run, "r000000000", "12+7=19#19", keep=4)
    observer = observe(config)
    assert len(observer.look().verdicts) == 1
    other = start_run(connect(any_redis.url), run.config)
    try:
        snapshot = observer.look()
        assert snapshot.run_key == other.plane.run_key
        assert snapshot.verdicts == []  # the same ids may be other rollouts
    finally:
        remove_run(other)


def test_a_run_at_rest_with_a_redis_of_its_own(tmp_path: Path, observe: Callable[..., Observer]) -> None:
    config = make_config(tmp_path, **SHIPPED)
    assert "no run with a Redis of its own" in observe(config).look().redis
    (config.run_dir / "redis").mkdir(parents=True)
    assert "is stopped" in observe(config).look().redis


def finish(config: Config, *, steps: int = 0, ledger: str | None = None) -> None:
    """The folder of a local run that is over: its Redis is gone with it."""
    folder = config.run_dir
    (folder / "redis").mkdir(parents=True)
    write_text(folder / "config.yaml", config.to_yaml())
    step = step_line(steps or config.learner.max_steps, policy_version=4)
    (folder / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    closed = {"admitted": 9, "trained": 6, "dropped": {"stale": 2}, "dead": 1, "open": 0}
    (folder / "ledger.json").write_text(ledger if ledger is not None else json.dumps(closed))


@pytest.mark.timeout(30)
@pytest.mark.parametrize("once", [True, False])
def test_a_run_that_is_over_is_shown_as_such_and_top_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], once: bool
) -> None:
    config = make_config(tmp_path, **SHIPPED)
    finish(config)
    source = config.run_dir / "config.yaml"
    assert top(config, source, interval_s=3600, once=once, as_json=True) == 0
    [line] = capsys.readouterr().out.splitlines()
    value = json.loads(line)
    assert (value["state"], value["step"], value["open_rollouts"]) == ("ended", config.learner.max_steps, 0)
    assert value["ledger"] == {"admitted": 9, "trained": 6, "dead": 1, "dropped:stale": 2}
    assert top(config, source, interval_s=3600, once=True, as_json=False) == 0
    text = capsys.readouterr().out
    assert "· ended · step" in text and "the run is over; shown from its folder" in text
    assert "not seen" not in text and "is stopped" not in text
    assert "9 admitted = 6 trained + 2 dropped + 1 dead + 0 open" in text


@pytest.mark.parametrize(
    ("steps", "ledger"),
    [
        (1, None),
        (0, '{"admitted": 9, "trained": 6, "dropped": {}, "dead": 1, "open": 2}'),
        (0, '{"admitted": 9}'),
        (0, "[]"),
        (0, "{"),
    ],
)
def test_a_run_that_stopped_before_its_end_is_not_over(
    tmp_path: Path, observe: Callable[..., Observer], steps: int, ledger: str | None
) -> None:
    config = make_config(tmp_path, **SHIPPED)
    finish(config, steps=steps, ledger=ledger)
    snapshot = observe(config).look()
    assert snapshot.state != "ended"
    assert "is stopped" in snapshot.redis
    assert "not seen" in rendered(snapshot)


def test_a_run_at_work_is_found_by_its_folder(tmp_path: Path, observe: Callable[..., Observer]) -> None:
    config = make_config(tmp_path, **SHIPPED)
    server = EmbeddedRedis(config.run_dir / "redis", maxmemory_mb=64)
    server.start()
    try:
        run = start_run(connect(server.url), config)
        start_run(connect(server.url), config)  # another one has the name now
        write_json(config.run_dir / "run.json", {"run_key": run.plane.run_key})
        write_text(config.run_dir / "config.yaml", config.to_yaml())
        snapshot = observe(config, config.run_dir / "config.yaml").look()
        assert snapshot.run_key == run.plane.run_key
    finally:
        server.stop()


# --- that it only reads, and little ---


def test_looking_changes_nothing_and_costs_the_same_however_much_there_is(
    own_redis: EmbeddedRedis, tmp_path: Path, observe: Callable[..., Observer]
) -> None:
    run = start_run(connect(own_redis.url), make_config(tmp_path, **SHIPPED))
    observer = observe(at(run.config, own_redis.url))

    def cost() -> int:
        before = run.client.info("stats")["total_commands_processed"]
        observer.look()
        return int(run.client.info("stats")["total_commands_processed"]) - int(before)

    def contents() -> dict[bytes, bytes]:
        return {key: run.client.dump(key) for key in run.client.keys("*")}

    observer.look()
    few = cost()
    for number in range(60):
        judge(run, f"r{number:09d}", "1+1=2", keep=3)
    for number in range(60, 100):
        run.admit(f"r{number:09d}")
    before = contents()
    assert cost() <= few + 8  # a read for each of the eight verdicts that are new
    assert cost() == few
    assert contents() == before


def test_the_operators_rights_are_enough(
    own_redis: EmbeddedRedis, tmp_path: Path, observe: Callable[..., Observer]
) -> None:
    run = start_run(connect(own_redis.url), make_config(tmp_path, **SHIPPED, liveness=PATIENT))
    judge(run, "r000000000", "12+7=19#19", keep=4)
    rules = (ROOT / "ops" / "redis" / "users.acl").read_text()
    [line] = [line for line in rules.splitlines() if line.startswith("user operator ")]
    run.client.execute_command("ACL", "SETUSER", "operator", *line.split()[2:], ">secret", "on")
    (tmp_path / "operator").write_text("secret\n")
    (tmp_path / "wrong").write_text("guess\n")
    redis = {"url": own_redis.url, "username": "{role}", "password_file": str(tmp_path / "{role}")}
    config = run.config.model_copy(update={"redis": run.config.redis.model_copy(update=redis)})
    observer = observe(config)
    run.plane.seen("w1", role="rollout", tokens=1, busy="0.5")
    snapshot = observer.look()
    assert snapshot.redis == ""
    assert len(snapshot.streams) == 5
    assert None not in (snapshot.dead_letters, snapshot.minima, snapshot.open_rollouts, snapshot.redis_used_bytes)
    assert snapshot.workers
    assert snapshot.verdicts
    assert {role.name for role in snapshot.roles if role.alive} == {"feeder", "arbiter", "rollout"}
    redis["password_file"] = str(tmp_path / "wrong")
    refused = run.config.model_copy(update={"redis": run.config.redis.model_copy(update=redis)})
    with pytest.raises(ConfigError, match="refuses the operator"):
        observe(refused).look()


# --- the command ---


def test_once_prints_one_picture(shown: tuple[Run, Config], capsys: pytest.CaptureFixture[str]) -> None:
    run, config = shown
    judge(run, "r000000000", "12+7=19#19", keep=4)
    assert top(config, Path("some.yaml"), interval_s=0.01, once=False, as_json=False) == 0  # no terminal
    text = capsys.readouterr().out
    assert text.count("katana top · test") == 1
    assert "12+7= ✂ 19#19" in text
    assert "\x1b" not in text


def test_once_as_json_is_one_object(shown: tuple[Run, Config], capsys: pytest.CaptureFixture[str]) -> None:
    _, config = shown
    assert top(config, Path("some.yaml"), interval_s=0.01, once=True, as_json=True) == 0
    [line] = capsys.readouterr().out.splitlines()
    value = json.loads(line)
    assert value["state"] == "open"
    assert {role["name"]: role["alive"] for role in value["roles"]}["learner"] is False


def test_a_stream_of_json_ends_with_the_run(shown: tuple[Run, Config], capsys: pytest.CaptureFixture[str]) -> None:
    run, config = shown
    run.client.set(run.key("run"), "ended")
    assert top(config, Path("some.yaml"), interval_s=0.01, once=False, as_json=True) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert json.loads(line)["state"] == "ended"


def test_nothing_to_be_seen_is_bad_input(any_redis: EmbeddedRedis, tmp_path: Path) -> None:
    config = at(make_config(tmp_path, name="nobody"), any_redis.url)
    with pytest.raises(ConfigError, match="Redis has no run named 'nobody'; and there is no folder"):
        top(config, Path("some.yaml"), interval_s=0.01, once=True, as_json=False)
