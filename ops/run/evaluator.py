"""avg@k and pass@k on the held-out split or on benchmarks, by sampling: with the slots, or a vLLM server."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from actors.engine import ClosedChunk, Shared, Writer
from actors.engine.loaded import sampler, sampler_before_a_server
from common import metrics, tracing
from common.config import Config, ConfigError
from common.failing import brief
from common.pretrained import Pair, check_pair, compare_tokenizers, load_tokenizer
from common.runfiles.lines import append_lines, open_whole_lines
from common.runfiles.names import TO_EVALUATE
from common.runfiles.records import Evaluation, Scores, ToEvaluate
from common.runfiles.run import RunFolder, read_json
from common.wire.messages import Ints
from common.wire.plane import Stopping
from common.wire.weights import BadWeights, WeightsRef, file_of, verified
from ops.tasks.source import TaskSource

log = logging.getLogger("katana.evaluate")


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right: 1 - C(n-c, k) / C(n, k).

    Source: Chen et al., "Evaluating Large Language Models Trained on Code", 2021, equation 1.

    Raises:
        ValueError: unless 0 ≤ correct ≤ samples and 1 ≤ k ≤ samples.
    """
    if not (0 <= correct <= samples and 1 <= k <= samples):
        raise ValueError(f"pass@{k} of {correct} right in {samples} samples")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


@dataclass(frozen=True, slots=True)
class _Sample:
    problem: int
    length: int
    ended: bool
    correct: bool | None  # None: the judge gave no verdict


@dataclass(frozen=True, slots=True)
class _Problems:
    """The first n problems of a source. `name` "": the held-out problems of the task."""

    name: str
    source: TaskSource
    n: int
    k: int


def _problems(config: Config) -> list[_Problems]:
    settings = config.eval
    if config.data.task == "dataset" and not settings.data:
        raise ConfigError("eval.data: names no benchmark; the task dataset has no held-out rows")
    if not settings.data:
        return [_Problems("", TaskSource(config, "eval"), settings.problems, settings.k)]
    found = []
    for name, one in settings.data.items():
        source = TaskSource(config, "eval", name)
        for note in source.notes:
            log.warning("eval.data.%s: %s", name, note)
        rows = source.count or 0
        found.append(_Problems(name, source, min(one.problems or rows, rows), one.k or settings.k))
    return found


class NotWritten(RuntimeError):
    """A server does not write the samples."""


class Evaluator:
    """Samples k completions of every problem, with the same seeds for every version.

    folder: of the model, by default the student's. stop: ends the wait for a server, with Stopping. Raises ConfigError,
    ModelError.
    """

    def __init__(self, config: Config, folder: Path | None = None, stop: threading.Event | None = None) -> None:
        self._config, settings = config, config.eval
        pair = check_pair(config)
        if folder is not None:
            theirs = load_tokenizer(folder).get_vocab()
            compare_tokenizers(load_tokenizer(pair.student.folder).get_vocab(), theirs)
        self._problems = _problems(config)
        self._swaps = 0
        model = folder or pair.student.folder
        if settings.engine == "vllm":
            self.writer = self._before_a_server(pair, model, stop or threading.Event())
        else:
            self.writer = sampler(
                config,
                pair,
                model,
                dtype=config.rollout.dtype,
                device=settings.device,
                temperature=settings.temperature,
                top_p=settings.top_p,
            )
        for one in self._problems:
            one.source.prepare()

    def _before_a_server(self, pair: Pair, model: Path, stop: threading.Event) -> Writer:
        """A server that nobody else gives weights to: it needs no lock, and the versions in its labels count our swaps,
        since those of a run may come again after a crash."""
        from actors.vllm.weights import OfModel

        writer = sampler_before_a_server(self._config, pair, model)
        shared = Shared(
            run=f"eval-{self._config.name}-{secrets.token_hex(4)}",
            weights=self._config.run_dir / TO_EVALUATE,
            number=lambda: 0,
            exclusively=lambda _: contextlib.nullcontext(lambda: True),
            pause=stop.wait,
        )
        if not writer.attach(shared):
            raise Stopping
        writer.swap(OfModel.of(model), self._swaps)
        return writer

    def swap(self, weights: bytes) -> None:
        """Swap in other weights, the bytes of a published file. Raises ValueError if they do not fit the model."""
        self._swaps += 1
        self.writer.swap(self.writer.read_weights(weights), self._swaps)

    def measure(self, *, k: int | None = None, stop: threading.Event | None = None) -> Scores | None:
        """Sample and judge; None if stopped before the end. `k`: samples per problem, by default as in the config."""
        found: dict[str, Scores] = {}
        for one in self._problems:
            scores = self._measure_one(one, k or one.k, stop)
            if scores is None:
                return None
            found[one.name] = scores
        return found[""] if "" in found else _overall(found, k or self._config.eval.k)

    def _measure_one(self, problems: _Problems, k: int, stop: threading.Event | None) -> Scores | None:
        waiting = [(problem, sample) for problem in range(problems.n) for sample in range(k)]
        waiting.reverse()
        done: list[_Sample] = []
        begun: dict[str, list[Ints]] = {}  # what a server sends in pieces
        while waiting or self.writer.busy:
            metrics.turned("evaluator")
            if stop is not None and stop.is_set():
                for key in self.writer.busy:
                    self.writer.remove(key)
                return None
            while waiting and self.writer.free:
                self._add(problems.source, *waiting.pop())
            for chunk in self._step():
                begun.setdefault(chunk.key, []).append(chunk.tokens)
                if chunk.finish is None:
                    continue
                metrics.turned("evaluator")  # judging a completion may take seconds
                tokens = np.concatenate(begun.pop(chunk.key))
                done.append(_judged(problems.source, chunk.key, tokens, chunk.finish == "eos"))
        return _scores(done, problems.n, k)

    def _step(self) -> list[ClosedChunk]:
        """Raises NotWritten if a server fails for good, or on one of the samples."""
        try:
            return self.writer.step()
        except Exception as error:
            if self._config.eval.engine == "slots":
                raise
            raise NotWritten(f"eval.vllm: {brief(error)}") from error

    def _add(self, source: TaskSource, problem: int, sample: int) -> None:
        self.writer.add(
            f"{problem}:{sample}",
            source.prompt(problem),
            seed=(problem << 20) + sample,
            max_new_tokens=self._config.rollout.max_completion_length,
        )


