"""Rows that name their teacher: those of a data set, and the dialects of the built-in task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_sets import FORMATS, put_rows, put_tiny_qwen3
from samples import make_config
from transformers import AutoModelForCausalLM

from common.config import Config, ConfigError
from common.pretrained import PACKAGE_ROOT, ModelError, check_pair
from ops.run.check import check
from ops.run.devices import spread
from ops.tasks.arithmetic import DIALECTS, SHIFTED, SHIFTS, Arithmetic
from ops.tasks.pretrain import VOCABULARY, ids_of, shift
from ops.tasks.source import TaskSource, make_task

ROWS = [{"prompt": f"p{n}", "answer": n, "kind": ("math", "code")[n % 3 == 0]} for n in range(7)]
MODELS = PACKAGE_ROOT / "ops" / "models"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put_tiny_qwen3(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def begin(tiny: Path, tmp_path: Path) -> Callable[..., Config]:
    def make(path: Path, **data: Any) -> Config:
        teachers = {name: {"model": str(tiny)} for name in ("math", "code")}
        values = {"task": "dataset", "path": str(path), "verifier": "exact", "teacher_key": "kind"} | data
        models = {"student": {"model": str(tiny)}, "teacher": None, "teachers": teachers}
        return make_config(tmp_path, data=values, eval={"every_steps": 0}, **models)

    return make


@pytest.mark.parametrize("form", FORMATS)
def test_each_row_has_the_teacher_that_it_names(form: str, begin: Callable[..., Config], tmp_path: Path) -> None:
    source = TaskSource(begin(put_rows(tmp_path / "rows", ROWS, form)))
    found = {source.problem(index).prompt: source.teacher(index) for index in range(len(ROWS))}
    assert found == {row["prompt"]: row["kind"] for row in ROWS}
    assert source.by_teacher == {"code": 3, "math": 4}


def test_the_name_may_be_nested_and_counts_in_the_digest(begin: Callable[..., Config], tmp_path: Path) -> None:
    nested = [{"prompt": "p", "answer": 1, "meta": {"kind": kind}} for kind in ("math", "code")]
    digests = set()
    for rows in (nested, nested[::-1], [nested[0]] * 2):
        source = TaskSource(begin(put_rows(tmp_path / "rows", rows, "jsonl"), teacher_key="meta.kind"))
        digests.add(make_task(begin(tmp_path / "rows.jsonl", teacher_key="meta.kind"), source.tokenizer).digest)  # type: ignore[attr-defined]
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"kind": "bio"}, "line 2: the teacher ('kind') is 'bio'; allowed: math, code"),
        ({"kind": 7}, "line 2: the teacher ('kind') is 7; allowed: math, code"),
        ({"kind": None}, "line 2: the teacher ('kind') is None; allowed: math, code"),
        ({"kinds": "math"}, "line 2: no column 'kind'; the nearest is 'kinds'"),
    ],
)
def test_a_row_without_a_known_teacher_is_refused_with_its_line(
    row: dict[str, Any], words: str, begin: Callable[..., Config], tmp_path: Path
) -> None:
    path = put_rows(tmp_path / "rows", [ROWS[0], {"prompt": "p", "answer": 1, **row}], "jsonl")
    with pytest.raises(ConfigError) as caught:
        TaskSource(begin(path))
    assert str(caught.value).startswith(f"{path}, {words[:7]}".rstrip())
    assert words.partition(": ")[2] in str(caught.value)


# --- the dialects of arithmetic ---------------------------------------------------------------------------------------


def dialects(folder: Path, **changes: Any) -> Config:
    teachers = {"plain": {"model": str(MODELS / "teacher")}, "shifted": {"model": str(folder / "shifted")}}
    values: dict[str, Any] = {
        "student": {"model": str(MODELS / "student")},
        "teacher": None,
        "teachers": teachers,
        "data": {"teacher_key": "dialect", "options": {"shifted_percent": 50}, "max_prompt_length": 24},
        "eval": {"every_steps": 0},
    }
    return make_config(folder, **values | changes)


def test_a_share_of_the_problems_is_written_in_the_other_dialect() -> None:
    task, plain = Arithmetic(shifted_percent=30), Arithmetic()
    found = [task.problem(index, split="train", seed=1) for index in range(400)]
    shifted = [one for one in found if one.teacher == SHIFTED]
    assert 80 <= len(shifted) <= 160 and {one.teacher for one in found} == set(DIALECTS)
    for index, one in enumerate(found):
        same = plain.problem(index, split="train", seed=1)
        assert one.answer == same.answer
        assert one.prompt == (same.prompt.replace("?", "\n") if one in shifted else same.prompt)
        assert same.teacher == ""


def test_a_dialect_is_judged_by_its_own_mark() -> None:
    task = Arithmetic(min_numbers=3, max_numbers=3, shifted_percent=100)
    problem = task.problem(0, split="eval", seed=0)
    right, wrong = f"12+7;19#19-3;{problem.answer}={problem.answer}", f"12+7=19;19-3={problem.answer}#{problem.answer}"
    assert task.verify(problem, right) and not task.verify(problem, wrong)
    assert task.answer_end(problem, right) == len(right)
    with pytest.raises(ValueError, match="need 0 <= shifted_percent <= 100"):
        Arithmetic(shifted_percent=101)


@pytest.mark.slow
def test_the_shifted_model_is_the_other_one_with_renamed_tokens(tmp_path: Path) -> None:
    """Bit for bit: each token has the logit that the token of its other name has in the shipped model."""
    shift(MODELS / "teacher", tmp_path / "shifted")
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (MODELS / "teacher", tmp_path / "shifted")]
    text = "12+7-3?12+7=19;19-3=16#16"
    other = text.translate(str.maketrans(SHIFTS))
    assert other == "12+7-3\n12+7;19#19-3;16=16"
    with torch.inference_mode():
        plain, shifted = (
            model(input_ids=torch.tensor([ids_of(one)])).logits[0].numpy()
            for model, one in zip(models, (text, other), strict=True)
        )
    renamed = np.arange(len(VOCABULARY))
    for old, new in SHIFTS.items():
        renamed[VOCABULARY[old]] = VOCABULARY[new]
    np.testing.assert_array_equal(shifted[:, renamed], plain)
    assert np.abs(shifted - plain).max() > 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"teacher_key": "kind"}}, "data.teacher_key: 'kind' of the task 'arithmetic' names no teacher"),
        (
            {"data": {"teacher_key": "dialect", "options": {"shifted_percent": 0}}},
            "'dialect' of the task 'arithmetic' names no teacher; allowed: 'dialect' of the task 'arithmetic' with",
        ),
        (
            {"teachers": {"plain": {"model": "a"}, "other": {"model": "b"}}},
            "the problems name the teachers plain, shifted; teachers has plain, other",
        ),
        (
            {"teacher": {"model": "a"}, "teachers": {}, "data": {"options": {"shifted_percent": 5}}},
            "the problems name the teachers plain, shifted; teachers has none",
        ),
    ],
)
def test_teachers_that_the_task_does_not_name_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    config = dialects(tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        make_task(config)
    assert words in str(caught.value)


# --- katana check -----------------------------------------------------------------------------------------------------


def test_check_says_how_many_rows_each_teacher_has_and_what_its_workers_take(tmp_path: Path) -> None:
    shift(MODELS / "teacher", tmp_path / "shifted")
    config = dialects(tmp_path)
    settings = config.teachers["shifted"].model_copy(update={"workers": 2, "slots": 8})
    config = config.model_copy(update={"teachers": {**config.teachers, "shifted": settings}})
    found = check(config)
    assert found.problems == []
    lines = "\n".join(found.lines)
    assert f"teacher plain {MODELS / 'teacher'} (qwen3)" in lines
    assert f"teacher shifted {tmp_path / 'shifted'} (qwen3)" in lines
    (rows,) = [line for line in found.lines if line.startswith("rows")]
    numbers = [int(word) for word in rows.replace(",", " ").split() if word.isdigit()]
    assert rows.startswith("rows       by teacher, of the first 256 problems: plain ") and sum(numbers[1:]) == 256
    for name, slots in (("teacher-plain-0", 32), ("teacher-shifted-0", 8), ("teacher-shifted-1", 8)):
        assert f"memory     {name} on cpu with {slots} slots: at most " in lines
    assert "1 rollout, 1 teacher plain, 2 teacher shifted" in lines
    assert not [line for line in found.lines if "has no row" in line]


def test_check_warns_of_a_teacher_without_rows(begin: Callable[..., Config], tmp_path: Path) -> None:
    rows = [row for row in ROWS if row["kind"] == "math"]
    found = check(begin(put_rows(tmp_path / "rows", rows, "jsonl"), max_prompt_length=8))
    assert "rows       by teacher, of 4 rows: math 4, code 0" in found.lines
    assert "warning    teacher code has no row: its workers would wait for ever" in found.lines


def test_devices_are_spread_over_the_workers_of_all_teachers(tmp_path: Path) -> None:
    auto = {"device": "auto", "workers": 2}
    teachers = {"plain": {"model": "a", **auto}, "shifted": {"model": "b", **auto}, "third": {"model": "c"}}
    config = dialects(tmp_path, teachers=teachers, learner={"device": "auto"})
    assert spread(config, 4) == {
        "learner": "cuda:0",
        "teacher-plain-0": "cuda:1",
        "teacher-plain-1": "cuda:2",
        "teacher-shifted-0": "cuda:3",
        "teacher-shifted-1": "cuda:1",
        "teacher-third-0": "cpu",
        "rollout-0": "cpu",
    }


# --- one tokenizer for all --------------------------------------------------------------------------------------------


def test_the_teacher_whose_tokenizer_differs_is_named(tiny: Path, tmp_path: Path) -> None:
    teachers = {"plain": {"model": str(MODELS / "teacher")}, "shifted": {"model": str(tiny)}}
    with pytest.raises(ModelError, match=r"^teacher shifted: the tokenizers differ: id 0 is "):
        check_pair(dialects(tmp_path, teachers=teachers))
    with pytest.raises(ModelError, match=r"^teacher shifted: /no/such: there is no such folder"):
        check_pair(dialects(tmp_path, teachers={**teachers, "shifted": {"model": "/no/such"}}))


def test_the_stop_set_is_the_union_over_all_teachers(tmp_path: Path) -> None:
    from ops.tasks.pretrain import EOS_ID, PAD_ID, exchange_end

    exchange_end(MODELS / "teacher", tmp_path / "shifted")
    assert check_pair(dialects(tmp_path)).stop_ids == (EOS_ID, PAD_ID)
    assert check_pair(dialects(tmp_path, rollout={"stop_set": "student"})).stop_ids == (EOS_ID,)
    assert TaskSource(dialects(tmp_path))._stops == {EOS_ID, PAD_ID}


def test_each_teacher_must_be_long_enough(tmp_path: Path) -> None:
    shift(MODELS / "teacher", tmp_path / "shifted")
    config = tmp_path / "shifted" / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 256', '"max_position_embeddings": 40'))
    with pytest.raises(ModelError, match=r"^teacher shifted .*: context of 40 tokens is too short"):
        check_pair(dialects(tmp_path))
