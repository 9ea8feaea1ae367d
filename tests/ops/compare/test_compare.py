"""`katana compare` with runs played at the process boundary: order, going on, refusals, failures, and the report."""

from __future__ import annotations

import csv
import json
import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import pytest
from run_folders import evaluation, line, step_line, write_lines

from common.config import Config, load
from common.runfiles.making import lock
from common.runfiles.records import Scores, ToEvaluate
from common.runfiles.run import RunFolder
from ops.cli.main import main
from ops.compare import command as compare
from ops.compare.grid import Cell
from ops.compare.runs import next_ready
from ops.run import evaluator as evaluate
from ops.run.summary import write_summary

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
DEMO = str(ROOT / "ops" / "experiments" / "demo.yaml")
BATCH, STEPS = 10, 20
ACCURACY = {"none": 0.5, "kat": 0.6, "random_matched": 0.55, "fixed": 0.5, "entropy": 0.6}


def fill(config: Config) -> None:
    """The folder of a finished run: 200 rollouts; of the treated half are cut at 24 of 40 tokens, but by `none`."""
    folder, policy, seed = config.run_dir, config.termination.policy, config.seed
    folder.mkdir(exist_ok=True)
    lines = []
    for number in range(BATCH * STEPS):
        arm = "control" if number % 4 == 0 else "treated"
        fields: dict[str, Any] = {"rid": f"r{number}", "arm": arm, "problem": number, "active": policy != "none"}
        fields |= {"tokens_generated": 40, "tokens_kept": 40, "tokens_trained": 40, "tokens_trainable": 40}
        if arm == "treated" and number % 2 and policy != "none":
            fields |= {"finish_reason": "cut", "tokens_generated": 26, "tokens_kept": 20, "tokens_trained": 20}
            fields |= {"tokens_detection": 4, "tokens_overshoot": 2}
        lines.append(line(**fields))
    write_lines(folder / "rollouts.jsonl", lines)
    accuracy = ACCURACY[policy] + 0.01 * seed + (0.001 * seed if policy == "kat" else 0)
    write_lines(folder / "eval.jsonl", [evaluation(0, 0.25), evaluation(STEPS, accuracy)])
    write_lines(folder / "metrics.jsonl", [guards(step, policy, seed) for step in range(1, STEPS + 1)])
    (folder / "wall.json").write_text(json.dumps({"wall_s": 60.0 + seed}))
    (folder / "config.yaml").write_text(config.to_yaml())
    (folder / "run.json").write_text("{}")
    write_summary(folder)


def guards(step: int, policy: str, seed: int) -> dict[str, Any]:
    """A line of metrics.jsonl; kat is active from step 3 on, and cuts more and more: 0.5 + seed / 100 a step / 20."""
    rate = 0.0 if policy == "none" or step < 3 else (0.5 + seed / 100) * step / STEPS
    # The same number, but for what floats make of it.
    threshold = None if policy == "none" or step < 3 else 0.04 + 1e-16 * (step * seed % 3)
    rates = {"cut_rate_treated": rate, "cut_rate_control": None if step % 2 else rate}
    return step_line(step, threshold=threshold, repetition=0.2, truncation_rate=None) | rates


class Played:
    """A run as a process: after `looks` polls its folder is as `write` leaves it."""

    def __init__(self, write: Callable[[], int], looks: int) -> None:
        self._write, self._left, self._code = write, looks, -1
        self.signals: list[int] = []

    def poll(self) -> int | None:
        if self._left > 0:
            self._left -= 1
            if self._left == 0:
                self._code = 130 if self.signals else self._write()
        return None if self._left else self._code

    def send_signal(self, number: int) -> None:
        self.signals.append(number)
        self._left = min(self._left, 2)

    def kill(self) -> None:
        raise AssertionError("a run that stops in order is not killed")


