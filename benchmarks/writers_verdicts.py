"""The same text judged twice: by what a vLLM server lists of the student's distribution, and by all of it.

A server writes the text. The exact distributions are those of a plain forward with the same weights, put together as
slots do. Each is scored by the teacher on its own support, as a teacher worker does, and the policy's rule runs over
both sequences of divergences. A third sequence has the plain forward's numbers in a server's list: how it differs from
the exact one is what the list leaves out, without the rounding of another engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from comparison import markdown
from numpy.typing import NDArray
from transformers import PreTrainedModel

from actors.engine import Scorer, ScoreRequest, Writer
from actors.engine.loaded import Engines
from actors.engine.models import load_model
from actors.engine.outcomes import log_outcomes, student_support
from actors.vllm.answers import Answer, LabelSpan
from actors.vllm.chunks import Outcomes, chunks_of, unlisted_stop_bound
from common import policies
from common.config import Config, Termination
from common.divergence import coarse_reverse_kl
from common.pretrained import Pair
from common.termination import Cut, MinimaBuffer
from ops.replay.verdicts import Shape, Windows
from ops.tasks.source import TaskSource

Reals = NDArray[np.float64]
_NOTHING = -1e4  # log of a probability of 0, finite
KINDS = ("exact", "listed", "server")
"""By plain forward; the same in a server's list; as the server answered."""


@dataclass(frozen=True, slots=True)
class Student:
    """A student's numbers about n tokens: see `ClosedChunk`."""

    support_ids: NDArray[np.int32]
    support: NDArray[np.float32]
    tail: NDArray[np.float32] | None

    @classmethod
    def of(cls, chunks: Sequence[Any]) -> Student:
        """Of consecutive chunks."""
        tails = [chunk.tail_logprobs for chunk in chunks]
        return cls(
            np.concatenate([chunk.support_ids for chunk in chunks]),
            np.concatenate([chunk.support_logprobs for chunk in chunks]),
            None if tails[0] is None else np.concatenate(tails),
        )


@dataclass(frozen=True, slots=True)
class Text:
    """A rollout that a server wrote. prompt: int32 [m]; tokens: int32 [n]; server: what it said about them."""

    key: str
    prompt: NDArray[np.int32]
    tokens: NDArray[np.int32]
    server: Student


@dataclass(frozen=True, slots=True)
class Judged:
    """Of a text of n tokens. divergence: float32 [n], by kind, nats. bound: float64 [n], the most by which those of
    `listed` and `exact` may differ. unlisted: bool [n], where some stop id is not listed."""

    divergence: dict[str, NDArray[np.float32]]
    bound: Reals
    unlisted: NDArray[np.bool_]


def write_texts(writer: Writer, config: Config, count: int) -> Iterator[Text]:
    """Whole rollouts of the config's first prompts, in the order in which they end."""
    source, waiting = TaskSource(config), list(range(count))
    prompts, chunks = {}, {}
    while waiting or writer.busy:
        while waiting and writer.free:
            number = waiting.pop()
            key, prompt = f"text{number}", source.prompt(number)
            prompts[key], chunks[key] = prompt, []
            writer.add(key, prompt, seed=number, max_new_tokens=config.rollout.max_completion_length)
        for chunk in writer.step():
            chunks[chunk.key].append(chunk)
            if chunk.finish:
                found = chunks.pop(chunk.key)
                tokens = np.concatenate([one.tokens for one in found])
                yield Text(chunk.key, prompts.pop(chunk.key), tokens, Student.of(found))


