"""What a rollout worker asks of whoever writes: the slots of this process (`decode`) or a vLLM server (`actors.vllm`).

Nobody that uses a writer asks which it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actors.engine.decode import NO_TOKENS, ClosedChunk
from actors.engine.shared import Shared


class Writer(Protocol):
    """Writes up to `slots` rollouts at a time, by key; they leave it in chunks. `decoded_tokens`: written so far."""

    decoded_tokens: int

    @property
    def slots(self) -> int:
        """How many there are."""

    @property
    def free(self) -> int:
        """How many rollouts `add` would take now."""

    @property
    def busy(self) -> tuple[str, ...]:
        """Keys of the rollouts here, in the order of admission."""

    def attach(self, shared: Shared) -> bool:
        """Before the first rollout of a run: make ready to write. False if the worker is to stop first. Raises
        ModelError if it can never write this run."""

    def add(
        self,
        key: str,
        prompt: NDArray[np.int32],
        *,
        seed: int,
        max_new_tokens: int,
        generated: NDArray[np.int32] = NO_TOKENS,
        unwatched: int = 0,
    ) -> None:
        """Take a rollout. `prompt` int32 [m], m >= 1; `generated` int32 [n]: the completion so far where it is resumed.
        `max_new_tokens` counts the whole completion. `unwatched`: until the completion has so many tokens, a chunk ends
        at 64 tokens (or at `chunk_tokens`, if that is more). Raises ValueError if it can never be written, RuntimeError
        where no place is free."""

    def remove(self, key: str) -> int:
        """Drop a rollout at once, its open chunk included; returns the tokens generated in all. Raises KeyError."""

    def discard(self, key: str) -> int:
        """`remove` of a rollout on which the writer failed."""

    def hold(self, key: str) -> None:
        """Keep a rollout without beginning another chunk of it. Raises KeyError."""

    def release(self, key: str) -> None:
        """Let a held rollout go on. Raises KeyError."""

    def step(self, only: Sequence[str] | None = None) -> list[ClosedChunk]:
        """Write on (the rollouts of `only`, if given), for a few milliseconds or a token of each; returns the chunks
        that are full or final. A rollout that ends leaves. Raises whatever fails on these rollouts: asked for one at a
        time, the one at fault raises it. EngineBroken: nothing can be written any more."""

    def close_chunks(self) -> list[ClosedChunk]:
        """Close every open chunk that is not empty: before the weights change, or to drain."""

    def read_weights(self, data: bytes) -> Any:
        """The content of a published file, for `swap`. Nothing changes: any thread may call it. Raises ValueError and
        SafetensorError for one that is of no use."""

    def swap(self, weights: Any, version: int = 0) -> None:
        """Write with other weights, the published ones of `version`, from the next chunk on."""

    def prove(self) -> None:
        """A self-test. Raises whatever is wrong."""

    def economize(self) -> int:
        """Use less memory at a time: a number that says how much, 0 if that is not possible."""
