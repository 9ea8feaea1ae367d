"""Experiment trackers: a run's figures in TensorBoard and in Weights & Biases, read from its folder while it grows.

A tracker only reads. What it shows is a function of metrics.jsonl, rollouts.jsonl and eval.jsonl, so nothing is lost
when it starts late. A failure is logged and the tracker is restarted later, while the run continues. The x axis is the
learner's step; a rollout is shown at the step whose weights wrote its end.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

from common import metrics
from common.config import Config, ConfigError
from common.files import write_json
from common.runfiles.making import lock
from common.runfiles.names import TENSORBOARD, WANDB
from common.runfiles.records import BookLine, Evaluation, Step
from common.runfiles.run import RunFolder

log = logging.getLogger("katana.tracking")
_POLL_S = 1.0
_RETRY_S = 30.0  # doubled with each failure
_LONGEST_RETRY_S = 600.0
_FINISH_S = 8.0  # `katana run` gives its processes 15 s to stop
_LAST_EVALUATION_S = 1800.0

_STEP = {
    "train": (
        *("loss", "kl", "entropy", "grad_norm", "learning_rate", "staleness_mean", "staleness_max"),
        *("support_mass", "support_mass_teacher", "topk_overlap", "ratio_mean", "ratio_max", "policy_version"),
    ),
    "perf": ("step_s", "idle_ratio", "tokens_trained", "tokens_trained_total"),
}
"""Fields of a Step, by the group that they have in a tracker."""


def missing(names: Sequence[str]) -> list[str]:
    """Problems with these trackers: a line for each whose package is not installed."""
    problems = []
    for name in names:
        try:
            version(name)
        except PackageNotFoundError:
            problems.append(
                f"tracking: {name} is not installed: pip install 'katana-distill[{name}]', or remove it from the list"
            )
    return problems


@dataclass(frozen=True, slots=True)
class TrackedPoint:
    """Figures at one learner step. `kind`: train | rollout | eval; the steps of a kind rise, until a restart."""

    kind: str
    step: int
    values: dict[str, float]
    unix_s: float | None = None


# --- from files to points ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Window:
    """Sums over the rollouts of a point."""

    written: dict[str, list[int]] = field(default_factory=lambda: {"treated": [0, 0], "control": [0, 0]})
    kept: int = 0
    judged: int = 0
    correct: int = 0
    cuttable: int = 0  # treated, and the policy was active
    fired: int = 0  # of these, applied or not
    threshold: float | None = None
    unix_s: float | None = None

    def add(self, line: BookLine) -> None:
        sums = self.written[line.arm]
        sums[0] += line.tokens_generated
        sums[1] += 1
        self.kept += line.tokens_kept
        if line.correct is not None:
            self.judged += 1
            self.correct += line.correct
        if line.arm == "treated" and line.compared:
            self.cuttable += 1
            self.fired += line.fired
        self.threshold = line.threshold if line.threshold is not None else self.threshold
        self.unix_s = line.ended_unix_s or self.unix_s

    @property
    def rollouts(self) -> int:
        return sum(count for _, count in self.written.values())

    def values(self) -> dict[str, float]:
        tokens = sum(total for total, _ in self.written.values())
        shares = {
            "rollout/completion_length": (tokens, self.rollouts),
            "rollout/completion_length_treated": tuple(self.written["treated"]),
            "rollout/completion_length_control": tuple(self.written["control"]),
            "rollout/kept_ratio": (self.kept, tokens),
            "rollout/accuracy": (self.correct, self.judged),
            "kat/cut_rate": (self.fired, self.cuttable),
        }
        found = {name: above / below for name, (above, below) in shares.items() if below}
        if self.threshold is not None:
            found["kat/threshold"] = self.threshold
        return found


class _Rollouts:
    """Booked rollouts as points: one for each step at which a rollout's last policy version was published.

    Versions rise in the order of booking, except for a few stragglers, which count in the open point. A line waits
    until the step that published its version is known. So the points depend on the contents of the files, not on when
    they were read.
    """

    def __init__(self) -> None:
        self._published: deque[tuple[int, int]] = deque()  # (policy version, step), those after the open point
        self._newest = -1
        self._waiting: deque[BookLine] = deque()
        self._window, self._step = _Window(), 0
        self._compared = {"treated": [0, 0], "control": [0, 0]}  # tokens, rollouts: the whole run so far

    def trained(self, policy_version: int, step: int) -> None:
        if policy_version > self._newest:  # else a step between two publications
            self._published.append((policy_version, step))
            self._newest = policy_version

    def booked(self, line: BookLine) -> None:
        self._waiting.append(line)

    def points(self, over: bool) -> Iterator[TrackedPoint]:
        """The complete points; if the run is over, also the open one."""
        while self._waiting and (over or self._waiting[0].policy_version_last <= self._newest):
            line = self._waiting.popleft()
            step = self._step
            while self._published and self._published[0][0] <= line.policy_version_last:
                step = self._published.popleft()[1]
            if step != self._step:
                yield from self._close()
                self._step = step
            self._add(line)
        if over:
            yield from self._close()

    def _add(self, line: BookLine) -> None:
        if line.ending == "dead" or line.ended_by_run:
            return
        self._window.add(line)
        if line.compared:
            sums = self._compared[line.arm]
            sums[0] += line.tokens_generated
            sums[1] += 1

    def _close(self) -> Iterator[TrackedPoint]:
        window, self._window = self._window, _Window()
        if not window.rollouts:
            return
        values = window.values()
        (treated, n_treated), (control, n_control) = self._compared["treated"], self._compared["control"]
        if n_treated and n_control:  # as in summary.json
            values["rollout/length_saving"] = 1 - (treated / n_treated) / (control / n_control)
        yield TrackedPoint("rollout", self._step, values, window.unix_s)


def _train_point(step: Step) -> TrackedPoint:
    values = {
        f"{group}/{name}": float(value)
        for group, names in _STEP.items()
        for name in names
        if (value := getattr(step, name)) is not None  # lines of older versions lack some
    }
    if step.rewards is not None:
        found = {"mean": step.rewards.mean, "signal": step.rewards.signal}
        values |= {f"reward/{name}": value for name, value in found.items() if value is not None}
    if step.reuse is not None:
        updates = (
            ("iterations", float(step.reuse.iterations)),
            ("kl", step.reuse.kl),
            ("ratio_max", step.reuse.ratio_max),
        )
        values |= {f"train/reuse_{name}": value for name, value in updates if value is not None}
    return TrackedPoint("train", step.step, values, step.unix_s)


def _eval_point(evaluation: Evaluation) -> TrackedPoint:
    scores = evaluation.scores
    values = {
        f"eval/avg@{scores.k}": scores.avg_at_k,
        f"eval/pass@{scores.k}": scores.pass_at_k,
        "eval/completion_length": scores.mean_length,
        "eval/eos_rate": scores.eos_rate,
    }
    return TrackedPoint("eval", evaluation.step, values)


@dataclass(frozen=True, slots=True)
class News:
    """New points. `restarted`: all earlier points are void, and these start from the first."""

    points: list[TrackedPoint]
    restarted: bool
    more: bool  # whether there is more to read now


class Follower:
    """Reads a run's folder while it grows. Not thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = RunFolder(folder)
        self._begun = False
        self._begin()

    def look(self, *, over: bool = False) -> News:
        """The new points. `over`: the run is over, so the open point is included once all is read.

        A learner that resumes from a checkpoint replaces metrics.jsonl by a shorter one. Then everything is read again,
        because any earlier line may have changed.
        """
        lines = self._read()
        renewed = any(tail.renewed for tail in (self._steps, self._evaluations, self._booked))
        if renewed:
            self._begin()
            lines = self._read()
        restarted = renewed or not self._begun
        self._begun = True
        points = self._points(*lines)
        more = any(lines)
        points += self._rollouts.points(over and not more)
        return News(points, restarted, more)

    def _begin(self) -> None:
        self._steps, self._evaluations = self._folder.steps.tail(), self._folder.evaluations.tail()
        self._booked = self._folder.rollouts.tail()
        self._rollouts = _Rollouts()

    def _read(self) -> tuple[list[Step], list[Evaluation], list[BookLine]]:
        # Steps before rollouts: a step is written before the rollouts of its weights are booked.
        return self._steps.read(), self._evaluations.read(), self._booked.read()

    def _points(self, steps: list[Step], evaluations: list[Evaluation], rollouts: list[BookLine]) -> list[TrackedPoint]:
        for step in steps:
            self._rollouts.trained(step.policy_version, step.step)
        for line in rollouts:
            self._rollouts.booked(line)
        return [_train_point(step) for step in steps] + [_eval_point(evaluation) for evaluation in evaluations]


