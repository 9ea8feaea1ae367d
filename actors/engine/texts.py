"""Texts in slots: what decoder and scorer have in common."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from actors.engine.outcomes import check_stop_ids
from actors.engine.proof import self_test
from actors.engine.slots import SlotModel

_PROMPTS_PER_SLOT = 4  # remembered at most
_FEWEST_TOKENS = 32  # in one forward: below, memory is not what is short


class TextSlots:
    """A model on slots, the text in each, and how many tokens, padding included, a forward may prefill."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        slots: int,
        max_length: int,
        stop_ids: tuple[int, ...],
        vocab_size: int,
        prefill_tokens: int,
    ) -> None:
        check_stop_ids(stop_ids, vocab_size)
        self._model = SlotModel(model, slots=slots, capacity=max_length)
        self._stop_ids, self._vocab_size, self._prefill_tokens = stop_ids, vocab_size, prefill_tokens
        self._stops = torch.tensor(stop_ids, device=self._model.device)
        self._slot: dict[str, int] = {}  # by rollout
        self._text = np.zeros((slots, max_length), dtype=np.int64)
        self._prompt = np.zeros(slots, dtype=np.int64)  # tokens of the prompt
        self._known = np.zeros(slots, dtype=np.int64)  # tokens of prompt and completion
        self._cached = np.zeros(slots, dtype=np.int64)  # of these, forwarded
        self._prompts: dict[bytes, int] = {}  # by prompt, the slot that was the first to forward it

    def _share_prompt(self, slot: int, length: int) -> int:
        """Copy a prompt of `length` tokens that another slot holds into this one, which has forwarded less of it.

        Returns the slot that holds it or will: this one, if it must forward the prompt itself.
        """
        prompt = self._text[slot, :length]
        first = self._prompts.setdefault(prompt.tobytes(), slot)
        if first == slot or not np.array_equal(self._text[first, :length], prompt):  # the slot has another text by now
            if len(self._prompts) > _PROMPTS_PER_SLOT * len(self._known):
                self._prompts.clear()
            self._prompts[prompt.tobytes()] = slot
            return slot
        # The last token of a prompt may not be forwarded yet: it is what the first token is drawn from.
        shared = min(length - 1, int(self._cached[first]))
        if shared == length - 1 and shared > self._cached[slot]:
            self._model.copy(first, slot, shared)
            self._cached[slot] = shared
        return first

    def economize(self) -> int:
        """Prefill half as many tokens in a forward from now on: how many that is; 0 where they are few already."""
        if self._prefill_tokens < 2 * _FEWEST_TOKENS:
            return 0
        self._prefill_tokens //= 2
        return self._prefill_tokens

    def prove(self) -> None:
        """The test that a model passes when it is loaded. Raises whatever its model raises, UnsupportedModelError."""
        self_test(self._model.model, vocab_size=self._vocab_size)