class Judge:
    """Student and teacher of a config, for texts. Raises ModelError."""

    def __init__(self, config: Config) -> None:
        engines = Engines(config)
        self._pair: Pair = engines.pair
        self._scorer: Scorer = engines.scorer()
        self._top_k = config.termination.teacher_top_k
        student, rollout = self._pair.student, config.rollout
        self._model: PreTrainedModel = load_model(
            student.folder, dtype=rollout.dtype, device=rollout.device, vocab_size=self._pair.vocab_size
        )
        self._outcomes = Outcomes(self._pair.stop_ids, self._pair.vocab_size, student.vocab_size, self._top_k)

    def judge(self, text: Text) -> Judged:
        logits = self._logits(text)
        exact = self._exact(logits)
        rows = logits.double().log_softmax(-1).cpu().numpy()
        ids = list_of(rows, text.tokens, self._outcomes.asked)
        students = {
            "exact": exact,
            "listed": listed(rows, text.tokens, ids, self._outcomes),
            "server": text.server,
        }
        teachers = {kind: self._score(text, student) for kind, student in students.items()}
        bound, unlisted = self._bound(rows, ids, exact, *teachers["exact"])
        divergence = {
            kind: coarse_reverse_kl(one.support, teachers[kind][0], one.tail, teachers[kind][1])
            for kind, one in students.items()
        }
        return Judged(divergence, bound, unlisted)

    @torch.inference_mode()
    def _logits(self, text: Text) -> torch.Tensor:
        """float32 [n, W], of what each token of the completion was drawn from."""
        whole = torch.from_numpy(np.concatenate([text.prompt, text.tokens]).astype(np.int64))[None]
        network: Any = self._model
        logits: torch.Tensor = network(input_ids=whole.to(self._model.device)).logits[0, len(text.prompt) - 1 : -1]
        return logits.float()

    def _exact(self, logits: torch.Tensor) -> Student:
        stop_ids = self._pair.stop_ids
        rows = log_outcomes(logits, stop_ids, self._pair.vocab_size)
        ids, support, tail = student_support(rows, stop_ids[0], self._top_k, stop_count=len(stop_ids))
        return Student(
            ids.cpu().numpy().astype(np.int32), support.cpu().numpy(), None if tail is None else tail.cpu().numpy()
        )

    def _score(self, text: Text, student: Student) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """The teacher's log-probabilities on the student's support, and its tail."""
        (scored,) = self._scorer.score([ScoreRequest(text.key, text.prompt, 0, text.tokens, student.support_ids)])
        self._scorer.drop(text.key)
        return scored.teacher_logprobs, scored.tail_logprobs

    def _bound(
        self,
        rows: Reals,
        ids: NDArray[np.int32],
        exact: Student,
        teacher: NDArray[np.float32],
        teacher_tail: NDArray[np.float32] | None,
    ) -> tuple[Reals, NDArray[np.bool_]]:
        """float64 [n], bool [n]: see `Judged`. `rows` float64 [n, W]: log-probabilities of tokens; `ids`: the list."""
        if exact.tail is None or teacher_tail is None:  # then everything is listed
            return np.zeros(len(rows)), np.zeros(len(rows), dtype=np.bool_)
        stops = np.array(self._pair.stop_ids)
        missing = ~(ids[:, :, None] == stops).any(axis=1)
        unlisted = np.logaddexp.reduce(np.where(missing, rows[:, stops], _NOTHING), axis=1)
        tail = np.logaddexp(exact.tail.astype(np.float64), unlisted)
        q_stop, q_tail = teacher[:, 0].astype(np.float64), teacher_tail.astype(np.float64)
        bound = unlisted_stop_bound(unlisted, exact.support[:, 0].astype(np.float64), tail, q_stop, q_tail)
        return np.where(missing.any(axis=1), bound, 0.0), missing.any(axis=1)


def list_of(rows: Reals, tokens: NDArray[np.int32], asked: int) -> NDArray[np.int32]:
    """int32 [n, asked]: the tokens that a server lists, most probable first. The one that was drawn takes the last
    place where it is none of these. `rows` float64 [n, W]: log-probabilities; `tokens` int32 [n]."""
    ids = np.argsort(-rows.astype(np.float32), axis=1, kind="stable")[:, :asked].astype(np.int32)
    absent = (ids != tokens[:, None]).all(axis=1)
    ids[absent, -1] = tokens[absent]
    return ids


def listed(rows: Reals, tokens: NDArray[np.int32], ids: NDArray[np.int32], outcomes: Outcomes) -> Student:
    """What a rollout worker makes of a server's answer with this list: see `list_of`. A server rounds to float32."""
    numbers = np.minimum(rows.astype(np.float32).astype(np.float64), 0.0)
    drawn = numbers[np.arange(len(tokens)), tokens]
    answer = Answer(
        tokens=tokens,
        drawn=drawn,
        ranks=(numbers > drawn[:, None]).sum(axis=1) + 1,
        ids=ids,
        logprobs=np.take_along_axis(numbers, ids.astype(np.int64), axis=1),
        finish="stop" if tokens[-1] in outcomes.stop_ids else "length",
        spans=(LabelSpan("", 0, len(tokens)),),
    )
    found = chunks_of(answer, outcomes, key="", start=0, asked=len(tokens), last=True, version_of=lambda _: 0)
    return Student.of(found.chunks)


# --- figures ---------------------------------------------------------------------------------------------------------


