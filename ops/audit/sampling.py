"""Continuing prefixes: many continuations of each, by the student or by the teacher, judged by the task's verifier."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from actors.engine import Decoder
from actors.engine.loaded import sampler
from common.config import Config, ConfigError
from common.draws import uniform_bits
from common.pretrained import ModelError, Pair, compare_tokenizers, find_model, load_tokenizer
from common.runfiles.names import MODEL, WEIGHTS
from common.wire.messages import Ints
from common.wire.weights import file_of, newest_version
from ops.tasks.source import TaskSource

_REPORT_EVERY_S = 30.0


@dataclass(frozen=True, slots=True)
class Continuer:
    """A model that continues prefixes. `file`: weights for the model of `folder`; None: its own. `name`: shown."""

    folder: Path
    file: Path | None
    name: str


def find_student(run: Path, pair: Pair, model: str | None) -> Continuer:
    """The student that continues: `model` if given, else the run's trained one, else its newest weights.

    Those that wrote the rollouts are gone. Raises ModelError, ConfigError.
    """
    if model is not None:
        return _other(find_model(model), pair, model)
    if (run / MODEL / "config.json").is_file():
        return _other(run / MODEL, pair, "model/, the student at the end of the run")
    newest = newest_version(run / WEIGHTS)
    if newest < 0:
        raise ConfigError(f"{run}: neither model/ nor weights/ is in it; name a student by --student")
    file = run / WEIGHTS / file_of(newest)
    return Continuer(pair.student.folder, file, f"weights/{file.name}, the newest of the run")


def _other(folder: Path, pair: Pair, name: str) -> Continuer:
    compare_tokenizers(load_tokenizer(pair.student.folder).get_vocab(), load_tokenizer(folder).get_vocab())
    return Continuer(folder, None, name)


def make_decoder(config: Config, pair: Pair, weights: Continuer, *, dtype: str, device: str) -> Decoder:
    """An engine that writes as rollouts of the run were written: stop set, temperature, nucleus, lengths. Raises
    ModelError."""
    temperature, top_p = config.rollout.temperature, config.rollout.top_p
    decoder = sampler(config, pair, weights.folder, dtype=dtype, device=device, temperature=temperature, top_p=top_p)
    if weights.file is not None:
        try:
            decoder.swap(decoder.read_weights(weights.file.read_bytes()))
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(f"{weights.file}: cannot be loaded ({error})") from error
    return decoder


@dataclass(frozen=True, slots=True)
class Prefix:
    """A text to be continued: the prompt of `problem` and `tokens` int32 [n] after it. `name`: what its draws depend
    on, besides the seed."""

    name: str
    problem: int
    tokens: Ints


class SamplingProgress:
    """A line on standard error now and then: continuations done, tokens written, tokens a second."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._tokens = total, 0, 0
        self._began = self._printed = time.monotonic()

    def count(self, continuations: int, tokens: int) -> None:
        self._done += continuations
        self._tokens += tokens
        if time.monotonic() - self._printed >= _REPORT_EVERY_S:
            self.report()

    def report(self) -> None:
        self._printed = time.monotonic()
        speed = self._tokens / max(self._printed - self._began, 1e-9)
        print(
            f"{self._done} of {self._total} continuations, {self._tokens:,} tokens written, {speed:,.0f} tokens/s",
            file=sys.stderr,
        )


def continue_all(
    decoder: Decoder,
    source: TaskSource,
    prefixes: Sequence[Prefix],
    *,
    stop_ids: Sequence[int],
    limit: int,
    samples: int,
    seed: int,
    progress: SamplingProgress,
) -> list[float | None]:
    """For each prefix the share of its `samples` continuations, each `limit` tokens at most in all, that are right.

    A prefix that has ended, by STOP or at the limit, is judged as it is. None without a verdict.
    """
    verdicts: list[list[bool | None]] = [[] for _ in prefixes]
    waiting: list[tuple[int, int]] = []
    # Those with most left to write come first, so that the slots stay full to the end; `pop` takes from the back.
    for place in sorted(range(len(prefixes)), key=lambda place: (-len(prefixes[place].tokens), place)):
        one = prefixes[place]
        if len(one.tokens) >= limit or (len(one.tokens) and int(one.tokens[-1]) in stop_ids):
            verdicts[place] = [source.judge(one.problem, one.tokens)] * samples
            progress.count(samples, 0)
        else:
            waiting += [(place, sample) for sample in range(samples)]
    while waiting or decoder.busy:
        while waiting and decoder.free:
            place, sample = waiting.pop()
            one = prefixes[place]
            decoder.add(
                f"{place}:{sample}",
                source.prompt(one.problem),
                seed=uniform_bits(seed, f"audit:{one.name}", sample),
                max_new_tokens=limit,
                generated=one.tokens,
            )
        for chunk in decoder.step():
            place = int(chunk.key.partition(":")[0])
            text = np.concatenate([prefixes[place].tokens, chunk.tokens])
            verdicts[place].append(source.judge(prefixes[place].problem, text))
            progress.count(1, len(chunk.tokens))
    return [_share(found) for found in verdicts]


def _share(verdicts: Sequence[bool | None]) -> float | None:
    judged = [verdict for verdict in verdicts if verdict is not None]
    return sum(judged) / len(judged) if judged else None
