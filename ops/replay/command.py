"""`katana replay`: what other settings would have cut in a run's recorded rollouts. No model, no Redis.

It replays rollouts that nothing could have stopped: the control arm; all rollouts of a run with `shadow`, `apply: mask`
or `policy: none`. How a stopped rollout would have continued is unknown.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from common import policies
from common.config import ConfigError, Termination, load
from common.files import write_text
from common.policies import Calibrated, check_policy
from common.runfiles.names import CONFIG, REPLAYS
from ops.plots import named, save_png
from ops.replay.answers import judged
from ops.replay.plot import SettingPoint, draw
from ops.replay.record import Recording, read_record
from ops.replay.results import Outcome, outcomes
from ops.replay.tables import Setting, about, aligned, as_csv, markdown, table, unequal
from ops.replay.verdicts import Judgement, Replay, Shape

MOST_SETTINGS = 400
_COMPUTED = "same, computed"
_FIXED = {
    "teacher_top_k": "the recorded divergences were made with it",
    "apply": "a replay is always as if cuts stopped the writing",
    "shadow": "a replay is always as if cuts stopped the writing",
    "control_trains": "it changes no verdict",
}
ALLOWED = tuple(f"termination.{name}" for name in Termination.model_fields if name not in _FIXED)


def replay(folder: Path, sets: Sequence[str] = (), sweeps: Sequence[str] = (), arm: str | None = None) -> str:
    """Replay a run's folder under its own settings and others; returns what to print.

    With `sweeps` ("termination.eta=0.1,0.3"; several: their product) `replay.csv`, `.md` and `.png` are written into
    the folder's `replay/`.

    Raises:
        ConfigError: no run's folder, a damaged one, a key or value that cannot be replayed, or nothing to replay.
    """
    pairs = [_pair("--set", item) for item in sets]
    swept = _swept(sweeps, {key for key, _ in pairs})
    record = read_record(folder, arm)
    check_policy(record.config, source=str(folder / CONFIG))
    settings = [*_own(record), *_chosen(folder, record, pairs, swept)]
    verdicts = _verdicts(Replay(record), settings)
    answers, missing = judged(record, verdicts, folder)
    found = outcomes(record, verdicts, answers)
    computed = settings[1:] and settings[1].name == _COMPUTED
    head = about(record, verdicts[0], verdicts[1] if computed else [], missing)
    if pairs and swept:
        head += f"\nset       {', '.join(f'{key} {value}' for key, value in pairs)} (swept rows)"
    text = "\n\n".join([head, aligned(table(settings, found)), *(fill(note, 118) for note in unequal(found))])
    return f"{text}\n\n{_write(folder, head, settings, found)}" if swept else text


def _write(folder: Path, head: str, settings: Sequence[Setting], found: Sequence[Outcome]) -> str:
    """The files of a sweep; returns which."""
    target = folder / REPLAYS
    with named(target):
        target.mkdir(exist_ok=True)
    key = next(one.changes[0][0] for one in settings if one.changes)
    title = f"{folder.resolve().name}: what cutting saves, and what it costs"
    save_png(draw(*_points(settings, found), title, key), target / "replay.png", 100)
    with named(target):
        write_text(target / "replay.csv", as_csv(settings, found))
        write_text(target / "replay.md", markdown(head, table(settings, found), unequal(found), "replay.png"))
    return f"wrote {target}/replay.csv, replay.md, replay.png"


def _points(settings: Sequence[Setting], found: Sequence[Outcome]) -> tuple[list[SettingPoint], list[SettingPoint]]:
    """What was swept, joined along the first key, a colour for each combination of the others; and the run's own."""
    swept, own = [], []
    for one, outcome in zip(settings, found, strict=True):
        if not one.changes:
            own.append(SettingPoint(one.name, "", outcome))
            continue
        (_, first), *others = one.changes
        swept.append(SettingPoint(first, ", ".join(f"{key} {value}" for key, value in others), outcome))
    return swept, own


# --- settings ---------------------------------------------------------------------------------------------------------


def _pair(option: str, item: str) -> tuple[str, str]:
    """Key and value of `termination.a=b`. Raises ConfigError."""
    key, equals, value = item.partition("=")
    key, value = key.strip(), value.strip()
    section, _, name = key.partition(".")
    if not equals or not value or not key:
        raise ConfigError(f"{option} {item!r}: expected key=value, for example termination.eta=0.1")
    if not name and key in Termination.model_fields:
        raise ConfigError(f"{option} {item!r}: expected termination.KEY=value, here termination.{key}={value}")
    if not name:
        raise ConfigError(f"{option} {item!r}: expected key=value with a key of termination: {', '.join(ALLOWED)}")
    if section != "termination":
        raise ConfigError(f"{option} {item!r}: a replay knows only verdicts; allowed: {', '.join(ALLOWED)}")
    if name in _FIXED:
        raise ConfigError(f"{option} {item!r}: cannot be replayed: {_FIXED[name]}; allowed: {', '.join(ALLOWED)}")
    return key, value


