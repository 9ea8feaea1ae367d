"""How fast slots and a vLLM server write the same prompts, and how long they take to stop a rollout.

Both are measured behind the interface that a rollout worker uses: support, tail and log-probabilities of every token
are recorded as in a run.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from comparison import in_words, markdown
from numpy.typing import NDArray

from actors.engine import Writer

Prompts = Sequence[NDArray[np.int32]]
Figures = dict[str, float]
ENGINES = ("slots", "vllm")
_BETWEEN_STOPS_S = (0.02, 0.08)  # least and most: a stop finds a chunk at any place


class Supply:
    """Rollouts for a writer, one after the other, by the prompts in turn. No two have the same seed, so that no text
    comes twice: a server would find it in its cache."""

    def __init__(self, prompts: Prompts, max_new_tokens: int) -> None:
        self._prompts, self._max_new_tokens = itertools.cycle(prompts), max_new_tokens
        self._numbers = itertools.count()

    def fill(self, writer: Writer) -> None:
        """Give every free slot a rollout."""
        while writer.free:
            number = next(self._numbers)
            prompt = next(self._prompts)
            writer.add(f"rollout{number}", prompt, seed=number, max_new_tokens=self._max_new_tokens)


def written_per_s(writer: Writer, supply: Supply, seconds: float) -> Figures:
    """Tokens a second, the prompts' forwards and the first and last chunks included, and how many processors were at
    work meanwhile: of this process, and of the whole machine. A rollout that ends is replaced at once; the writer is
    left empty."""
    before, began, worked, busy = writer.decoded_tokens, time.perf_counter(), time.process_time(), _busy_s()
    while time.perf_counter() - began < seconds:
        supply.fill(writer)
        writer.step()
    writer.close_chunks()  # what was written and not handed over yet counts too
    took = time.perf_counter() - began
    found = {
        "tokens_per_s": (writer.decoded_tokens - before) / took,
        "own_processors": (time.process_time() - worked) / took,
        "all_processors": (_busy_s() - busy) / took,
    }
    empty(writer)
    return found


def _busy_s() -> float:
    """Processor seconds of everything on this machine since it started: a server's processes are not ours to ask."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def stop_ms(writer: Writer, supply: Supply, count: int, *, seed: int) -> list[float]:
    """Milliseconds that each of `count` stops took, of a random rollout of a full writer at a random time: from the
    call to its return, after which nothing more of the rollout is written."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        until = time.perf_counter() + rng.uniform(*_BETWEEN_STOPS_S)
        while time.perf_counter() < until:
            supply.fill(writer)
            writer.step()
        supply.fill(writer)
        key = rng.choice(writer.busy)
        began = time.perf_counter()
        writer.remove(key)
        found.append(1e3 * (time.perf_counter() - began))
    empty(writer)
    return found


def empty(writer: Writer) -> None:
    """Drop all of its rollouts, together: one at a time would take a round trip each."""
    writer.close_chunks()
    for key in writer.busy:
        writer.remove(key)


# --- points ----------------------------------------------------------------------------------------------------------

Make = Callable[[str, int], Writer]
"""A writer by engine and chunk_tokens."""


def speed_repeats(
    make: Make, prompts: Prompts, *, chunks: Sequence[int], tokens: int, seconds: float, repeats: int
) -> Iterator[dict[str, dict[str, Figures]]]:
    """For each repeat: by chunk_tokens, by engine, `written_per_s`. Slots and vLLM take turns."""
    writers = {(chunk, engine): make(engine, chunk) for chunk in chunks for engine in ENGINES}
    supplies = {at: Supply(prompts, tokens) for at in writers}
    for (chunk, engine), writer in writers.items():
        written_per_s(writer, supplies[chunk, engine], min(1.0, seconds))  # warms up
    for _ in range(repeats):
        found: dict[str, dict[str, Figures]] = {str(chunk): {} for chunk in chunks}
        for (chunk, engine), writer in writers.items():
            found[str(chunk)][engine] = written_per_s(writer, supplies[chunk, engine], seconds)
        yield found


def stop_repeats(
    make: Make, prompts: Prompts, *, chunk: int, tokens: int, stops: int, repeats: int
) -> Iterator[dict[str, list[float]]]:
    """For each repeat: by engine, the milliseconds of each stop."""
    writers = {engine: make(engine, chunk) for engine in ENGINES}
    supplies = {engine: Supply(prompts, tokens) for engine in ENGINES}
    for repeat in range(repeats):
        yield {engine: stop_ms(writer, supplies[engine], stops, seed=repeat) for engine, writer in writers.items()}


# --- tables ----------------------------------------------------------------------------------------------------------


def speed_table(repeats: Sequence[dict[str, dict[str, Figures]]]) -> str:
    """By chunk_tokens, medians and ranges; ratios are taken within a repeat."""
    chunks = [*repeats[0]]
    longest = chunks[-1]
    rows = []
    for chunk in chunks:
        speeds = {engine: [one[chunk][engine]["tokens_per_s"] for one in repeats] for engine in ENGINES}
        whole = [one[longest]["vllm"]["tokens_per_s"] for one in repeats]
        rows.append(
            [
                chunk,
                *(in_words(speeds[engine]) for engine in ENGINES),
                in_words(_ratios(speeds["vllm"], speeds["slots"])),
                in_words(_ratios(speeds["vllm"], whole)),
                *(in_words([one[chunk][engine]["all_processors"] for one in repeats]) for engine in ENGINES),
            ]
        )
    head = ["chunk_tokens", "slots, tokens/s", "vllm, tokens/s", "vllm / slots", f"vllm / vllm at {longest}"]
    return markdown([*head, "processors at work, slots", "processors at work, vllm"], rows)


def _ratios(these: Sequence[float], those: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(these, those, strict=True)]


def stop_table(repeats: Sequence[dict[str, list[float]]]) -> str:
    """p50 and p95 of each repeat, as medians and ranges."""
    rows: list[list[Any]] = []
    for engine in ENGINES:
        both = np.array([np.percentile(one[engine], (50, 95)) for one in repeats]).T
        rows.append([engine, str(sum(len(one[engine]) for one in repeats)), *(in_words(one) for one in both.tolist())])
    return markdown(["", "stops", "ms from the stop to its answer, p50", "p95"], rows)
