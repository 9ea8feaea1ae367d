"""What `katana run` shows while it runs: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from types import TracebackType
from typing import Any

import redis
from rich.console import Console
from rich.live import Live
from rich.table import Table

from common.config import Config
from common.policies import written
from common.policy_names import CALIBRATED
from common.runfiles.records import BookLine, Evaluation, Step, Summary
from common.runfiles.run import RunFolder
from common.teachers import called, of
from common.wire.plane import Plane
from ops.stats import endings, rewards
from ops.stats.saving import ARMS, length_saving

_STEPS_BYTES = 16 << 10  # read from the end of metrics.jsonl: about 30 steps


class RunProgress:
    """A view of the run's folder and Redis; reads only. Use as a context manager around the run."""

    def __init__(self, config: Config, plane: Plane) -> None:
        self._config, self._plane = config, plane
        self._folder = RunFolder(config.run_dir)
        self._lines, self._evaluations = self._folder.rollouts.tail(), self._folder.evaluations.tail()
        self._step: Step | None = None
        self._read_steps()  # of an earlier session
        self._evaluation: Evaluation | None = None
        self._booked: deque[BookLine] = deque(maxlen=1024)  # summary.json has the saving of the whole run
        self._recent: dict[str, deque[int]] = {"treated": deque(maxlen=256), "control": deque(maxlen=64)}
        self._written: deque[tuple[float, int]] = deque(maxlen=20)
        self._pace: deque[tuple[float, float]] = deque(maxlen=20)  # time, and the completed share of the run
        self._facts: dict[str, Any] = {}
        self._busy: dict[str, tuple[float, int]] = {}  # by role: sum of shares, number of shares
        self._console = Console()
        self._live = Live(self._table(), console=self._console, refresh_per_second=4) if sys.stdout.isatty() else None
        self._update_at = 0.0
        self._printed = self._twentieths()
        self._began = time.monotonic()

    def __enter__(self) -> RunProgress:
        if self._live is not None:
            self._live.start()
        else:
            self._print(f"run {self._config.name} in {self._config.run_dir}: starting")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.update(self._table())
            self._live.stop()

    def update(self) -> None:
        """Read new data and show it, at most twice a second."""
        now = time.monotonic()
        if now < self._update_at:
            return
        self._update_at = now + 0.5
        steps = self._read_steps()
        for step in steps:
            self._note_busy("learner", 1 - step.idle_ratio)
        if steps:
            self._pace.append((now, self._share()))
        self._evaluation = [self._evaluation, *self._evaluations.read()][-1]
        for line in self._lines.read():
            self._booked.append(line)
            self._recent[line.arm].append(line.tokens_generated)
        try:
            self._ask()
        except (redis.exceptions.RedisError, OSError):
            self._facts["redis"] = "does not answer"
        if self._live is not None:
            self._live.update(self._table())
        else:
            self._print_step()

    def _read_steps(self) -> list[Step]:
        """New steps, read only from the end of the file.

        A restarted learner replaces the file by one that is cut back to its checkpoint. Reading that from the beginning
        would count every step twice and load the whole run: each restart in a soak of 2,700 steps added 1 to 2 MB to
        this process.
        """
        before, steps = self._done_steps, self._folder.steps.last(_STEPS_BYTES)
        self._step = [self._step, *steps][-1]
        return [step for step in steps if step.step > before]

    def _ask(self) -> None:
        client, key = self._plane.client, self._plane.key
        stored = {name: client.get(key(of(name, "threshold"))) for name in self._plane.teachers}
        self._facts["thresholds"] = {
            name: float(value) for name, value in stored.items() if value not in (None, b"inactive")
        }
        self._facts["buffer"] = sum(client.llen(key(of(name, "minima"))) for name in self._plane.teachers)
        live = self._plane.live(within_s=10.0)
        self._facts["workers"] = live
        for facts in live.values():
            self._note_busy(facts.get("role", "?"), float(facts.get("busy", 0)))
        tokens = sum(int(facts.get("tokens", 0)) for facts in live.values() if facts.get("role") == "rollout")
        if not self._written or tokens != self._written[-1][1]:
            self._written.append((time.monotonic(), tokens))
        self._facts.pop("redis", None)

    def busy_shares(self) -> dict[str, float]:
        """Mean busy share by role over the run so far; the highest is the bottleneck."""
        return {role: total / seen for role, (total, seen) in self._busy.items()}

    def _note_busy(self, role: str, share: float) -> None:
        total, seen = self._busy.get(role, (0.0, 0))
        self._busy[role] = (total + share, seen + 1)

    # --- figures -----------------------------------------------------------------------------------------------

    def _rate(self) -> float | None:
        if len(self._written) < 2:
            return None
        (t0, n0), (t1, n1) = self._written[0], self._written[-1]
        return (n1 - n0) / (t1 - t0) if t1 > t0 and n1 >= n0 else None

    @property
    def _done_steps(self) -> int:
        return self._step.step if self._step else 0

    @property
    def _done_tokens(self) -> int:
        return self._step.tokens_generated or 0 if self._step else 0

    def _share(self) -> float:
        """The completed share of the run: of its steps or of its tokens, whichever is larger."""
        learner = self._config.learner
        share = self._done_steps / learner.max_steps
        if learner.max_generated_tokens is not None:
            share = max(share, self._done_tokens / learner.max_generated_tokens)
        return share

    def _twentieths(self) -> int:
        return int(20 * self._share() + 1e-9)

    def _left_s(self) -> float | None:
        """Seconds to the end at the recent pace."""
        if len(self._pace) < 2:
            return None
        (t0, share0), (t1, share1) = self._pace[0], self._pace[-1]
        return max(0.0, (1 - share1) * (t1 - t0) / (share1 - share0)) if share1 > share0 else None

    def _done(self) -> str:
        """Steps done of all steps, and tokens of all tokens if they may end the run."""
        learner = self._config.learner
        steps = f"{self._done_steps} / {learner.max_steps}"
        if learner.max_generated_tokens is None:
            return steps
        return f"{steps}, {self._done_tokens:,} / {learner.max_generated_tokens:,} tokens generated"

    def _figures(self) -> dict[str, str]:
        means = {arm: sum(recent) / len(recent) if recent else None for arm, recent in self._recent.items()}
        saving = length_saving(list(self._booked), resamples=200) if self._booked else None
        interval = (
            f"{saving.ratio:.1%} ({saving.low:.1%} … {saving.high:.1%})"
            if saving is not None and saving.ratio is not None
            else "–"
        )
        thresholds, policy = self._facts.get("thresholds", {}), self._config.termination.policy
        rate = self._rate()
        workers = self._facts.get("workers", {}).values()
        roles = [f"{facts.get('role')} {float(facts.get('busy', 0)):.0%}" for facts in workers]
        step, last = self._step, self._evaluation
        evaluated = last and f"{last.scores.avg_at_k:.3f} / {last.scores.pass_at_k:.3f} at step {last.step}"
        return {
            "step": self._done(),
            "left": f"about {left:.0f} s" if (left := self._left_s()) is not None else "–",
            "loss": _number(step and step.loss, ".4f"),
            "length treated / control": "{} / {} tokens".format(*(_number(means[arm], ".0f") for arm in ARMS)),
            "saving": interval,
            "threshold": ", ".join(f"{name} {written(one, policy, '.2e')}".strip() for name, one in thresholds.items())
            or (
                f"inactive ({self._facts.get('buffer', 0)} of {self._config.termination.min_calibration} minima)"
                if policy in CALIBRATED
                else "–"
            ),
            "lag": f"{_number(step and step.staleness_mean, '.2f')} versions",
            "written": f"{_number(rate, '.0f')} tokens/s",
            "avg@k / pass@k": str(evaluated or "–"),
            "busy": ", ".join(sorted(roles)) or "starting",
        }

    def _table(self) -> Table:
        table = Table(title=f"katana · {self._config.name}", show_header=False, min_width=60)
        for name, text in self._figures().items():
            table.add_row(name, text)
        if "redis" in self._facts:
            table.add_row("redis", str(self._facts["redis"]))
        return table

    def _print_step(self) -> None:
        if self._twentieths() > self._printed:
            self._printed = self._twentieths()
            figures = self._figures()
            self._print(
                f"step {figures['step']}  loss {figures['loss']}  length {figures['length treated / control']}  "
                f"saving {figures['saving']}  threshold {figures['threshold']}  lag {figures['lag']}  "
                f"{figures['written']}  avg@k {figures['avg@k / pass@k']}  left {figures['left']}"
            )

    def _print(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:6.1f} s] {text}", flush=True)


