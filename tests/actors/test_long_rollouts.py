"""A teacher that must read a long rollout from its beginning scores others meanwhile: the real worker and engine on the
shipped teacher and a real Redis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from samples import Run
from shipped_engines import load_shipped, scorer_of
from transformers import PreTrainedModel

from actors.engine.score import Scorer
from common.wire.messages import ScoreSupport
from ops.reach.embedded import EmbeddedRedis
from tests.actors.test_teacher_faults import K, N, alone, steps, text, worker_of, write

pytestmark = pytest.mark.slow

PIECE = 6  # prompts have three tokens, and chunks six


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    torch.set_num_threads(1)
    return load_shipped("teacher")


@pytest.fixture
def run(embedded_redis: EmbeddedRedis, start: Callable[..., Run]) -> Run:
    return start(
        embedded_redis,
        teacher={"slots": 2},
        data={"max_prompt_length": 16},
        termination={"teacher_top_k": K},
        rollout={"max_unscored_chunks": 4},
    )


def in_pieces(run: Run, teacher: PreTrainedModel) -> Scorer:
    scorer = scorer_of(run, teacher)
    scorer._prefill_tokens = PIECE
    return scorer


def test_others_are_scored_while_a_long_rollout_is_read(run: Run, teacher: PreTrainedModel) -> None:
    for rid in ("r1", "r2"):
        run.admit(rid)
    run.take(count=2)
    first = worker_of(run, scorer_of(run, teacher))
    for seq in range(5):
        write(run, "r1", text(seq), seq=seq, start=seq * N)
        steps(first, turns=1)
    assert run.field("r1", "scored") == b"5"
    worker: Any = worker_of(run, in_pieces(run, teacher), "t2")  # knows nothing of r1
    write(run, "r1", text(5), seq=5, start=5 * N)
    for seq in range(4):  # a prompt of 3 tokens and 30 more: six pieces, the last of them with the chunk
        write(run, "r2", text(20 + seq), seq=seq, start=seq * N)
        steps(worker, turns=1)
        assert (run.field("r1", "scored"), run.field("r2", "scored")) == (b"5", b"%d" % (seq + 1))
    steps(worker, turns=2)
    assert run.field("r1", "scored") == b"6"
    got = ScoreSupport.decode(run.field("r1", "q:5") or b"").sampled_logprobs
    assert np.allclose(got, alone(run, teacher, "r1", 5), atol=1e-4)
    assert run.entries("dead") == []
