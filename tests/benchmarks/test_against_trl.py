"""The comparison with TRL: arguments, the prompts that TRL is given, and the figures. TRL itself needs the network."""

from __future__ import annotations

import json
import py_compile
from pathlib import Path
from typing import Any

import against_trl
import pytest
from accuracy_race import katana_s, outcome
from accuracy_race import table as race_table
from comparison import number, summarize, table
from exported import export
from run_folders import step_line, write_lines
from samples import make_config
from sides import Course, course_of
from trl_venv import requirements

from actors.feeder import head_of
from common.config import Config, ConfigError
from common.runfiles.records import Scores
from ops.bench.accuracy import Looked
from ops.tasks.pretrain import exchange_end
from ops.tasks.source import TaskSource

ROOT = Path(__file__).parents[2]
PAIR = {"student": {"model": "ops/models/student"}, "teacher": {"model": "ops/models/teacher"}}


def shipped(folder: Path, **changes: Any) -> Config:
    learner = {"max_steps": 4, "batch_size": 3, "learning_rate": 5e-4, "warmup_ratio": 0.5}
    return make_config(folder, **PAIR, learner=learner, **changes)


def test_trl_s_script_compiles(tmp_path: Path) -> None:
    py_compile.compile(str(ROOT / "benchmarks/trl_side.py"), cfile=str(tmp_path / "compiled"), doraise=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--out"),
        (["--out", "{}/o.json", "--repeats", "0"], "a whole number of at least 1"),
        (["--out", "{}/o.json", "--policy", "fixd"], "invalid choice"),
        (["--out", "{}/o.json", "--steps", "4", "--warmup", "4"], "--warmup 4: expected fewer than --steps, 4"),
        (["--out", "{}/o.json", "--steps", "1"], "--warmup 1: expected fewer than --steps, 1"),
        (["--out", "{}"], "expected a file in a folder that is there"),
        (["--out", "{}/none/o.json"], "expected a file in a folder that is there"),
        (["--out", "{}/o.json", "--problems", "9"], "--problems is for --time-to-accuracy"),
        (["--out", "{}/o.json", "--katana-steps", "9"], "--katana-steps is for --time-to-accuracy"),
        (["--out", "{}/o.json", "--set", "seed=1"], "--set is for --time-to-accuracy"),
        (
            ["--out", "{}/o.json", "--time-to-accuracy", "--set", "learner.max_steps=9"],
            "--set learner.max_steps: expected --katana-steps",
        ),
        (["--out", "{}/o.json", "--time-to-accuracy", "--pair", "made"], "the made pair learns nothing"),
        (["--out", "{}/o.json", "--time-to-accuracy", "--warmup", "2"], "counts from the first step on"),
    ],
)
def test_bad_arguments_exit_with_2(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        against_trl.main([word.format(tmp_path) for word in words])
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


def test_the_race_has_its_own_defaults(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "o.json")]
    speed, race = against_trl.parse_arguments(out), against_trl.parse_arguments([*out, "--time-to-accuracy"])
    assert (speed.steps, speed.warmup, speed.policy) == (40, 10, "none")
    assert (race.steps, race.katana_steps, race.every, race.problems, race.policy) == (50, 100, 5, 192, "kat")


def test_both_sides_have_the_batch_that_is_asked_for(tmp_path: Path) -> None:
    words = ["--out", str(tmp_path / "o.json"), "--work", str(tmp_path), "--steps", "6", "--batch-size", "8"]
    assert export(against_trl.config_of(against_trl.parse_arguments(words)), threads=2)["batch_size"] == 8


def test_both_sides_have_the_demo_s_settings(tmp_path: Path) -> None:
    words = ["--out", str(tmp_path / "o.json"), "--work", str(tmp_path), "--steps", "6"]
    config = against_trl.config_of(against_trl.parse_arguments(words))
    assert (config.learner.max_steps, config.termination.policy, config.eval.every_steps) == (6, "none", 0)
    job = export(config, threads=2)
    assert (job["batch_size"], job["temperature"], job["max_completion_length"]) == (32, 1.0, 192)
    assert max(job["learning_rates"]) == 5e-4 and len(job["prompts"]) == 6 * 32


@pytest.mark.parametrize("generations", [1, 2])
def test_trl_gets_the_prompts_that_the_feeder_admits(tmp_path: Path, generations: int) -> None:
    config = shipped(tmp_path, seed=3, data={"num_generations": generations})
    source = TaskSource(config)
    admitted = [head_of(config, source, number).prompt.tolist() for number in range(12)]
    job = export(config, threads=1)
    assert [prompt["ids"] for prompt in job["prompts"]] == admitted
    tokenized = source.tokenizer([prompt["text"] for prompt in job["prompts"]])["input_ids"]  # as TRL does it
    assert tokenized == admitted
    json.dumps(job)


def test_trl_gets_the_learner_s_rates(tmp_path: Path) -> None:
    rates = export(shipped(tmp_path), threads=1)["learning_rates"]
    assert rates == pytest.approx([2.5e-4, 5e-4, 5e-4, 2.5e-4])