# --- the trackers ------------------------------------------------------------------------------------------------


class Tracker(Protocol):
    """Shows the figures. Every method may raise one of `errors`."""

    errors: tuple[type[Exception], ...]

    def begin(self) -> None:
        """Start. If points were shown before, all of them come again from the first, and some may differ."""

    def show(self, point: TrackedPoint) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


# A full disk, a folder without write permission, a malformed line.
_ERRORS: tuple[type[Exception], ...] = (OSError, ValueError, TypeError, LookupError, RuntimeError, ImportError)


class TensorBoard:
    """Event files in `tensorboard/` of the run's folder, for `tensorboard --logdir runs`.

    To restart, it writes a session start, at which a reader discards all earlier events, and then all points again.
    A later process does this in a new file and keeps the previous one: a running TensorBoard is still reading it, and
    would not continue with the next file if it were gone.
    """

    errors = _ERRORS

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._events: Any = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self._summaries: Any = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        self._records: Any = importlib.import_module("tensorboard.summary.writer.record_writer")
        self._writer: Any = None

    def begin(self) -> None:
        if self._writer is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            for former in sorted(self._folder.glob("events.out.tfevents.*.katana"))[:-1]:
                former.unlink()
            # Readers sort files by name. Nanoseconds keep files of the same second in order.
            seconds, rest = divmod(time.time_ns(), 10**9)
            name = f"events.out.tfevents.{seconds}.{rest:09}.{socket.gethostname()}.{os.getpid()}.katana"
            self._writer = self._records.RecordWriter((self._folder / name).open("xb"))
            self._write(file_version="brain.Event:2")
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._write(session_log=start, step=0)

    def show(self, point: TrackedPoint) -> None:
        values = [self._summaries.Summary.Value(tag=tag, simple_value=value) for tag, value in point.values.items()]
        self._write(wall_time=point.unix_s, step=point.step, summary=self._summaries.Summary(value=values))

    def _write(self, wall_time: float | None = None, **fields: Any) -> None:
        event = self._events.Event(wall_time=time.time() if wall_time is None else wall_time, **fields)
        self._writer.write(event.SerializeToString())

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


