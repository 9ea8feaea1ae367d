"""Random trajectories of a small vocabulary, whose logits are padded."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from whole_logits import log_outcomes, on_support, sampled_logprobs

from learner.batch import Trajectory

VOCAB, WIDTH = 12, 14
STOPS = [5, 2, 9]


def top_support(logits: Tensor, k: int, stops: list[int], vocab: int) -> Tensor:
    """The k likeliest ids of each row that are no stop ids."""
    masked = logits[:, :vocab].clone()
    masked[:, stops] = -torch.inf
    return masked.topk(k, dim=1).indices


def random_batch(seed: int, sizes: list[tuple[int, int]], support: int = 4) -> list[Trajectory]:
    """Trajectories of (prompt, kept) sizes, with a random teacher; stop ids occur among the tokens."""
    rng = np.random.default_rng(seed)
    batch = []
    for index, (m, n) in enumerate(sizes):
        teacher = torch.from_numpy(rng.normal(size=(n, WIDTH)).astype(np.float32))
        support_ids = top_support(torch.from_numpy(rng.normal(size=(n, WIDTH))), support, STOPS, VOCAB)
        tokens = rng.integers(0, VOCAB, n).astype(np.int32)
        outcomes = log_outcomes(teacher, STOPS, VOCAB)
        logprobs, tail = on_support(outcomes, support_ids, STOPS[0], has_tail=True)
        assert tail is not None
        batch.append(
            Trajectory(
                rid=f"r{index}",
                arm="treated",
                prompt=rng.integers(0, VOCAB, m).astype(np.int32),
                tokens=tokens,
                support_ids=support_ids.numpy().astype(np.int32),
                teacher_logprobs=logprobs.numpy(),
                teacher_tail=tail.numpy(),
                teacher_sampled=sampled_logprobs(outcomes, torch.from_numpy(tokens).long(), STOPS).numpy(),
                rollout_logprobs=rng.uniform(-3, -1, n).astype(np.float32),
                sampling_logprobs=rng.uniform(-3, -1, n).astype(np.float32),
                oldest_version=0,
            )
        )
    return batch
