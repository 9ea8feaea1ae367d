"""`katana dead` on a real Redis: how it shows records broken in many ways, and that nothing is sent back twice."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from samples import Run, make_config, make_divergence, make_head, make_tokens

from actors.feeder import Feeder
from common.pretrained import find_model, load_tokenizer
from common.runfiles.making import lock
from common.wire.connect import connect
from common.wire.messages import Ints
from common.wire.plane import create_run, open_plane
from ops.cli.main import main
from ops.reach.embedded import EmbeddedRedis
from ops.run import dead

ROOT = Path(__file__).parents[3]


class Counting:
    """Prompt n is the token n + 1."""

    def prompt(self, problem: int) -> Ints:
        return np.array([problem + 1], np.int32)

    def judge(self, problem: int, tokens: Ints) -> bool:
        return True


@dataclass
class Desk:
    """A run with its config in a file, and `katana dead` on it."""

    run: Run
    capsys: pytest.CaptureFixture[str]
    arguments: list[str]

    def output(self, *arguments: str) -> str:
        """Standard output of the command; it must succeed."""
        assert main(["dead", *self.arguments, *arguments]) == 0
        return self.capsys.readouterr().out

    def refused(self, *arguments: str) -> str:
        """Standard error of the command; it must fail with the exit code for bad input."""
        assert main(["dead", *self.arguments, *arguments]) == 2
        captured = self.capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert captured.out == ""
        return captured.err

    def letter(self) -> str:
        """The newest entry."""
        [(entry, _)] = self.run.client.xrevrange(self.run.key("dead"), count=1)
        return entry.decode()

    def die(self, rid: str = "r1", *, booked: bool = True, **changes: Any) -> str:
        """A rollout with a scored chunk that died in its second; returns the letter."""
        self.run.admit(rid, **changes)
        self.run.take()
        self.run.chunk(rid)
        self.run.score(rid)
        self.run.chunk(rid, seq=1, start=3, tokens=(4, 5))
        for _ in range(3):
            self.run.plane.fail(rid, "teacher", "chunk 1: broken", max_attempts=3, shown=b"\x1b[2J")
        if booked:
            assert self.run.book(rid, "dead") == [b"ok", 1]
        return self.letter()

    def store(self, rid: str, name: str, value: bytes) -> None:
        self.run.client.hset(self.run.key(f"rollout:{rid}"), name, value)

    def feed(self) -> None:
        """A feeder's work, from its start until there is nothing to do."""
        self.run.client.delete(self.run.key("lease:feeder"))
        Feeder(self.run.config, self.run.plane, Counting(), threading.Event()).run(until_idle=True)


@pytest.fixture
def begin(
    any_redis: EmbeddedRedis, start: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Desk]:
    def new(**overrides: Any) -> Desk:
        run = start(any_redis, **overrides)
        path = tmp_path / "some.yaml"
        path.write_text(run.config.to_yaml())
        return Desk(run, capsys, [str(path), "--set", f"redis.url={any_redis.url}"])

    return new


@pytest.fixture
def desk(begin: Callable[..., Desk]) -> Desk:
    return begin()


# --- the list ---


def test_a_run_without_letters_says_so(desk: Desk) -> None:
    assert desk.output() == f"no dead letters in run {desk.run.plane.run_key}\n"
    assert desk.output("--json") == ""


def test_the_list_shows_stage_rollout_reason_and_time(desk: Desk) -> None:
    first = desk.die("r1")
    desk.run.plane.fail("", "scores", "rid: not a rollout id", max_attempts=1, shown=b"{b'x': 1}")
    desk.die("r2", booked=False)
    desk.run.plane.fail("r9", "rollout", "gone by now", max_attempts=1)
    head, *rows = desk.output().splitlines()
    assert head.split() == ["entry", "when", "(UTC)", "stage", "rollout", "attempts", "reason"]
    assert [row.split()[0] for row in rows] == [
        entry.decode() for entry, _ in desk.run.client.xrange(desk.run.key("dead"))
    ]
    assert rows[0].split()[0] == first
    assert rows[0].split()[3:] == ["teacher", "r1", "3", "chunk", "1:", "broken"]
    assert rows[1].split()[3:6] == ["scores", "–", "–"]
    assert "r2 (open)" in rows[2]
    assert "r9 (gone)" in rows[3]
    assert all(row[17:21] >= "2024" and row[21] == "-" for row in rows)