class WeightsAndBiases:
    """A W&B run whose id is the run's key, so that a resumed run continues in it; files in `wandb/`.

    Sent figures cannot be changed, so every step is sent once. If a learner repeats steps after a crash, W&B shows the
    first attempt, metrics.jsonl and TensorBoard the last.
    """

    def __init__(self, config: Config, run_key: str) -> None:
        self._wandb: Any = importlib.import_module("wandb")
        logging.getLogger("wandb").propagate = False  # it has its own files; the feeder's log is for the run
        self.errors = (*_ERRORS, self._wandb.Error)
        self._config, self._run_key = config, run_key
        self._sent_file = config.run_dir / WANDB / "told.json"
        self._sent: dict[str, int] = {}
        self._run: Any = None

    def begin(self) -> None:
        if self._run is not None:
            return
        self._sent_file.parent.mkdir(parents=True, exist_ok=True)
        if self._sent_file.exists():
            self._sent = {kind: int(step) for kind, step in json.loads(self._sent_file.read_text()).items()}
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "katana"),
            id=self._run_key,
            name=self._config.name,
            resume="allow",
            dir=self._config.run_dir,
            config=self._config.model_dump(),
            settings=self._wandb.Settings(
                silent=True,  # asks nothing on a terminal
                console="off",  # the feeder's log is not output of the experiment
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                x_disable_stats=True,  # they would be of the feeder's host, which does not train
                finish_timeout=_FINISH_S,
            ),
        )
        # Evaluations come late. W&B's own step may only rise, so it would refuse them.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        log.info("wandb: %s", self._run.url or f"offline; upload it with: wandb sync {self._run.settings.sync_dir}")

    def show(self, point: TrackedPoint) -> None:
        if point.step > self._sent.get(point.kind, -1):
            self._run.log({"step": point.step, **point.values})
            self._sent[point.kind] = point.step

    def flush(self) -> None:
        write_json(self._sent_file, self._sent)

    def close(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.finish()


def make_tracker(name: str, config: Config, run_key: str) -> Tracker:
    """Raises ConfigError for an unknown name."""
    if name == "tensorboard":
        return TensorBoard(config.run_dir / TENSORBOARD)
    if name == "wandb":
        return WeightsAndBiases(config, run_key)
    raise ConfigError(f"tracking: {name!r} is not known; allowed: tensorboard, wandb")


# --- beside the run ----------------------------------------------------------------------------------------------


def show_new(tracker: Tracker, follower: Follower, *, over: bool = False) -> bool:
    """Show new points; returns whether there are more to read now."""
    news = follower.look(over=over)
    if news.restarted:
        tracker.begin()
    for point in news.points:
        tracker.show(point)
    if news.restarted or news.points:
        tracker.flush()
    return news.more


def track(tracker: Tracker, folder: Path, stop: threading.Event) -> None:
    """Follow a run's folder until stopped; show everything written before that. Raises one of `tracker.errors`."""
    follower = Follower(folder)
    try:
        while True:
            over = stop.is_set()  # checked before reading, so that nothing written before the end is missed
            more = show_new(tracker, follower, over=over)
            if over and not more:
                return
            if not more:
                stop.wait(_POLL_S)
    finally:
        tracker.close()


class Tracking:
    """The trackers of a run, each in its own thread. A context manager around the feeder's work.

    They run in the feeder's process, because a run has one feeder, which ends last. The threads are daemons: a tracker
    that hangs, for example on the network, must not keep the process alive.
    """

    def __init__(self, config: Config, run_key: str, names: Sequence[str]) -> None:
        """Raises ConfigError if a package is missing or a name is unknown."""
        for problem in missing(names):
            raise ConfigError(problem)
        self._folder = config.run_dir
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._keep_on, args=(name, config, run_key), name=f"track-{name}", daemon=True)
            for name in names
        ]

    def __enter__(self) -> Tracking:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Show the rest; waits at most 8 s for it."""
        self._stop.set()
        deadline = time.monotonic() + _FINISH_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                log.warning("%s: not done after %.0f s, abandoned", thread.name, _FINISH_S)

    def wait_for_evaluations(self, stop: threading.Event, within_s: float = _LAST_EVALUATION_S) -> None:
        """Wait until all pending weights are evaluated, so that trackers show the results. Without trackers, return."""
        deadline = time.monotonic() + within_s
        logged = False
        while self._threads and RunFolder(self._folder).to_evaluate and not stop.is_set():
            if time.monotonic() > deadline:
                log.warning("the last evaluation is not done after %.0f s; trackers end without it", within_s)
                return
            if not logged:
                log.info("trackers wait for the last evaluation, at most %.0f s", within_s)
                logged = True
            metrics.turned("feeder")
            stop.wait(0.3)

    def _keep_on(self, name: str, config: Config, run_key: str) -> None:
        """Track; after a failure, log it and restart later."""
        wait_s = _RETRY_S
        folder = config.run_dir / name
        held: IO[str] | None = None
        with contextlib.ExitStack() as stack:
            while not self._stop.is_set():
                errors = _ERRORS
                try:
                    if held is None:
                        held = self._take(folder)
                        if held is None:
                            return
                        stack.enter_context(held)
                    tracker = make_tracker(name, config, run_key)
                    errors = tracker.errors
                    track(tracker, self._folder, self._stop)
                    return
                except errors as error:
                    log.warning(
                        "tracking by %s failed (%s); the run continues, next attempt in %.0f s", name, error, wait_s
                    )
                self._stop.wait(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_RETRY_S)

    def _take(self, folder: Path) -> IO[str] | None:
        """The folder's lock: if two feeders run, one of which has lost its lease, only one tracks. None if stopped."""
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            with contextlib.suppress(ConfigError):
                return lock(folder)
            if self._stop.wait(_POLL_S):
                return None
