"""Trajectories, and the micro-batches into which the learner splits a batch of them.

The loss gets flat tensors: the N kept tokens of a micro-batch in sequence, without prompts and padding. Left out here:
packing several trajectories into one row, which needs a block mask that not every model's attention supports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Denominator = Literal["kept", "sequence", "generated"]
"""The divisor of a batch's mean, see `token_weights`."""

Shares = Callable[["Trajectory"], npt.NDArray[np.float64]]
"""The share of each kept token of a trajectory, float64 [n], at least 0, see `learner.weighting`."""

Weighted = tuple["Trajectory", npt.NDArray[np.float64]]
"""A trajectory, and the weight of each of its kept tokens in the mean of the whole batch, float64 [n]."""

_MUCH_SHORTER = 0.75  # of the longest row of a micro-batch
_LARGE_ENOUGH = 1024  # tokens of a micro-batch, padding included, from which on a forward is worth its fixed costs

PADDING_ID = 0
"""Any id of the embedding: padding does not affect kept tokens (see `_micro_batch`)."""


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """A training example: one rollout, trimmed to the tokens that its verdict kept.

    rid: the rollout's id; arm: "treated" or "control".
    prompt: int32 [m], m >= 1.
    tokens: int32 [n], n >= 1, the kept tokens only.
    support_ids: int32 [n, K], the outcomes of the support besides STOP: the student's, then those the teacher added.
    teacher_logprobs: float32 [n, K+1] nats; column 0 is STOP, column k+1 belongs to support_ids[:, k].
    teacher_tail: float32 [n] nats; None if support and STOP are all outcomes.
    teacher_sampled: float32 [n] nats, the teacher's log-probability of the sampled outcome (STOP's for a
        stop token).
    rollout_logprobs: float32 [n] nats, the same under the student that sampled it, at temperature 1, before top-p.
    sampling_logprobs: float32 [n] nats, the same after temperature and top-p, as it was sampled.
    entropy: float32 [n] nats, the student's on its support when it wrote them; None: nothing reads it.
    oldest_version: the oldest policy version among the kept tokens.
    generated: tokens that its verdict saw, up to the trigger if it was cut; n or more; 0 means n.
    to_go: float32 [n] nats, what the tokens after each one cost (`learner.returns`); None: the loss does not read it.
    advantage: of its reward over its group, on every kept token; 0 without reward. reward: the verifier's, None if it
        has none. without_reward: why it is trained without; '' if it is not.
    finish_reason, threshold: as in the verdict. fired: whether the policy fired, applied or not (control arm, mask,
        shadow). repetition: of all its tokens, see `learner.drift`. These four are only for metrics.

    Raises ValueError, with rollout and field, for a wrong dtype or shape, or a log-probability that is not finite:
    this is the last check before training, and one NaN would end a run.
    """

    rid: str
    arm: str
    prompt: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.int32]
    support_ids: npt.NDArray[np.int32]
    teacher_logprobs: npt.NDArray[np.float32]
    teacher_tail: npt.NDArray[np.float32] | None
    teacher_sampled: npt.NDArray[np.float32]
    rollout_logprobs: npt.NDArray[np.float32]
    sampling_logprobs: npt.NDArray[np.float32]
    oldest_version: int
    generated: int = 0
    finish_reason: str = ""
    fired: bool = False
    threshold: float | None = None
    repetition: float = 0.0
    to_go: npt.NDArray[np.float32] | None = None
    entropy: npt.NDArray[np.float32] | None = None
    advantage: float = 0.0
    reward: float | None = None
    without_reward: str = ""

    def __post_init__(self) -> None:
        self._check("prompt", np.int32, None)
        self._check("tokens", np.int32, None)
        if not len(self.prompt):  # the logits at its last token predict the first kept one
            raise ValueError(f"trajectory {self.rid}: prompt is empty")
        if not len(self.tokens):
            raise ValueError(f"trajectory {self.rid}: tokens is empty; such a rollout is dropped, not trained on")
        n = len(self.tokens)
        self._check("support_ids", np.int32, n, None)
        self._check("teacher_logprobs", np.float32, n, self.support_ids.shape[1] + 1)
        if self.teacher_tail is not None:
            self._check("teacher_tail", np.float32, n)
        self._check("teacher_sampled", np.float32, n)
        self._check("rollout_logprobs", np.float32, n)
        self._check("sampling_logprobs", np.float32, n)
        if self.to_go is not None:
            self._check("to_go", np.float32, n)
        if self.entropy is not None:
            self._check("entropy", np.float32, n)
        if 0 < self.generated < n:
            raise ValueError(f"trajectory {self.rid}: {self.generated} tokens generated, {n} kept")
        if not math.isfinite(self.advantage):
            raise ValueError(f"trajectory {self.rid}: advantage is {self.advantage}")

    def _check(self, name: str, dtype: type[np.generic], *shape: int | None) -> None:
        """Raise ValueError unless field `name` is a finite array of `dtype` and `shape` (None: any size)."""
        array: Any = getattr(self, name)
        where = f"trajectory {self.rid}: {name}"
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{where} is {type(array).__name__}, not an array")
        fits = array.ndim == len(shape) and all(
            want is None or have == want for have, want in zip(array.shape, shape, strict=True)
        )
        if array.dtype != dtype or not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"{where} is {array.dtype}{list(array.shape)}, expected {dtype.__name__}[{wanted}]")
        if not np.isfinite(array).all():
            first = np.argwhere(~np.isfinite(array))[0].tolist()
            raise ValueError(f"{where} is not finite at {first}")

    @property
    def length(self) -> int:
        """Prompt and kept tokens together."""
        return len(self.prompt) + len(self.tokens)


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """b trajectories, right-padded to the longest (T tokens), and the loss's inputs for their N kept tokens.

    Flat tensors are in the order of `logits[logit_mask]`: row by row, within a row in the order of writing.

    rids: the b rollouts, in row order.
    input_ids: int64 [b, T].
    logit_mask: bool [b, T], True at the N positions *before* the kept tokens, whose logits predict them.
    targets: int64 [N], the kept tokens.
    support_ids: int64 [N, K]; teacher_logprobs: float32 [N, K+1]; teacher_tail: float32 [N] or None.
    teacher_sampled, rollout_logprobs, sampling_logprobs: float32 [N] nats.
    to_go: float32 [N] nats, 0 where the loss does not read it.
    advantages: float32 [N], each token's trajectory's.
    weights: float32 [N], each token's weight in the mean of the *whole batch*: the batch's loss is the
        sum of `(weights * token_losses).sum()` over its micro-batches, however it was split.
    """

    rids: tuple[str, ...]
    input_ids: Tensor
    logit_mask: Tensor
    targets: Tensor
    support_ids: Tensor
    teacher_logprobs: Tensor
    teacher_tail: Tensor | None
    teacher_sampled: Tensor
    rollout_logprobs: Tensor
    sampling_logprobs: Tensor
    to_go: Tensor
    advantages: Tensor
    weights: Tensor

    @property
    def kept_tokens(self) -> int:
        """N, the number of tokens in the loss."""
        return self.targets.shape[0]

    def only(self, tokens: slice) -> MicroBatch:
        """Return the same micro-batch with the loss's inputs of some of its kept tokens alone."""
        values = {field.name: getattr(self, field.name) for field in fields(self)[3:]}
        some: dict[str, Any] = {name: None if value is None else value[tokens] for name, value in values.items()}
        return replace(self, **some)

    def to(self, device: torch.device | str) -> MicroBatch:
        """Return the same micro-batch with every tensor on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {n: v.to(device) for n, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def uniform(trajectory: Trajectory) -> npt.NDArray[np.float64]:
    """The same share for every kept token."""
    return np.ones(len(trajectory.tokens))


def token_weights(
    trajectories: Sequence[Trajectory], denominator: Denominator, shares: Shares = uniform
) -> list[npt.NDArray[np.float64]]:
    """Return, for each trajectory, the weight of each of its kept tokens in the batch's mean, float64 [n].

    kept: share / (sum of the batch's shares): all kept tokens count the same, long trajectories more than short ones.
    sequence: share / (sum of this trajectory's shares x trajectories): all trajectories count the same.
    generated: share / (tokens generated in the batch): a cut token counts as a loss of 0, so that cutting does not
        raise the weight of the kept tokens.

    All weights of `kept` and `sequence` sum to 1 (0 if no token has a share; a trajectory without shares counts 0).
    Raises ValueError for an unknown denominator.
    """
    counted = [shares(trajectory) for trajectory in trajectories]
    if denominator == "kept":
        total = sum(float(share.sum()) for share in counted)
        return [share / (total or 1.0) for share in counted]
    if denominator == "sequence":
        return [share / ((float(share.sum()) or 1.0) * len(counted)) for share in counted]
    if denominator == "generated":
        total = sum(one.generated or len(one.tokens) for one in trajectories)
        return [share / total for share in counted]
    raise ValueError(f"denominator is {denominator!r}, expected one of {', '.join(get_args(Denominator))}")


def micro_batches(
    trajectories: Sequence[Trajectory], *, max_tokens: int, denominator: Denominator = "kept", shares: Shares = uniform
) -> list[MicroBatch]:
    """Split a batch into micro-batches of rows of similar length, of at most `max_tokens` padded tokens each.

    Padded tokens are rows x longest; a trajectory that is longer than `max_tokens` is alone in its micro-batch. The
    order is by length, longest first (so a device that is too small fails at the first step), then by rid: it depends
    only on the set, so neither the order of arrival nor a restart changes the order in which gradients are summed.

    Raises ValueError for max_tokens < 1, or if trajectories differ in K or in having a tail.
    """
    return grouped(weighted(trajectories, denominator, shares), max_tokens)


def weighted(trajectories: Sequence[Trajectory], denominator: Denominator, shares: Shares) -> list[Weighted]:
    """A batch's rows, longest first, then by rid. Raises ValueError as `micro_batches`."""
    _check_alike(trajectories)
    weights = token_weights(trajectories, denominator, shares)
    return sorted(zip(trajectories, weights, strict=True), key=lambda row: (-row[0].length, row[0].rid))


def grouped(rows: Sequence[Weighted], max_tokens: int) -> list[MicroBatch]:
    """Micro-batches of these rows of a batch, which are in the order of `weighted`; see `micro_batches`."""
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, expected at least 1")
    groups: list[list[Weighted]] = []
    for row in rows:
        if groups and _joins(row[0].length, len(groups[-1]), groups[-1][0][0].length, max_tokens):
            groups[-1].append(row)
        else:
            groups.append([row])
    return [_micro_batch([row[0] for row in group], [row[1] for row in group]) for group in groups]


def _joins(length: int, rows: int, longest: int, max_tokens: int) -> bool:
    """Whether a row joins a group of so many, which is padded to its first and longest. A much shorter row begins
    another group if this one is large enough: its padding would cost more than another forward does."""
    much_shorter = length < _MUCH_SHORTER * longest and rows * longest >= _LARGE_ENOUGH
    return (rows + 1) * longest <= max_tokens and not much_shorter


def _check_alike(trajectories: Sequence[Trajectory]) -> None:
    """Raise ValueError unless all trajectories have the same K, and either all or none have a tail."""
    for trajectory in trajectories[1:]:
        first = trajectories[0]
        if trajectory.support_ids.shape[1] != first.support_ids.shape[1]:
            raise ValueError(
                f"trajectory {trajectory.rid}: support of {trajectory.support_ids.shape[1]} outcomes, "
                f"trajectory {first.rid}: of {first.support_ids.shape[1]}"
            )
        if (trajectory.teacher_tail is None) != (first.teacher_tail is None):
            raise ValueError(f"one of trajectories {trajectory.rid} and {first.rid} has a tail, the other none")


def _micro_batch(rows: Sequence[Trajectory], weights: Sequence[npt.NDArray[np.float64]]) -> MicroBatch:
    """Pad and flatten `rows`; the first is the longest."""
    # Right padding needs no attention mask: attention is causal, so no position sees one to its right, and
    # all padding is to the right of every token that counts. Rotary positions count from 0 at the left end
    # of the row, as in sampling. Outputs at padded positions are never selected, so they have no gradient.
    input_ids = np.full((len(rows), rows[0].length), PADDING_ID, dtype=np.int64)
    logit_mask = np.zeros(input_ids.shape, dtype=np.bool_)
    for row, trajectory in enumerate(rows):
        input_ids[row, : trajectory.length] = np.concatenate([trajectory.prompt, trajectory.tokens])
        # The logits at position i predict the token at i + 1.
        logit_mask[row, len(trajectory.prompt) - 1 : trajectory.length - 1] = True

    def flat(name: str) -> Tensor:
        # np.concatenate copies even a single array: arrays from the wire are read-only, which torch refuses.
        return torch.from_numpy(np.concatenate([getattr(trajectory, name) for trajectory in rows]))

    return MicroBatch(
        rids=tuple(trajectory.rid for trajectory in rows),
        input_ids=torch.from_numpy(input_ids),
        logit_mask=torch.from_numpy(logit_mask),
        targets=flat("tokens").long(),
        support_ids=flat("support_ids").long(),
        teacher_logprobs=flat("teacher_logprobs"),
        teacher_tail=None if rows[0].teacher_tail is None else flat("teacher_tail"),
        teacher_sampled=flat("teacher_sampled"),
        rollout_logprobs=flat("rollout_logprobs"),
        sampling_logprobs=flat("sampling_logprobs"),
        to_go=torch.from_numpy(np.concatenate([_to_go(trajectory) for trajectory in rows])),
        advantages=torch.from_numpy(
            np.repeat(
                np.array([trajectory.advantage for trajectory in rows], np.float32),
                [len(trajectory.tokens) for trajectory in rows],
            )
        ),
        weights=torch.from_numpy(np.concatenate(weights).astype(np.float32)),
    )


def _to_go(trajectory: Trajectory) -> npt.NDArray[np.float32]:
    return np.zeros(len(trajectory.tokens), np.float32) if trajectory.to_go is None else trajectory.to_go
