"""The sizes that LoRA is measured by: real files of a small shape, counted by hand."""

from __future__ import annotations

import pytest
from lora_sizes import QWEN3_0_6B, sizes

from common.config import Lora

pytest.importorskip("peft", reason="peft is not installed")


def test_sizes_are_those_of_the_files() -> None:
    shape = QWEN3_0_6B | {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 50, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    found = sizes(shape, Lora(rank=4))
    # q, o: [32, 32]; k, v: [32, 16]; gate, up, down: [32, 48]; in two layers.
    trained = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 16 + 2 * 32  # norms of q and k, and two of the layer
    assert found["trained_parameters"] == {
        "lora": trained,
        "full": 2 * layer + 50 * 32 + 32,
        "share": trained / (2 * layer + 50 * 32 + 32),
    }
    assert 4 * trained < found["published_bytes"]["lora"] < 4 * trained + 8192, "factors, and a header"
    assert 12 * trained < found["checkpoint_bytes"]["lora"] < 12 * trained + 65536, "A, B, two moments, and headers"
    assert found["merge_cpu_s"] > 0
    whole = 2 * (2 * layer + 50 * 32 + 32)
    assert whole < found["merged_file_bytes"] < whole + 8192, "bfloat16, and a header"
