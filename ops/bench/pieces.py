"""Memory and time of the learner's head and loss, and of a teacher's scores, a few rows of logits at a time.

Each measurement is a process of its own, so that its most memory is its own. Models and rows are random numbers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from actors.engine import Scorer, ScoreRequest
from common import own_packages
from common.config import Config, Loss
from learner.batch import MicroBatch
from learner.divergences import LOG_FLOOR
from learner.head import LinearHead, UncastHead
from learner.loss import StudentOutcomes, diagnostics, token_losses
from learner.pieces import PIECE_ROWS, backward_in_pieces
from ops.bench.resident import forget_peak, peak_mb
from ops.bench.speed import machine, spread

_STOPS, _SUPPORT = (3, 7), 64
_CHUNKS = (64, 64)  # rollouts and tokens of each, for the scores
_MOST_S = 3600.0  # of one measurement
_FIGURES = {
    "memory_share": "the most memory above that of parameters, their gradients and the trunk's states, by that of the "
    "float32 matrix of all logits",
    "seconds": "forward, loss, gradients and diagnostics, from the trunk's states on",
    "ratio": "seconds of a repeat in pieces by those with whole logits, measured one after the other",
}


@dataclass(frozen=True, slots=True)
class HeadShape:
    """What is measured. `tokens`: of the measurement of memory; `compared`: of that beside whole logits, which need
    about 28 bytes a token and id. `dtype`: of the trunk's states; the learner's head is float32."""

    vocab: int
    hidden: int
    tokens: int
    compared: int
    dtype: str
    device: str
    threads: int


def pieces(
    config: Config, repeats: int, *, vocab_size: int, hidden_size: int, tokens: int, compared_tokens: int
) -> dict[str, Any]:
    """Memory and seconds in pieces and with whole logits, for states in float32 and bfloat16; a teacher's memory."""
    found: dict[str, Any] = {}
    settings = config.learner
    for dtype in ("float32", "bfloat16"):
        shape = HeadShape(vocab_size, hidden_size, tokens, compared_tokens, dtype, settings.device, settings.threads)
        found[dtype] = {
            "in_pieces": _in_a_process("memory", shape, 1),
            "beside_whole_logits": _in_a_process("compare", shape, repeats),
            "scores": _in_a_process("scores", shape, 1),
        }
    return {
        "what": "logits in pieces",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "tokens": tokens,
        "rows_of_a_piece": PIECE_ROWS,
        "scored": f"{_CHUNKS[0]} rows of {_CHUNKS[1]} tokens",
        **found,
        "figures": _FIGURES,
        "machine": machine(),
    }


def _in_a_process(what: str, shape: HeadShape, repeats: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "ops.bench.pieces", what, json.dumps(asdict(shape)), str(repeats)]
    done = subprocess.run(
        command, env=own_packages.environment(), text=True, capture_output=True, timeout=_MOST_S, check=False
    )
    if done.returncode:
        raise RuntimeError(f"measuring {what} ended with {done.returncode}: {done.stderr[-500:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


# --- in the process of one measurement


def _memory(shape: HeadShape, _: int) -> dict[str, Any]:
    step = _Step(shape, shape.tokens)
    used, seconds = _most_memory(step.in_pieces, shape.device)
    return {**_shares(used, shape.tokens, shape), "seconds": seconds}


def _compare(shape: HeadShape, repeats: int) -> dict[str, Any]:
    step = _Step(shape, shape.compared)
    for way in (step.in_pieces, step.whole):
        way()
    timed = [[_seconds(way, shape.device) for way in (step.in_pieces, step.whole)] for _ in range(repeats)]
    used = _most_memory(step.whole, shape.device)[0]
    return {
        "tokens": shape.compared,
        "whole": _shares(used, shape.compared, shape),
        "in_pieces_s": spread([one for one, _ in timed]),
        "whole_s": spread([other for _, other in timed]),
        "ratio": spread([one / other for one, other in timed]),
    }


def _scores(shape: HeadShape, _: int) -> dict[str, Any]:
    rows, tokens = _CHUNKS
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=shape.hidden // 4,
        max_position_embeddings=2 * tokens,
        pad_token_id=0,
    )
    with torch.device(shape.device):
        model: Any = Qwen3ForCausalLM(config).to(getattr(torch, shape.dtype)).eval().requires_grad_(False)
    settings: dict[str, Any] = {"slots": rows, "max_length": 2 * tokens, "prefill_tokens": rows * tokens}
    scorer = Scorer(model, stop_ids=_STOPS, vocab_size=shape.vocab, **settings)
    asked = [
        ScoreRequest(
            key=str(row),
            prompt=np.array([1, 2], np.int32),
            start=0,
            tokens=np.random.default_rng(row).integers(10, shape.vocab, tokens).astype(np.int32),
            support_ids=np.tile(np.arange(10, 10 + _SUPPORT, dtype=np.int32), (tokens, 1)),
        )
        for row in range(rows)
    ]
    scorer.score(asked[:1])  # the cache has its place now
    scorer.forget()
    used, seconds = _most_memory(lambda: scorer.score(asked), shape.device)
    return {**_shares(used, rows * tokens, shape), "seconds": seconds}