class Runner:
    """Takes the place of `start_run`: notes what is started, and how many at a time."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.resumed: list[str] = []
        self.fail: dict[str, str] = {}
        self.interrupt_in = ""
        self.looks = 2
        self.most = 0
        self._running: list[str] = []

    def __call__(self, arguments: Sequence[str], log: Path) -> Played:
        config = load(Path(arguments[0]))
        assert Path(arguments[0]).parent.name == (config.name if "--resume" in arguments else "configs")
        (self.resumed if "--resume" in arguments else self.started).append(config.name)
        self._running.append(config.name)
        self.most = max(self.most, len(self._running))
        log.write_text("starting\n")
        if config.name == self.interrupt_in:
            config.run_dir.mkdir()
            (config.run_dir / "config.yaml").write_text(config.to_yaml())
            os.kill(os.getpid(), signal.SIGINT)
        return Played(lambda: self._end(config, log), self.looks)

    def _end(self, config: Config, log: Path) -> int:
        self._running.remove(config.name)
        if config.name in self.fail:
            log.write_text(f"starting\nerror: {self.fail[config.name]}\nbye\n")
            return 1
        fill(config)
        return 0


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    runner = Runner()
    monkeypatch.setattr(compare, "start_run", runner)
    monkeypatch.setattr("ops.compare.runs._LOOK_S", 0.01)
    return runner


@pytest.fixture
def call(tmp_path: Path) -> Callable[..., int]:
    def call(*arguments: str, policies: str = "none,kat", seeds: str = "0-1", name: str = "grid") -> int:
        fixed = ("--set", f"runs_dir={tmp_path}", "--set", f"learner.batch_size={BATCH}")
        chosen = ("--policies", policies, "--seeds", seeds, "--name", name)
        return main(["compare", DEMO, *fixed, *chosen, *arguments])

    return call


def test_a_cell_waits_for_the_one_it_needs() -> None:
    kat, matched, other = Cell("kat", 0), Cell("random_matched", 0), Cell("none", 1)
    assert next_ready([matched, other], [kat]) == other
    assert next_ready([matched], [kat]) is None
    assert next_ready([matched, kat], []) == kat
    assert next_ready([matched], []) == matched  # kat is done or has failed


def test_loss_modes_and_staleness_are_axes_and_rows_of_the_report(
    tmp_path: Path, runner: Runner, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    axes = ("--loss", "reverse_kl_topk_tail,forward_kl_topk_tail", "--sweep", "learner.max_staleness=1,4")
    assert call(*axes, policies="kat", seeds="0-2") == 0
    labels = [f"kat.{mode}.max_staleness-{most}" for mode in ("reverse_kl", "forward_kl") for most in (1, 4)]
    assert runner.started == [f"{label}-s{seed}" for seed in range(3) for label in labels]
    config = RunFolder(tmp_path / "grid" / f"{labels[2]}-s1").config
    assert (config.loss.mode, config.learner.max_staleness) == ("forward_kl_topk_tail", 1)
    text = (tmp_path / "grid" / "compare.md").read_text()
    assert all(f"| {label} |" in text for label in labels)
    assert f"Row minus `{labels[0]}`" in text
    capsys.readouterr()
    assert call(*axes, policies="kat", seeds="0-2") == 0
    assert len(runner.started) == 12  # all are done


def test_the_grid_is_run_seed_by_seed_and_reported(
    tmp_path: Path, runner: Runner, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(policies="none,random_matched", seeds="0-2") == 0
    order = [f"{label}-s{seed}" for seed in range(3) for label in ("none", "kat", "random_matched")]
    assert (runner.started, runner.resumed, runner.most) == (order, [], 1)
    out = capsys.readouterr().out
    assert "random_matched is made from kat of the same seed: row kat added" in out
    assert "kat-s1: starts" in out
    assert "kat-s1: done, avg@4 0.611, 6,600 tokens generated" in out
    assert "; 0 of 9 left" in out
    text = (tmp_path / "grid" / "compare.md").read_text()
    assert "Results: 9 runs, budget steps" in text
    assert out.count("within 2 %") >= 3
    matched = load(tmp_path / "grid" / "random_matched-s2" / "config.yaml")
    assert (matched.seed, matched.termination.policy, set(matched.termination.hazard)) == (2, "random_matched", {24})


def test_what_is_done_is_kept_and_what_is_half_done_is_resumed(
    tmp_path: Path, runner: Runner, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    runner.interrupt_in, runner.looks = "kat-s0", 6
    assert call() == 130
    assert runner.started == ["none-s0", "kat-s0"]
    captured = capsys.readouterr()
    assert "Continue with the same command" in captured.err
    assert not (tmp_path / "grid" / "compare.md").exists()
    runner.interrupt_in = ""
    assert call() == 0
    assert runner.resumed == ["kat-s0"]
    assert runner.started == ["none-s0", "kat-s0", "none-s1", "kat-s1"]
    assert "1 done already, 3 to do" in capsys.readouterr().out
    assert call(policies="fixed,kat", seeds="0-2") == 0  # larger: what is there stays in the report
    assert runner.started[4:] == ["fixed-s0", "fixed-s1", "fixed-s2", "kat-s2"]
    text = (tmp_path / "grid" / "compare.md").read_text()
    assert "NOT DONE, and left out of all tables: none-s2 (new)." in text


def test_cells_of_another_base_are_not_joined(
    tmp_path: Path, runner: Runner, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(policies="none,random_matched", seeds="0-1") == 0
    before = sorted(path.name for path in (tmp_path / "grid").iterdir())
    runner.started.clear()
    other = ("--set", "learner.learning_rate=0.25")
    assert call(*other, policies="none", seeds="2-3") == 2  # other seeds of the same row
    assert call(*other, policies="fixed", seeds="0-1") == 2  # another row of the same seeds
    err = capsys.readouterr().err
    assert err.count("learner.learning_rate is 0.0005 there and 0.25 now") == 2
    assert runner.started == []
    assert sorted(path.name for path in (tmp_path / "grid").iterdir()) == before
    assert call(policies="none", seeds="2") == 0


def test_cells_of_two_bases_are_not_reported(
    tmp_path: Path, runner: Runner, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call() == 0
    path = tmp_path / "grid" / "kat-s1" / "config.yaml"
    path.write_text(load(path, ["learner.learning_rate=0.25"]).to_yaml())
    capsys.readouterr()
    assert call("--report-only") == 2
    assert "learner.learning_rate is 0.0005 in none-s0 and 0.25 in kat-s1" in capsys.readouterr().err


def drop_last_evaluation(run: Path) -> None:
    write_lines(run / "eval.jsonl", [evaluation(0, 0.25)])
    write_summary(run)


def test_a_run_whose_last_evaluation_is_missing_is_resumed(
    tmp_path: Path, runner: Runner, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(policies="none,random_matched") == 0
    drop_last_evaluation(tmp_path / "grid" / "kat-s0")
    assert call("--report-only") == 0
    assert "NOT DONE, and left out of all tables: kat-s0 (begun)." in capsys.readouterr().out
    runner.started.clear()
    assert call(policies="none,random_matched") == 0
    assert (runner.started, runner.resumed) == ([], ["kat-s0"])
    assert "NOT DONE" not in (tmp_path / "grid" / "compare.md").read_text()


def test_a_run_that_ends_without_its_last_evaluation_has_failed(
    tmp_path: Path,
    runner: Runner,
    call: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def end(config: Config, log: Path) -> int:
        fill(config)
        drop_last_evaluation(config.run_dir)
        return 0

    monkeypatch.setattr(runner, "_end", end)
    assert call(policies="none", seeds="0") == 1
    captured = capsys.readouterr()
    assert f"failed: none-s0: the run ended, but it is not complete: its last step, {STEPS}, is not" in captured.err
    assert "NOT DONE, and left out of all tables: none-s0 (begun)." in captured.out
    assert (tmp_path / "grid" / "compare.csv").read_text().splitlines()[1].startswith("none,0,begun,,")


def test_a_run_that_was_killed_while_it_began_is_begun_again(
    tmp_path: Path, runner: Runner, call: Callable[..., int]
) -> None:
    (tmp_path / "grid" / "none-s0").mkdir(parents=True)
    (tmp_path / "grid" / "none-s0" / "run.json").write_text("{}")
    (tmp_path / "grid" / "compare.json").write_text(
        '{"budget": "steps", "rows": {"none": ["termination.policy=none"]}, "seeds": [0]}'
    )
    seen: list[list[Path]] = []
    begun = runner.__call__

    def look(arguments: Sequence[str], log: Path) -> Played:
        seen.append(list((tmp_path / "grid" / "none-s0").iterdir()))
        return begun(arguments, log)

    compare.start_run = look  # type: ignore[assignment]  # the fixture puts the real one back
    assert call(policies="none", seeds="0") == 0
    assert (runner.started, seen) == (["none-s0"], [[]])


def test_another_comparison_at_work_is_named(
    tmp_path: Path, runner: Runner, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "grid").mkdir()
    with lock(tmp_path / "grid"):
        assert call() == 2
    assert "another `katana compare` is running in this folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "grid").iterdir()] == [".lock"]


def test_what_was_added_before_the_folder_was_held_is_kept(
    tmp_path: Path, runner: Runner, call: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_first(folder: Path) -> IO[str]:
        monkeypatch.setattr(compare, "lock", lock)
        assert call(policies="fixed", seeds="0") == 0
        return lock(folder)

    monkeypatch.setattr(compare, "lock", other_first)
    assert call(policies="kat", seeds="1") == 0
    rows = json.loads((tmp_path / "grid" / "compare.json").read_text())
    assert (list(rows["rows"]), rows["seeds"]) == (["kat", "fixed"], [0, 1])


def test_folders_that_cannot_be_are_refused(
    tmp_path: Path, runner: Runner, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "grid").write_text("a file")
    assert call() == 2
    assert "is not a comparison" in capsys.readouterr().err
    assert call("--set", f"runs_dir={tmp_path}/grid/below") == 2
    assert "cannot be made or written to (Not a directory); check runs_dir" in capsys.readouterr().err
    assert (tmp_path / "grid").read_text() == "a file"


@pytest.mark.parametrize(("policy", "matched"), [("kat", "random_matched"), ("entropy", "random_matched-entropy")])
def test_seeds_that_are_not_matched_are_named(
    tmp_path: Path, runner: Runner, call: Callable[..., int], policy: str, matched: str
) -> None:
    assert call(policies=f"none,{policy},{matched}", seeds="0-2") == 0
    text = (tmp_path / "grid" / "compare.md").read_text()
    assert "Wall-clock" in text and "wait for the evaluator" in text
    assert "NOT matched within 2 %" not in text
    books = tmp_path / "grid" / f"{matched}-s1" / "rollouts.jsonl"
    lines = [json.loads(one) for one in books.read_text().splitlines()]
    write_lines(books, [one | {"tokens_kept": one["tokens_kept"] // 2} for one in lines])
    assert call("--report-only") == 0
    against = (tmp_path / "grid" / "compare.md").read_text().partition(f"## Against {matched}")[2]
    assert "NOT matched within 2 %: seed 1. There" in against.partition("##")[0]
    # Of three seeds one keeps half, the others the same: a sixth less, ± 4.3027 · 0.2887 / √3.
    last = next(line for line in against.splitlines() if line.startswith("| all"))
    expected = ["all", "NOT within 2 %", "mean generated +0.0% ± 0.0%, mean kept -16.7% ± 71.7%"]
    assert [part.strip() for part in last.strip("| ").split("|")] == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rollouts.jsonl", "{]\n"),
        ("rollouts.jsonl", "[]\n"),
        ("rollouts.jsonl", '{"ending": "trained", "active": true, "finish_reason": "eos", "arm": "treated"}\n'),
        ("summary.json", "[]"),
    ],
)
def test_a_damaged_run_of_kat_is_refused_by_name(
    name: str, text: str, tmp_path: Path, runner: Runner, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(policies="kat", seeds="0") == 0
    run = tmp_path / "grid" / "kat-s0"
    (run / name).write_text(text)
    assert main(["match", str(run)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {run}") and "damaged (" in err
    assert ("rollouts.jsonl:1: " if name == "rollouts.jsonl" else "expected the summary of a run") in err


def test_an_evaluation_behind_a_torn_line_stands_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an evaluator left that was killed while it wrote."""

    class Measured:
        def swap(self, path: Path) -> None: ...

        def measure(self, stop: threading.Event) -> Scores:
            return Scores(4, 8, 0.5, 0.6, 9.0, 1.0)

    results = tmp_path / "eval.jsonl"
    write_lines(results, [evaluation(0, 0.25)])
    with results.open("a") as file:
        file.write('{"policy_version":1,"st')
    monkeypatch.setattr(evaluate, "verified", lambda folder, ref: folder / ref.file)
    note = ToEvaluate(version=2, step=2, tokens_trained=5, sha256="0")
    assert evaluate._evaluate_one(Measured(), note, tmp_path, results, threading.Event())  # type: ignore[arg-type]
    assert [json.loads(one)["step"] for one in results.read_text().splitlines()] == [0, 2]


