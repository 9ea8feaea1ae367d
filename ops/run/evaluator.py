"""avg@k and pass@k on the held-out split or on benchmarks, by sampling with the slot engine."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load

from actors.engine.loaded import sampler
from common import metrics
from common.config import Config, ConfigError
from common.pretrained import check_pair, compare_tokenizers, load_tokenizer
from common.runfiles.lines import append_lines, open_whole_lines, read_lines
from common.runfiles.records import EVALUATIONS
from common.wire.messages import Ints
from common.wire.weights import BadWeights, WeightsRef, verified
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
class Scores:
    """n problems, k samples each: mean accuracy, chance that one of k is right, mean tokens, share ended by STOP.

    A problem with a sample that nobody could judge is left out of accuracy and chance, and of n; `unjudged` counts such
    samples. Of several benchmarks: n is their sum, as is `unjudged`, k that of the config, and every other number the
    mean of theirs.
    """

    n: int
    k: int
    avg_at_k: float
    pass_at_k: float
    mean_length: float
    eos_rate: float
    benchmarks: dict[str, Scores] = field(default_factory=dict)
    unjudged: int = 0

    def line(self) -> dict[str, Any]:
        """As it stands in eval.jsonl and summary.json."""
        line: dict[str, Any] = {
            "k": self.k,
            "n": self.n,
            "avg@k": self.avg_at_k,
            "pass@k": self.pass_at_k,
            "mean_length": self.mean_length,
            "eos_rate": self.eos_rate,
        }
        if self.unjudged:
            line["unjudged"] = self.unjudged
        if self.benchmarks:
            line["benchmarks"] = {name: scores.line() for name, scores in self.benchmarks.items()}
        return line


@dataclass(frozen=True, slots=True)
class _Sample:
    problem: int
    length: int
    ended: bool
    correct: bool | None  # None: the judge gave no verdict


@dataclass(frozen=True, slots=True)
class _Problems:
    """What is measured: the first n problems of a source. `name` "": the task's held-out problems."""

    name: str
    source: TaskSource
    n: int
    k: int


def _problems(config: Config) -> list[_Problems]:
    settings = config.eval
    if config.data.task == "dataset" and not settings.data:
        raise ConfigError("eval.data: names no benchmark; the task dataset holds no rows out")
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


class Evaluator:
    """Samples k completions of every problem; the same draws for every version."""

    def __init__(self, config: Config, folder: Path | None = None) -> None:
        self._config, settings = config, config.eval
        pair = check_pair(config)
        if folder is not None:
            theirs = load_tokenizer(folder).get_vocab()
            compare_tokenizers(load_tokenizer(pair.student.folder).get_vocab(), theirs)
        self.decoder = sampler(
            config,
            pair,
            folder or pair.student.folder,
            dtype=config.rollout.dtype,
            device=settings.device,
            temperature=settings.temperature,
            top_p=settings.top_p,
        )
        self._problems = _problems(config)
        for one in self._problems:
            one.source.prepare()

    def swap(self, weights: bytes) -> None:
        """Take other weights, a safetensors file's bytes. Raises ValueError where they do not fit."""
        self.decoder.swap(load(weights))

    def measure(self, *, k: int | None = None, stop: threading.Event | None = None) -> Scores | None:
        """Sample and judge; None when stopped in between. `k`: samples a problem; None: as the config says."""
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
        while waiting or self.decoder.busy:
            metrics.turned("evaluator")
            if stop is not None and stop.is_set():
                for key in self.decoder.busy:
                    self.decoder.remove(key)
                return None
            while waiting and self.decoder.free:
                self._add(problems.source, *waiting.pop())
            for chunk in self.decoder.step():
                metrics.turned("evaluator")  # to judge a completion may take seconds
                done.append(_judged(problems.source, chunk.key, chunk.tokens, chunk.finish == "eos"))
        return _scores(done, problems.n, k)

    def _add(self, source: TaskSource, problem: int, sample: int) -> None:
        self.decoder.add(
            f"{problem}:{sample}",
            source.prompt(problem),
            seed=(problem << 20) + sample,
            max_new_tokens=self._config.rollout.max_completion_length,
        )


def _judged(source: TaskSource, key: str, tokens: Ints, ended: bool) -> _Sample:
    problem = int(key.partition(":")[0])
    correct = source.judge(problem, tokens)
    if correct is None:  # the judge died over it, or for want of memory: once more, by a new one
        correct = source.judge(problem, tokens)
    return _Sample(problem, len(tokens), ended, correct)


def _scores(samples: list[_Sample], n: int, k: int) -> Scores:
    """Raises ConfigError where there is not one problem whose samples are all judged."""
    left_out = {sample.problem for sample in samples if sample.correct is None}
    unjudged = sum(sample.correct is None for sample in samples)
    if unjudged:
        log.warning("%d samples have no verdict: %d of %d problems are left out", unjudged, len(left_out), n)
    if len(left_out) == n:
        raise ConfigError(
            f"data.verifier: gave no verdict on {unjudged} of {len(samples)} samples, of every problem some"
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
    """Benchmarks weigh the same, however many problems each has."""
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


def follow(config: Config, stop: threading.Event, finished: Callable[[], bool]) -> None:
    """Evaluate every version that the learner leaves in `eval/`, oldest first, until the run is over.

    Beside the training and not in its way: a process of its own, at the lowest priority.
    """
    os.nice(19)
    evaluator: Evaluator | None = None
    folder, results = config.run_dir / "eval", config.run_dir / EVALUATIONS
    for line in [*read_lines(results)][-1:]:
        _show(line)
    while not stop.is_set():
        metrics.turned("evaluator")
        over = finished()  # asked before looking: what was left behind before the end is seen
        notes = sorted(folder.glob("v*.json"))
        if not notes:
            if over:
                return
            stop.wait(0.3)
            continue
        note = json.loads(notes[0].read_text())
        if note["step"] not in _steps(results):
            evaluator = evaluator or Evaluator(config)
            if not _evaluate_one(evaluator, note, folder, results, stop):
                return
        (folder / f"v{note['version']:08d}.safetensors").unlink(missing_ok=True)
        notes[0].unlink()


def _show(line: dict[str, Any]) -> None:
    metrics.policy_version.labels("evaluator").set(line["policy_version"])
    metrics.eval_avg_at_k.set(line["avg@k"])
    metrics.eval_pass_at_k.set(line["pass@k"])
    metrics.eval_mean_length.set(line["mean_length"])


def _steps(results: Path) -> set[int]:
    return {line["step"] for line in read_lines(results)}


def _evaluate_one(
    evaluator: Evaluator, note: dict[str, Any], folder: Path, results: Path, stop: threading.Event
) -> bool:
    began = time.monotonic()
    ref = WeightsRef(note["version"], f"v{note['version']:08d}.safetensors", note["sha256"])
    try:
        evaluator.swap(verified(folder, ref))
    except (BadWeights, ValueError) as error:
        log.warning("not evaluated: %s", error)
        return True
    scores = evaluator.measure(stop=stop)
    if scores is None:
        return False
    line = {"policy_version": note["version"], "step": note["step"], "tokens_trained": note["tokens_trained"]}
    line |= scores.line() | {"wall_s": time.monotonic() - began}
    _show(line)
    with open_whole_lines(results) as file:  # an evaluator that was killed may have left a part of a line
        append_lines(file, [line])
    log.info("version %d: avg@%d %.3f", note["version"], scores.k, scores.avg_at_k)
    return True
