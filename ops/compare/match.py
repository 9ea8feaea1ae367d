"""The control for KAT's *places*: `random_matched`, which cuts as often and keeps as much, by chance. From files alone.

From a finished run of KAT (or of another policy that stops rollouts) comes the hazard of a cut at each position t:

    hazard[t] = treated rollouts that were cut when t tokens had been seen / those that had come as far as t, uncut

Under one scale on all hazards and one number of cut tokens, the means of what is generated and of what is kept follow
exactly from the lengths of rollouts that nothing stops; both numbers are chosen so that the means agree with KAT's.
Shuffling KAT's cut lengths instead would put many after the end of the rollout that they are assigned to.

How long rollouts are that nothing stops is known from the control arm at first, which is small, and whose student
learned under another policy. The run that was made from it knows more: its cuts were drawn by chance, so each of its
rollouts gives a lower bound of its length (`uncut_lengths`). From these the two numbers are corrected.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.config import Config, ConfigError
from common.runfiles.records import BookLine
from common.runfiles.run import RunFolder
from ops.compare.match_means import (
    TOLERANCE,
    Match,
    Means,
    Reals,
    Rule,
    agree,
    all_alike,
    expected_means,
    hazard_of,
    match,
    outcomes,
    uncut_lengths,
)
from ops.stats.intervals import interval, resampled_sums


@dataclass(frozen=True, slots=True)
class Arm:
    """Rollouts of one arm that the policy could have cut, each [n]: prompt, tokens up to the trigger (or all), tokens
    kept and generated, and whether it was cut."""

    problem: Reals
    seen: Reals
    kept: Reals
    generated: Reals
    cut: npt.NDArray[np.bool_]

    @property
    def means(self) -> Means:
        return Means(float(self.generated.mean()), float(self.kept.mean()), float(self.cut.mean()))

    @property
    def overshoot(self) -> float:
        """Mean tokens that were written after a trigger."""
        return float((self.generated - self.seen)[self.cut].mean()) if self.cut.any() else 0.0


# --- how sure that is ----------------------------------------------------------------------------------------------


def _resampled_means(arm: Arm, columns: Reals) -> Reals:
    sums = resampled_sums(arm.problem, np.column_stack([columns, np.ones(len(columns))]))
    means: Reals = sums[:, :-1] / sums[:, -1:]
    return means


Pair = tuple[tuple[float, float], tuple[float, float]]
"""95 % intervals of two differences: of generated and of kept tokens, as shares."""


def _differences(one: Arm, other: Arm) -> Pair:
    """Of the realised means of two runs; prompts are drawn with replacement, with their rollouts of both runs."""
    blank_one, blank_other = (np.zeros((len(arm.cut), 3)) for arm in (one, other))
    own = [np.column_stack([arm.generated, arm.kept, np.ones(len(arm.cut))]) for arm in (one, other)]
    columns = np.concatenate([np.hstack([own[0], blank_one]), np.hstack([blank_other, own[1]])])
    sums = resampled_sums(np.concatenate([one.problem, other.problem]), columns)
    sums = sums[(sums[:, 2] > 0) & (sums[:, 5] > 0) & (sums[:, 1] > 0)]
    ratios = (sums[:, 3:5] / sums[:, 5:]) / (sums[:, :2] / sums[:, 2:3]) - 1
    return interval(ratios[:, 0]), interval(ratios[:, 1])


def _known(found: Match, control: Arm, overshoot: float) -> tuple[Pair, str]:
    """What the control arm's size leaves open: of the two differences, and in words of its length and of the scale."""
    scales = found.rule.scale * np.geomspace(1 / 16, 16, 49)
    rules = [Rule(found.rule.hazard, float(scale), 0) for scale in scales]
    means = _resampled_means(
        control,
        np.column_stack(
            [
                control.generated,
                outcomes(found.rule, control.generated, overshoot)[:, :2],
                *(outcomes(rule, control.generated, overshoot)[:, 0] for rule in rules),
            ]
        ),
    )
    # More scale, fewer tokens: read from right to left, the scale by which each resample comes to what is wanted.
    needed = [float(np.interp(found.wanted.generated, row[::-1], scales[::-1])) for row in means[:, 3:]]
    pair = (interval(means[:, 1] / found.wanted.generated - 1), interval(means[:, 2] / found.wanted.kept - 1))
    (shortest, longest), (least, most) = interval(means[:, 0]), interval(np.array(needed))
    text = (
        f"mean length of control rollouts {control.generated.mean():.2f} tokens (95 % interval {shortest:.2f} to "
        f"{longest:.2f})\nscale {found.rule.scale:.4g} ({least:.3g} to {most:.3g}), "
        f"{found.rule.detection_tokens} tokens cut at a trigger\n"
    )
    return pair, text