def _swept(sweeps: Sequence[str], taken: set[str]) -> list[list[tuple[str, str]]]:
    """For each sweep its pairs. Raises ConfigError."""
    found = []
    for item in sweeps:
        key, values = _pair("--sweep", item)
        if key in taken:
            raise ConfigError(f"--sweep {item!r}: {key} is given twice")
        taken = taken | {key}
        parts = [part.strip() for part in values.split(",")]
        if not all(parts):
            raise ConfigError(f"--sweep {item!r}: a value is empty; expected values with commas between them")
        found.append([(key, part) for part in dict.fromkeys(parts)])
    if (count := math.prod(len(pairs) for pairs in found)) > MOST_SETTINGS:
        raise ConfigError(f"--sweep: {count} settings; at most {MOST_SETTINGS}")
    return found


def _own(record: Recording) -> list[Setting]:
    """The run's own settings: by the numbers on record, and by numbers that are computed anew. Raises ConfigError."""
    settings = record.config.termination.model_copy(update={"shadow": False, "apply": "stop"})
    _check_views(record, settings)
    own = [Setting("as recorded", (), record.config.termination, recorded=True)]
    return own if _why_not_replayable(record, settings) else [*own, Setting(_COMPUTED, (), settings)]


def _chosen(
    folder: Path, record: Recording, pairs: Sequence[tuple[str, str]], swept: Sequence[Sequence[tuple[str, str]]]
) -> list[Setting]:
    """What is asked for. Raises ConfigError, also for what the record cannot tell."""
    chosen = []
    for combination in itertools.product(*swept) if swept or pairs else ():
        wanted = [*pairs, *combination]
        overrides = ["termination.shadow=false", "termination.apply=stop", *(f"{key}={value}" for key, value in wanted)]
        config = load(folder / CONFIG, overrides)
        check_policy(config, source=str(folder / CONFIG))
        settings = config.termination
        _check_views(record, settings)
        changes = tuple((key.removeprefix("termination."), value) for key, value in combination or pairs)
        name = ", ".join(f"{key} {value}" for key, value in changes)
        if why := _why_not_replayable(record, settings):
            # The reason begins with its key, so a single change of that key is not named again.
            named = len(changes) == 1 and why.startswith(changes[0][0])
            raise ConfigError(why if named else f"{name}: {why}")
        chosen.append(Setting(name, changes, settings))
    return chosen


def _check_views(record: Recording, settings: Termination) -> None:
    """Raise ConfigError if the policy reads what the record lacks."""
    reads = policies.find(settings.policy).reads
    if reads and any(one.view is None for one in record.rollouts):
        raise ConfigError(
            f"policy {settings.policy} reads {' and '.join(sorted(reads))}, which this record lacks; record a run with "
            f"feeder.record_views: true"
        )


def _why_not_replayable(record: Recording, settings: Termination) -> str:
    """Why the record of a run that stopped rollouts cannot tell what these settings do; empty if it can."""
    if record.whole:
        return ""
    rest = "rollouts of this run could be stopped; record one with termination.shadow: true"
    calibrated = issubclass(policies.find(settings.policy), Calibrated)
    if calibrated and settings.calibrate_on != "control":
        return (
            f"calibrate_on: {settings.calibrate_on} takes minima of treated rollouts to their ends, and {rest}, or "
            f"replay with --set termination.calibrate_on=control"
        )
    if settings.control_fraction != record.config.termination.control_fraction:
        return f"control_fraction decides which rollouts have an end on record, and {rest}"
    return ""


def _verdicts(replayed: Replay, settings: Sequence[Setting]) -> list[list[Judgement]]:
    """Of each setting, in their order; computed by shape, which costs the most."""
    order = sorted(range(len(settings)), key=lambda place: repr(Shape.of(settings[place].termination)))
    found: dict[int, list[Judgement]] = {}
    for place in order:
        one = settings[place]
        found[place] = (replayed.as_recorded if one.recorded else replayed.recomputed)(one.termination)
    return [found[place] for place in range(len(settings))]
