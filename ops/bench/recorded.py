"""Rollouts recorded once from a config's models, to be replayed without a model: chunks, scores and divergences."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from actors.engine import ClosedChunk, Scored, ScoreRequest
from actors.engine.loaded import Engines
from common.config import Config
from common.divergence import coarse_entropy, coarse_reverse_kl
from common.draws import rollout_seed
from common.policies import ScoredTokens
from common.wire.messages import Floats, Ints
from ops.tasks.source import TaskSource


@dataclass(frozen=True, slots=True)
class RecordedChunk:
    """A chunk as the student's engine closed it, the teacher's scores of it, its divergences, float32 [n], and its
    view, float32 [3, n], nats."""

    chunk: ClosedChunk
    scored: Scored
    divergence: Floats
    view: Floats

    @property
    def read(self) -> ScoredTokens:
        """As a policy reads it."""
        return ScoredTokens(self.chunk.tokens, self.divergence, self.view)


@dataclass(frozen=True, slots=True)
class RecordedRollout:
    """A whole rollout that nothing stopped. `prompt`: int32 [m]."""

    prompt: Ints
    chunks: list[RecordedChunk] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens in all of its chunks."""
        return sum(len(one.chunk.tokens) for one in self.chunks)


def record(config: Config, count: int) -> list[RecordedRollout]:
    """Write `count` rollouts with the config's student and score them with its teacher, in this process."""
    engines = Engines(config)
    decoder, scorer, source = engines.decoder, engines.scorer(), TaskSource(config)
    rollouts = [RecordedRollout(source.prompt(number)) for number in range(count)]
    begun, ended = 0, 0
    while ended < count:
        while decoder.free and begun < count:
            most = config.rollout.max_completion_length
            seed = rollout_seed(config.seed, begun)
            decoder.add(f"r{begun}", rollouts[begun].prompt, seed=seed, max_new_tokens=most)
            begun += 1
        closed = decoder.step()
        for chunk, scored in zip(closed, scorer.score([_request(rollouts, one) for one in closed]), strict=True):
            divergence = coarse_reverse_kl(
                chunk.support_logprobs, scored.teacher_logprobs, chunk.tail_logprobs, scored.tail_logprobs
            )
            entropy = coarse_entropy(chunk.support_logprobs, chunk.tail_logprobs)
            view = np.stack((entropy, chunk.rollout_logprobs, scored.sampled))
            rollouts[_number(chunk)].chunks.append(RecordedChunk(chunk, scored, divergence, view))
            if chunk.finish:
                scorer.drop(chunk.key)
                ended += 1
    return rollouts


def _number(chunk: ClosedChunk) -> int:
    return int(chunk.key[1:])


def _request(rollouts: list[RecordedRollout], chunk: ClosedChunk) -> ScoreRequest:
    prompt = rollouts[_number(chunk)].prompt
    return ScoreRequest(chunk.key, prompt, chunk.start, chunk.tokens, chunk.support_ids)
