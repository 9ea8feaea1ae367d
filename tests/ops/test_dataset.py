"""Prompts from data sets on disk: every format, bad files, chat templates, an order that only the seed decides."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_sets import AIME, DAPO, FORMATS, GSM8K, MATH, Rows, put_rows, put_tiny_qwen3
from samples import make_config

from common.config import Config, ConfigError
from common.pretrained import PACKAGE_ROOT
from ops.check import check
from ops.rows import DataMissing, read_rows
from ops.source import TaskSource
from ops.tasks import PromptTooLong
from ops.tasks.dataset import shuffled


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
        ([{"prompt": " ", "answer": "1"}], {}, "the prompt is empty"),
        ([{"prompt": [{"role": "user"}], "answer": "1"}], {"chat": True}, "message 1 is no pair of texts"),
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
    assert "nothing in it can be read" in refusal("empty")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert "splits/SPLIT with SPLIT of ['train', 'test']" in refusal("splits")
    (tmp_path / "saved").mkdir()
    state = tmp_path / "saved" / "state.json"
    for files, words in [
        ([{"filename": "../up.arrow"}], "names no data files"),
        ([{"filename": "data.arrow"}], "data.arrow: is missing"),
        ([], "names no data files"),
    ]:
        state.write_text(json.dumps({"_data_files": files}))
        assert words in refusal("saved")
    state.write_text('{"_indices_files": [{}]}')
    assert "save it again" in refusal("saved")


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
    import shutil

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
    monkeypatch.setattr("ops.rows.importlib.util.find_spec", lambda name: None if name == hidden else known(name))
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
        "import sys; from pathlib import Path; from common.config import load; from ops.source import TaskSource\n"
        f"source = TaskSource(load(Path({str(config)!r})))\n"
        "assert len(source.prompt(0)) and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=PACKAGE_ROOT, timeout=60, check=True)
