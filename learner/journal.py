"""The learner's journal: a line a step in metrics.jsonl and in trained.jsonl, and the same in the metrics."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import IO, Any

from common import metrics
from common.config import Config
from common.policies import unit_of
from common.runfiles.lines import open_cut_back
from common.runfiles.records import METRICS, TRAINED, Trained
from common.wire.messages import row_digest
from learner.batch import Trajectory
from learner.drift import Drift, drift_of
from learner.loss import Diagnostics


class Journal:
    """Its files are open from `open` to `close`; a line is on disk after `sync`."""

    def __init__(self, config: Config) -> None:
        self._folder = config.run_dir
        self._policy = config.termination.policy
        self._lines: dict[str, IO[str]] = {}

    def open(self, step: int) -> None:
        """Cut back what was written after `step`: it will be done again."""
        for name in (METRICS, TRAINED):
            self._lines[name] = open_cut_back(self._folder / name, lambda line: line["step"] <= step)

    def write(
        self,
        trajectories: Sequence[Trajectory],
        seen: Diagnostics,
        *,
        step: int,
        policy_version: int,
        loss: float,
        grad_norm: float,
        learning_rate: float,
        tokens_trained_total: int,
        tokens_generated: int,
        staleness: Sequence[int],
        stale_dropped: Mapping[str, int],
        step_s: float,
        idle_ratio: float,
    ) -> None:
        """A step: what it was trained on and what that showed. `loss` in nats; `stale_dropped` by arm."""
        drift = drift_of(trajectories)
        line = {
            "step": step,
            "policy_version": policy_version,
            "loss": loss,
            "kl": seen.kl_nats,
            "entropy": seen.entropy_nats,
            "support_mass": seen.support_mass,
            "support_mass_teacher": seen.support_mass_teacher,
            "topk_overlap": seen.topk_overlap,
            **asdict(drift),
            "ratio_mean": seen.ratio_mean,
            "ratio_max": seen.ratio_max,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "trajectories": len(trajectories),
            "tokens_trained": seen.tokens,
            "tokens_trained_total": tokens_trained_total,
            "tokens_generated": tokens_generated,
            "mean_kept": seen.tokens / len(trajectories),
            "staleness_mean": sum(staleness) / len(staleness),
            "staleness_max": max(staleness),
            "stale_dropped": dict(stale_dropped),
            "step_s": step_s,
            "idle_ratio": idle_ratio,
            "unix_s": time.time(),
        }
        self._append(METRICS, line)
        self._append(TRAINED, _trained_line(step, policy_version, trajectories).to_json())
        metrics.learner_steps.inc()
        metrics.learner_tokens.inc(seen.tokens)
        metrics.learner_loss.set(loss)
        metrics.learner_step_seconds.observe(step_s)
        metrics.learner_idle.set(idle_ratio)
        self._show_drift(seen, drift)

    def sync(self) -> None:
        for file in self._lines.values():
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in self._lines.values():
            file.close()

    def _show_drift(self, seen: Diagnostics, drift: Drift) -> None:
        """What a batch cannot tell stays as the last one told it."""
        metrics.learner_entropy.set(seen.entropy_nats)
        shares = {
            "support_mass": seen.support_mass,
            "support_mass_teacher": seen.support_mass_teacher,
            "topk_overlap": seen.topk_overlap,
            "repetition": drift.repetition,
            "truncation": drift.truncation_rate,
            "cut_treated": drift.cut_rate_treated,
            "cut_control": drift.cut_rate_control,
        }
        for kind, share in shares.items():
            if share is not None:
                metrics.learner_drift.labels(kind).set(share)
        if drift.threshold is not None and unit_of(self._policy) == "nats":
            metrics.learner_threshold.set(drift.threshold)

    def _append(self, name: str, line: dict[str, Any]) -> None:
        self._lines[name].write(json.dumps(line, allow_nan=False) + "\n")
        self._lines[name].flush()


def _trained_line(step: int, version: int, trajectories: Sequence[Trajectory]) -> Trained:
    """What a step was trained on: rollout, tokens, digest (8 bytes) of their ids as little-endian int32."""
    return Trained(
        step=step,
        policy_version=version,
        rids=[one.rid for one in trajectories],
        tokens=[len(one.tokens) for one in trajectories],
        digests=[row_digest(one.tokens) for one in trajectories],
    )