def _judged(source: TaskSource, key: str, tokens: Ints, ended: bool) -> _Sample:
    problem = int(key.partition(":")[0])
    correct = source.judge(problem, tokens)
    if correct is None:  # the judge crashed, perhaps out of memory: retry once with a new one
        correct = source.judge(problem, tokens)
    return _Sample(problem, len(tokens), ended, correct)


def _scores(samples: list[_Sample], n: int, k: int) -> Scores:
    """Raises ConfigError if there is no problem whose samples are all judged."""
    left_out = {sample.problem for sample in samples if sample.correct is None}
    unjudged = sum(sample.correct is None for sample in samples)
    if unjudged:
        log.warning("%d samples have no verdict: %d of %d problems are left out", unjudged, len(left_out), n)
    if len(left_out) == n:
        raise ConfigError(
            f"data.verifier: gave no verdict on {unjudged} of {len(samples)} samples, at least one of every problem"
        )
    right = Counter(sample.problem for sample in samples if sample.correct)
    correct = [right[problem] for problem in range(n) if problem not in left_out]
    n = len(correct)
    return Scores(
        n=n,
        k=k,
        avg_at_k=sum(correct) / (n * k),
        pass_at_k=sum(pass_at_k(k, count, k) for count in correct) / n,
        mean_length=sum(sample.length for sample in samples) / len(samples),
        eos_rate=sum(sample.ended for sample in samples) / len(samples),
        unjudged=unjudged,
    )


def _overall(benchmarks: dict[str, Scores], k: int) -> Scores:
    """All benchmarks have the same weight, however many problems they have."""
    all_of = list(benchmarks.values())
    return Scores(
        n=sum(one.n for one in all_of),
        k=k,
        avg_at_k=sum(one.avg_at_k for one in all_of) / len(all_of),
        pass_at_k=sum(one.pass_at_k for one in all_of) / len(all_of),
        mean_length=sum(one.mean_length for one in all_of) / len(all_of),
        eos_rate=sum(one.eos_rate for one in all_of) / len(all_of),
        unjudged=sum(one.unjudged for one in all_of),
        benchmarks=benchmarks,
    )


def follow(
    config: Config,
    stop: threading.Event,
    finished: Callable[[], bool],
    begun: Callable[[], bool] = lambda: True,
) -> None:
    """Evaluate every version that the learner puts into `eval/`, oldest first, until the run has ended.

    It runs in a separate process at the lowest priority, to leave the CPU to the training. Nothing is evaluated before
    `begun`: where Linux shares out the CPU by session, a priority does not keep one role back for another.
    """
    os.nice(19)
    copies = config.run_dir / TO_EVALUATE / "vllm"  # of weights, which a server was given
    shutil.rmtree(copies, ignore_errors=True)
    try:
        _follow(config, stop, finished, begun)
    finally:
        shutil.rmtree(copies, ignore_errors=True)


def _follow(config: Config, stop: threading.Event, finished: Callable[[], bool], begun: Callable[[], bool]) -> None:
    evaluator: Evaluator | None = None
    run = RunFolder(config.run_dir)
    for last in [*run.evaluations()][-1:]:
        _show(last)
    while not stop.is_set():
        metrics.turned("evaluator")
        over = finished()  # checked before listing, so that nothing written before the end is missed
        waiting = run.to_evaluate
        if not waiting and over:
            return
        if not waiting or not (over or begun()):
            stop.wait(0.3)
            continue
        path = waiting[0]
        note = ToEvaluate.from_json(read_json(path))
        if note.step not in {one.step for one in run.evaluations()}:
            evaluator = evaluator or Evaluator(config, stop=stop)
            if not _evaluate_one(evaluator, note, path.parent, run.evaluations.path, stop):
                return
        (path.parent / file_of(note.version)).unlink(missing_ok=True)
        path.unlink()


def _show(one: Evaluation) -> None:
    metrics.policy_version.labels("evaluator").set(one.policy_version)
    metrics.eval_avg_at_k.set(one.scores.avg_at_k)
    metrics.eval_pass_at_k.set(one.scores.pass_at_k)
    metrics.eval_mean_length.set(one.scores.mean_length)


def _evaluate_one(evaluator: Evaluator, note: ToEvaluate, folder: Path, results: Path, stop: threading.Event) -> bool:
    began = time.monotonic()
    try:
        evaluator.swap(verified(folder, WeightsRef(note.version, file_of(note.version), note.sha256)))
    except (BadWeights, ValueError) as error:
        log.warning("version not evaluated: %s", error)
        return True
    with tracing.span("evaluating", step=note.step):
        scores = evaluator.measure(stop=stop)
    if scores is None:
        return False
    found = Evaluation(note.version, note.step, note.tokens_trained, scores, time.monotonic() - began)
    _show(found)
    with open_whole_lines(results) as file:  # a killed evaluator may have left a partial line
        append_lines(file, [found])
    log.info("version %d: avg@%d %.3f", note.version, scores.k, scores.avg_at_k)
    return True
