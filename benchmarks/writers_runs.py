"""Whole runs by slots and by a vLLM server, with the same seed, prompts and budget: what their books say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from comparison import in_words, markdown
from savings import NeverActive, overshoot
from sides import course_of, run_katana
from vllm_side import Server
from writers_speed import ENGINES

from common.config import Config
from common.runfiles.run import RunFolder

_ENDS = ("trained", "dropped", "dead")


def figures_of(folder: Path, counted: int | None = None) -> dict[str, Any]:
    """Of a finished run's folder. `counted`: tokens that the server wrote meanwhile, by its own counter.

    Raises NeverActive where no rollout was stopped, ConfigError for a damaged folder.
    """
    run = RunFolder(folder)
    return {
        "seconds": _seconds(folder),
        "tokens_generated": sum(line.tokens_generated for line in run.rollouts()),
        "server_counted": counted,
        "books_closed": books_closed(run),
        "accuracy": accuracy(run),
        "saved": saved(run),
        "overshoot": overshoot(run, run.config.rollout.chunk_tokens),
    }


def _seconds(folder: Path) -> float:
    """From the end of the first step to that of the last."""
    course = course_of(folder)
    return course.ended_unix_s[-1] - course.ended_unix_s[0]


def books_closed(run: RunFolder) -> bool:
    """Whether every admitted rollout has ended exactly once and has its line, and no step's batch lacks one."""
    ledger, lines = run.ledger, list(run.rollouts())
    if ledger is None or ledger.open or ledger.admitted != ledger.ended or ledger.admitted != len(lines):
        return False
    ends = [sum(line.ending == end for line in lines) for end in _ENDS]
    trained = [rid for step in run.trained() for rid in step.rids]
    whole = all(
        line.tokens_generated == line.tokens_kept + line.tokens_detection + line.tokens_overshoot for line in lines
    )
    once = len({line.rid for line in lines}) == len(lines) and len(set(trained)) == len(trained)
    return whole and once and ends == [ledger.trained, sum(ledger.dropped.values()), ledger.dead]


def accuracy(run: RunFolder) -> dict[str, float] | None:
    """Held-out avg@k of the last evaluation. `se`: an upper limit, as if the samples of a problem were always alike."""
    evaluations = list(run.evaluations())
    if not evaluations:
        return None
    last = evaluations[-1]
    share, problems = last.scores.avg_at_k, last.scores.n
    return {"avg": share, "se": math.sqrt(share * (1 - share) / problems), "k": last.scores.k, "problems": problems}


def saved(run: RunFolder) -> float:
    """1 - mean tokens of treated by those of control rollouts, while the policy could cut. Raises NeverActive."""
    lengths = {
        arm: [one.tokens_generated for one in run.rollouts() if one.compared and one.arm == arm]
        for arm in ("treated", "control")
    }
    if not all(lengths.values()):
        raise NeverActive(f"{run.path}: an arm has no rollout that could be cut; expected more --steps")
    treated, control = (sum(one) / len(one) for one in lengths.values())
    return 1 - treated / control


def run_repeats(
    config_of: Callable[[str, int], Config], server: Server, repeats: int
) -> Iterator[dict[str, dict[str, Any]]]:
    """For each repeat, by engine, the figures of a run. `config_of`: by engine and repeat, which is the seed.

    Raises SideFailed, NeverActive, ConfigError.
    """
    for repeat in range(repeats):
        found = {}
        for engine in ENGINES:
            config, before = config_of(engine, repeat), server.generated()
            run_katana(config)
            counted = server.generated() - before if engine == "vllm" else None
            found[engine] = figures_of(config.run_dir, counted)
        yield found


def run_table(repeats: Sequence[dict[str, dict[str, Any]]]) -> str:
    """By engine: medians and ranges, and run by run what must be exact."""
    names: dict[str, Callable[[dict[str, Any]], str | float]] = {
        "held-out avg@k ± standard error": lambda run: _accuracy_text(run["accuracy"]),
        "share of tokens saved, treated against control": lambda run: float(run["saved"]),
        "rollouts stopped": lambda run: float(run["overshoot"]["stopped"]),
        "tokens written after the policy fired, p50": lambda run: float(run["overshoot"]["tokens_p50"]),
        "the same, p95": lambda run: float(run["overshoot"]["tokens_p95"]),
        "the same, p99": lambda run: float(run["overshoot"]["tokens_p99"]),
        "seconds from the first step to the last": lambda run: float(run["seconds"]),
        "tokens generated, by the books": lambda run: f"{run['tokens_generated']:,}",
        "tokens written, by the server's counter": lambda run: _counted_text(run["server_counted"]),
        "books closed": lambda run: "yes" if run["books_closed"] else "NO",
    }
    rows = []
    for text, of in names.items():
        cells = [[of(one[engine]) for one in repeats] for engine in ENGINES]
        rows.append([text, *map(_cell, cells)])
    return markdown(["", *ENGINES], rows)


def _cell(values: Sequence[str | float]) -> str:
    numbers = [value for value in values if isinstance(value, float)]
    return in_words(numbers) if numbers else "; ".join(map(str, values))


def _accuracy_text(found: dict[str, float] | None) -> str:
    return "not evaluated" if found is None else f"{found['avg']:.3f} ± {found['se']:.3f}"


def _counted_text(counted: int | None) -> str:
    return "" if counted is None else f"{counted:,}"
