"""The learner's journal: a line per step in metrics.jsonl and in trained.jsonl, and the Prometheus metrics."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import IO

from common import metrics
from common.config import Config
from common.policies import unit_of
from common.runfiles.records import Step, StepReuse, Trained
from common.runfiles.run import RunFolder
from common.wire.messages import row_digest
from learner.batch import Trajectory
from learner.drift import Drift, drift_of
from learner.loss import Diagnostics
from learner.rewarding import rewards_in, show_rewards


class Journal:
    """Writes the lines. Its files are open from `open` to `close`; a line is on disk after `sync`."""

    def __init__(self, config: Config) -> None:
        self._folder = RunFolder(config.run_dir)
        self._policy = config.termination.policy
        self._rewarded, self._generations = config.reward.mode != "none", config.data.num_generations
        self._lines: dict[type, IO[str]] = {}  # by the record that each file holds

    def open(self, step: int) -> None:
        """Open the files, without the lines after `step`: those steps will be repeated."""
        self._lines[Step] = self._folder.steps.open_cut_back(lambda line: line.step <= step)
        self._lines[Trained] = self._folder.trained.open_cut_back(lambda line: line.step <= step)

    def write(
        self,
        trajectories: Sequence[Trajectory],
        seen: Diagnostics,
        reuse: StepReuse | None,
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
        """Write the lines of a step: its figures and its trajectories. `loss` in nats; `stale_dropped` by arm."""
        drift = drift_of(trajectories)
        rewards = rewards_in(trajectories, self._generations) if self._rewarded else None
        self._append(
            Step(
                step=step,
                policy_version=policy_version,
                loss=loss,
                kl=seen.kl_nats,
                entropy=seen.entropy_nats,
                support_mass=seen.support_mass,
                support_mass_teacher=seen.support_mass_teacher,
                topk_overlap=seen.topk_overlap,
                **asdict(drift),
                rewards=rewards,
                reuse=reuse,
                ratio_mean=seen.ratio_mean,
                ratio_max=seen.ratio_max,
                grad_norm=grad_norm,
                learning_rate=learning_rate,
                trajectories=len(trajectories),
                tokens_trained=seen.tokens,
                tokens_trained_total=tokens_trained_total,
                tokens_generated=tokens_generated,
                mean_kept=seen.tokens / len(trajectories),
                staleness_mean=sum(staleness) / len(staleness),
                staleness_max=max(staleness),
                stale_dropped=dict(stale_dropped),
                step_s=step_s,
                idle_ratio=idle_ratio,
                unix_s=time.time(),
            )
        )
        self._append(_trained_line(step, policy_version, trajectories, rewarded=self._rewarded))
        metrics.learner_steps.inc()
        metrics.learner_tokens.inc(seen.tokens)
        metrics.learner_loss.set(loss)
        metrics.learner_step_seconds.observe(step_s)
        metrics.learner_idle.set(idle_ratio)
        self._show_drift(seen, drift)
        if rewards is not None:
            show_rewards(rewards)

    def sync(self) -> None:
        for file in self._lines.values():
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in self._lines.values():
            file.close()

    def _show_drift(self, seen: Diagnostics, drift: Drift) -> None:
        """Set the gauges; a figure that this batch does not have keeps its last value."""
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

    def _append(self, line: Step | Trained) -> None:
        file = self._lines[type(line)]
        file.write(json.dumps(line.to_json(), allow_nan=False) + "\n")
        file.flush()


def _trained_line(step: int, version: int, trajectories: Sequence[Trajectory], *, rewarded: bool) -> Trained:
    """What a step was trained on: rollouts, token counts, 8-byte digests of the ids as little-endian int32; with
    rewards, each one's advantage, or why it has none."""
    return Trained(
        step=step,
        policy_version=version,
        rids=[one.rid for one in trajectories],
        tokens=[len(one.tokens) for one in trajectories],
        digests=[row_digest(one.tokens) for one in trajectories],
        advantages=[one.advantage for one in trajectories] if rewarded else [],
        without_reward=[one.without_reward for one in trajectories] if rewarded else [],
    )
