"""Time to accuracy: the avg@k that TRL's model has at the end is the target of Katana's checkpoints, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from comparison import markdown, number
from sides import Course

from common.config import Config, parse
from common.runfiles.records import Scores
from ops.bench.accuracy import Looked, looks_until, standard_error_at_most, to_be_evaluated
from ops.run.evaluator import Evaluator

CLOCKS = {"since_start_s": "from the process's start", "since_first_step_s": "from the end of the first step"}


class Judge:
    """Evaluates models of both sides on the same held-out problems, with the same seeds, as `katana eval` does.

    It works between the runs, when no clock runs.
    """

    def __init__(self, config: Config) -> None:
        self._config = config

    def of_model(self, folder: Path) -> Scores:
        """A model as save_pretrained wrote it."""
        scores = Evaluator(self._config, folder).measure()
        assert scores is not None
        return scores

    def looks(self, folder: Path, target: float) -> list[Looked]:
        """The checkpoints of a run, in order, to the first that reaches `target`."""
        return looks_until(Evaluator(self._config), folder, target)


def katana_s(config: Config, *, steps: int, every: int, settings: Sequence[str] = ()) -> Config:
    """Katana's run: `steps` long, with `settings` of its own (KEY=VALUE), and a checkpoint every `every` steps, all
    kept; no evaluation beside it. Raises ConfigError."""
    lengths = [f"learner.max_steps={steps}", f"checkpoints.every_steps={every}"]
    return to_be_evaluated(parse(config.to_yaml(), [*settings, *lengths], source="--set"))


def outcome(theirs: Course, goal: Scores, ours: Course, looks: Sequence[Looked]) -> dict[str, Any]:
    """Figures of a repeat. `ratio` is TRL's seconds by Katana's on each clock; None if Katana did not get there."""
    last = looks[-1]
    reached = last.avg_at_k >= goal.avg_at_k
    trl = {
        "step": len(theirs.ended_unix_s),
        "avg_at_k": goal.avg_at_k,
        "standard_error_at_most": standard_error_at_most(goal),
        **theirs.seconds_to(len(theirs.ended_unix_s)),
    }
    katana = {"step": last.step, "avg_at_k": last.avg_at_k, **ours.seconds_to(last.step)} if reached else None
    return {
        "trl": trl,
        "katana": katana,
        "ratio": {clock: trl[clock] / katana[clock] for clock in CLOCKS} if katana else None,
        "problems": goal.n,
        "k": goal.k,
        "looks": [asdict(look) for look in looks],
    }


def sentence(repeat: dict[str, Any]) -> str:
    trl, katana = repeat["trl"], repeat["katana"]
    said = f"TRL {trl['avg_at_k']:.3f} (± {trl['standard_error_at_most']:.3f}) after {trl['since_start_s']:.1f} s"
    if katana is None:
        best = max(look["avg_at_k"] for look in repeat["looks"])
        return f"{said}; Katana did not reach it, its best is {best:.3f}"
    return f"{said}; Katana {katana['avg_at_k']:.3f} at step {katana['step']} after {katana['since_start_s']:.1f} s"


def table(repeats: Sequence[dict[str, Any]]) -> str:
    """A row for each repeat; seconds on both clocks, the second in parentheses."""
    head = ["repeat", "TRL's avg@k", "± at most", "TRL, s", "Katana, s", "at step", "TRL / Katana"]
    rows = []
    for place, one in enumerate(repeats, start=1):
        trl, katana, ratio = one["trl"], one["katana"], one["ratio"]
        rows.append(
            [
                str(place),
                f"{trl['avg_at_k']:.3f}",
                f"{trl['standard_error_at_most']:.3f}",
                _both(trl),
                _both(katana) if katana else "not reached",
                str(katana["step"]) if katana else "–",
                _both(ratio) if ratio else "–",
            ]
        )
    return f"{markdown(head, rows)}\n\nSeconds {' ('.join(CLOCKS.values())})."


def _both(found: dict[str, float]) -> str:
    first, second = (number(found[clock]) for clock in CLOCKS)
    return f"{first} ({second})"
