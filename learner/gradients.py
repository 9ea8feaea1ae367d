"""The gradients of a batch: micro-batches through the model, the loss, and the diagnostics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from common import tracing
from common.config import Config
from common.pretrained import Pair
from learner.batch import MicroBatch
from learner.head import OutputHead
from learner.loss import Diagnostics, StudentOutcomes, diagnostics, token_losses
from learner.pieces import backward_in_pieces
from learner.reward import reward_losses

Busy = Callable[[], AbstractContextManager[Any]]
"""Declares work that may take long, see `common.pulse`."""


def add_gradients(
    rows_of_one: Callable[[MicroBatch], Tensor],
    head: OutputHead,
    micros: Sequence[MicroBatch],
    config: Config,
    pair: Pair,
    *,
    device: str,
    busy: Busy,
    between: Callable[[], None],
) -> tuple[float, list[Diagnostics]]:
    """Add the gradients of the micro-batches' losses to the parameters'; returns the sum of the losses in nats, and the
    diagnostics of each micro-batch that has rollouts.

    rows_of_one: as `rows_of`. head: the model's, from `output_head`. Each micro-batch is computed in `busy()`, and
    `between()` is called after it.
    """

    def losses(student: StudentOutcomes, micro: MicroBatch) -> Tensor:
        found = token_losses(config.loss, student, micro)
        if config.reward.mode == "none":
            return found
        return found + reward_losses(student, micro, config.reward.weight, ratio_clip=config.loss.ratio_clip)

    loss, parts = 0.0, []
    for micro in micros:
        micro = micro.to(device)
        with busy():
            tracing.note(rows=len(micro.rids), tokens=micro.kept_tokens)
            rows = rows_of_one(micro)
            part, student = backward_in_pieces(
                head,
                rows,
                micro,
                losses,
                stop_ids=pair.stop_ids,
                vocab_size=pair.vocab_size,
                students=config.termination.teacher_top_k,
            )
            loss += float(part)
            if micro.rids:
                parts.append(diagnostics(student, micro))
        between()
    return loss, parts


def rows_of(model: torch.nn.Module, head: OutputHead, config: Config, micro: MicroBatch) -> Tensor:
    """`kept_rows` in `learner.dtype`."""
    with _cast(config):
        return kept_rows(model, head, micro)


def kept_rows(model: torch.nn.Module, head: OutputHead, micro: MicroBatch) -> Tensor:
    """Run the model: what its head makes the logits of, [N, H] for the N kept tokens, with the graph."""
    return head.kept_rows(model, micro)


def _cast(config: Config) -> Any:
    settings = config.learner
    dtype = getattr(torch, settings.dtype)
    return torch.autocast(torch.device(settings.device).type, dtype=dtype, enabled=dtype != torch.float32)
