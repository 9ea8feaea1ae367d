"""An audit of a run made by hand: right, wrong and looping texts, written on by the models that ship."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_sets import solution_of
from run_folders import fill, line, trace_line, write_lines

from common.config import ConfigError, load
from common.pretrained import ModelError, check_pair, find_model
from ops.audit import command as module
from ops.audit.command import audit
from ops.audit.cuts import AFTER, BEFORE, LOOP
from ops.audit.sampling import Continuer, Prefix, SamplingProgress, continue_all, find_student, make_decoder
from ops.cli.main import main
from ops.reading.rollouts import Words
from ops.tasks.pretrain import exchange_end
from ops.tasks.source import TaskSource

pytestmark = pytest.mark.slow

CONFIG = """
name: small
student: {model: ops/models/student}
teacher: {model: ops/models/teacher}
data: {max_prompt_length: 24}
termination: {window: 4, patience: 2, min_calibration: 2, control_fraction: 0.5}
learner: {batch_size: 2, max_steps: 2}
rollout: {max_completion_length: 110}
eval: {slots: 24}
"""
FILES = ("audit.csv", "audit.json", "audit.md", "audit.png")


class Maker:
    """Makes a run's folder of texts for the task's own problems."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.yaml").write_text(CONFIG)
        self.folder = folder
        self.source = TaskSource(load(folder / "config.yaml"))
        self._books: list[dict[str, Any]] = []
        self._traces: list[dict[str, Any]] = []

    def solution(self) -> str:
        """The right text for the next rollout's problem."""
        return solution_of(self.source.problem(len(self._books)).prompt)

    def tokens(self, text: str) -> list[int]:
        ids: list[int] = self.source.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def put(self, ids: Sequence[int], keep: int | None = None, trigger: int | None = None, **changes: Any) -> None:
        """Without `keep`, one in which the policy did not fire."""
        keep, trigger = keep if keep is not None else len(ids), trigger if trigger is not None else len(ids)
        number = len(self._books)
        arm = changes.get("arm", "treated")
        booked = line(rid=f"r{number:09d}", problem=number, tokens_generated=len(ids), tokens_kept=keep, **changes)
        traced = trace_line([0.5] * len(ids), keep, trigger, arm, booked["rid"], ids)
        self._books.append(booked)
        self._traces.append(traced | {"problem": number, "version": number})
        write_lines(self.folder / "rollouts.jsonl", self._books)
        write_lines(self.folder / "traces.jsonl", self._traces)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each kind of cut one, and as many uncut rollouts."""
    maker = Maker(tmp_path_factory.mktemp("audit") / "hand")
    right = maker.tokens(maker.solution() + "\n12+7?12+7=")
    answered = len(maker.tokens(maker.solution()))
    maker.put(right, answered + 1, answered + 5)
    wrong = maker.tokens(maker.solution().partition("#")[0] + "#9\n12+7?12+7=19")
    maker.put(wrong, len(wrong) - 9, len(wrong) - 1)
    maker.put(maker.tokens(maker.solution())[:40], 13, 27)
    step = maker.tokens(maker.solution().partition(";")[0] + ";")
    maker.put(step * 6, len(step), 4 * len(step))
    whole = maker.tokens(maker.solution())
    maker.put([*whole, 0], 20, 33, arm="control", correct=True)
    for _ in range(6):
        maker.put([*maker.tokens(maker.solution() + "\n12+7?12+7=19#19")][:105])
    shutil.copytree(find_model("ops/models/student"), maker.folder / "model")  # as if nothing had been learned
    return maker.folder


@pytest.fixture(scope="module")
def printed(run: Path) -> str:
    return audit(run, samples=4)


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "audit" / "audit.csv").open() as file:
        return list(csv.DictReader(file))


def test_texts_made_by_hand_come_out_as_they_must(run: Path, printed: str) -> None:
    right, wrong, before, loop, control = rows(run)
    assert [one["class"] for one in rows(run)] == [AFTER, AFTER, BEFORE, LOOP, BEFORE]
    chances = ("correct_keep", "correct_keep_teacher", "correct_trigger")
    assert [right[name] for name in chances] == ["1"] * 3
    assert [wrong[name] for name in chances] == ["0"] * 3
    assert float(before["correct_keep_teacher"]) >= 0.75  # a right beginning; this teacher is right in 99 %
    assert float(control["correct_keep_teacher"]) >= 0.75
    assert (control["correct_whole"], right["correct_whole"]) == ("1", "")
    # The first problem's answer has its two digits behind #.
    assert int(right["answer"]) == int(right["keep"]) - 1
    assert (before["answer"], loop["answer"]) == ("", "")
    assert len({one["uncut_rid"] for one in rows(run)}) == 5
    assert all(one["correct_uncut_keep"] and one["correct_uncut_trigger"] for one in rows(run))


def test_all_files_are_there_and_agree(run: Path, printed: str) -> None:
    assert sorted(path.name for path in (run / "audit").iterdir()) == sorted(FILES)
    tree = json.loads((run / "audit" / "audit.json").read_text())
    shares = [float(one["correct_keep"]) for one in rows(run)]
    assert tree["classes"]["all cuts"]["correct"]["keep"]["mean"] == pytest.approx(sum(shares) / 5, abs=1e-6)
    assert (tree["cuts"], tree["cuts_on_record"], tree["versions"]) == (5, 5, [0, 4])
    assert tree["student"] == "model/, the student at the end of the run"
    assert "all 5 cuts on record: 2 before the answer, 2 after the answer, 1 in a loop" in printed
    assert str(run / "audit") in printed
    assert (run / "audit" / "audit.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_same_seed_same_bytes_and_another_seed_others(run: Path, printed: str, tmp_path: Path) -> None:
    other = tmp_path / run.name
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("audit"))
    assert audit(other, samples=4).partition("\n\n/")[0] == printed.partition("\n\n/")[0]
    for name in FILES:
        assert (other / "audit" / name).read_bytes() == (run / "audit" / name).read_bytes()
    audit(other, samples=4, rollouts=3, seed=1)
    assert (other / "audit" / "audit.csv").read_bytes() != (run / "audit" / "audit.csv").read_bytes()
    assert len(rows(other)) == 3


def test_an_interrupted_audit_leaves_the_former_files(
    run: Path, printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    former = {name: (other / "audit" / name).read_bytes() for name in FILES}
    monkeypatch.setattr(module, "make_decoder", lambda *_, **__: None)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "continue_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        audit(other, samples=2, seed=9)
    assert {path.name: path.read_bytes() for path in (other / "audit").iterdir()} == former


# --- continuing -------------------------------------------------------------------------------------------------------


def test_what_has_ended_is_judged_as_it_is_and_needs_no_model(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(run / "config.yaml")
    pair, source = check_pair(config), TaskSource(config)
    weights = Continuer(pair.student.folder, None, "student")
    decoder = make_decoder(config, pair, weights, dtype="float32", device="cpu")
    solution = source.tokenizer(solution_of(source.problem(0).prompt), add_special_tokens=False)["input_ids"]
    ended, long = [*solution, pair.stop_ids[0]], solution[:20]
    prefixes = [Prefix("a", 0, np.array(ended, np.int32)), Prefix("b", 0, np.array(long, np.int32))]
    progress = SamplingProgress(4)
    steps: list[object] = []
    monkeypatch.setattr(decoder, "step", lambda *_: steps.append(None) or [])
    shares = continue_all(
        decoder, source, prefixes, stop_ids=pair.stop_ids, limit=20, samples=2, seed=0, progress=progress
    )
    assert shares == [1.0, 0.0]  # by STOP, right; at the limit, unfinished
    assert not steps
    progress.report()
    assert "4 of 4 continuations, 0 tokens written" in capsys.readouterr().err


# --- how they are read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stop_set", "text"), [("student", "1=1<pad>2"), ("union", "1=1")])
def test_a_text_ends_where_its_writer_ended_it(tmp_path: Path, stop_set: str, text: str) -> None:
    exchange_end(find_model("ops/models/teacher"), tmp_path / "teacher")
    (tmp_path / "config.yaml").write_text(
        CONFIG.replace("ops/models/teacher", str(tmp_path / "teacher")).replace("rollout: {", "rollout: {stop_set: x, ")
    )
    config = load(tmp_path / "config.yaml", [f"rollout.stop_set={stop_set}"])
    pair, source = check_pair(config), TaskSource(config)
    assert Words(config).stop_ids == set(pair.stop_ids)
    ids = source.tokenizer("1=1", add_special_tokens=False)["input_ids"]
    two = source.tokenizer("2", add_special_tokens=False)["input_ids"]
    assert source.text(np.array([*ids, 0, *two, 1], np.int32)) == text


def test_a_source_tells_where_an_answer_ends(run: Path) -> None:
    source = TaskSource(load(run / "config.yaml"))
    assert source.answer_end(0, "1=1#16;") == 6
    assert source.answer_end(0, "1=1#") is None


# --- which student ----------------------------------------------------------------------------------------------------


def test_the_student_is_the_named_one_then_the_run_s_then_its_newest_weights(run: Path, tmp_path: Path) -> None:
    config = load(run / "config.yaml")
    pair = check_pair(config)
    assert find_student(run, pair, "ops/models/teacher").name == "ops/models/teacher"
    assert find_student(run, pair, None).folder == run / "model"
    with pytest.raises(ConfigError, match=r"neither model/ nor weights/ is in it; name a student by --student"):
        find_student(tmp_path, pair, None)
    (tmp_path / "weights").mkdir()
    for version in (3, 12):
        path = tmp_path / "weights" / f"v{version:08d}.safetensors"
        path.write_bytes((pair.student.folder / "model.safetensors").read_bytes() if version == 12 else b"")
    found = find_student(tmp_path, pair, None)
    assert (found.folder, found.name) == (pair.student.folder, "weights/v00000012.safetensors, the newest of the run")
    make_decoder(config, pair, found, dtype="float32", device="cpu")
    assert found.file is not None
    found.file.write_bytes(b"torn")
    with pytest.raises(ModelError, match=r"v00000012.safetensors: cannot be loaded"):
        make_decoder(config, pair, found, dtype="float32", device="cpu")


# --- bad input --------------------------------------------------------------------------------------------------------


def test_folders_that_cannot_be_audited_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not a run's folder"):
        audit(tmp_path)
    folder = fill(tmp_path)
    with pytest.raises(ModelError, match=r"absent-student"):
        audit(folder)
    (folder / "config.yaml").write_text(CONFIG)
    with pytest.raises(ConfigError, match=r"neither model/ nor weights/"):
        audit(folder)
    with pytest.raises(ModelError, match=r"no-such-model"):
        audit(folder, student="no-such-model")
    write_lines(folder / "traces.jsonl", [trace_line([0.5] * 6, 6, 6)])
    with pytest.raises(ConfigError, match=r"no cut on record in 1 rollouts \(policy kat\)"):
        audit(folder)
    (folder / "config.yaml").write_text(CONFIG + "feeder: {record_traces: false}\n")
    (folder / "traces.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"no traces.jsonl.*it was off in this run"):
        audit(folder)
    assert not (folder / "audit").exists()


def test_a_run_that_cuts_nothing_is_told_how_to_have_cuts_on_record(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    (folder / "config.yaml").write_text(CONFIG.replace("window: 4", "policy: none, window: 4"))
    write_lines(folder / "traces.jsonl", [trace_line([0.5] * 6, 6, 6)])
    with pytest.raises(ConfigError, match=r"policy none.*termination.shadow"):
        audit(folder)


def test_nobody_to_judge(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    data = "data: {task: dataset, path: rows.jsonl, verifier: none, "
    config = CONFIG.replace("data: {", data).replace("eval: {", "eval: {every_steps: 0, ")
    (folder / "config.yaml").write_text(config)
    with pytest.raises(ConfigError, match=r"data.verifier is none"):
        audit(folder)


def test_a_folder_that_is_no_run_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(tmp_path)]) == 2
    assert f"error: {tmp_path}" in capsys.readouterr().err