def test_the_list_as_json_has_one_line_per_letter(desk: Desk) -> None:
    entry = desk.die("r1")
    desk.run.plane.fail("", "scores", "no id", max_attempts=1, shown=b"\xff")
    dead_one, notice = (json.loads(line) for line in desk.output("--json").splitlines())
    at = dead_one.pop("at")
    assert (at[:2], at[-6:]) == ("20", "+00:00")
    assert dead_one == {
        "entry": entry,
        "stage": "teacher",
        "rid": "r1",
        "record": "there",
        "attempts": "3",
        "claims": "",
        "reason": "chunk 1: broken",
        "shown": repr(b"\x1b[2J"),
    }
    assert (notice["rid"], notice["record"], notice["shown"]) == ("", "", repr(b"\xff"))


def test_a_long_list_is_complete_and_in_order(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead, "_AT_A_TIME", 3)
    for number in range(10):
        desk.run.plane.fail("", "scores", f"number {number}", max_attempts=1)
    assert [json.loads(line)["reason"] for line in desk.output("--json").splitlines()] == [
        f"number {number}" for number in range(10)
    ]


def test_rows_are_cut_to_the_terminal_and_complete_in_a_pipe(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.run.plane.fail("", "scores", "because " * 30, max_attempts=1)
    assert "because " * 30 in desk.output()
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert [len(row) for row in desk.output().splitlines()][1:] == [100]


def test_the_content_of_a_letter_cannot_control_the_terminal(desk: Desk) -> None:
    fields = {"rid": b"\x1b[2J", "stage": b"\x1b]0;x\x07", "reason": "≤ 3\x1b[31m\n\xff".encode(), "shown": b"\x1b"}
    desk.run.client.xadd(desk.run.key("dead"), fields)
    desk.run.client.xadd(desk.run.key("dead"), {"what": "?"})
    shown = desk.output() + desk.output("--show", json.loads(desk.output("--json").splitlines()[0])["entry"])
    assert "\x1b" not in shown
    assert r"≤ 3\x1b[31m\nÿ" in shown
    assert len(desk.output().splitlines()) == 3


# --- one letter ---


def test_one_letter_with_all_its_fields(desk: Desk) -> None:
    shown = desk.output("--show", desk.die("r1", problem=12))
    for text in (
        "reason      chunk 1: broken",
        r"shown       b'\x1b[2J'",
        "attempts    3 without progress",
        "arm         treated",
        "problem     12",
        "prompt      token ids 5 6 7",
        "chunks      2 stored, 2 readable; 1 scored, 1 readable",
        "tokens      5 stored, 5 readable",
        "written     token ids 1 2 3 4 5",
        "verdict     dead",
        "t:1        ok      tokens 3 … 4, policy version 0, by n1",
    ):
        assert text in shown, text
    assert "BROKEN" not in shown
    assert "mismatch" not in shown


def test_prompt_and_tokens_are_text_if_the_tokenizer_is_available(begin: Callable[..., Desk]) -> None:
    models = {"student": {"model": "ops/models/student"}, "teacher": {"model": "ops/models/teacher"}}
    desk = begin(**models)
    from ops.tasks.source import TaskSource

    source = TaskSource(desk.run.config)
    prompt = source.prompt(3)
    shown = desk.output("--show", desk.die("r1", prompt=prompt))
    assert f"prompt      {source.tokenizer.decode(prompt.tolist())!r}" in shown
    desk.store("r1", "head", make_head("r1", prompt=np.array([2**31 - 1], np.int32)).encode())
    assert "prompt      " in desk.output("--show", desk.letter())


def test_prompt_and_tokens_are_text_with_the_tokenizer_in_the_run_folder(begin: Callable[..., Desk]) -> None:
    desk = begin()  # the student's folder is gone
    entry = desk.die("r1", prompt=np.array([3, 4], np.int32))
    assert "prompt      token ids 3 4" in desk.output("--show", entry)
    model = find_model("ops/models/student")
    shutil.copytree(model, desk.run.config.run_dir / "model")
    assert f"prompt      {load_tokenizer(model).decode([3, 4])!r}" in desk.output("--show", entry)


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("head", b"\xc1", "head       BROKEN  head: not msgpack (FormatError) (1 bytes)"),
        ("head", b"", "head       BROKEN  head: not msgpack"),
        ("t:0", make_tokens((1, 2, 3)).encode()[:-2], "t:0        BROKEN  tokens: not msgpack"),
        ("t:1", make_tokens((4, 5), seq=0).encode(), "t:1        BROKEN  belongs to chunk 0"),
        ("d:0", make_divergence((1.0,)).encode().replace(b"\x00\x00\x80\x3f", b"\x00\x00\xc0\x7f"), "not finite"),
        ("d:0", make_divergence((0.5, 0.25)).encode(), "mismatch    tokens: d:0 2, p:0 3, q:0 3, t:0 3"),
        ("p:1", make_head().encode(), "p:1        BROKEN  support: another kind of record"),
        ("q:0", b"\x93" * 100_000, "q:0        BROKEN  teacher: "),
        ("verdict", b"dying", "verdict    BROKEN  verdict: "),
        ("chunks", b"-1", "chunks     BROKEN  chunks: not a number"),
        ("chunks", b"99999999999", "chunks      99999999999 stored, 2 readable"),
        ("worker", b"\x1b[2J", r"worker     ok      \x1b[2J"),
        ("what\x1b", b"?", r"what\x1b   BROKEN  not a field of a rollout (1 bytes)"),
        ("t:99999999999", b"?", "t:99999999999 BROKEN  not a field of a rollout"),
    ],
)
def test_an_unreadable_field_is_shown_with_the_reason(desk: Desk, name: str, value: bytes, line: str) -> None:
    desk.die("r1")
    desk.store("r1", name, value)
    shown = desk.output("--show", desk.letter())
    assert line in shown
    assert "\x1b" not in shown


