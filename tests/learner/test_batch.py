"""Micro-batches: what the loss sees is each kept token once, with the logits it was drawn from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.batch import MicroBatch, Trajectory, micro_batches, token_weights


def trajectory(rid: str, prompt: list[int], tokens: list[int], *, support: int = 2, tail: bool = True) -> Trajectory:
    """A trajectory in which each number encodes its field, the first prompt token of its rollout and its position."""
    n = len(tokens)
    mark = (prompt[0] + np.arange(n) / 100).astype(np.float32)
    return Trajectory(
        rid=rid,
        arm="treated",
        prompt=np.array(prompt, dtype=np.int32),
        tokens=np.array(tokens, dtype=np.int32),
        support_ids=(np.arange(n)[:, None] * 10 + np.arange(support)).astype(np.int32),
        teacher_logprobs=-np.stack([mark + k for k in range(support + 1)], axis=1),
        teacher_tail=-mark - 0.5 if tail else None,
        teacher_sampled=-mark - 0.25,
        rollout_logprobs=-mark - 0.125,
        sampling_logprobs=-mark - 0.375,
        oldest_version=3,
    )


def test_a_micro_batch_by_hand() -> None:
    batch = [trajectory("a", [11, 12], [13, 14]), trajectory("b", [21, 22, 23, 24], [25])]
    (micro,) = micro_batches(batch, max_tokens=10)

    assert micro.rids == ("b", "a")  # 5 tokens before 4
    assert micro.input_ids.tolist() == [[21, 22, 23, 24, 25], [11, 12, 13, 14, 0]]
    # The kept token at position i is drawn from the logits at i - 1.
    assert micro.logit_mask.int().tolist() == [[0, 0, 0, 1, 0], [0, 1, 1, 0, 0]]
    assert micro.targets.tolist() == [25, 13, 14]
    assert micro.kept_tokens == 3
    assert micro.support_ids.tolist() == [[0, 1], [0, 1], [10, 11]]
    a0, a1, b0 = 11.0, 11.01, 21.0
    expected = torch.tensor([[b0, b0 + 1, b0 + 2], [a0, a0 + 1, a0 + 2], [a1, a1 + 1, a1 + 2]])
    torch.testing.assert_close(micro.teacher_logprobs, -expected)
    assert micro.teacher_tail is not None
    torch.testing.assert_close(micro.teacher_tail, -torch.tensor([b0, a0, a1]) - 0.5)
    torch.testing.assert_close(micro.teacher_sampled, -torch.tensor([b0, a0, a1]) - 0.25)
    torch.testing.assert_close(micro.rollout_logprobs, -torch.tensor([b0, a0, a1]) - 0.125)
    torch.testing.assert_close(micro.weights, torch.tensor([1 / 3, 1 / 3, 1 / 3]))
    assert (micro.input_ids.dtype, micro.support_ids.dtype) == (torch.int64, torch.int64)
    assert (micro.teacher_logprobs.dtype, micro.weights.dtype) == (torch.float32, torch.float32)


def test_weights_by_hand() -> None:
    batch = [trajectory("a", [1], [2]), trajectory("b", [1], [2, 3, 4])]
    assert [row.tolist() for row in token_weights(batch, "kept")] == [[0.25], [0.25] * 3]
    assert [row.tolist() for row in token_weights(batch, "sequence")] == [[0.5], [1 / 6] * 3]
    # Nothing was cut: as many were generated as were kept. With 4 of 1 and 12 of 3: each counts a sixteenth.
    assert [row.tolist() for row in token_weights(batch, "generated")] == [[0.25], [0.25] * 3]
    cut = [replace(batch[0], generated=4), replace(batch[1], generated=12)]
    assert [row.tolist() for row in token_weights(cut, "generated")] == [[1 / 16], [1 / 16] * 3]
    assert [row.tolist() for row in token_weights(cut, "kept")] == [[0.25], [0.25] * 3]
    (micro,) = micro_batches(batch, max_tokens=100, denominator="sequence")
    torch.testing.assert_close(micro.weights, torch.tensor([1 / 6, 1 / 6, 1 / 6, 0.5]))
    with pytest.raises(ValueError, match=r"denominator is 'tokens', expected one of kept, sequence, generated"):
        token_weights(batch, "tokens")  # type: ignore[arg-type]


def test_weights_span_the_whole_batch_not_the_micro_batch() -> None:
    batch = [trajectory("a", [1], [2]), trajectory("b", [1], [2, 3, 4])]
    micros = micro_batches(batch, max_tokens=4)
    assert [micro.rids for micro in micros] == [("b",), ("a",)]
    assert [micro.weights.tolist() for micro in micros] == [[0.25, 0.25, 0.25], [0.25]]


def test_similar_lengths_share_a_micro_batch() -> None:
    lengths = {"a": 3, "b": 9, "c": 4, "d": 8, "e": 30}
    batch = [trajectory(rid, [7], [1] * (length - 1)) for rid, length in lengths.items()]
    # e (30) is longer than the limit and stands alone; 2 x 9 = 18; 2 x 4 = 8.
    micros = micro_batches(batch, max_tokens=18)
    assert [micro.rids for micro in micros] == [("e",), ("b", "d"), ("c", "a")]
    assert [tuple(micro.input_ids.shape) for micro in micros] == [(1, 30), (2, 9), (2, 4)]


def test_much_shorter_rows_are_not_padded_to_a_large_group() -> None:
    def lengths(sizes: list[int], max_tokens: int) -> list[list[int]]:
        batch = [trajectory(f"{place:02d}", [1] * (size - 1), [2]) for place, size in enumerate(sizes)]
        groups = [micro.rids for micro in micro_batches(batch, max_tokens=max_tokens)]
        return [[sizes[int(rid)] for rid in group] for group in groups]

    # Six rows of 200 are 1,200 tokens: 150 is three quarters of the longest, 149 is less and begins a group.
    assert lengths([200] * 6 + [150, 149, 20], 8192) == [[200] * 6 + [150], [149, 20]]
    # Five rows are 1,000 tokens: too few for a micro-batch of their own.
    assert lengths([200] * 5 + [100], 8192) == [[200] * 5 + [100]]
    assert lengths([600, 600, 20], 1200) == [[600, 600], [20]]


def test_no_trajectories_make_no_micro_batch() -> None:
    assert micro_batches([], max_tokens=8) == []


@given(
    sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=12),
    max_tokens=st.integers(1, 60),
    shuffled=st.randoms(use_true_random=False),
)
def test_every_kept_token_is_seen_once(sizes: list[tuple[int, int]], max_tokens: int, shuffled: Any) -> None:
    """Every kept token is in exactly one micro-batch, in whatever order the trajectories came."""
    batch = [
        trajectory(f"r{i:02d}", [100 * i + 1] * m, [100 * i + 10 + j for j in range(n)])
        for i, (m, n) in enumerate(sizes)
    ]
    micros = micro_batches(batch, max_tokens=max_tokens)
    seen = [token for micro in micros for token in micro.targets.tolist()]
    assert sorted(seen) == sorted(token for row in batch for token in row.tokens.tolist())
    for micro in micros:
        rows, longest = micro.input_ids.shape
        assert rows == 1 or rows * longest <= max_tokens
        # The token after each selected position is the target: nothing is off by one.
        assert micro.input_ids[:, 1:][micro.logit_mask[:, :-1]].tolist() == micro.targets.tolist()
    assert sum(float(micro.weights.sum()) for micro in micros) == pytest.approx(1.0, abs=1e-5)

    shuffled.shuffle(batch)
    again = micro_batches(batch, max_tokens=max_tokens)
    assert [micro.rids for micro in again] == [micro.rids for micro in micros]


def test_read_only_arrays_off_the_wire() -> None:
    """Arrays from np.frombuffer are read-only; torch warns of those, and here warnings are errors."""
    row = trajectory("a", [1], [2, 3])
    frozen = replace(
        row,
        tokens=np.frombuffer(row.tokens.tobytes(), dtype="<i4"),
        rollout_logprobs=np.frombuffer(row.rollout_logprobs.tobytes(), dtype="<f4"),
    )
    (micro,) = micro_batches([frozen], max_tokens=8)
    assert micro.targets.tolist() == [2, 3]
    micro.rollout_logprobs.zero_()  # it is a copy
    assert frozen.rollout_logprobs[0] == pytest.approx(-1.125)


def test_without_a_tail_and_to_a_device() -> None:
    (micro,) = micro_batches([trajectory("a", [1], [2, 3], tail=False)], max_tokens=8)
    assert micro.teacher_tail is None
    moved = micro.to("meta")
    assert isinstance(moved, MicroBatch)
    assert moved.rids == ("a",) and moved.teacher_tail is None
    assert moved.input_ids.device.type == moved.weights.device.type == "meta"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": np.zeros(0, np.int32)}, "trajectory a: prompt is empty"),
        ({"tokens": np.zeros(0, np.int32)}, "trajectory a: tokens is empty"),
        ({"tokens": [2, 3]}, "trajectory a: tokens is list, not an array"),
        ({"tokens": np.zeros(2, np.int64)}, r"tokens is int64\[2\], expected int32\[any\]"),
        ({"prompt": np.zeros((1, 1), np.int32)}, r"prompt is int32\[1, 1\], expected int32\[any\]"),
        (
            {"support_ids": np.zeros((3, 2), np.int32)},
            r"support_ids is int32\[3, 2\], expected int32\[2, any\]",
        ),
        ({"teacher_logprobs": np.zeros((2, 2), np.float32)}, r"teacher_logprobs .* expected float32\[2, 3\]"),
        ({"teacher_logprobs": np.zeros((2, 3))}, r"teacher_logprobs is float64\[2, 3\]"),
        ({"teacher_tail": np.zeros(3, np.float32)}, r"teacher_tail is float32\[3\], expected float32\[2\]"),
        ({"teacher_sampled": np.zeros((2, 1), np.float32)}, r"teacher_sampled is float32\[2, 1\]"),
        (
            {"rollout_logprobs": np.array([0, -np.inf], np.float32)},
            r"rollout_logprobs is not finite at \[1\]",
        ),
        ({"teacher_tail": np.array([np.nan, 0], np.float32)}, r"teacher_tail is not finite at \[0\]"),
    ],
)
def test_a_wrong_trajectory_is_refused_with_field_and_reason(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(trajectory("a", [1], [2, 3]), **change)


def test_trajectories_with_different_shapes_are_refused() -> None:
    first = trajectory("a", [1], [2])
    with pytest.raises(ValueError, match="trajectory b: support of 3 outcomes, trajectory a: of 2"):
        micro_batches([first, trajectory("b", [1], [2], support=3)], max_tokens=8)
    with pytest.raises(ValueError, match="has a tail, the other none"):
        micro_batches([first, trajectory("b", [1], [2], tail=False)], max_tokens=8)
    with pytest.raises(ValueError, match="max_tokens is 0"):
        micro_batches([first], max_tokens=0)
