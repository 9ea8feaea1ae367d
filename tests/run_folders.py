"""Folders of runs as tests need them: prepared files in the form in which a run writes them."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.runfiles.records import BookLine
from ops.report.page import write_page
from ops.report.plots import draw_all
from ops.report.run import read_run

CONFIG = """
name: small
student: {model: ./absent-student}
teacher: {model: ./absent-teacher}
termination: {window: 4, patience: 2, min_calibration: 2, control_fraction: 0.5}
learner: {batch_size: 2, max_steps: 2}
rollout: {max_completion_length: 16}
"""


def line(**changes: Any) -> dict[str, Any]:
    """A booked rollout of 10 tokens, all trained on."""
    fields: dict[str, Any] = {
        "rid": "r0",
        "arm": "treated",
        "problem": 0,
        "finish_reason": "eos",
        "ending": "trained",
        "reason": "",
        "active": True,
        "tokens_generated": 10,
        "tokens_kept": 10,
        "tokens_trained": 10,
        "tokens_detection": 0,
        "tokens_overshoot": 0,
        "threshold": 0.5,
        "min_window": 0.6,
        "policy_version_first": 0,
        "policy_version_last": 0,
        "staleness": 0,
        "correct": True,
        "admitted_unix_s": None,
        "verdict_unix_s": None,
        "ended_unix_s": None,
        "tokens_trainable": 10,
    }
    return fields | changes


def booked(**changes: Any) -> BookLine:
    return BookLine.from_json(line(**changes))


def trace_line(
    divergence: Sequence[float],
    keep: int,
    trigger: int,
    arm: str = "treated",
    rid: str = "r0",
    tokens: Sequence[int] | None = None,
) -> dict[str, Any]:
    """A line of traces.jsonl; token ids are 0, 1, 2 … where none are given."""
    ids = np.arange(len(divergence)) if tokens is None else np.array(tokens)
    fired = keep < len(divergence)
    return {
        "rid": rid,
        "arm": arm,
        "problem": 0,
        "trigger": trigger,
        "keep": keep,
        "train": keep,
        "finish_reason": "kl_trap" if fired and arm == "treated" else "eos",
        "cut": arm == "treated" and fired,
        "threshold": 0.5,
        "version": 0,
        "tokens": base64.b64encode(ids.astype("<i4").tobytes()).decode(),
        "divergence": base64.b64encode(np.array(divergence, dtype="<f4").tobytes()).decode(),
    }


def evaluation(step: int, average: float) -> dict[str, Any]:
    return {
        "policy_version": step,
        "step": step,
        "tokens_trained": 0,
        "k": 4,
        "n": 8,
        "avg@k": average,
        "pass@k": average + 0.1,
        "mean_length": 9.0,
        "eos_rate": 1.0,
        "wall_s": 1.0,
    }


def step_line(step: int, **changes: Any) -> dict[str, Any]:
    """A line of metrics.jsonl; it has every field."""
    fields: dict[str, Any] = {
        "step": step,
        "policy_version": step,
        "loss": 0.5,
        "kl": 1.0 / step,
        "entropy": 0.5,
        "support_mass": 0.9,
        "support_mass_teacher": 0.8,
        "topk_overlap": 0.75,
        "repetition": 0.25,
        "truncation_rate": 0.0,
        "cut_rate_treated": 0.5,
        "cut_rate_control": None,
        "threshold": None,
        "ratio_mean": 1.0,
        "ratio_max": 2.0,
        "grad_norm": 3.0,
        "learning_rate": 1e-3,
        "trajectories": 2,
        "tokens_trained": 20,
        "tokens_trained_total": 20 * step,
        "tokens_generated": 25 * step,
        "mean_kept": 10.0,
        "staleness_mean": 0.5,
        "staleness_max": 1,
        "stale_dropped": {"treated": 0, "control": 0},
        "step_s": 0.25,
        "idle_ratio": 0.5,
        "unix_s": 1.7e9 + step,
    }
    return fields | changes


def write_lines(path: Path, items: Sequence[dict[str, Any] | BookLine]) -> None:
    """JSON lines as the books write them."""
    trees = [item.to_json() if isinstance(item, BookLine) else item for item in items]
    path.write_text("".join(json.dumps(tree, separators=(",", ":")) + "\n" for tree in trees))


def fill(folder: Path, *, config: str = CONFIG) -> Path:
    """A run of two steps: in each arm one rollout in which the rule fired, in each one in which it did not."""
    cut = {"tokens_kept": 2, "tokens_trained": 2, "tokens_detection": 5, "tokens_overshoot": 3}
    control = {"arm": "control", "policy_version_last": 1}
    lines = [line(rid="r0"), line(rid="r1", finish_reason="kl_trap", **cut), line(rid="r2", **control)]
    lines.append(line(rid="r3", **control, **cut))
    wave = [1.0, 2.0, *[0.001] * 5, 0.0, 3.0, 1.0]
    traces = [
        trace_line(wave, 10, 10, rid="r0"),
        trace_line(wave[:8], 2, 7, rid="r1"),
        trace_line(wave, 2, 7, "control", rid="r3"),
    ]
    write_lines(folder / "rollouts.jsonl", lines)
    write_lines(folder / "traces.jsonl", traces)
    write_lines(folder / "eval.jsonl", [evaluation(0, 0.2), evaluation(2, 0.4)])
    write_lines(folder / "metrics.jsonl", [step_line(1), step_line(2)])
    ledger = {"admitted": 4, "trained": 4, "dropped": {}, "dead": 0, "open": 0}
    (folder / "ledger.json").write_text(json.dumps(ledger))
    (folder / "config.yaml").write_text(config)
    return folder


def fill_long(folder: Path, rollouts: int, *, seed: int = 0, config: str = "", ids: int = 37, length: int = 40) -> Path:
    """A run of so many rollouts of about `length` tokens, drawn at random: both arms, cuts, drops, times, evaluations.

    Without a config of its own it has the models that ship, so that token ids below 37 are text.
    """
    rng = np.random.default_rng(seed)
    lines, traces = [], []
    for place in range(rollouts):
        written, traced = _rollout(rng, place, rollouts, ids, length)
        lines.append(written)
        traces.append(traced)
    write_lines(folder / "rollouts.jsonl", lines)
    write_lines(folder / "traces.jsonl", traces)
    steps = max(1, rollouts // 10)
    write_lines(folder / "metrics.jsonl", [step_line(step) for step in range(1, steps + 1)])
    write_lines(folder / "eval.jsonl", [evaluation(0, 0.2), evaluation(steps // 2, 0.3)])
    shipped = CONFIG.replace("./absent-", "ops/models/").replace("batch_size: 2", "batch_size: 10")
    (folder / "config.yaml").write_text(config or shipped)
    (folder / "wall.json").write_text('{"wall_s": 75.25}')
    return folder


def _rollout(
    rng: np.random.Generator, place: int, rollouts: int, ids: int, length: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    rid, arm = f"r{place:09d}", "control" if place % 4 == 3 else "treated"
    total = int(rng.integers(length // 2, length + 1))
    fired = bool(rng.random() < 0.5)
    keep, trigger = (total // 2, total // 2 + total // 4) if fired else (total, total)
    stale = bool(rng.random() < 0.05)
    begin = 1.7e9 + place
    version = place * 20 // rollouts
    booked = line(
        rid=rid,
        arm=arm,
        problem=place // 2,
        finish_reason="kl_trap" if fired and arm == "treated" else "eos",
        ending="dropped" if stale else "trained",
        reason="stale" if stale else "",
        active=place > rollouts // 10,
        tokens_generated=total,
        tokens_kept=keep,
        tokens_trained=0 if stale else keep,
        tokens_detection=trigger - keep,
        tokens_overshoot=total - trigger,
        threshold=0.5 - 0.2 * place / rollouts,
        min_window=float(rng.random()),
        policy_version_first=version,
        policy_version_last=version,
        staleness=int(rng.integers(0, 4)),
        correct=bool(rng.random() < 0.6),
        admitted_unix_s=begin,
        verdict_unix_s=begin + float(rng.random()),
        ended_unix_s=begin + 2.0,
        tokens_trainable=keep,
    )
    divergence = np.exp(rng.normal(-4.0, 2.0, total))
    traced = trace_line(divergence.tolist(), keep, trigger, arm, rid, rng.integers(0, ids, total).tolist())
    return booked, traced


def write_html(folder: Path) -> Path:
    """report.html of a run's folder alone, as `katana report` makes it with the rest."""
    run = read_run(folder)
    return write_page(run, draw_all(run))