def test_a_letter_whose_rollout_is_gone_is_shown_without_fields(desk: Desk) -> None:
    desk.run.plane.fail("r9", "rollout", "why", max_attempts=1)
    shown = desk.output("--show", desk.letter())
    assert "rollout     r9, its record is gone" in shown
    assert "field" not in shown


def test_a_rollout_that_the_learner_gave_up_is_found(desk: Desk) -> None:
    entry = desk.run.judged("r1")
    desk.run.plane.fail("r1", "trajectories", "chunk 0: broken", max_attempts=1)
    desk.run.settle("r1", entry, "dead", "trajectories")
    assert "r1 (open)" in desk.output()
    desk.run.book("r1", "dead")
    shown = desk.output("--show", desk.letter())
    assert "rollout     r1, its record is kept" in shown
    assert "verdict     given, see its field" in shown
    assert "verdict    ok      kl_trap: trigger 3, keep 2, train 2" in shown
    desk.output("--again", desk.letter())
    assert desk.run.entries("again") == [{"rid": "r1", "problem": "0"}]


# --- sent back ---


def test_what_is_sent_back_is_admitted_anew_exactly_once(begin: Callable[..., Desk]) -> None:
    desk = begin(feeder={"concurrency": 3}, learner={"batch_size": 4, "max_steps": 100})
    desk.feed()
    desk.run.plane.fail("r000000001", "rollout", "why", max_attempts=1)
    desk.feed()
    assert desk.run.ledger() == {"admitted": 4, "dead": 1}
    entry = desk.letter()
    assert "r000000001: problem 1 is sent back" in desk.output("--again", entry)
    assert desk.output().splitlines()[-1] == "1 sent back, waiting for the feeder to admit them"
    assert "no such letter" in desk.refused("--again", entry)
    desk.run.plane.fail("r000000002", "rollout", "why", max_attempts=1)
    for _ in range(3):
        desk.feed()
    assert desk.run.ledger() == {"admitted": 5, "dead": 2}
    assert (desk.run.entries("again"), desk.run.field("r000000004", "problem")) == ([], b"1")
    assert desk.run.plane.rollout("r000000001") == {}
    assert [json.loads(line)["rid"] for line in desk.output("--json").splitlines()] == ["r000000002"]