class _Step:
    """Head and loss of so many tokens, with the parameter's gradient there before, as after a first micro-batch."""

    def __init__(self, shape: HeadShape, tokens: int) -> None:
        torch.manual_seed(0)
        with torch.device(shape.device):
            layer = nn.Linear(shape.hidden, shape.vocab, bias=False)
            layer.__class__ = UncastHead
            self._layer, self._vocab = layer, shape.vocab
            layer.weight.grad = torch.zeros_like(layer.weight)
            self._rows = torch.randn(tokens, shape.hidden, dtype=getattr(torch, shape.dtype)).requires_grad_()
            self._rows.grad = torch.zeros_like(self._rows)
            even = torch.full((tokens,), -3.0)
            self._micro = MicroBatch(
                rids=("bench",),
                input_ids=torch.zeros(1, tokens, dtype=torch.int64),
                logit_mask=torch.ones(1, tokens, dtype=torch.bool),
                targets=torch.randint(shape.vocab, (tokens,)),
                support_ids=torch.arange(10, 10 + _SUPPORT).expand(tokens, _SUPPORT).contiguous(),
                teacher_logprobs=torch.full((tokens, _SUPPORT + 1), -6.0),
                teacher_tail=torch.full((tokens,), -0.2),
                teacher_sampled=even,
                rollout_logprobs=even,
                sampling_logprobs=even,
                to_go=torch.zeros(tokens),
                advantages=torch.zeros(tokens),
                weights=torch.full((tokens,), 1.0 / tokens),
            )

    def in_pieces(self) -> None:
        """As the learner does."""
        total, student = backward_in_pieces(
            LinearHead(self._layer), self._rows, self._micro, _losses, stop_ids=_STOPS, vocab_size=self._vocab
        )
        float(total), diagnostics(student, self._micro)

    def whole(self) -> None:
        """All logits at once, with autograd."""
        outcomes = _log_outcomes(self._layer(self._rows))
        student = _student(outcomes, self._micro)
        loss = (self._micro.weights * _losses(student, self._micro)).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            entropy = -(outcomes.exp() * outcomes.clamp_min(LOG_FLOOR)).sum(dim=1)
            top = outcomes.topk(_SUPPORT + 1, dim=1).values
            last = torch.where(student.logprobs[:, 0] >= top[:, -2], top[:, -1], top[:, -2])
            overlap = (student.logprobs[:, 1:] >= last[:, None]).float().mean(dim=1)
            again = _student(outcomes, self._micro)
            seen = StudentOutcomes(again.logprobs, again.tail, again.sampled, entropy, overlap)
            float(loss), diagnostics(seen, self._micro)


def _losses(student: StudentOutcomes, micro: MicroBatch) -> Tensor:
    return token_losses(Loss(), student, micro)


def _log_outcomes(logits: Tensor) -> Tensor:
    logprobs = logits.log_softmax(dim=1)
    ids = torch.tensor(_STOPS, device=logits.device)
    stop = logprobs.index_select(1, ids).logsumexp(dim=1, keepdim=True)
    return logprobs.index_fill(1, ids, -torch.inf).index_copy_(1, ids[:1], stop)


def _student(outcomes: Tensor, micro: MicroBatch) -> StudentOutcomes:
    """With neither entropy nor overlap."""
    columns = torch.cat([torch.full_like(micro.support_ids[:, :1], _STOPS[0]), micro.support_ids], dim=1)
    tail = outcomes.scatter(1, columns, LOG_FLOOR).logsumexp(dim=1)
    sampled = outcomes.gather(1, micro.targets[:, None])[:, 0]
    return StudentOutcomes(outcomes.gather(1, columns), tail, sampled, sampled, sampled)


def _shares(used_mb: float, tokens: int, shape: HeadShape) -> dict[str, float]:
    logits_mb = 4 * tokens * shape.vocab / (1 << 20)
    return {"logits_mb": logits_mb, "memory_mb": used_mb, "memory_share": used_mb / logits_mb}


def _seconds(work: Callable[[], object], device: str) -> float:
    began = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _most_memory(work: Callable[[], object], device: str) -> tuple[float, float]:
    """MB above what is in use before, and seconds."""
    before = forget_peak(device)
    seconds = _seconds(work, device)
    return max(0.0, peak_mb(device) - before), seconds


def _main(what: str, shape: str, repeats: str) -> None:
    wanted = HeadShape(**json.loads(shape))
    torch.set_num_threads(wanted.threads)
    measure = {"memory": _memory, "compare": _compare, "scores": _scores}[what]
    print(json.dumps(measure(wanted, int(repeats))))


if __name__ == "__main__":
    _main(*sys.argv[1:])