def test_jobs_run_at_a_time(runner: Runner, call: Callable[..., int]) -> None:
    runner.looks = 4
    assert call("--jobs", "3", policies="random_matched,kat", seeds="0-1") == 0
    assert runner.most == 2  # the matched ones wait for both runs of kat
    assert runner.started[:2] == ["kat-s0", "kat-s1"]


def test_a_failed_cell_stops_no_other_and_is_named(
    tmp_path: Path, runner: Runner, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    runner.fail = {"kat-s0": "the disk is full"}
    assert call(policies="none,kat,random_matched") == 1
    captured = capsys.readouterr()
    assert "failed: kat-s0: exit code 1: error: the disk is full (log: " in captured.err
    assert "failed: random_matched-s0: random_matched-s0 is made from kat-s0, which is not done" in captured.err
    assert runner.started == ["none-s0", "kat-s0", "none-s1", "kat-s1", "random_matched-s1"]
    assert "kat-s0 (new), random_matched-s0 (new)" in captured.out
    runner.fail = {}
    assert call(policies="none,kat,random_matched") == 0
    assert "NOT DONE" not in (tmp_path / "grid" / "compare.md").read_text()


def test_a_run_that_leaves_no_summary_has_failed(
    tmp_path: Path, runner: Runner, call: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_end", lambda config, log: 0)
    assert call(policies="none", seeds="0") == 1
    assert (tmp_path / "grid" / "compare.csv").read_text().splitlines()[1].startswith("none,0,new,,")


def test_another_config_is_refused_before_anything_runs(
    tmp_path: Path, runner: Runner, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call() == 0
    runner.started.clear()
    assert call("--set", "termination.eta=0.25", seeds="0-3") == 2
    assert "termination.eta is 0.6 there and 0.25 now" in capsys.readouterr().err
    assert call("--budget", "tokens:5000") == 2
    assert "its budget is steps" in capsys.readouterr().err
    assert runner.started == []
    assert not (tmp_path / "grid" / "kat-s2").exists()


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ((), {"policies": "none,katt"}, "the nearest is 'kat'"),
        ((), {"seeds": "4-0"}, "'4-0' is not a range of seeds"),
        (("--budget", "tokens:many"), {}, "expected `steps`, or `tokens:N`"),
        (("--budget", "tokens:900", "--set", "learner.max_steps=3"), {}, "it is the tokens that end a run"),
        (("--variant", "short:learner.max_steps=3"), {}, "the budget is the same in all rows"),
        (("--set", "learner.max_generated_tokens=900"), {}, "ask for --budget tokens:900"),
        (("--set", "eval.every_steps=0"), {}, "there is nothing to compare"),
        (("--set", "learner.max_step=3"), {}, "the nearest known one is 'learner.max_steps'"),
        (
            (),
            {"policies": "none,gone_for_good:X"},
            "row 'gone_for_good.X': termination.policy: 'gone_for_good:X': the module",
        ),
        (("--variant", "early:termination.etta=0.1"), {}, "the nearest known one is 'termination.eta'"),
        (("--set", "teacher.model=/no/such"), {}, "row 'none': /no/such: there is no such folder"),
        (("--set", "termination.shadow=true"), {"policies": "random_matched"}, "needs policy kat, apply stop"),
        (("--set", "name=x/y"), {"name": ""}, "name"),
        ((), {"name": "taken"}, "is not a comparison"),
        (("--report-only",), {"name": "absent"}, "not a comparison (no compare.json in it)"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(
    arguments: tuple[str, ...],
    options: dict[str, str],
    said: str,
    tmp_path: Path,
    runner: Runner,
    call: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    assert call(*arguments, **options) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said in err
    assert runner.started == []
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "notes.txt"]


def test_the_report_is_made_from_the_folders_alone_and_twice_the_same(
    tmp_path: Path, runner: Runner, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(policies="none,kat,random_matched", seeds="0-2") == 0
    folder = tmp_path / "grid"
    names = ("compare.csv", "compare.md", "compare.png", "compare.html")
    first = {name: (folder / name).read_bytes() for name in names}
    for name in names:
        (folder / name).unlink()
    moved = folder.rename(tmp_path / "other").rename(folder)
    capsys.readouterr()
    assert main(["compare", str(moved), "--report-only"]) == 0
    assert {name: (folder / name).read_bytes() for name in names} == first
    assert first["compare.md"].decode().split("\n![")[0].strip() in capsys.readouterr().out
    assert call("--report-only") == 0  # the same, named by config and name
    assert len(runner.started) == 9
    check_csv(first["compare.csv"].decode())
    page = first["compare.html"].decode()
    assert page.count("<table>") == 7 and "<svg" in page and "http:" not in page
    assert first["compare.png"].startswith(b"\x89PNG")


def check_csv(text: str) -> None:
    rows = list(csv.DictReader(text.splitlines()))
    assert [(row["row"], row["seed"], row["state"]) for row in rows[3:6]] == [("kat", str(n), "done") for n in range(3)]
    kat = rows[5]
    assert float(kat["avg_at_k"]) == pytest.approx(0.622)
    # 50 control rollouts and 50 treated ones of 40 tokens, and 100 that were cut.
    assert {name: kat[f"tokens_{name}"] for name in ("generated", "trained", "detection", "overshoot")} == {
        "generated": "6600",
        "trained": "6000",
        "detection": "400",
        "overshoot": "200",
    }
    assert float(kat["length_saving"]) == pytest.approx(1 - (50 * 40 + 100 * 26) / 150 / 40)
    assert rows[0]["length_treated"] == ""


def test_the_tables_by_hand(tmp_path: Path, runner: Runner, call: Callable[..., int]) -> None:
    assert call(policies="none,kat", seeds="0-2") == 0
    lines = (tmp_path / "grid" / "compare.md").read_text().splitlines()
    table = {line.split("|")[1].strip(): line for line in reversed(lines) if line.startswith("| ")}
    # none: 0.50, 0.51, 0.52; kat: 0.600, 0.611, 0.622; s = 0.01 and 0.011, half = 4.3027 s / √3.
    assert "| 0.510 ± 0.025 |" in table["none"]
    assert "| 0.611 ± 0.027 |" in table["kat"]
    assert "|  61 ± 2 |" in table["kat"]
    # 18 steps were judged; of seed 0 the means of steps 3 to 8 and 15 to 20 are 0.5 · 5.5 / 20 and 0.5 · 17.5 / 20.
    drift = next(line for line in lines[lines.index("## Drift") :] if line.startswith("| kat"))
    expected = ["kat", "0.04 → 0.04 (+0 ± 0)", "0.140 → 0.446 (+0.306 ± 0.015)"]
    assert [part.strip() for part in drift.strip("| ").split("|")][:3] == expected
    pair = next(line for line in lines if line.startswith("| avg@4"))
    # 0.100, 0.101, 0.102; half = 4.3027 · 0.001 / √3.
    expected = ["avg@4", "kat", "3", "+0.101", "+0.099 to +0.103", "+0.100 to +0.102", "3 0 0", "higher"]
    assert [part.strip() for part in pair.strip("| ").split("|")] == expected


def drop_as_stale(run: Path, count: int, tokens: int) -> None:
    """Besides what a run has trained on."""
    lines = [json.loads(text) for text in (run / "rollouts.jsonl").read_text().splitlines()]
    changes = {"ending": "dropped", "reason": "stale", "finish_reason": "length", "staleness": 9, "tokens_trained": 0}
    lengths = dict.fromkeys(("tokens_generated", "tokens_kept", "tokens_trainable"), tokens)
    lines += [line(rid=f"r{len(lines) + one}", active=False, **changes, **lengths) for one in range(count)]
    write_lines(run / "rollouts.jsonl", lines)
    write_summary(run)


def test_a_run_that_trained_on_a_sample_that_is_not_fair_is_named(
    tmp_path: Path, runner: Runner, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Seven that ran to 192 in one run; as many of 40 tokens, and two of 192 (a hundredth), in two others."""
    stale = {"none-s1": (7, 192), "none-s0": (7, 40), "kat-s0": (2, 192)}

    def end(config: Config, log: Path) -> int:
        fill(config)
        if config.name in stale:
            drop_as_stale(config.run_dir, *stale[config.name])
        return 0

    runner._end = end  # type: ignore[method-assign]
    assert call() == 0
    out = capsys.readouterr().out
    ended = {one.split("] ")[1].split(":")[0]: one for one in out.splitlines() if ": done, " in one}
    named = [cell for cell, said in ended.items() if "WARNING" in said]
    assert named == ["none-s1"]
    words = "stale (older than learner.max_staleness when the learner took it): 7, 3.4% of them and the trained"
    assert (
        f"WARNING: {words}. Mean tokens (± sd) against the trained: 192.0 ± 0.0 against 40.0 ± 0.0" in ended["none-s1"]
    )
    text = (tmp_path / "grid" / "compare.md").read_text()
    assert text.strip().split("\n![")[0].strip() in out
    assert "WARNING: not trained on a fair sample: none-s1. See" in text
    assert text.count("WARNING, ") == 1 and f"WARNING, none-s1: {words}" in text
    assert "WARNING, none-s1: " in (tmp_path / "grid" / "compare.html").read_text()
    rows = {
        row["row"] + row["seed"]: row
        for row in csv.DictReader((tmp_path / "grid/compare.csv").read_text().splitlines())
    }
    assert float(rows["none1"]["stale_share"]) == pytest.approx(7 / 207)
    names = ("trainable_trained", "trainable_stale", "written_trained", "written_stale", "run_end_share")
    assert [rows["none1"][name] for name in names] == ["40.0", "192.0", "40.0", "192.0", "0.0"]
    assert [rows["kat1"][name] for name in names] == ["30.0", "", "33.0", "", "0.0"]


def test_where_little_was_left_out_nothing_is_warned_of(
    tmp_path: Path, runner: Runner, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call() == 0
    assert "WARNING" not in capsys.readouterr().out
    text = (tmp_path / "grid" / "compare.md").read_text()
    assert "WARNING" not in text and "## What was left out of the training" in text


def test_the_share_called_by_chance_has_two_digits(tmp_path: Path, runner: Runner, call: Callable[..., int]) -> None:
    assert call(policies="none,kat", seeds="0-2") == 0
    assert "of 2 without any difference about 0.1 would" in (tmp_path / "grid" / "compare.md").read_text()
    for path in tmp_path.glob("grid/*/eval.jsonl"):
        lines = [json.loads(one) | {"pass@k": 0.9} for one in path.read_text().splitlines()]
        write_lines(path, lines)
    assert call("--report-only", policies="none,kat", seeds="0-2") == 0
    assert (
        "of 1 without any difference about 0.05 would be significant by chance"
        in (tmp_path / "grid" / "compare.md").read_text()
    )
