"""Small data sets on disk in every format, solutions of arithmetic, a tiny random Qwen3 with a chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ops.tasks.arithmetic import steps_of, terms_of

Rows = Sequence[dict[str, Any]]
FORMATS = ("jsonl", "parquet", "saved")

GSM8K: Rows = [
    {
        "question": "Ann has 3 boxes of 24 eggs. How many eggs?",
        "answer": "3 boxes of 24 are 3*24 = <<3*24=72>>72.\n#### 72",
    },
    {"question": "A car costs $1,200 and a bike $34. Both?", "answer": "1200+34=1234\n#### 1,234"},
]
MATH: Rows = [
    {"problem": "Halve $x$.", "solution": "We get $\\boxed{\\frac{x}{2}}$.", "level": 1},
    {
        "problem": "Polar form of $(0,3)$?",
        "solution": "It is $\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}$.",
        "level": 2,
    },
]
AIME: Rows = [{"id": 60, "problem": "Find $m+n$.", "answer": 204}, {"id": 61, "problem": "Find $n$.", "answer": 73}]
DAPO: Rows = [
    {
        "prompt": [{"role": "user", "content": f"Solve problem {number}."}],
        "reward_model": {"ground_truth": str(10 * number), "style": "rule"},
    }
    for number in range(5)
]

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is false %}<nothink>{% endif %}{% endif %}"
)


def put_rows(path: Path, rows: Rows, form: str) -> Path:
    """Write rows to `path`, whose ending (or, for `saved`, whose being a folder) tells the format. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "jsonl":
        path = path.with_suffix(".jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    table = pyarrow.Table.from_pylist(list(rows))
    if form == "parquet":
        path = path.with_suffix(".parquet")
        pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=2)
        return path
    # As datasets 5 saves: Arrow streams in shards, and state.json, which names them in their order.
    path.mkdir()
    half = (len(rows) + 1) // 2
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (table.slice(0, half), table.slice(half)), strict=True):
        with pyarrow.OSFile(str(path / name), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(part)
    (path / "dataset_info.json").write_text("{}")
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return path


def put_tiny_qwen3(folder: Path, *, seed: int = 0, ids: int = 0) -> Path:
    """A random Qwen3 of some ten thousand parameters, every byte a token, as save_pretrained writes it. `ids`: of the
    tokenizer, if it is to have more than bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    specials = ["<|end|>", "<|user|>", "<|system|>", "<|assistant|>"]
    alphabet = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    alphabet += [f"more{number}" for number in range(len(alphabet), ids)]
    backend = Tokenizer(BPE({token: index for index, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", additional_special_tokens=specials
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(folder))
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(alphabet),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=16384,
        eos_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(str(folder))
    return folder


def put_paper_data(folder: Path) -> None:
    """A few rows of every data set of ops/experiments/paper/*.yaml, under the names and columns that they use."""
    put_rows(
        folder / "data" / "dapo-math-17k" / "train",
        [{"prompt": f"What is {number} + {number}?", "solution": str(2 * number)} for number in range(8)],
        "jsonl",
    )
    asked: dict[str, Rows] = {
        "amc23": [{"question": "What is $2^5$?", "answer": 32.0}],
        "math500": [{"problem": "What is $\\frac12+\\frac14$?", "answer": "\\frac{3}{4}"}],
        "minervamath": [{"question": "How many atoms?", "answer": "4.5e33"}],
        "aime24": [{"problem": "Find $n$.", "answer": "073"}],
    }
    for name, rows in asked.items():
        put_rows(folder / "data" / name / "test", rows, "jsonl")


def solution_of(prompt: str) -> str:
    """The reference completion of an arithmetic problem, without an end token: "12+7=19;19-3=16#16"."""
    value, terms = terms_of(prompt)
    steps = steps_of(value, terms)
    answer = steps[-1].result if steps else value
    return ";".join(step.text for step in steps) + f"#{answer}"