def _within(pair: Pair) -> bool:
    return all(low >= -TOLERANCE and high <= TOLERANCE for low, high in pair)


# --- folders -------------------------------------------------------------------------------------------------------


def matched_config(folder: Path) -> tuple[Config, str]:
    """The config of random_matched for a finished run of KAT, and what was matched, in words. Raises ConfigError."""
    config, treated, control, since = _cutting_run(folder)
    if not len(control.cut):
        raise ConfigError(f"{folder}: nothing to match, the run has no control rollout")
    found = match(hazard_of(treated.seen, treated.cut), treated.means, all_alike(control.generated), treated.overshoot)
    pair, known = _known(found, control, treated.overshoot)
    text = (
        f"{len(treated.cut)} treated and {len(control.cut)} control rollouts, active from policy version {since}\n"
        f"{known}{_text(found.wanted, found.expected, pair)}"
    )
    if not _within(pair):
        text += (
            f"\nThe control arm is too small to promise {TOLERANCE:.0%}. When the run is done, compare it with "
            f"--against; if they do not agree, use --correct."
        )
    return _with_rule(config, found.rule, f"{config.name[:56]}-matched", since), text


def corrected_config(folder: Path, other: Path) -> tuple[Config, str]:
    """The config of random_matched from a run of KAT and a run that was matched to it before; in words what changed.

    The next run has the seed of both, so it draws the same chances: how far those drew other means than expected is
    taken off what is aimed at. Raises ConfigError, also where `other` was not made from `folder`.
    """
    _, treated, _, _ = _cutting_run(folder)
    config = RunFolder(other).config
    rule, hazard = config.termination, hazard_of(treated.seen, treated.cut)
    if rule.policy != "random_matched" or rule.hazard != hazard or not (rule.apply == "stop" and not rule.shadow):
        raise ConfigError(f"{other}: not made from {folder}; expected a run of what `katana match` made of it")
    made, control = _arms(other)
    lengths = uncut_lengths(np.concatenate([made.seen, control.generated]), np.concatenate([made.cut, control.cut]))
    before = Rule(hazard, rule.hazard_scale, rule.detection_tokens)
    usual, real, aim = expected_means(before, lengths, made.overshoot), made.means, treated.means
    wanted = Means(aim.generated - real.generated + usual.generated, aim.kept - real.kept + usual.kept, aim.cut)
    found = match(hazard, wanted, lengths, made.overshoot)
    text = (
        f"{_realised(treated, made)}\n"
        f"lengths of {len(made.cut) + len(control.cut)} rollouts of {other}, {int(made.cut.sum())} of them cut\n"
        f"scale {before.scale:.4g} → {found.rule.scale:.4g}, tokens cut at a trigger {before.detection_tokens} → "
        f"{found.rule.detection_tokens}\n"
        f"expected to agree; by chance a run of this size may miss that by {_scatter(made):.1%} (95 %)"
    )
    return _with_rule(config, found.rule, _next_name(config.name), rule.warmup_steps), text


def compare(folder: Path, other: Path) -> tuple[str, bool]:
    """The realised means of two runs' treated rollouts, in words, and whether they agree within 2 %."""
    for run in (folder, other):
        _ = RunFolder(run).config  # a folder that is no run's is named as such
    (one, _), (two, _) = _arms(folder), _arms(other)
    return _realised(one, two), agree(one.means, two.means)


def _realised(one: Arm, two: Arm) -> str:
    pair = _differences(one, two)
    unsure = "" if _within(pair) else f"; too few rollouts to be sure of {TOLERANCE:.0%}"
    return f"{_text(one.means, two.means, pair)}{unsure}"


