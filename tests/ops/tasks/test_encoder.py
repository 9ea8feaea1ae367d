"""Token ids of prompts, and tokenizers that refuse a text."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from common.pretrained import ModelError
from ops.tasks.source import Encoder


def without_unknown(*words: str) -> PreTrainedTokenizerFast:
    """A tokenizer of these words, which has no token for others."""
    inner = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="<none>"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def test_a_text_that_the_tokenizer_refuses_is_named() -> None:
    encode = Encoder(without_unknown("1", "plus"), chat=False)
    assert encode(["1 plus 1", "plus"]) == [[0, 1, 0], [1]]
    with pytest.raises(ModelError, match=r"the student's tokenizer cannot encode '1 minus 1' \(.+\)$"):
        encode(["1 plus 1", "1 minus 1"])


def test_a_tokenizer_that_knows_no_digit_is_refused_in_one_sentence() -> None:
    with pytest.raises(ModelError, match=r"the student's tokenizer cannot encode '1' \(.+\)$"):
        Encoder(without_unknown("plus"), chat=False)
