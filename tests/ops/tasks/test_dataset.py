"""Prompts from data sets on disk: every format, bad files, chat templates, an order that only the seed decides."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_sets import AIME, DAPO, FORMATS, GSM8K, MATH, Rows, put_rows, put_tiny_qwen3
from samples import make_config

from common.config import Config, ConfigError, Data
from common.pretrained import PACKAGE_ROOT, ModelError, load_tokenizer
from ops.run.check import check
from ops.tasks import PromptTooLong, SpecialToken
from ops.tasks.dataset import shuffled
from ops.tasks.prompts import Renderer
from ops.tasks.rows import DataMissing, read_rows
from ops.tasks.source import TaskSource
from ops.tasks.templates import Templates

SHIPPED = {"model": "ops/models/student"}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put_tiny_qwen3(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def begin(tiny: Path, tmp_path: Path) -> Callable[..., Config]:
    def make(path: Path, benchmarks: dict[str, Any] | None = None, **data: Any) -> Config:
        models = {"student": {"model": str(tiny)}, "teacher": {"model": str(tiny)}}
        values = {"task": "dataset", "path": str(path), "verifier": "exact", "max_prompt_length": 400, **data}
        evaluation = {"every_steps": 1 if benchmarks else 0, "data": benchmarks or {}}
        return make_config(tmp_path, data=values, eval=evaluation, seed=3, **models)

    return make


def texts(source: TaskSource, count: int) -> list[str]:
    return [source.problem(index).prompt for index in range(count)]


# --- formats ---


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("rows", "prompt_key", "answer_key"),
    [(GSM8K, "question", "answer"), (MATH, "problem", "solution"), (AIME, "problem", "answer")],
    ids=["gsm8k", "math", "aime"],
)
def test_rows_become_problems(
    rows: Rows, prompt_key: str, answer_key: str, form: str, begin: Callable[..., Config], tmp_path: Path
) -> None:
    path = put_rows(tmp_path / "data" / "rows", rows, form)
    source = TaskSource(begin(path, prompt_key=prompt_key, answer_key=answer_key))
    assert source.count == len(rows)
    found = {(one.prompt, one.answer) for one in map(source.problem, range(len(rows)))}
    assert found == {(row[prompt_key], str(row[answer_key])) for row in rows}
    ids = source.prompt(0)
    assert source.tokenizer.decode(ids.tolist()) == source.problem(0).prompt


@pytest.mark.parametrize("form", FORMATS)
def test_messages_and_nested_columns(form: str, begin: Callable[..., Config], tmp_path: Path) -> None:
    path = put_rows(tmp_path / "dapo", DAPO, form)
    config = begin(
        path,
        answer_key="reward_model.ground_truth",
        chat=True,
        system_prompt="Think.",
        prompt_suffix=" Box it.",
        template_options={"enable_thinking": False},
    )
    prompts = texts(TaskSource(config), 5)
    expected = "<|system|>Think.<|end|><|user|>Solve problem {}. Box it.<|end|><|assistant|><nothink>"
    assert sorted(prompts) == [expected.format(number) for number in range(5)]


def test_text_becomes_one_message_of_the_user(begin: Callable[..., Config], tmp_path: Path) -> None:
    path = put_rows(tmp_path / "rows", AIME[:1], "jsonl")
    source = TaskSource(begin(path, prompt_key="problem", chat=True))
    assert texts(source, 1) == ["<|user|>Find $m+n$.<|end|><|assistant|>"]
    # Each role is one token, not its characters.
    assert len(source.prompt(0)) == len("Find $m+n$.") + 3


def test_a_folder_of_files_is_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a"):
        put_rows(tmp_path / "rows" / name, [{"prompt": name}], "jsonl")
    assert [row["prompt"] for _, row in read_rows(tmp_path / "rows")] == ["a", "b"]


def test_what_datasets_itself_saves(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = [{"prompt": f"p{number}", "answer": number} for number in range(10)]
    table = datasets.table.InMemoryTable.from_pylist(rows)
    # Fingerprints given: what makes them pickles classes, which not every version of pyarrow allows.
    saved = datasets.Dataset(table, fingerprint="a").select([3, 1, 4, 0, 9, 2, 6], new_fingerprint="b")
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "saved"), num_shards={"train": 3})
    assert [row for _, row in read_rows(tmp_path / "saved" / "train")] == list(saved)


# --- order ---


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 64, 1000])
def test_every_row_comes_once_an_epoch(count: int) -> None:
    assert sorted(shuffled(place, count, "7:0") for place in range(count)) == list(range(count))


def test_the_shuffle_is_fixed_for_ever_and_mixes() -> None:
    assert [shuffled(place, 10, "0:0") for place in range(10)] == [6, 7, 2, 3, 9, 8, 4, 5, 0, 1]
    far = sum(abs(shuffled(place, 1000, "1:0") - place) for place in range(1000)) / 1000
    assert 300 < far < 367  # a third of the rows is what a random permutation moves on average


def test_problems_depend_on_seed_and_index_alone(begin: Callable[..., Config], tmp_path: Path) -> None:
    rows = [{"prompt": f"p{number}", "answer": "1"} for number in range(20)]
    config = begin(put_rows(tmp_path / "rows", rows, "jsonl"))
    first = texts(TaskSource(config), 60)
    # A restarted feeder goes on at its cursor, here 37, with a source of its own.
    again = TaskSource(config)
    assert [again.problem(index).prompt for index in range(37, 60)] == first[37:]
    epochs = [first[:20], first[20:40], first[40:]]
    assert all(sorted(epoch) == sorted(row["prompt"] for row in rows) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert texts(TaskSource(config.model_copy(update={"seed": 4})), 20) != first[:20]


def test_benchmarks_are_in_the_file_s_order(begin: Callable[..., Config], tmp_path: Path) -> None:
    path = put_rows(tmp_path / "rows", [{"prompt": "p", "answer": "1"}], "jsonl")
    held = put_rows(tmp_path / "aime", AIME, "jsonl")
    config = begin(path, {"aime24": {"path": str(held), "prompt_key": "problem"}})
    source = TaskSource(config, "eval", "aime24")
    assert texts(source, 2) == ["Find $m+n$.", "Find $n$."]
    tokens = source.tokenizer("\\boxed{204}", add_special_tokens=False)["input_ids"]
    assert source.judge(0, tokens) is True
    assert source.judge(1, tokens) is False
    told = check(config)
    assert not told.problems
    assert any(line.startswith("benchmark  aime24: 2 of 2 rows") for line in told.lines)


# --- bad input ---


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("rows", "keys", "words"),
    [
        (AIME, {"prompt_key": "problems"}, "no column 'problems'; the nearest is 'problem'"),
        (AIME, {"prompt_key": "problem", "answer_key": "zzz"}, "no column 'zzz'; there are: "),
        (DAPO, {"chat": True, "answer_key": "reward_model.ground_truht"}, "the nearest is 'ground_truth'"),
        (DAPO, {"answer_key": "reward_model.ground_truth"}, "needs data.chat: true"),
        (DAPO, {"chat": True, "answer_key": "reward_model"}, "the answer ('reward_model') is dict"),
        (AIME, {"prompt_key": "id"}, "the prompt ('id') is int; allowed: text, or a list of messages"),
        ([{"prompt": "p", "answer": None}], {}, "is NoneType; allowed: text or a number"),
        ([{"prompt": "p", "answer": True}], {}, "is bool; allowed: text or a number"),
        ([{"prompt": "p", "answer": " "}], {}, "is empty"),
        ([{"prompt": "p", "answer": "\\boxed{}"}], {}, "is empty"),
        ([{"prompt": "p", "answer": float("nan")}], {}, "is nan; allowed: text or a finite number"),
        ([{"prompt": "p", "answer": float("-inf")}], {}, "is -inf; allowed: text or a finite number"),
        ([{"prompt": "<|end|> p", "answer": "1"}], {"chat": True}, "the prompt contains '<|end|>'"),
        ([{"prompt": " ", "answer": "1"}], {}, "the prompt is empty"),
        ([{"prompt": [{"role": "user"}], "answer": "1"}], {"chat": True}, "message 1 has no content"),
        ([{"prompt": [{"role": "assistant", "content": "x"}], "answer": "1"}], {"chat": True}, "the last message"),
    ],
)
def test_a_wrong_row_is_named(
    rows: Rows, keys: dict[str, Any], words: str, form: str, begin: Callable[..., Config], tmp_path: Path
) -> None:
    path = put_rows(tmp_path / "rows", rows, form)
    with pytest.raises(ConfigError) as caught:
        TaskSource(begin(path, **keys))
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", b"", "there is no row in it"),
        ("rows.jsonl", b"\n\n", "there is no row in it"),
        ("rows.jsonl", b'{"prompt": "p", "answer": "1"}\n{oops\n', "rows.jsonl, line 2: not valid JSON"),
        ("rows.jsonl", b"[1]\n", "line 1: a row is an object of columns, found list"),
        ("rows.jsonl", b"\xff\xfe\n", "line 1: not valid JSON"),
        ("rows.jsonl", b'{"prompt": "\\ud800 p", "answer": "1"}\n', "line 1: the prompt has half a character in it"),
        ("rows.jsonl", b'{"prompt": "p", "answer": "\\udc00"}\n', "line 1: the answer ('answer') has half a character"),
        ("rows.jsonl", b'{"prompt": "p", "answer": "1", "answer": "2"}\n', "'answer' occurs twice in one object"),
        ("rows.jsonl", b'{"prompt": "p", "answer": 1e999}\n', "is inf; allowed: text or a finite number"),
        ("rows.csv", b"prompt,answer\n", "the format '.csv' is not known; allowed: *.jsonl"),
        ("rows", b"x", "the format '' is not known"),
        ("rows.parquet", b"PAR1 nothing", "rows.parquet: cannot be read"),
        ("rows.parquet", b"", "rows.parquet: cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used(
    name: str, content: bytes, words: str, begin: Callable[..., Config], tmp_path: Path
) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        TaskSource(begin(tmp_path / name))
    assert words in str(caught.value)


def test_a_folder_that_cannot_be_used(begin: Callable[..., Config], tmp_path: Path) -> None:
    def refusal(name: str) -> str:
        with pytest.raises(ConfigError) as caught:
            TaskSource(begin(tmp_path / name))
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    assert "contains nothing that can be read" in refusal("empty")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert "splits/SPLIT with SPLIT of ['train', 'test']" in refusal("splits")
    (tmp_path / "saved").mkdir()
    state = tmp_path / "saved" / "state.json"
    odd: list[tuple[Any, str]] = [
        (5, "names no data files"),
        ({"filename": "data.arrow"}, "names no data files"),
        ([{"filename": "../up.arrow"}], "names no data files"),
        ([{"filename": "data.arrow"}], "data.arrow: is missing"),
        ([], "names no data files"),
    ]
    for files, words in odd:
        state.write_text(json.dumps({"_data_files": files}))
        assert words in refusal("saved")
    state.write_text('{"_indices_files": [{}]}')
    assert "save it again" in refusal("saved")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["train.jsonl", "test.jsonl"], "looks like several splits (test.jsonl, train.jsonl)"),
        (["gsm8k_train-00.parquet", "gsm8k_val-00.parquet"], "looks like several splits"),
        (["a.jsonl", "b.parquet"], "holds files of several formats (.jsonl, .parquet): name the one to read"),
    ],
)
def test_a_folder_of_which_a_part_alone_is_meant(
    names: list[str], words: str, begin: Callable[..., Config], tmp_path: Path
) -> None:
    (tmp_path / "rows").mkdir()
    for name in names:
        (tmp_path / "rows" / name).write_text('{"prompt": "p", "answer": "1"}\n')
    with pytest.raises(ConfigError) as caught:
        TaskSource(begin(tmp_path / "rows"))
    assert words in str(caught.value)


def test_shards_of_one_split_are_one_data_set(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "more"):
        put_rows(tmp_path / "rows" / name, [{"prompt": name}], "jsonl")
    assert len(list(read_rows(tmp_path / "rows"))) == 3


@pytest.mark.timeout(30)
def test_what_is_no_file_is_never_waited_for(begin: Callable[..., Config], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jsonl").mkdir()
    for path, words in [
        ("/dev/null", "the format '' is not known"),
        (tmp_path / "pipe.jsonl", "pipe.jsonl: is not a file"),
        (tmp_path / "folder", "a.jsonl: is not a file"),
        ("~nobody-of-that-name/rows.jsonl", "cannot be read"),
        (tmp_path / ("long" * 100), "cannot be read"),
    ]:
        with pytest.raises(ConfigError) as caught:
            TaskSource(begin(Path(path)))
        assert words in str(caught.value)


def test_a_parquet_file_with_values_that_are_none(begin: Callable[..., Config], tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    broken = arrow.Array.from_buffers(
        arrow.string(), 1, [None, arrow.py_buffer(b"\0\0\0\0\2\0\0\0"), arrow.py_buffer(b"\xff\xfe")]
    )
    prompts, answers = arrow.array(["p"]), arrow.array(["1"])
    late = arrow.array([2**62], arrow.timestamp("us"))
    for name, columns, names, words in [
        ("text", [broken, answers], ["prompt", "answer"], "cannot be read ('utf-8' codec"),
        ("time", [prompts, late], ["prompt", "answer"], "cannot be read ("),
        ("twice", [prompts, answers, answers], ["prompt", "answer", "answer"], "has 2 columns 'answer'"),
    ]:
        path = tmp_path / f"{name}.parquet"
        parquet.write_table(arrow.Table.from_arrays(columns, names=names), path)
        with pytest.raises(ConfigError) as caught:
            TaskSource(begin(path))
        assert words in str(caught.value)


def test_data_that_are_not_there_yet_are_told_by_check_and_refused_by_a_run(
    begin: Callable[..., Config], tmp_path: Path
) -> None:
    config = begin(tmp_path / "later.jsonl")
    with pytest.raises(DataMissing):
        TaskSource(config)
    found = check(config)
    assert not found.problems
    assert any("later.jsonl: there is no such file or folder" in text for text in found.unchecked)


def test_a_prompt_that_is_too_long_is_named_or_left_out(begin: Callable[..., Config], tmp_path: Path) -> None:
    rows = [{"prompt": "p" * length, "answer": "1"} for length in (3, 11, 10)]
    path = put_rows(tmp_path / "rows", rows, "jsonl")
    with pytest.raises(
        PromptTooLong, match=r"rows.jsonl, line 2: the prompt has 11 tokens, data.max_prompt_length is 10"
    ):
        TaskSource(begin(path, max_prompt_length=10))
    source = TaskSource(begin(path, max_prompt_length=10, too_long="skip"))
    assert (source.count, source.skipped) == (2, 1)
    assert sorted(texts(source, 2), key=len) == ["p" * 3, "p" * 10]
    with pytest.raises(ConfigError, match="there is no row in it of at most 2 tokens"):
        TaskSource(begin(path, max_prompt_length=2, too_long="skip"))


def test_chat_without_a_template_and_a_template_that_refuses(
    begin: Callable[..., Config], tiny: Path, tmp_path: Path
) -> None:
    path = put_rows(tmp_path / "rows", AIME, "jsonl")
    config = begin(path, prompt_key="problem", chat=True)
    other = tmp_path / "student"
    shutil.copytree(tiny, other)
    (other / "chat_template.jinja").write_text("{{ raise_exception('no numbers') }}")
    student = {"student": config.student.model_copy(update={"model": str(other)})}
    with pytest.raises(ConfigError, match=r"line 1: the chat template refuses the prompt \(no numbers\)"):
        TaskSource(config.model_copy(update=student))
    (other / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="has no chat template"):
        TaskSource(config.model_copy(update=student))


def other_student(config: Config, tiny: Path, folder: Path, **changes: Any) -> Config:
    """The config with a student whose tokenizer differs: `template`, or parts of the tokenizer by their names."""
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(tiny, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    tokenizer.chat_template = changes.pop("template", tokenizer.chat_template)
    for name, value in changes.items():
        setattr(tokenizer.backend_tokenizer, name, value)
    tokenizer.save_pretrained(str(folder))
    return config.model_copy(update={"student": config.student.model_copy(update={"model": str(folder)})})


def test_tokens_are_counted_and_never_guessed_from_bytes(
    begin: Callable[..., Config], tiny: Path, tmp_path: Path
) -> None:
    from tokenizers import normalizers

    path = put_rows(tmp_path / "rows", [{"prompt": "\ufdfa", "answer": "1"}], "jsonl")  # 3 bytes, by NFKC 33
    config = other_student(begin(path, max_prompt_length=20), tiny, tmp_path / "student", normalizer=normalizers.NFKC())
    with pytest.raises(PromptTooLong, match=r"the prompt has 33 tokens, data.max_prompt_length is 20"):
        TaskSource(config)


def test_a_text_begins_as_its_tokenizer_begins_texts_and_does_not_end(
    begin: Callable[..., Config], tiny: Path, tmp_path: Path
) -> None:
    from tokenizers import processors

    ends = processors.TemplateProcessing(single="<|user|> $A <|end|>", special_tokens=[("<|user|>", 1), ("<|end|>", 0)])
    rows = [{"prompt": "ab", "answer": "1"}, {"prompt": "<|user|>ab", "answer": "1"}]
    path = put_rows(tmp_path / "rows", rows, "jsonl")
    plain = other_student(begin(path, max_prompt_length=3), tiny, tmp_path / "student", post_processor=ends)
    source = TaskSource(plain)
    a, b = source.tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert [source.prompt(index).tolist() for index in range(2)] == [[1, a, b]] * 2
    with pytest.raises(PromptTooLong, match="the prompt has 3 tokens"):
        TaskSource(plain.model_copy(update={"data": plain.data.model_copy(update={"max_prompt_length": 2})}))
    chat = plain.data.model_copy(update={"chat": True, "max_prompt_length": 9, "path": str(tmp_path / "one.jsonl")})
    put_rows(tmp_path / "one", rows[:1], "jsonl")
    templated = TaskSource(plain.model_copy(update={"data": chat}))
    assert templated.tokenizer.decode(templated.prompt(0).tolist()) == "<|user|>ab<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 1/0 }}", "line 1: the chat template refuses the prompt (division by zero)"),
        ("{{ 'x'.encode('no-such') }}", "line 1: the chat template refuses the prompt"),
        ("{{ messages[0].content[:0] }}", "line 1: the chat template renders the prompt as empty text"),
    ],
)
def test_a_chat_template_that_fails(
    template: str, words: str, begin: Callable[..., Config], tiny: Path, tmp_path: Path
) -> None:
    path = put_rows(tmp_path / "rows", AIME, "jsonl")
    config = begin(path, prompt_key="problem", chat=True)
    with pytest.raises(ConfigError) as caught:
        TaskSource(other_student(config, tiny, tmp_path / "student", template=template))
    assert words in str(caught.value)


def test_a_switch_that_the_chat_template_does_not_know(begin: Callable[..., Config], tmp_path: Path) -> None:
    path = put_rows(tmp_path / "rows", AIME, "jsonl")
    config = begin(path, prompt_key="problem", chat=True, template_options={"enable_thinkng": False})
    with pytest.raises(ConfigError, match=r"data.template_options.enable_thinkng: the student's chat template has no"):
        TaskSource(config)


def test_check_warns_of_a_template_without_a_generation_prompt(
    begin: Callable[..., Config], tiny: Path, tmp_path: Path
) -> None:
    path = put_rows(tmp_path / "rows", AIME, "jsonl")
    config = begin(path, prompt_key="problem", chat=True)
    assert not any("add_generation_prompt" in line for line in check(config).lines)
    template = "{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}"
    bare = other_student(config, tiny, tmp_path / "student", template=template)
    assert any("add_generation_prompt" in note for note in TaskSource(bare).notes)
    found = check(bare)
    assert not found.problems
    assert sum("ignores add_generation_prompt" in line for line in found.lines) == 1


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_check_finds_a_judge_that_cannot_start(
    begin: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    (tmp_path / "antlr4").mkdir()
    (tmp_path / "antlr4" / "__init__.py").write_text("raise ImportError('of another version')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    path = put_rows(tmp_path / "rows", AIME, "jsonl")
    [problem] = check(begin(path, prompt_key="problem", verifier="math-verify")).problems
    assert "its judge ends at its start" in problem


def test_the_data_of_a_run_are_on_record(begin: Callable[..., Config], tmp_path: Path) -> None:
    config = begin(put_rows(tmp_path / "rows", AIME, "jsonl"), prompt_key="problem")
    record = tmp_path / "run.json"
    record.write_text('{"run_key": "k"}')
    for _ in range(2):  # at the beginning, and where it goes on
        TaskSource(config).note_data(tmp_path)
        noted = json.loads(record.read_text())
        assert noted["run_key"] == "k"
        assert noted["data"]["rows"] == 2
    put_rows(tmp_path / "rows", [AIME[0], {**AIME[1], "answer": 74}], "jsonl")
    with pytest.raises(ConfigError, match=r"are not those that this run began with \(2 rows, now 2; .*run.json\)"):
        TaskSource(config).note_data(tmp_path)
    assert json.loads(record.read_text()) == noted
    TaskSource(make_config(tmp_path, student=SHIPPED, teacher=SHIPPED)).note_data(tmp_path)  # a task without rows


def test_a_change_of_the_data_says_what_changed(begin: Callable[..., Config], tmp_path: Path) -> None:
    def put(name: str, *prompts: str) -> None:
        put_rows(tmp_path / "rows" / name, [{"prompt": text, "answer": "1"} for text in prompts], "jsonl")

    def refusal(**data: Any) -> str:
        changed = config.model_copy(update={"data": config.data.model_copy(update=data)})
        with pytest.raises(ConfigError) as caught:
            TaskSource(changed).note_data(folder)
        told = str(caught.value)
        assert told.startswith("data.path: prompts or answers are not those that this run began with (")
        assert told.endswith("Put the former data back, or begin a run of another name")
        return told

    put("a", "p1", "p2")
    put("b", "p3", "p4", "too long")
    config = begin(tmp_path / "rows", max_prompt_length=2, too_long="skip")
    folder = put_run(tmp_path / "run")
    TaskSource(config).note_data(folder)
    noted = json.loads((folder / "run.json").read_text())["data"]
    assert [(one["name"], one["rows"]) for one in noted["files"]] == [("a.jsonl", 2), ("b.jsonl", 2)]
    assert noted["left_out"] == {"too_long": 1, "special_tokens": 0}
    assert (folder / "data.rows").read_text().splitlines()[0] == "# a.jsonl"
    assert len((folder / "data.rows").read_text().splitlines()) == 2 + 4

    put("b", "p3", "p5", "too long")
    told = refusal()
    assert (
        "b.jsonl had 2 rows in use, now 2 (102 bytes as before); the first row that differs is b.jsonl, line 2." in told
    )
    assert "a.jsonl" not in told
    put("b", "new", "p3", "p4", "too long")
    put("b", "p3", "p4", "p5")
    told = refusal()
    assert "b.jsonl had 2 rows in use, now 3" in told
    assert "1 rows were left out by too_long, now 0" in told
    assert "the 4 former rows are unchanged, and more follow, from b.jsonl, line 3 on" in told
    (tmp_path / "rows" / "b.jsonl").unlink()
    told = refusal()
    assert "(4 rows, now 2;" in told
    assert "b.jsonl is gone (2 rows)" in told
    assert "all 2 rows are unchanged, and those that followed, from b.jsonl, line 1 on, are gone" in told
    put("c", "p3", "p4")
    assert TaskSource(config).note_data(folder) is None  # another name, the same prompts: nothing has changed
    put("c", "x", "p4")
    told = refusal()
    assert "c.jsonl is new (2 rows)" in told
    assert "the first row that differs is c.jsonl, line 1, formerly b.jsonl, line 1" in told
    assert "data.prompt_suffix was '', now '!'" in refusal(prompt_suffix="!", max_prompt_length=3)
    (folder / "data.rows").write_bytes(b"\xff")
    assert "the first row" not in refusal()
    assert json.loads((folder / "run.json").read_text())["data"] == noted


def test_another_chat_template_or_version_is_said_to_be_what_changed(
    begin: Callable[..., Config], tiny: Path, tmp_path: Path
) -> None:
    path = put_rows(tmp_path / "rows", [{"prompt": "3?", "answer": "1"}], "jsonl")
    config = other_student(begin(path, chat=True), tiny, tmp_path / "student")
    folder = put_run(tmp_path / "run")
    (folder / "run.json").write_text('{"run_key": "k", "versions": {"transformers": "1.0", "commit": "abc"}}')
    TaskSource(config).note_data(folder)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ strftime_now('%Y') }}"
    (tmp_path / "student" / "chat_template.jinja").write_text(template)
    with pytest.raises(ConfigError) as caught:
        TaskSource(config).note_data(folder)
    told = str(caught.value)
    for words in (
        "the student's chat template has changed",
        "bytes as before",
        "transformers was 1.0, now",
        "Katana's commit was abc, now",
        "the chat template writes today's date",
    ):
        assert words in told


def test_a_run_of_before_goes_on_and_is_told_what_it_can_be(begin: Callable[..., Config], tmp_path: Path) -> None:
    config = begin(put_rows(tmp_path / "rows", AIME, "jsonl"), prompt_key="problem")
    folder, source = put_run(tmp_path / "run"), TaskSource(config)
    source.note_data(folder)
    whole = json.loads((folder / "run.json").read_text())
    old = {"run_key": "k", "data": {name: whole["data"][name] for name in ("rows", "digest")}}
    (folder / "data.rows").unlink()
    (folder / "run.json").write_text(json.dumps(old))
    source.note_data(folder)  # the same rows: it goes on, and can tell from now on
    assert json.loads((folder / "run.json").read_text()) == whole
    assert (folder / "data.rows").is_file()
    (folder / "data.rows").unlink()
    (folder / "run.json").write_text(json.dumps(old))
    put_rows(tmp_path / "rows", AIME[:1], "jsonl")
    with pytest.raises(
        ConfigError, match=r"\(2 rows, now 1; .*\): this folder of an older version does not record what differs"
    ):
        TaskSource(config).note_data(folder)
    (folder / "run.json").write_text('{"data": 5}')
    with pytest.raises(ConfigError, match=r"run.json: data is int, not a run's record of its data"):
        TaskSource(config).note_data(folder)


def test_the_digest_of_a_run_s_data_is_fixed_for_ever(begin: Callable[..., Config], tmp_path: Path) -> None:
    path = put_rows(tmp_path / "rows", AIME, "jsonl")
    folder = put_run(tmp_path / "run")
    TaskSource(begin(path, prompt_key="problem")).note_data(folder)
    assert json.loads((folder / "run.json").read_text())["data"]["digest"] == "30332a82080d2cb8cad562702dd48ddc"


@pytest.mark.parametrize(
    ("hidden", "change", "words"),
    [
        ("math_verify", {"verifier": "math-verify"}, "pip install 'katana-distill[math]'"),
        ("pyarrow", {}, "pip install 'katana-distill[data]'"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    hidden: str,
    change: dict[str, Any],
    words: str,
    begin: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"x")
    if hidden == "math_verify":
        path = put_rows(tmp_path / "rows", AIME, "jsonl")
    import importlib.util

    known = importlib.util.find_spec
    monkeypatch.setattr("ops.tasks.rows.importlib.util.find_spec", lambda name: None if name == hidden else known(name))
    config = begin(path, prompt_key="problem", **change)
    with pytest.raises(ConfigError) as caught:
        TaskSource(config)
    assert words in str(caught.value)
    assert words in check(config).problems[0]


def test_the_feeder_s_source_of_rows_needs_no_torch(begin: Callable[..., Config], tmp_path: Path) -> None:
    path = put_rows(tmp_path / "rows", DAPO, "jsonl")
    config = tmp_path / "config.yaml"
    config.write_text(begin(path, chat=True, answer_key="reward_model.ground_truth").to_yaml())
    code = (
        "import sys; from pathlib import Path; from common.config import load\n"
        "from ops.tasks.source import TaskSource\n"
        f"source = TaskSource(load(Path({str(config)!r})))\n"
        "assert len(source.prompt(0)) and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=PACKAGE_ROOT, timeout=60, check=True)


# --- what a chat template is handed ---

READS_ALL = (
    "{% for d in documents or [] %}DOC {{ d.text }}{% endfor %}"
    "{% for t in tools or [] %}TOOL {{ t | tojson }}{% endfor %}"
    "{% for m in messages %}[{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}]{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{{ effort }}{% endif %}"
)
READS_CONTENT = "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}{% endfor %}"
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}
OTHER_CALL = {"type": "function", "function": {"name": "neg", "arguments": {"b": 4}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "integer"}}}}
OTHER_TOOL = {"type": "function", "function": {"name": "neg", "parameters": {"b": {"type": "integer"}}}}
ASK: dict[str, Any] = {"role": "user", "content": "3+4?"}


def rendered(messages: list[dict[str, Any]], template: Any = READS_ALL, **columns: Any) -> str:
    return renderer(template)(messages, "row 1", columns)


def renderer(template: Any, /, **data: Any) -> Renderer:
    tokenizer = load_tokenizer(PACKAGE_ROOT / "ops" / "models" / "student")
    tokenizer.chat_template = template
    return Renderer(tokenizer, Data(task="dataset", path="x", chat=True, **data))


def test_the_template_is_handed_whole_messages() -> None:
    messages = [
        {"role": "user", "content": "3+4?", "name": "ada", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "nd?"}]},
    ]
    assert rendered(messages) == '[user ada]3+4?[assistant]CALL add{"a": 3}[user]and?[assistant]'


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([{"type": "image", "url": "x"}], "content is list; allowed: text, a list of text parts, or null"),
        (5, "content is int; allowed"),
        (None, "has no content"),
    ],
)
def test_content_that_no_text_model_takes_is_refused(content: object, told: str) -> None:
    with pytest.raises(ConfigError, match=f"row 1: message 1.*{told}"):
        rendered([{"role": "user", "content": content}])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("stored", [list, json.dumps], ids=["list", "text"])
def test_columns_beside_the_prompt_go_to_the_template(
    form: str, stored: Callable[[Any], Any], begin: Callable[..., Config], tiny: Path, tmp_path: Path
) -> None:
    rows = [
        {"prompt": [ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}, ASK], "tools": stored([TOOL])},
        {"prompt": [ASK, {"role": "assistant", "content": None, "tool_calls": [OTHER_CALL]}, ASK]},
        {"prompt": [ASK], "tools": stored([OTHER_TOOL]), "documents": [{"text": "d"}]},
        {"prompt": [ASK], "tools": stored([]), "chat_template_kwargs": {"effort": "high"}},
    ]
    bare = {"answer": "1", "tools": None, "documents": None, "chat_template_kwargs": None}
    path = put_rows(tmp_path / "rows", [bare | row for row in rows], form)
    config = other_student(begin(path, chat=True), tiny, tmp_path / "student", template=READS_ALL)
    source = TaskSource(config.model_copy(update={"data": config.data.model_copy(update={"max_prompt_length": 900})}))
    # Parquet and Arrow give every call all arguments of all calls, and every tool all parameters: none of it is there.
    assert sorted(texts(source, 4)) == sorted(
        [
            f'TOOL {json.dumps(TOOL)}[user]3+4?[assistant]CALL add{{"a": 3}}[user]3+4?[assistant]',
            '[user]3+4?[assistant]CALL neg{"b": 4}[user]3+4?[assistant]',
            f"DOC dTOOL {json.dumps(OTHER_TOOL)}[user]3+4?[assistant]",
            "[user]3+4?[assistant]high",
        ]
    )
    none = config.data.model_copy(update={"max_prompt_length": 900, "template_columns": []})
    assert not any("TOOL" in text for text in texts(TaskSource(config.model_copy(update={"data": none})), 4))


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"tools": "{oops"}, "row 1: tools is text, but not JSON"),
        ({"tools": '[{"a": 1, "a": 2}]'}, "'a' occurs twice in one object"),
        (
            {"tools": {"add": 1}},
            "row 1: tools is dict; allowed: a list of mappings, or that as JSON text; if it is not",
        ),
        ({"tools": ["add"]}, "row 1: tools is a list that contains str"),
        ({"documents": [{}]}, "row 1: documents is a list that contains an empty mapping"),
        ({"chat_template_kwargs": [1]}, "row 1: chat_template_kwargs is a list that contains int; allowed: a mapping"),
        (
            {"chat_template_kwargs": {"tokenize": True}},
            "chat_template_kwargs: 'tokenize' is not a switch of a template",
        ),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs: 'messages' is not a switch of a template"),
    ],
)
def test_columns_that_no_template_takes_are_refused(columns: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rendered([ASK], **columns)
    assert words in str(caught.value)


@pytest.mark.parametrize("empty", [None, "", " ", "null", "[]", []])
def test_a_column_with_nothing_in_it_is_none(empty: object) -> None:
    assert rendered([ASK], tools=empty) == "[user]3+4?[assistant]"


# --- what a chat template ignores ---


def test_what_may_be_lost_is_said_once_with_the_rows_that_have_it() -> None:
    render = renderer(READS_ALL)
    thinks = {"role": "assistant", "content": "7", "reasoning_content": "3 and 4"}
    for number in range(5):
        render([{**ASK, "name": "ada"}, thinks, ASK], f"row {number}", {"chat_template_kwargs": {"pace": number}})
    render([ASK], "row 6", {"chat_template_kwargs": {"effort": "low"}})
    assert render.notes == [
        "the chat template ignores reasoning_content in messages of the assistant: 5 rows have it, checked "
        "in the first 3",
        "the chat template ignores chat_template_kwargs.pace: 5 rows have it, checked in the first 3",
    ]


@pytest.mark.parametrize(
    ("template", "messages", "columns", "words"),
    [
        (READS_CONTENT, [ASK], {"tools": [TOOL]}, "ignores the column tools; another template may"),
        (READS_CONTENT, [ASK], {"documents": [{"text": "d"}]}, "the column documents; another template may"),
        (
            READS_CONTENT,
            [ASK, {"role": "assistant", "content": "I add.", "tool_calls": [CALL]}, ASK],
            {},
            "row 1: the chat template ignores tool_calls in messages of the assistant (message 2)",
        ),
        (
            READS_ALL.replace("m.content or ''", "'' if m.tool_calls else m.content"),
            [ASK, {"role": "assistant", "content": "I add.", "tool_calls": [CALL]}, ASK],
            {},
            "ignores content beside tool_calls in messages of the assistant (message 2)",
        ),
        (
            "{% for m in messages if m.role != 'tool' %}[{{ m.role }}]{{ m.content }}{% endfor %}",
            [ASK, {"role": "tool", "content": "7"}, ASK],
            {},
            "ignores content in messages of the tool (message 2)",
        ),
        ("[{{ messages[-1].content }}]", [ASK, ASK, ASK], {}, "content in messages of the user (message 1)"),
    ],
)
def test_a_conversation_that_would_be_broken_is_refused(
    template: str, messages: list[dict[str, Any]], columns: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        rendered(messages, template, **columns)
    assert words in str(caught.value)


def test_nothing_is_lost_where_there_is_nothing() -> None:
    calls_alone = READS_ALL.replace("m.content or ''", "'' if m.tool_calls else m.content")
    messages = [ASK, {"role": "assistant", "content": " ", "tool_calls": [CALL], "refusal": "", "audio": []}, ASK]
    render = renderer(calls_alone)
    render(messages, "row 1")
    assert render.notes == []


def test_only_the_first_rows_are_rendered_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    render, calls = renderer(READS_ALL), []
    apply = Templates.apply
    monkeypatch.setattr(Templates, "apply", lambda *args, **named: calls.append(1) or apply(*args, **named))
    for _ in range(50):
        render([{**ASK, "name": "ada"}], "a row", {"tools": [TOOL]})
    assert len(calls) == 50 + 3 * 3  # name, content, tools


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", True),
        (READS_CONTENT, False),
    ],
)
def test_a_system_prompt_that_the_template_ignores_is_refused(template: str, told: bool) -> None:
    if not told:
        renderer(template, system_prompt="Think.")
        return
    with pytest.raises(ConfigError, match=r"data.system_prompt: the chat template ignores"):
        renderer(template, system_prompt="Think.")


def test_a_template_that_writes_the_date_is_said() -> None:
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}{{ date_string }}"
    assert any("writes today's date" in note for note in renderer(dated + READS_ALL).notes)
    assert not renderer(dated + READS_ALL, template_options={"date_string": "1 May"}).notes
    assert not renderer(READS_ALL).notes


def test_check_and_loading_say_what_is_not_read(begin: Callable[..., Config], tmp_path: Path) -> None:
    rows = [{"prompt": [{**ASK, "name": "ada"}], "answer": "1"}]
    path = put_rows(tmp_path / "rows", rows, "jsonl")
    config = begin(path, chat=True)
    told = "the chat template ignores name in messages of the user: 1 row has it, checked in the first 1"
    assert TaskSource(config).notes == [told]
    found = check(config)
    assert not found.problems
    assert found.lines.count(f"warning    {told}") == 1


# --- special tokens ---


def test_special_tokens_are_looked_for_in_all_that_the_template_is_handed() -> None:
    tokenizer = load_tokenizer(PACKAGE_ROOT / "ops" / "models" / "student")
    special = tokenizer.all_special_tokens[0]
    call = {"type": "function", "function": {"name": "add", "arguments": {special: 3}}}
    for messages, columns, where in [
        ([{**ASK, "content": f"a{special}"}], {}, "the prompt"),
        ([{**ASK, "name": special}], {}, "name of message 1"),
        ([{**ASK, "role": special}, ASK], {}, "role of message 1"),
        ([ASK, {"role": "assistant", "content": None, "tool_calls": [call]}, ASK], {}, "tool_calls of message 2"),
        ([ASK], {"tools": json.dumps([{"name": special}])}, "tools"),
        ([ASK], {"documents": [{"text": special}]}, "documents"),
        ([ASK], {"chat_template_kwargs": {"effort": special}}, "chat_template_kwargs"),
    ]:
        with pytest.raises(SpecialToken) as caught:
            rendered(messages, **columns)
        assert str(caught.value).startswith(f"row 1: {where} contains {special!r}")
        assert "data.special_tokens: skip" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"system_prompt": "Be <|end|> brief."}, "data.system_prompt: contains '<|end|>'"),
        ({"prompt_suffix": " <|user|>"}, "data.prompt_suffix: contains '<|user|>'"),
        (
            {"template_options": {"enable_thinking": "<|end|>"}},
            "data.template_options.enable_thinking: contains '<|end|>'",
        ),
        ({"template_options": {"add_generation_prompt": False}}, "'add_generation_prompt' is not a switch"),
    ],
)
def test_the_config_s_own_text_is_looked_at_too(
    change: dict[str, Any], words: str, begin: Callable[..., Config], tmp_path: Path
) -> None:
    path = put_rows(tmp_path / "rows", AIME, "jsonl")
    config = begin(path, prompt_key="problem", chat=True, **change)
    with pytest.raises(ConfigError) as caught:
        TaskSource(config)
    assert words in str(caught.value)
    assert any(words in problem for problem in check(config).problems)


def test_rows_that_spell_a_special_token_are_left_out_and_said(begin: Callable[..., Config], tmp_path: Path) -> None:
    good = [{"prompt": f"p{number}", "answer": "1"} for number in range(2)]
    bad = [{"prompt": f"<|end|>{number}", "answer": "1"} for number in range(5)]
    path = put_rows(tmp_path / "rows", [bad[0], good[0], *bad[1:], good[1]], "jsonl")
    config = begin(path, chat=True, special_tokens="skip")
    source = TaskSource(config)
    assert (source.count, source.skipped) == (2, 5)
    note = f"5 rows left out for a special token in the text: {path}, line 1; {path}, line 3; {path}, line 4; …"
    assert source.notes == [note]
    assert f"warning    {note}" in check(config).lines
    # What is on record is what is used.
    source.note_data(put_run(tmp_path / "run"))
    put_rows(tmp_path / "rows", good, "jsonl")
    TaskSource(config).note_data(tmp_path / "run")
    put_rows(tmp_path / "rows", bad, "jsonl")
    with pytest.raises(ConfigError, match="there is no row in it without a special token"):
        TaskSource(config)
    with pytest.raises(ValueError, match="special_tokens: skip needs chat: true"):
        begin(path, special_tokens="skip")


def put_run(folder: Path) -> Path:
    folder.mkdir()
    (folder / "run.json").write_text('{"run_key": "k"}')
    return folder


# --- templates by name ---


def test_a_template_is_chosen_by_name_as_transformers_does_or_as_the_config_says() -> None:
    named = {"default": "D{{ messages[0].content }}", "tool_use": READS_ALL, "rag": "R{{ messages[0].content }}"}
    render = renderer(named)
    assert render([ASK], "a row") == "D3+4?"
    assert render([ASK], "a row", {"tools": [TOOL]}).startswith("TOOL")
    assert renderer(named, template="rag")([ASK], "a row") == "R3+4?"
    with pytest.raises(ConfigError, match="column tools"):  # the one that is named is for rows with tools too
        renderer(named, template="default")([ASK], "a row", {"tools": [TOOL]})
    assert renderer("D{{ messages[0].content }}", template="default")([ASK], "a row") == "D3+4?"


@pytest.mark.parametrize(
    ("template", "name", "words"),
    [
        (
            {"default": "D", "rag": "R"},
            "rga",
            "data.template: 'rga' is not a chat template of the student; there are: def",
        ),
        ("D", "rag", "data.template: 'rag' is not a chat template of the student; there are: default"),
        ({"tool_use": "T", "rag": "R"}, None, "named chat templates (rag, tool_use) and none is called 'default'"),
        ({"default": 5}, None, "the student's chat template 'default' is int, not text"),
        (None, "rag", "has no chat template"),
    ],
)
def test_a_template_that_is_not_there_or_not_clear(template: Any, name: str | None, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        renderer(template, template=name)
    assert words in str(caught.value)


def test_templates_by_name_from_a_folder(begin: Callable[..., Config], tiny: Path, tmp_path: Path) -> None:
    path = put_rows(tmp_path / "rows", [{"prompt": "3?", "answer": "1"}], "jsonl")
    named = {"rag": "R{{ messages[0].content }}", "plain": "P{{ messages[0].content }}<|end|>"}
    config = other_student(begin(path, chat=True), tiny, tmp_path / "student", template=named)
    (tmp_path / "student" / "chat_template.jinja").unlink()  # of the model that was copied
    assert (tmp_path / "student" / "additional_chat_templates" / "rag.jinja").is_file()
    [problem] = check(config).problems
    assert "(plain, rag) and none is called 'default'" in problem
    chosen = config.model_copy(update={"data": config.data.model_copy(update={"template": "plain"})})
    assert texts(TaskSource(chosen), 1) == ["P3?<|end|>"]


def test_a_list_of_templates_without_their_text(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    shutil.copytree(tiny, folder)
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": [{"name": "default"}]}))
    with pytest.raises(
        ModelError, match=r"the tokenizer cannot be loaded: KeyError 'template'; look at tokenizer_conf"
    ):
        load_tokenizer(folder)
