"""avg@k and pass@k on the held-out split, by sampling with the slot engine."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from actors.books import read_lines
from actors.engine import Decoder
from actors.models import load_model
from common import metrics
from common.config import Config
from common.messages import Ints
from common.pretrained import check_pair, compare_tokenizers, load_tokenizer
from common.weights import BadWeights, WeightsRef, verified
from ops.source import TaskSource

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
    """n problems, k samples each: mean accuracy, chance that one of k is right, mean tokens, share ended by STOP."""

    n: int
    k: int
    avg_at_k: float
    pass_at_k: float
    mean_length: float
    eos_rate: float

    def line(self) -> dict[str, Any]:
        """As it stands in eval.jsonl and summary.json."""
        fields = asdict(self)
        return {
            "k": self.k,
            "n": self.n,
            "avg@k": fields["avg_at_k"],
            "pass@k": fields["pass_at_k"],
            "mean_length": self.mean_length,
            "eos_rate": self.eos_rate,
        }


@dataclass(frozen=True, slots=True)
class _Sample:
    problem: int
    length: int
    ended: bool
    correct: bool


class Evaluator:
    """Samples k completions of the first n held-out problems; the same draws for every version."""

    def __init__(self, config: Config, folder: Path | None = None) -> None:
        self._config, settings = config, config.eval
        torch.set_num_threads(settings.threads)
        pair = check_pair(config)
        if folder is not None:
            theirs = load_tokenizer(folder).get_vocab()
            compare_tokenizers(load_tokenizer(pair.student.folder).get_vocab(), theirs)
        model = load_model(
            folder or pair.student.folder,
            dtype=config.rollout.dtype,
            device=settings.device,
            vocab_size=pair.vocab_size,
        )
        self.source = TaskSource(config, "eval")
        self.decoder = Decoder(
            model,
            slots=settings.slots,
            max_length=config.max_length,
            stop_ids=pair.stop_ids,
            vocab_size=pair.vocab_size,
            teacher_top_k=1,
            chunk_tokens=config.rollout.max_completion_length,
            prefill_tokens=config.rollout.prefill_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
        )

    def swap(self, path: Path) -> None:
        """Take other weights. Raises ValueError where they do not fit."""
        self.decoder.swap(load_file(path, device=self._config.eval.device))

    def measure(self, *, k: int, stop: threading.Event | None = None) -> Scores | None:
        """Sample and judge; None when stopped in between."""
        n = self._config.eval.problems
        waiting = [(problem, sample) for problem in range(n) for sample in range(k)]
        waiting.reverse()
        done: list[_Sample] = []
        while waiting or self.decoder.busy:
            metrics.turned("evaluator")
            if stop is not None and stop.is_set():
                for key in self.decoder.busy:
                    self.decoder.remove(key)
                return None
            while waiting and self.decoder.free:
                self._add(*waiting.pop())
            for chunk in self.decoder.step():
                done.append(self._judge(chunk.key, chunk.tokens, chunk.finish == "eos"))
        return _scores(done, n, k)

    def _add(self, problem: int, sample: int) -> None:
        self.decoder.add(
            f"{problem}:{sample}",
            self.source.prompt(problem),
            seed=(problem << 20) + sample,
            max_new_tokens=self._config.rollout.max_completion_length,
        )

    def _judge(self, key: str, tokens: Ints, ended: bool) -> _Sample:
        problem = int(key.partition(":")[0])
        return _Sample(problem, len(tokens), ended, bool(self.source.judge(problem, tokens)))


def _scores(samples: list[_Sample], n: int, k: int) -> Scores:
    correct = [0] * n
    for sample in samples:
        correct[sample.problem] += sample.correct
    return Scores(
        n=n,
        k=k,
        avg_at_k=sum(correct) / (n * k),
        pass_at_k=sum(pass_at_k(k, right, k) for right in correct) / n,
        mean_length=sum(sample.length for sample in samples) / len(samples),
        eos_rate=sum(sample.ended for sample in samples) / len(samples),
    )


def follow(config: Config, stop: threading.Event, finished: Callable[[], bool]) -> None:
    """Evaluate every version that the learner leaves in `eval/`, oldest first, until the run is over.

    Beside the training and not in its way: a process of its own, at the lowest priority.
    """
    os.nice(19)
    evaluator: Evaluator | None = None
    folder, results = config.run_dir / "eval", config.run_dir / "eval.jsonl"
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
            if not _evaluate_one(evaluator, note, folder, results, config.eval.k, stop):
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
    evaluator: Evaluator, note: dict[str, Any], folder: Path, results: Path, k: int, stop: threading.Event
) -> bool:
    began = time.monotonic()
    ref = WeightsRef(note["version"], f"v{note['version']:08d}.safetensors", note["sha256"])
    try:
        evaluator.swap(verified(folder, ref))
    except (BadWeights, ValueError) as error:
        log.warning("not evaluated: %s", error)
        return True
    scores = evaluator.measure(k=k, stop=stop)
    if scores is None:
        return False
    line = {"policy_version": note["version"], "step": note["step"], "tokens_trained": note["tokens_trained"]}
    line |= scores.line() | {"wall_s": time.monotonic() - began}
    _show(line)
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")
    log.info("version %d: avg@%d %.3f", note["version"], k, scores.avg_at_k)
    return True
