"""The teacher's engine with more and more rollouts in flight: its speed, and what it forwards again."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from actors.engine import Scorer, ScoreRequest
from actors.engine.models import load_model
from actors.engine.outcomes import support_size
from common.config import Config
from common.pretrained import check_pair
from ops.bench.speed import machine, spread
from ops.tasks.source import TaskSource


def score(config: Config, repeats: int) -> dict[str, Any]:
    """Tokens scored a second, and tokens forwarded again for each, for rollouts that advance in turn, chunk by chunk.

    In flight: `teacher.slots`, one more, a quarter more and twice as many. `fixed` keeps the slots as they are, and
    `growing` may add up to `teacher.max_slots`; both are measured alternately. The texts are random tokens.
    """
    torch.set_num_threads(config.only_teacher.threads)
    pair, slots = check_pair(config), config.only_teacher.slots
    model = load_model(
        pair.teacher.folder,
        dtype=config.only_teacher.dtype,
        device=config.only_teacher.device,
        vocab_size=pair.vocab_size,
    )
    prompts = [TaskSource(config).prompt(index) for index in range(2 * slots)]
    rows = {}
    for in_flight in sorted({slots, slots + 1, slots + slots // 4, 2 * slots}):
        found: dict[str, list[tuple[float, float]]] = {"fixed": [], "growing": []}
        for repeat in range(repeats + 1):
            for name, most in (("fixed", slots), ("growing", config.only_teacher.max_slots)):
                scorer = Scorer(
                    model,
                    slots=slots,
                    max_slots=most,
                    max_length=config.max_length,
                    stop_ids=pair.stop_ids,
                    vocab_size=pair.vocab_size,
                    prefill_tokens=config.only_teacher.prefill_tokens,
                )
                measured = score_speed(scorer, config, prompts[:in_flight], pair.vocab_size, pair.stop_ids)
                if repeat:  # the first warms up
                    found[name].append(measured)
        rows[in_flight] = {
            name: {
                "tokens_per_s": spread([speed for speed, _ in pairs]),
                "forwarded_again_per_token": spread([again for _, again in pairs]),
            }
            for name, pairs in found.items()
        }
    return {"what": "scoring", "slots": slots, "rollouts_in_flight": rows, "machine": machine()}


def score_speed(
    scorer: Scorer, config: Config, prompts: list[Any], vocab_size: int, stop_ids: tuple[int, ...]
) -> tuple[float, float]:
    """Tokens a second, and tokens forwarded again for each token scored, of rollouts with these prompts: random tokens,
    as long as the config allows, that come in turn, chunk by chunk. The scores are on the host when the clock stops."""
    rng, length, chunk = np.random.default_rng(0), config.rollout.max_completion_length, config.rollout.chunk_tokens
    allowed = np.setdiff1d(np.arange(vocab_size, dtype=np.int32), stop_ids)
    ids = allowed[: support_size(config.termination.teacher_top_k, vocab_size, len(stop_ids))]
    texts = rng.choice(allowed, (len(prompts), length))
    began = time.perf_counter()
    for start in range(0, length, chunk):
        waiting = list(range(len(prompts)))
        while waiting:
            taken, waiting = waiting[: scorer.slots], waiting[scorer.slots :]  # as a teacher worker takes chunks
            scorer.score(
                [
                    ScoreRequest(
                        key=f"bench{row}",
                        prompt=prompts[row],
                        start=start,
                        tokens=texts[row, start : start + chunk],
                        support_ids=np.tile(ids, (min(chunk, length - start), 1)),
                        prefix=None if scorer.cached(f"bench{row}") == start else texts[row, :start],
                    )
                    for row in taken
                ]
            )
    scored = texts.size
    return scored / (time.perf_counter() - began), scorer.rebuilt_tokens / scored