def test_what_trl_cannot_do_is_refused(tmp_path: Path) -> None:
    exchange_end(ROOT / "ops/models/teacher", tmp_path / "exchanged")
    tree = shipped(tmp_path).model_dump() | {"teacher": {"model": str(tmp_path / "exchanged")}}
    with pytest.raises(ConfigError, match=r"teacher.model: it ends with other tokens"):
        export(Config.model_validate(tree), threads=1)
    limited = shipped(tmp_path).model_dump()
    limited["learner"] |= {"max_generated_tokens": 1000}
    with pytest.raises(ConfigError, match="max_generated_tokens"):
        export(Config.model_validate(limited), threads=1)


def test_trl_s_environment_names_the_build_of_torch() -> None:
    import torch

    named = requirements()[0].removeprefix("torch==")
    assert torch.__version__.startswith(named)


# --- figures -----------------------------------------------------------------------------------------------------


def course(start: float, *ends: float, tokens: int = 100) -> Course:
    counts = tuple(tokens + place for place in range(len(ends)))
    return Course(start, ends[-1] + 1, ends, counts, counts, {"torch": "2"})


def test_a_step_s_seconds_are_counted_from_the_end_of_the_last_step_left_out() -> None:
    found = course(100.0, 110.0, 111.0, 113.0, 115.0, tokens=10).to_json(2)
    assert found["seconds_a_step"] == 2.0
    assert (found["generated_a_step"], found["trained_a_step"]) == (12.5, 12.5)
    assert (found["wall_s"], found["last_step_s"], found["steps_s"]) == (16.0, 15.0, [1.0, 2.0, 2.0])
    assert course(100.0, 110.0, 111.0).seconds_to(2) == {"since_start_s": 11.0, "since_first_step_s": 1.0}


def test_ratios_are_taken_within_a_repeat() -> None:
    pairs = [(2.0, 1.0), (9.0, 3.0), (4.0, 4.0)]
    repeats = [
        {"trl": course(0.0, 1.0, 1.0 + trl).to_json(1), "katana": course(0.0, 1.0, 1.0 + katana).to_json(1)}
        for trl, katana in pairs
    ]
    summary = summarize(repeats)
    assert summary["ratio"] == {"min": 1.0, "median": 2.0, "max": 3.0}  # the medians' own ratio would be 4/3
    assert summary["trl"]["seconds_a_step"] == {"min": 2.0, "median": 4.0, "max": 9.0}
    lines = table(summary).splitlines()
    assert lines[0] == "|  | min | median | max |"
    assert "| TRL's seconds / Katana's | 1 | 2 | 3 |" in lines
    assert "| Katana: seconds a step | 1 | 3 | 4 |" in lines
    with pytest.raises(ValueError, match="no repeats"):
        summarize([])


@pytest.mark.parametrize(("value", "text"), [(0.61234, "0.612"), (12.345, "12.3"), (1234.5, "1,234"), (0.0, "0")])
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_a_run_s_course_comes_from_its_folder(tmp_path: Path) -> None:
    steps = [(5.0, 300, 90), (7.0, 420, 80)]
    lines = [
        step_line(number, unix_s=unix_s, tokens_generated=generated, tokens_trained=trained)
        for number, (unix_s, generated, trained) in enumerate(steps, start=1)
    ]
    write_lines(tmp_path / "metrics.jsonl", lines)
    (tmp_path / "run.json").write_text('{"versions": {"torch": "2"}}')
    found = course_of(tmp_path)
    assert (found.ended_unix_s, found.generated, found.trained) == ((5.0, 7.0), (300, 120), (90, 80))


GOAL = Scores(k=4, n=100, avg_at_k=0.5, pass_at_k=0.9, mean_length=90.0, eos_rate=1.0)


def test_the_race_ends_with_the_first_checkpoint_at_the_goal() -> None:
    looks = [Looked(1, 0.4, 0.05, 0.0), Looked(2, 0.5, 0.05, 1.0)]
    found = outcome(course(0.0, 10.0, 30.0), GOAL, course(0.0, 6.0, 8.0), looks)
    assert found["trl"]["standard_error_at_most"] == pytest.approx(0.05)
    assert found["katana"] == {"step": 2, "avg_at_k": 0.5, "since_start_s": 8.0, "since_first_step_s": 2.0}
    assert found["ratio"] == {"since_start_s": 30 / 8, "since_first_step_s": 10.0}
    assert "| 1 | 0.500 | 0.050 | 30 (20) | 8 (2) | 2 | 3.75 (10) |" in race_table([found])


def test_a_goal_that_is_not_reached_has_no_time() -> None:
    found = outcome(course(0.0, 10.0, 30.0), GOAL, course(0.0, 6.0, 8.0), [Looked(2, 0.49, 0.05, 2.0)])
    assert found["katana"] is None and found["ratio"] is None
    assert "| 1 | 0.500 | 0.050 | 30 (20) | not reached | – | – |" in race_table([found])
    assert against_trl.accuracy_race.sentence(found).endswith("did not reach it, its best is 0.490")


def test_katana_s_race_keeps_every_checkpoint(tmp_path: Path) -> None:
    config = katana_s(shipped(tmp_path), steps=9, every=2, settings=["learner.num_iterations=4"])
    assert (config.learner.max_steps, config.checkpoints.every_steps, config.eval.every_steps) == (9, 2, 0)
    assert config.checkpoints.keep >= 5 and config.learner.num_iterations == 4


def test_a_wrong_setting_of_katana_s_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the nearest known one is 'learner.batch_size'"):
        katana_s(shipped(tmp_path), steps=9, every=2, settings=["learner.batch_sise=4"])
