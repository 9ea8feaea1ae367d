"""Drift guards against numbers worked by hand."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from samples import make_head, make_score_support, make_support, make_tokens, make_verdict

from learner.batch import Trajectory
from learner.drift import Drift, drift_of, repetition
from learner.intake import read_trajectory


def deflated(raw: bytes) -> int:
    """Without two bytes of zlib's header and four of its checksum."""
    return len(zlib.compress(raw)) - 6


@pytest.mark.parametrize(
    ("vocab_size", "width"), [(2, 1), (37, 1), (256, 1), (257, 2), (65_536, 2), (151_936, 3), (1 << 24, 3)]
)
def test_repetition_counts_each_id_in_as_many_bytes_as_the_vocabulary_needs(vocab_size: int, width: int) -> None:
    ids = [1, 0, 1, vocab_size - 1] * 12
    raw = b"".join(one.to_bytes(width, "little") for one in ids)
    assert repetition(np.array(ids, np.int32), vocab_size) == pytest.approx(1 - deflated(raw) / len(raw), abs=1e-12)


def test_a_loop_repeats_and_noise_does_not() -> None:
    loop = np.array([3, 7, 9] * 64, np.int32)
    noise = np.random.default_rng(0).integers(0, 256, 192).astype(np.int32)
    assert repetition(loop, 256) > 0.9
    assert repetition(noise, 256) == 0.0  # deflate would make it longer
    assert repetition(np.array([5], np.int32), 256) == 0.0
    half = np.concatenate([noise[:96], noise[:96]])
    assert 0.35 < repetition(half, 256) < 0.5


def read(**changes: Any) -> Trajectory:
    """A rollout of six tokens."""
    values = {"tokens": np.array([1, 2, 3, 1, 2, 3], np.int32), "divergence": np.ones(6, np.float32), "generated": 6}
    verdict = make_verdict(**(values | {"trigger": 6, "keep": 6, "train": 6, "cut": False} | changes))
    record = {
        b"head": make_head(arm=verdict.arm).encode(),
        b"verdict": verdict.encode(),
        b"t:0": make_tokens(verdict.tokens.tolist()).encode(),
        b"p:0": make_support(6).encode(),
        b"q:0": make_score_support(6).encode(),
    }
    return read_trajectory(record, vocab_size=64)


def test_a_trajectory_knows_how_its_rollout_ended() -> None:
    cut = {"trigger": 4, "keep": 2, "train": 2}
    stopped = read(cut=True, finish_reason="kl_trap", threshold=0.25, **cut)
    assert (stopped.finish_reason, stopped.fired, stopped.threshold) == ("kl_trap", True, 0.25)
    # Of all its tokens, not of the two that it keeps.
    assert stopped.repetition == repetition(np.array([1, 2, 3, 1, 2, 3], np.int32), 64)
    would = read(arm="control", cut=False, finish_reason="length", threshold=None, **cut)
    assert (would.finish_reason, would.fired, would.threshold) == ("length", True, None)
    assert not read(finish_reason="eos").fired
    assert read(finish_reason="eos", cut=False, trigger=4, keep=2, train=6).fired  # shadow: trained whole


def test_a_batch_by_hand() -> None:
    one = read()
    batch = [
        replace(one, finish_reason="kl_trap", fired=True, threshold=0.5, repetition=0.25),
        replace(one, finish_reason="length", fired=False, threshold=0.25, repetition=0.75),
        replace(one, finish_reason="eos", fired=False, threshold=None, repetition=0.0),
        replace(one, finish_reason="length", fired=True, threshold=None, repetition=0.5, arm="control"),
    ]
    assert drift_of(batch) == Drift(
        repetition=0.375, truncation_rate=0.5, cut_rate_treated=1 / 3, cut_rate_control=1.0, threshold=0.375
    )


def test_a_figure_that_no_trajectory_has_is_none() -> None:
    one = replace(read(), threshold=None)
    found = drift_of([one, one])
    assert (found.cut_rate_treated, found.cut_rate_control, found.threshold) == (0.0, None, None)
    assert drift_of([replace(one, arm="control")]).cut_rate_treated is None