def _number(value: Any, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def describe(summary: Summary, config: Config) -> str:
    """A summary as text."""
    saving, ledger = summary.length_saving, summary.ledger
    lines = [f"{summary.steps} steps in {_number(summary.wall_s, '.0f')} s, policy version {summary.policy_version}"]
    for one in summary.evaluations:
        scores = one.scores
        lines.append(
            f"version {one.policy_version:>4}: avg@{scores.k} {scores.avg_at_k:.3f}  pass@{scores.k} "
            f"{scores.pass_at_k:.3f}  mean length {scores.mean_length:.1f}  ({scores.n} problems)"
        )
    for arm, totals in summary.arms.items():
        lines.append(
            f"{arm:>8}: {totals.rollouts} rollouts, {totals.tokens_generated} tokens written, "
            f"{totals.tokens_trained} trained on, mean {_number(totals.mean_generated, '.1f')}"
        )
    for name, found in summary.teachers.items():
        lines.append(
            f"{called(name)}: {found.rollouts} rollouts, mean {found.mean_generated:.1f}, right "
            f"{_number(found.accuracy, '.3f')}, cut {_number(found.cut_rate, '.3f')}"
        )
    if saving.ratio is not None:
        lines.append(f"length saving {saving.ratio:.1%} (95 % interval {saving.low:.1%} to {saving.high:.1%})")
    lines.append("ended: " + ", ".join(f"{reason} {count}" for reason, count in summary.finish_reasons.items()))
    if ledger:
        lines.append(
            f"ledger: admitted {ledger.admitted} = trained {ledger.trained} + dropped {sum(ledger.dropped.values())} "
            f"+ dead {ledger.dead} + open {ledger.open}"
        )
    if summary.rewards is not None:
        lines.append(rewards.words(summary.rewards))
    lines += [f"left out: {endings.words(one)}" for one in endings.left_out(summary.endings)]
    lines.append(f"folder: {config.run_dir} (summary.json, report.html, model/)")
    return "\n".join(lines)
