"""The control for KAT's *places*: `random_matched`, which cuts as often and keeps as much, by chance. From files alone.

From a finished run of KAT comes the hazard of a cut at each position t:

    hazard[t] = treated rollouts that were cut when t tokens had been seen / those that had come as far as t, uncut

The control arm tells how long rollouts are that nothing stops. Under one scale on all hazards and one number of cut
tokens, the means of what is seen and of what is kept follow exactly; both numbers are chosen so that the means agree
with KAT's. Shuffling KAT's cut lengths instead would put many behind the end of the rollout that they are dealt to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actors.books import ENDS_BY_ITSELF, compared, read_lines
from common.config import Config, ConfigError, load

TOLERANCE = 0.02


@dataclass(frozen=True, slots=True)
class Means:
    """Tokens a rollout: seen (up to the trigger, or all), kept; and the share of rollouts that were cut."""

    seen: float
    kept: float
    cut: float


@dataclass(frozen=True, slots=True)
class Match:
    """What random_matched needs, with the means that it aims at and those that it will have."""

    hazard: dict[int, float]
    scale: float
    detection_tokens: int
    wanted: Means
    expected: Means


def hazard_of(seen: Sequence[int], cut: Sequence[bool]) -> dict[int, float]:
    """The hazard at every position where a cut was; `seen` in tokens, with whether the rollout was cut there."""
    fired = Counter(tokens for tokens, was_cut in zip(seen, cut, strict=True) if was_cut)
    lengths = np.sort(np.asarray(seen))
    return {at: fired[at] / int(len(lengths) - np.searchsorted(lengths, at)) for at in sorted(fired)}


def expected_means(hazard: dict[int, float], scale: float, detection: int, lengths: Sequence[int]) -> Means:
    """Means of random_matched over rollouts that would by themselves be of these lengths, in tokens; exact."""
    at = np.array(sorted(hazard))
    chances = np.minimum(1.0, scale * np.array([hazard[position] for position in at]))
    before = np.concatenate(([1.0], np.cumprod(1 - chances)))
    fires = before[:-1] * chances
    reached = np.searchsorted(at, np.asarray(lengths), side="right")  # places of a rollout's length or below
    sums = [np.concatenate(([0.0], np.cumsum(fires * part))) for part in (at, np.maximum(0, at - detection), 1.0)]
    seen, kept, cut = (total[reached] for total in sums)
    left = before[reached] * np.asarray(lengths)
    return Means(float((seen + left).mean()), float((kept + left).mean()), float(cut.mean()))


def match(seen: Sequence[int], kept: Sequence[int], cut: Sequence[bool], lengths: Sequence[int]) -> Match:
    """Scale and detection for the treated rollouts of a run of KAT, and the lengths of its control rollouts.

    Raises ConfigError where no scale does it within 2 %.
    """
    if not any(cut) or not lengths:
        raise ConfigError("nothing to match: the run has no treated rollout that was cut, or no control rollout")
    wanted = Means(float(np.mean(seen)), float(np.mean(kept)), float(np.mean(cut)))
    hazard = hazard_of(seen, cut)
    if wanted.seen >= float(np.mean(lengths)):
        raise ConfigError(
            f"cannot be matched: treated rollouts were no shorter ({wanted.seen:.1f} tokens) than those of the control "
            f"arm ({np.mean(lengths):.1f})"
        )
    low, high = 0.0, 1.0 / min(hazard.values())  # there every chance is 1
    for _ in range(60):
        middle = (low + high) / 2
        longer = expected_means(hazard, middle, 0, lengths).seen > wanted.seen
        low, high = (middle, high) if longer else (low, middle)
    detection = _detection(hazard, high, lengths, wanted.kept)
    found = Match(hazard, high, detection, wanted, expected_means(hazard, high, detection, lengths))
    if not agree(found.wanted, found.expected):
        raise ConfigError(f"cannot be matched within {TOLERANCE:.0%}: {_text(found.wanted, found.expected)}")
    return found


def _detection(hazard: dict[int, float], scale: float, lengths: Sequence[int], kept: float) -> int:
    """The number of cut tokens that brings the mean kept nearest; more of them keep less."""
    means = [expected_means(hazard, scale, tokens, lengths).kept for tokens in range(max(hazard) + 1)]
    return int(np.argmin(np.abs(np.array(means) - kept)))


def agree(one: Means, other: Means) -> bool:
    """Whether means of seen and kept tokens differ by at most 2 %."""
    pairs = ((one.seen, other.seen), (one.kept, other.kept))
    return all(abs(b - a) <= TOLERANCE * a for a, b in pairs)


def matched_config(folder: Path) -> tuple[Config, str]:
    """The config of random_matched for a run of KAT, and what was matched, in words. Raises ConfigError."""
    config = _config(folder)
    if config.termination.policy != "kat" or config.termination.apply != "stop" or config.termination.shadow:
        raise ConfigError(f"{folder}: its policy is {config.termination.policy!r}; expected a run of kat that stops")
    lines = _compared(folder)
    treated, control = _arms(lines)
    if not treated:
        raise ConfigError(f"{folder}: no treated rollout that kat could have cut")
    found = match(
        [_seen(line) for line in treated],
        [line["tokens_kept"] for line in treated],
        [_cut(line) for line in treated],
        [line["tokens_generated"] for line in control],
    )
    since = min(line["policy_version_last"] for line in lines)
    changes = {
        "policy": "random_matched",
        "hazard": found.hazard,
        "hazard_scale": found.scale,
        "detection_tokens": found.detection_tokens,
        "warmup_steps": since,
    }
    tree = config.model_dump()
    tree["termination"] |= changes
    tree["name"] = f"{config.name[:56]}-matched"
    text = (
        f"{len(treated)} treated and {len(control)} control rollouts, active from policy version {since}; "
        f"scale {found.scale:.4g}, {found.detection_tokens} tokens cut at a trigger\n"
        f"{_text(found.wanted, found.expected)}"
    )
    return Config.model_validate(tree), text


def compare(folder: Path, other: Path) -> tuple[str, bool]:
    """The realised means of two runs' treated rollouts, in words, and whether they agree within 2 %."""
    one, two = _realised(folder), _realised(other)
    return _text(one, two), agree(one, two)