@pytest.mark.parametrize(("rid", "field", "problem"), [("r000000007", None, "3"), ("r000000007", b"12", "12")])
def test_a_rollout_whose_head_is_broken_is_sent_back_by_its_number(
    begin: Callable[..., Desk], rid: str, field: bytes | None, problem: str
) -> None:
    desk = begin(data={"num_generations": 2})
    entry = desk.die(rid)
    desk.store(rid, "head", b"\xc1")
    if field is not None:
        desk.store(rid, "problem", field)
    assert f"{rid}: problem {problem} is sent back" in desk.output("--again", entry)
    assert desk.run.entries("again") == [{"rid": rid, "problem": problem}]


@pytest.mark.parametrize(("rid", "field"), [("unnumbered", None), ("r000000001", b"\x00")])
def test_a_rollout_whose_problem_is_unknown_is_not_sent_back(desk: Desk, rid: str, field: bytes | None) -> None:
    entry = desk.die(rid)
    desk.store(rid, "head", b"\xc1")
    if field is not None:
        desk.store(rid, "problem", field)
    assert "its head cannot be read" in desk.refused("--again", entry)
    assert desk.run.entries("again") == []
    assert desk.run.field(rid, "head") is not None


def test_many_concurrent_commands_send_back_once(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    entry = desk.die("r1")
    with ThreadPoolExecutor(8) as pool:
        how = ["--again", "--again", "--again", "--drop"] * 4
        codes = list(pool.map(lambda one: main(["dead", *desk.arguments, one, entry]), how))
    assert sorted(codes) == [0] + [2] * 15
    assert len(desk.run.entries("again")) == (1 if how[codes.index(0)] == "--again" else 0)
    assert desk.run.entries("dead") == []
    capsys.readouterr()


def test_a_lost_answer_sends_back_once_and_the_command_says_that_it_may_have_done_so(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = desk.die("r1")
    evaluate, lost = dead.Plane._evaluate, []

    def losing(plane: dead.Plane, calls: Any) -> Any:
        answers = evaluate(plane, calls)
        if calls[0].script == "again" and not lost:
            lost.append(answers)
            raise redis.exceptions.ConnectionError("lost")
        return answers

    monkeypatch.setattr(dead.Plane, "_evaluate", losing)
    assert "by this one: it is repeated if its first answer is lost" in desk.refused("--again", entry)
    assert lost == [[[b"ok"]]]
    assert desk.run.entries("again") == [{"rid": "r1", "problem": "0"}]


def test_a_letter_that_cannot_be_sent_back_is_refused_and_stays(desk: Desk) -> None:
    desk.run.plane.fail("", "scores", "no id", max_attempts=1)
    assert "names no rollout" in desk.refused("--again", desk.letter())
    desk.run.plane.fail("r9", "rollout", "why", max_attempts=1)
    assert "record of rollout r9 is gone" in desk.refused("--again", desk.letter())
    desk.die("r1", booked=False)
    assert "rollout r1 is not in the books yet" in desk.refused("--again", desk.letter())
    assert "rollout r1 is not in the books yet" in desk.refused("--drop", desk.letter())
    desk.run.book("r1", "dead")
    desk.run.lease("learner").advance("state", "trained")
    assert "its training is over" in desk.refused("--again", desk.letter())
    assert len(desk.run.entries("dead")) == 3
    assert desk.run.entries("again") == []
    desk.run.lease("feeder").advance("state", "ended")
    assert "its training is over" in desk.refused("--again", desk.letter())
    assert desk.output("--show", desk.letter())


def test_dropping_removes_letter_and_record_and_nothing_else(desk: Desk) -> None:
    first, second = desk.die("r1"), desk.die("r2")
    desk.run.plane.fail("", "scores", "no id", max_attempts=1)
    assert desk.output("--drop", first) == f"removed {first} and the record of rollout r1\n"
    assert desk.run.plane.rollout("r1") == {}
    assert desk.run.plane.rollout("r2") != {}
    assert "no such letter" in desk.refused("--drop", first)
    notice = desk.letter()
    assert desk.output("--drop", notice) == f"removed {notice}\n"
    assert desk.letter() == second
    assert len(desk.run.entries("dead")) == 1
    assert desk.run.ledger() == {"admitted": 2, "dead": 2}


# --- what is refused ---


def test_only_an_existing_entry_id_is_accepted(desk: Desk) -> None:
    desk.die("r1")
    for what in ("--show", "--again", "--drop"):
        for entry in ("", "r1", "-", "+", "1", "1-1-1", "١-٠", "99999999999999999999-0", "1-0; drop"):
            assert "not an entry id" in desk.refused(f"{what}={entry}")
        assert "no such letter" in desk.refused(what, "1-1")
        assert "no such letter" in desk.refused(what, "9999999999999999999-9999999999999999999")
    assert len(desk.run.entries("dead")) == 1


def test_only_one_action_per_call(desk: Desk) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["dead", *desk.arguments, "--again", "1-1", "--drop", "1-1"])
    assert exit_.value.code == 2


def test_unknown_runs_and_unreachable_servers(desk: Desk, tmp_path: Path) -> None:
    assert "has no run named 'other'" in desk.refused("--name", "other")
    desk.arguments[-1] = f"redis.url=unix://{tmp_path}/none.sock"
    assert "Redis does not answer" in desk.refused("--set", "liveness.redis_wait_s=0.3")
    del desk.arguments[1:]
    assert "redis.url: not set" in desk.refused()
    desk.arguments[0] = "no/such.yaml"
    assert "no/such.yaml" in desk.refused()


def test_a_run_that_redis_has_lost(desk: Desk) -> None:
    entry = desk.die("r1")
    desk.run.client.delete(desk.run.key("run"))
    assert "does not know the run" in desk.refused("--again", entry)
    desk.run.client.delete(desk.run.key("config"))
    assert "does not know the run" in desk.refused()


# --- the embedded Redis of a run ---


def test_a_run_with_an_embedded_redis_is_reached_while_it_runs_and_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path)
    folder = config.run_dir
    server = EmbeddedRedis(folder / "redis", maxmemory_mb=64)
    server.start()
    (folder / "config.yaml").write_text(config.to_yaml())
    (folder / "run.json").write_text('{"run_key": "test-1"}')
    client = connect(server.url)
    create_run(client, config, "test-1")
    desk = Desk(Run(config, open_plane(config, client, "test-1")), capsys, [str(folder / "config.yaml")])
    entry = desk.die("r1")
    try:
        with lock(folder):
            assert "chunk 1: broken" in desk.output()
        assert server.running()
    finally:
        server.stop()
    with lock(folder):
        assert "its Redis is not at" in desk.refused()
    folder.rename(tmp_path / "moved")  # as `--fresh` does: the folder may be moved
    desk.arguments = [str(tmp_path / "moved" / "config.yaml")]
    assert "r1: problem 0 is sent back" in desk.output("--again", entry)
    assert "1 sent back" in desk.output()
    assert not (tmp_path / "moved" / "redis" / "redis.sock").exists()
    lock(tmp_path / "moved").close()


def test_a_run_of_the_fault_harness_is_read_from_the_data_that_the_harness_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"unix://{tmp_path}/katana-gone/redis.sock?db="
    config = make_config(tmp_path, redis={"url": url + "0", "broker_url": url + "1"})
    folder, left = config.run_dir, tmp_path / "test.redis"
    server = EmbeddedRedis(left, maxmemory_mb=64)
    server.start()
    folder.mkdir()
    for path in (folder, left):
        (path / "config.yaml").write_text(config.to_yaml())
    (folder / "run.json").write_text('{"run_key": "test-1"}')
    client = connect(server.url)
    create_run(client, config, "test-1")
    desk = Desk(Run(config, open_plane(config, client, "test-1")), capsys, [str(folder / "config.yaml")])
    entry = desk.die("r1")
    client.close()
    server.stop()
    assert "chunk 1: broken" in desk.output()
    assert f"removed {entry}" in desk.output("--drop", entry)
    assert entry not in desk.output()
    assert not (left / "redis.sock").exists()


def test_it_starts_without_torch() -> None:
    code = "import sys, ops.run.dead; print({'torch', 'celery', 'matplotlib'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert answer.stdout.strip() == "set()", answer.stderr
