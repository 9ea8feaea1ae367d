"""Figures and policies in words, the same in every command."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from matplotlib.ticker import EngFormatter

from common import policy_names
from common.config import Config


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def short(count: float) -> str:
    """31,308 as 31.3 k."""
    return str(EngFormatter(places=1 if count >= 1000 else 0, sep=" ")(count))


def fired_word(config: Config) -> str:
    """The label for a treated rollout in which the policy fired."""
    return "Cut" if config.termination.stops("treated") else "Fired, not stopped"


def teachers_text(config: Config, *, short_names: bool = False) -> str:
    """The model of the teacher, or of several the model of each by its name. `short_names`: no folders."""
    models = {name: Path(one.model).name if short_names else one.model for name, one in config.all_teachers.items()}
    return ", ".join(f"{model} ({name})" if name else model for name, model in models.items())


def policy_text(config: Config, thresholds: Iterable[float | None]) -> str:
    """What ends a rollout early, with its settings and the thresholds that were in force, in nats."""
    settings = config.termination
    applied = " (shadow)" if settings.shadow else " (mask)" if settings.apply == "mask" else ""
    if settings.policy == "fixed":
        return f"fixed{applied}: the first {settings.fixed_tokens} tokens"
    if settings.policy == "repetition":
        return f"repetition{applied}: the first {settings.ngram} tokens that come twice"
    if settings.policy == "margin_change":
        return (
            f"margin_change{applied}: where the margin {settings.margin_side}s, drift {settings.margin_drift:g}, "
            f"threshold {settings.margin_threshold:g} nats"
        )
    if settings.policy == "adaptive":
        return f"adaptive{applied}: δ {settings.adaptive_delta:g}, blocks of {settings.adaptive_block} tokens"
    if settings.policy not in policy_names.OF_WINDOWS:
        return settings.policy + applied
    text = (
        f"{settings.policy}{applied}: W {settings.window}, C {settings.patience}, η {settings.eta:g}, "
        f"K {settings.teacher_top_k}, control {100 * settings.control_fraction:g} %; threshold "
    )
    seen = [one for one in thresholds if one is not None]
    return text + (f"{min(seen):.2g} … {max(seen):.2g} nats" if seen else "never active")
