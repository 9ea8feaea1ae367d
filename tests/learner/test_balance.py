"""A batch dealt out to ranks: every trajectory once, with its weight in the whole batch, and about equal tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rank_scenarios import batch_of
from test_batch import trajectory

from learner.balance import balanced
from learner.batch import Denominator, micro_batches
from learner.sharded import packed, unpacked

LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=1, max_size=12)


@given(lengths=LENGTHS, ranks=st.integers(1, 4), denominator=st.sampled_from(["kept", "sequence", "generated"]))
def test_each_trajectory_is_dealt_once_with_its_weights(
    lengths: list[tuple[int, int]], ranks: int, denominator: Denominator
) -> None:
    batch = [trajectory(f"r{i}", [i + 1] * prompt, [2] * kept) for i, (prompt, kept) in enumerate(lengths)]
    hands = balanced(batch, ranks, max_tokens=64, denominator=denominator)
    assert len({len(hand) for hand in hands}) == 1, "each micro-batch is a collective operation"
    dealt = [micro for hand in hands for micro in hand]
    assert sorted(rid for micro in dealt for rid in micro.rids) == sorted(one.rid for one in batch)
    whole = micro_batches(batch, max_tokens=64, denominator=denominator)
    weights = [torch.cat([micro.weights for micro in some]).sort().values for some in (whole, dealt)]
    torch.testing.assert_close(weights[0], weights[1][-len(weights[0]) :])
    assert all(micro.weights.eq(0).all() and micro.kept_tokens == 1 for micro in dealt if not micro.rids)
    tokens = [sum(one.length for one in batch if one.rid in {r for m in hand for r in m.rids}) for hand in hands]
    assert max(tokens) - min(tokens) <= max(one.length for one in batch)


def test_by_hand() -> None:
    """6 to the first, 5 to the second, 4 to the second (5 < 6), 3 to the first (6 < 9)."""
    batch = [trajectory(name, [1], [2] * (length - 1)) for name, length in (("d", 3), ("b", 5), ("c", 4), ("a", 6))]
    hands = balanced(batch, 2, max_tokens=6)
    assert [[micro.rids for micro in hand] for hand in hands] == [[("a",), ("d",)], [("b",), ("c",)]]
    reordered = balanced(list(reversed(batch)), 2, max_tokens=6)
    assert [[micro.rids for micro in hand] for hand in reordered] == [[("a",), ("d",)], [("b",), ("c",)]]


def test_a_batch_of_one_gives_the_other_rank_something_to_compute() -> None:
    hands = balanced([trajectory("a", [7, 8], [9])], 2, max_tokens=6)
    assert [[micro.rids for micro in hand] for hand in hands] == [[("a",)], [()]]
    assert hands[1][0].input_ids.tolist() == [[7, 7]]


@pytest.mark.parametrize("tail", [True, False])
def test_a_share_is_the_same_after_its_way_to_another_rank(tail: bool) -> None:
    batch = [trajectory("a", [1, 2], [3, 4], tail=tail), trajectory("b", [1], [2], tail=tail)] if not tail else None
    for hand in balanced(batch or batch_of(0), 2, max_tokens=100):
        again = unpacked(packed(hand))
        assert len(again) == len(hand)
        for micro, same in zip(hand, again, strict=True):
            assert micro.rids == same.rids
            assert (micro.teacher_tail is None) == (same.teacher_tail is None) == (not tail)
            for name in ("input_ids", "logit_mask", "targets", "support_ids", "teacher_logprobs", "weights"):
                found, expected = getattr(same, name), getattr(micro, name)
                assert found.dtype == expected.dtype and torch.equal(found, expected)