def _realised(folder: Path) -> Means:
    treated, _ = _arms(_compared(folder))
    if not treated:
        raise ConfigError(f"{folder}: no treated rollout that its policy could have cut")
    # Here with what was written behind the trigger: it was generated, too.
    generated = float(np.mean([line["tokens_generated"] for line in treated]))
    kept = float(np.mean([line["tokens_kept"] for line in treated]))
    return Means(generated, kept, float(np.mean([_cut(line) for line in treated])))


def _text(one: Means, other: Means) -> str:
    def pair(name: str, a: float, b: float) -> str:
        return f"mean {name} {a:.2f} and {b:.2f} tokens ({(b - a) / a if a else 0:+.1%})"

    kept, generated = pair("kept", one.kept, other.kept), pair("generated", one.seen, other.seen)
    return f"{generated}, {kept}; cut {one.cut:.1%} and {other.cut:.1%}"


def _config(folder: Path) -> Config:
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder}: no run's folder, there is no config.yaml; expected one like runs/demo")
    return load(folder / "config.yaml", import_policy=False)


def _compared(folder: Path) -> list[dict[str, Any]]:
    _config(folder)
    return [line for line in read_lines(folder / "rollouts.jsonl") if compared(line)]


def _arms(lines: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    judged = [line for line in lines if line["finish_reason"] != "unfinished"]
    arms: dict[str, list[dict[str, Any]]] = {"treated": [], "control": []}
    for line in judged:
        arms[line["arm"]].append(line)
    return arms["treated"], arms["control"]


def _cut(line: dict[str, Any]) -> bool:
    return line["finish_reason"] not in ENDS_BY_ITSELF


def _seen(line: dict[str, Any]) -> int:
    """Tokens up to the trigger; all of what ended by itself."""
    return int(line["tokens_kept"] + line["tokens_detection"])