def _scatter(made: Arm) -> float:
    """How far means of the next run may fall from what this one led to expect, as a share: both vary by chance."""
    drawn = _resampled_means(made, np.column_stack([made.generated, made.kept]))
    halves = [(high - low) / (high + low) for low, high in map(interval, drawn.T)]
    return float(np.sqrt(2) * max(halves))


def _text(one: Means, other: Means, pair: Pair | None = None) -> str:
    def part(name: str, a: float, b: float, known: tuple[float, float] | None) -> str:
        interval = "" if known is None else f"; 95 % interval {known[0]:+.1%} to {known[1]:+.1%}"
        return f"mean {name} {a:.2f} and {b:.2f} tokens ({(b - a) / a if a else 0:+.1%}{interval})"

    of_generated, of_kept = pair or (None, None)
    generated = part("generated", one.generated, other.generated, of_generated)
    kept = part("kept", one.kept, other.kept, of_kept)
    return f"{generated}, {kept}; cut {one.cut:.1%} and {other.cut:.1%}"


def _with_rule(config: Config, rule: Rule, name: str, since: int) -> Config:
    tree = config.model_dump()
    tree["termination"] |= {
        "policy": "random_matched",
        "hazard": rule.hazard,
        "hazard_scale": rule.scale,
        "detection_tokens": rule.detection_tokens,
        "warmup_steps": since,
    }
    return Config.model_validate(tree | {"name": name})


def _next_name(name: str) -> str:
    """kat-matched, kat-matched-2, kat-matched-3 …"""
    base, dash, number = name.rpartition("-")
    again = bool(dash) and number.isdecimal() and len(number) < 4
    return f"{base}-{int(number) + 1}" if again else f"{name[:62]}-2"


_EXPECTED = "a run of kat, or of another policy, that stops rollouts"


def _cutting_run(folder: Path) -> tuple[Config, Arm, Arm, int]:
    """Config and arms of a finished run that stops rollouts, and the policy version that it was active from. Raises
    ConfigError, first of all where it is a run that cannot: what such a run lacks follows from that."""
    config = RunFolder(folder).config
    rule = config.termination
    if rule.policy in ("none", "random_matched"):
        raise ConfigError(f"{folder}: its policy is {rule.policy!r}; expected {_EXPECTED}")
    if rule.shadow or rule.apply != "stop":
        setting = "termination.shadow: true" if rule.shadow else f"termination.apply: {rule.apply}"
        raise ConfigError(f"{folder}: made with {setting}, which stops nothing; expected {_EXPECTED}")
    treated, control = _arms(folder)
    if not treated.cut.any():
        raise ConfigError(f"{folder}: nothing to match, no treated rollout was cut")
    return config, treated, control, _active_since(folder)


def _arms(folder: Path) -> tuple[Arm, Arm]:
    """Both arms of a finished run. Raises ConfigError, also where no treated rollout could have been cut."""
    _check_finished(folder)
    arms = [_arm([line for line in _compared(folder) if line.arm == name]) for name in ("treated", "control")]
    if not len(arms[0].cut):
        raise ConfigError(f"{folder}: no treated rollout that its policy could have cut")
    return arms[0], arms[1]


def _check_finished(folder: Path) -> None:
    """What is still being written when a run is looked at is longer than what has ended."""
    summary = RunFolder(folder).summary
    if summary is None:
        raise ConfigError(f"{folder}: not finished, no summary.json; resume it with `katana run … --resume`")
    if summary.ledger and summary.ledger.open:
        left = f"{summary.ledger.open} rollouts are open"
        raise ConfigError(f"{folder}: not finished, {left}; resume it with `katana run … --resume`")


def _compared(folder: Path) -> list[BookLine]:
    return [line for line in RunFolder(folder).rollouts() if line.compared and line.judged]


def _active_since(folder: Path) -> int:
    """The policy version that the first compared rollout ended under."""
    return min(line.policy_version_last for line in _compared(folder))


def _arm(lines: list[BookLine]) -> Arm:
    def column(*names: str) -> Reals:
        return np.array([sum(getattr(line, name) for name in names) for line in lines], np.float64)

    return Arm(
        problem=column("problem"),
        seen=column("tokens_kept", "tokens_detection"),
        kept=column("tokens_kept"),
        generated=column("tokens_generated"),
        cut=np.array([line.stopped for line in lines], np.bool_),
    )