def figures(judged: Sequence[Judged], settings: Termination) -> dict[str, Any]:
    """Differences of the divergence a token, and of the verdicts a text."""
    every = {kind: np.concatenate([one.divergence[kind] for one in judged]).astype(np.float64) for kind in KINDS}
    bound = np.concatenate([one.bound for one in judged])
    by_list = np.abs(every["listed"] - every["exact"])
    return {
        "texts": len(judged),
        "tokens": len(bound),
        "divergence_mean": float(every["exact"].mean()),
        "tokens_with_a_stop_id_unlisted": float(np.concatenate([one.unlisted for one in judged]).mean()),
        "nats": {
            "server and exact": spread_of(np.abs(every["server"] - every["exact"])),
            "server's list of the exact numbers, and exact": spread_of(by_list),
            "the bound on the latter": spread_of(bound),
            "by how much the latter is above the bound": spread_of(np.maximum(by_list - bound, 0.0)),
        },
        "verdicts": verdicts(judged, settings),
    }


def spread_of(values: Reals) -> dict[str, float]:
    median, p99 = (float(one) for one in np.percentile(values, (50, 99)))
    return {"median": median, "p99": p99, "max": float(values.max())}


def verdicts(judged: Sequence[Judged], settings: Termination) -> dict[str, Any]:
    """How many texts are cut, and how many are cut otherwise by what the server says: with the threshold of the exact
    divergences for both, and with each kind's own. A threshold is the quantile of the least window means of all texts,
    whole, as KAT has it of a control arm."""
    windows = {kind: [Windows(one.divergence[kind], Shape.of(settings)) for one in judged] for kind in KINDS}
    thresholds = {kind: threshold_of(some, settings) for kind, some in windows.items()}
    cuts = {kind: cuts_of(some, thresholds["exact"], settings) for kind, some in windows.items()}
    own = cuts_of(windows["server"], thresholds["server"], settings)
    return {
        "thresholds": thresholds,
        "cut": sum(one is not None for one in cuts["exact"]),
        "server": differing(cuts["exact"], cuts["server"]),
        "listed": differing(cuts["exact"], cuts["listed"]),
        "server_with_its_own_threshold": differing(cuts["exact"], own),
    }


def threshold_of(windows: Sequence[Windows], settings: Termination) -> float:
    """Raises ValueError where no text is long enough for a window."""
    least = [minimum for one in windows if (minimum := one.minimum()) is not None]
    looks_high = policies.find(settings.policy).looks_high
    return MinimaBuffer(max(1, len(least)), least).quantile(settings.eta if looks_high else 1 - settings.eta)


def cuts_of(windows: Sequence[Windows], threshold: float, settings: Termination) -> list[Cut | None]:
    return [one.cut(threshold, settings.patience, "kl") for one in windows]


def differing(these: Sequence[Cut | None], those: Sequence[Cut | None]) -> dict[str, int]:
    """Texts that only one cuts, and texts that both cut, but not at the same token."""
    pairs = list(zip(these, those, strict=True))
    return {
        "only_one_cuts": sum((one is None) != (other is None) for one, other in pairs),
        "another_token": sum(None not in (one, other) and one != other for one, other in pairs),
    }


def verdicts_table(found: dict[str, Any]) -> str:
    rows = [[name, *(f"{one[key]:.2g}" for key in ("median", "p99", "max"))] for name, one in found["nats"].items()]
    differences = markdown(["difference of the divergence, nats a token", "median", "p99", "max"], rows)
    verdict = found["verdicts"]
    others = [
        [text, *map(str, verdict[name].values())]
        for name, text in (
            ("server", "server against exact, one threshold"),
            ("listed", "server's list of the exact numbers against exact, one threshold"),
            ("server_with_its_own_threshold", "server against exact, each with its own threshold"),
        )
    ]
    cut = markdown(["verdicts that differ", "only one cuts", "both cut, at another token"], others)
    thresholds = verdict["thresholds"]
    said = (
        f"{found['texts']} texts, {found['tokens']:,} tokens, mean divergence {found['divergence_mean']:.3g} nats; a "
        f"stop id is unlisted at {found['tokens_with_a_stop_id_unlisted']:.1%} of the tokens. {verdict['cut']} texts "
        f"are cut by the exact divergences. Thresholds: exact {thresholds['exact']:.6g}, server "
        f"{thresholds['server']:.6g} nats."
    )
    return f"{said}\n\n{differences}\n\n{cut}"
