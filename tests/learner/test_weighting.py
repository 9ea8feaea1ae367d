"""Token weightings: values by hand, reproducibility, and their effect on the batch's mean."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from samples import (
    make_former_support,
    make_head,
    make_score_support,
    make_support,
    make_tokens,
    make_verdict,
    make_view,
)

from common.config import Loss
from common.wire.messages import MessageError
from learner.batch import Trajectory, micro_batches, token_weights, uniform
from learner.culprits import witness
from learner.intake import read_trajectory
from learner.weighting import by_disagreement, by_entropy, by_position, random_drop, shares_of


def trajectory(rid: str, count: int, entropy: list[float] | None = None) -> Trajectory:
    return Trajectory(
        rid=rid,
        arm="treated",
        prompt=np.array([1], np.int32),
        tokens=np.arange(count, dtype=np.int32),
        support_ids=np.zeros((count, 1), np.int32),
        teacher_logprobs=np.full((count, 2), -1, np.float32),
        teacher_tail=None,
        teacher_sampled=np.full(count, -1, np.float32),
        rollout_logprobs=np.full(count, -1, np.float32),
        sampling_logprobs=np.full(count, -1, np.float32),
        oldest_version=0,
        entropy=None if entropy is None else np.array(entropy, np.float32),
    )


def test_entropy_weights_by_hand() -> None:
    one, other = trajectory("a", 3, [0.0, 0.5, 1.5]), trajectory("b", 1, [0.5])
    assert by_entropy(one, 0.5).tolist() == [0.0, 0.5, 0.75]
    rows = token_weights([one, other], "kept", shares_of(Loss(weighting="entropy", entropy_half=0.5), 3))
    assert np.concatenate(rows).tolist() == pytest.approx([0, 0.5 / 1.75, 0.75 / 1.75, 0.5 / 1.75])
    with pytest.raises(ValueError, match=r"trajectory c: it has no entropies, which loss\.weighting entropy reads"):
        by_entropy(trajectory("c", 1), 0.5)


def test_the_witness_of_a_batch_has_an_entropy_where_the_batch_has() -> None:
    found = witness(trajectory("a", 3, [0.0, 0.5, 1.5]))
    assert by_entropy(found, 0.5).shape == (1,) and by_entropy(found, 0.5)[0] > 0
    assert witness(trajectory("a", 3)).entropy is None


def test_position_weights_halve_at_the_half_life() -> None:
    assert by_position(5, 2.0)[::2].tolist() == [1.0, 0.5, 0.25]
    assert by_position(3, 1.0).tolist() == [1.0, 0.5, 0.25]
    rows = token_weights(
        [trajectory("a", 2), trajectory("b", 1)], "kept", lambda one: by_position(len(one.tokens), 1.0)
    )
    assert [row.tolist() for row in rows] == [[0.4, 0.2], [0.4]]


def test_weights_fall_with_what_both_models_have_disagreed_on() -> None:
    """Gaps of 0, 1, 2 and 1 nats, of either sign: before the tokens 0, 0, 1/4 and 3/4 of the sum."""
    teacher = np.array([-1, -2, -0.5, -3], np.float32)
    written = np.array([-1, -1, -2.5, -2], np.float32)
    one = replace(trajectory("a", 4), teacher_sampled=teacher, rollout_logprobs=written)
    assert by_disagreement(one, 0.5).tolist() == [1.5, 1.5, 1.375, 1.125]
    assert by_disagreement(one, 0.0).tolist() == [1.0] * 4
    alike = by_disagreement(trajectory("b", 3), 0.5)  # nothing to disagree on
    assert alike.tolist() == [1.5] * 3
    rows = token_weights([one, trajectory("b", 3)], "sequence", lambda row: by_disagreement(row, 0.5))
    assert [row.sum() for row in rows] == pytest.approx([0.5, 0.5])


def test_random_drop_keeps_its_retention_at_every_position() -> None:
    shares = np.stack([random_drop(trajectory(f"r{number}", 200), 0.3, seed=5) for number in range(100)])
    assert set(np.unique(shares)) == {0.0, 1.0}
    # 20,000 draws: five standard errors are 0.016; a half of the positions 0.023.
    assert shares.mean() == pytest.approx(0.3, abs=0.016)
    assert shares[:, :100].mean() == pytest.approx(0.3, abs=0.023)
    assert not (shares[0] == shares[1]).all()


def test_random_drop_is_a_function_of_seed_rollout_and_position() -> None:
    one = random_drop(trajectory("r1", 64), 0.5, seed=1)
    assert (random_drop(trajectory("r1", 64), 0.5, seed=1) == one).all()
    assert (random_drop(trajectory("r1", 40), 0.5, seed=1) == one[:40]).all()
    assert not (random_drop(trajectory("r1", 64), 0.5, seed=2) == one).all()
    assert random_drop(trajectory("r1", 64), 1.0, seed=1).all()


def test_each_name_in_the_config_gives_its_weighting() -> None:
    one = trajectory("r1", 9)
    assert shares_of(Loss(), 3) is uniform
    drop = shares_of(Loss(weighting="random_drop", retention=0.5), 3)
    assert (drop(one) == random_drop(one, 0.5, 3)).all()
    fading = shares_of(Loss(weighting="position", position_half_life=3.0), 3)
    assert (fading(one) == by_position(9, 3.0)).all()
    apart = shares_of(Loss(weighting="importance_position", importance_gamma=2.0), 3)
    assert (apart(one) == by_disagreement(one, 2.0)).all()


@pytest.mark.parametrize("denominator", ["kept", "sequence"])
def test_dropped_tokens_have_no_weight_and_the_rest_sums_to_one(denominator: str) -> None:
    batch = [trajectory(f"r{number}", 30 + number) for number in range(4)]
    shares = shares_of(Loss(weighting="random_drop", retention=0.4), 3)
    micros = micro_batches(batch, max_tokens=70, denominator=denominator, shares=shares)  # type: ignore[arg-type]
    assert len(micros) > 1
    weights = {rid: micro.weights.numpy() for micro in micros for rid in micro.rids if len(micro.rids) == 1}
    assert sum(float(micro.weights.sum()) for micro in micros) == pytest.approx(1.0, abs=1e-5)
    for one in batch:
        if one.rid in weights:
            assert ((weights[one.rid] > 0) == (shares(one) > 0)).all()


def test_a_batch_without_kept_tokens_has_no_weight() -> None:
    for denominator in ("kept", "sequence", "generated"):
        rows = token_weights([trajectory("a", 2)], denominator, lambda one: np.zeros(len(one.tokens)))  # type: ignore[arg-type]
        assert rows[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("support", [make_support(5), make_former_support(5)])
@pytest.mark.parametrize(("cut", "generated"), [(True, 3), (False, 5)])
def test_generated_is_what_the_verdict_saw_up_to_its_trigger(cut: bool, generated: int, support: Any) -> None:
    """Trigger 3 of 5 scored tokens, keep 2; more tokens may have been scored when the cut was found."""
    verdict = make_verdict(
        keep=2,
        trigger=3,
        train=2,
        cut=cut,
        generated=None if cut else 5,
        tokens=np.arange(5, dtype=np.int32),
        divergence=np.ones(5, np.float32),
    )
    record = {
        b"head": make_head().encode(),
        b"verdict": verdict.encode(),
        b"t:0": make_tokens(range(5)).encode(),
        b"p:0": support.encode(),
        b"q:0": make_score_support(5).encode(),
    }
    found = read_trajectory(record, vocab_size=64)
    assert (len(found.tokens), found.generated) == (2, generated)


def test_entropies_are_read_where_they_are_wanted_and_must_fit() -> None:
    verdict = make_verdict(tokens=np.arange(5, dtype=np.int32), divergence=np.ones(5, np.float32), keep=3, train=3)
    record = {b"head": make_head().encode(), b"verdict": verdict.encode()}
    for seq, count in enumerate((2, 3)):
        values = [0.25 * (seq + place) for place in range(count)]
        record |= {
            b"t:%d" % seq: make_tokens(range(count), seq=seq, start=2 * seq).encode(),
            b"p:%d" % seq: make_support(count).encode(),
            b"q:%d" % seq: make_score_support(count).encode(),
            b"v:%d" % seq: make_view(values, seq).encode(),
        }
    assert read_trajectory(record, vocab_size=64).entropy is None
    found = read_trajectory(record, vocab_size=64, entropies=True).entropy
    assert found is not None and found.tolist() == [1.0, 0.75, 0.75]  # 1 - 0, 1 - 0.25; 1 - 0.25
    for broken, said in ((b"", "view: not msgpack"), (make_view([0.5]).encode(), "1 entropies of 3 tokens")):
        with pytest.raises(MessageError, match=said):
            read_trajectory(record | {b"v:1": broken}, vocab_size=64, entropies=True)
