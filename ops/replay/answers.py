"""Which right rollouts would still be right with the cuts of a setting, by the run's own verifier.

The verifier judges the text, not the place of an answer: an answer may be repeated, and a right one may be taken back.
`katana audit` asks the same of what a cut kept.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.config import Config, ConfigError
from common.pretrained import ModelError
from common.runfiles.names import MODEL
from ops.replay.record import Recording, Replayed
from ops.replay.verdicts import Judgement
from ops.tasks.source import TaskSource

_REPORT_EVERY_S = 30.0


@dataclass(frozen=True, slots=True)
class Answers:
    """`right`: by place in the record and number of first tokens, whether the verifier calls these tokens right.

    `unsure`: places of right rollouts that it does not call right as they are, or cannot judge; no verdict on
    them.
    """

    right: Mapping[tuple[int, int], bool]
    unsure: frozenset[int]


def judged(record: Recording, settings: Sequence[Sequence[Judgement]], folder: Path) -> tuple[Answers | None, str]:
    """Verdicts on what each setting keeps of each right rollout that it cuts, and else on what was written by then.

    None: no verdicts, since no answer was verified, or task or tokenizer are not available here. The second says
    what is missing; empty where nothing is. `folder`: of the run.
    """
    if all(record.rollouts[place].correct is None for place in record.counted):
        return None, "none was verified in this run"
    wanted = _wanted(record, settings)
    try:
        source = _source(record.config, folder)
        if wanted:
            source.rehearse()
    except (ConfigError, ModelError) as error:
        return None, f"not judged, because the task or the tokenizer is not available here ({error})"
    right: dict[tuple[int, int], bool] = {}
    unsure, reported_at = set(), time.monotonic()
    for count, (place, ends) in enumerate(wanted.items()):
        found = _judge(source, record.rollouts[place], ends)
        if found is None:
            unsure.add(place)
        else:
            right |= {(place, end): verdict for end, verdict in found.items()}
        if time.monotonic() - reported_at >= _REPORT_EVERY_S:
            reported_at = time.monotonic()
            print(f"{count + 1:,} of {len(wanted):,} right rollouts judged where they are cut", file=sys.stderr)
    missing = f"{len(unsure):,} right rollouts are left out: the verifier does not call them right now"
    return Answers(right, frozenset(unsure)), missing if unsure else ""


def _source(config: Config, folder: Path) -> TaskSource:
    """The run's task, read with the student's tokenizer or with that of the model the run left. Raises ConfigError,
    ModelError."""
    try:
        return TaskSource(config)
    except ModelError:
        if not (folder / MODEL / "config.json").is_file():
            raise
    left = config.student.model_copy(update={"model": str((folder / MODEL).resolve())})
    return TaskSource(config.model_copy(update={"student": left}))


def _wanted(record: Recording, settings: Sequence[Sequence[Judgement]]) -> dict[int, set[tuple[int, int]]]:
    """By place, of right rollouts that count: keep and trigger of each cut that any setting makes."""
    found: dict[int, set[tuple[int, int]]] = {}
    for place in record.counted:
        if record.rollouts[place].correct:
            verdicts = (verdicts[place] for verdicts in settings)
            ends = {(one.cut.keep, one.cut.trigger) for one in verdicts if one.active and one.cut is not None}
            if ends:
                found[place] = ends
    return found


def _judge(source: TaskSource, rollout: Replayed, ends: set[tuple[int, int]]) -> dict[int, bool] | None:
    """By number of first tokens; None where the verifier does not call the whole right, or once gives no verdict.

    A verdict of math-verify takes a hundredth of a second: each number is asked once, a trigger only where its keep is
    not right.
    """
    found: dict[int, bool | None] = {}

    def right(end: int) -> bool | None:
        if end not in found:
            found[end] = source.judge(rollout.problem, rollout.tokens[:end])
        return found[end]

    if not right(len(rollout.tokens)):
        return None
    for keep, trigger in sorted(ends):
        if not right(keep):
            right(trigger)
    known = {end: verdict for end, verdict in found.items() if verdict is not None}
    return known if len(known) == len(found) else None
