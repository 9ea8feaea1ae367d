"""Experiment trackers: a run's figures in TensorBoard and in Weights & Biases, read from its folder while it grows.

A tracker looks on. What it shows is a function of metrics.jsonl, rollouts.jsonl and eval.jsonl, so nothing is lost
when it starts late; one that fails is said in the log and begun again later, and the run goes on meanwhile. The x axis
is the learner's step; a rollout stands at the step whose weights wrote its end.
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
from common.runfiles.lines import Object, Tail, an_object
from common.runfiles.records import EVALUATIONS, METRICS, ROLLOUTS, BookLine
from common.runfiles.run import lock

log = logging.getLogger("katana.tracking")
_POLL_S = 1.0
_RETRY_S = 30.0  # doubled with each failure
_LONGEST_RETRY_S = 600.0
_FINISH_S = 8.0  # `katana run` gives its processes 15 s to stop
_LAST_EVALUATION_S = 1800.0

# Name in a tracker → name in a line of metrics.jsonl.
_TRAIN = {
    "train/loss": "loss",
    "train/kl": "kl",
    "train/entropy": "entropy",
    "train/grad_norm": "grad_norm",
    "train/learning_rate": "learning_rate",
    "train/staleness_mean": "staleness_mean",
    "train/staleness_max": "staleness_max",
    "train/support_mass": "support_mass",
    "train/ratio_mean": "ratio_mean",
    "train/ratio_max": "ratio_max",
    "train/policy_version": "policy_version",
    "perf/step_s": "step_s",
    "perf/idle_ratio": "idle_ratio",
    "perf/tokens_trained": "tokens_trained",
    "perf/tokens_trained_total": "tokens_trained_total",
}


def missing(names: Sequence[str]) -> list[str]:
    """What is wrong with the wish for these trackers: a line for each whose package is not installed."""
    problems = []
    for name in names:
        try:
            version(name)
        except PackageNotFoundError:
            problems.append(
                f"tracking: {name} is not installed: pip install 'katana-distill[{name}]', or leave it out of the list"
            )
    return problems


@dataclass(frozen=True, slots=True)
class TrackedPoint:
    """Figures at one learner step. `kind`: train | rollout | eval; within a kind the steps of a lineage rise."""

    kind: str
    step: int
    values: dict[str, float]
    unix_s: float | None = None


# --- from files to points ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Window:
    """Sums over the rollouts of one point."""

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

    Versions rise with the order of booking but for a few stragglers, which count in the point that is open. A line
    whose version no step is known to have published yet waits. So the points depend on what is in the files, never on
    when it was read.
    """

    def __init__(self) -> None:
        self._published: deque[tuple[int, int]] = deque()  # (policy version, step), those ahead of the open point
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
        """The points that are complete; when it is over, also the one that is open."""
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


def _train_point(line: dict[str, Any]) -> TrackedPoint:
    values = {name: float(line[key]) for name, key in _TRAIN.items() if line.get(key) is not None}
    return TrackedPoint("train", line["step"], values, line.get("unix_s"))


def _eval_point(line: dict[str, Any]) -> TrackedPoint:
    k = line["k"]
    values = {
        f"eval/avg@{k}": line["avg@k"],
        f"eval/pass@{k}": line["pass@k"],
        "eval/completion_length": line["mean_length"],
        "eval/eos_rate": line["eos_rate"],
    }
    return TrackedPoint("eval", line["step"], values)


@dataclass(frozen=True, slots=True)
class News:
    """Points since the last look. `anew`: all that was told before is void, the points begin from the beginning."""

    points: list[TrackedPoint]
    anew: bool
    more: bool  # whether there is more to read at once


class Follower:
    """Reads a run's folder while it grows. Not for two threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._begun = False
        self._begin()

    def look(self, *, over: bool = False) -> News:
        """What is new; `over`: when nothing more is there, what is held back is told as well.

        A learner that goes on from a checkpoint puts a shorter metrics.jsonl into the place of the old one. Then all is
        read anew, because no line that was told needs to stand any more.
        """
        lines = self._read()
        renewed = any(tail.renewed for tail in (self._steps, self._evaluations, self._booked))
        if renewed:
            self._begin()
            lines = self._read()
        anew = renewed or not self._begun
        self._begun = True
        points = self._points(*lines)
        more = any(lines)
        points += self._rollouts.points(over and not more)
        return News(points, anew, more)

    def _begin(self) -> None:
        self._steps = Tail(self._folder / METRICS, an_object)
        self._evaluations = Tail(self._folder / EVALUATIONS, an_object)
        self._booked = Tail(self._folder / ROLLOUTS, BookLine.from_json)
        self._rollouts = _Rollouts()

    def _read(self) -> tuple[list[Object], list[Object], list[BookLine]]:
        # Steps before rollouts: a step is written before anything that its weights wrote is booked.
        return self._steps.read(), self._evaluations.read(), self._booked.read()

    def _points(self, steps: list[Object], evaluations: list[Object], rollouts: list[BookLine]) -> list[TrackedPoint]:
        for step in steps:
            self._rollouts.trained(step["policy_version"], step["step"])
        for line in rollouts:
            self._rollouts.booked(line)
        return [_train_point(step) for step in steps] + [_eval_point(evaluation) for evaluation in evaluations]


# --- the trackers ------------------------------------------------------------------------------------------------


class Tracker(Protocol):
    """What the figures are shown in. Every method may raise one of `errors`."""

    errors: tuple[type[Exception], ...]

    def begin(self) -> None:
        """Make ready. If something was shown already, all points come again, from the first; some may differ."""

    def show(self, point: TrackedPoint) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


# A full disk, a folder that cannot be written to, a line of a file that does not hold what it should.
_ERRORS: tuple[type[Exception], ...] = (OSError, ValueError, TypeError, LookupError, RuntimeError, ImportError)


class TensorBoard:
    """Event files in `tensorboard/` of the run's folder, for `tensorboard --logdir runs`.

    To begin again is to write a session start, at which a reader forgets all that came before, and then everything.
    A later process does so in a file of its own, and leaves the last one before it: a TensorBoard that is looking on
    reads that file, and would never get past its end if it were gone.
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
            # Readers take files by name. Nanoseconds keep those of one second in order.
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
    """A run of Weights & Biases whose id is the run's key, so that a resumed run goes on in it; files in `wandb/`.

    What was sent cannot be taken back. So every step is told once, the first time: of steps that a learner did again
    after a crash, W&B shows the first try, while metrics.jsonl and TensorBoard show what stands.
    """

    def __init__(self, config: Config, run_key: str) -> None:
        self._wandb: Any = importlib.import_module("wandb")
        logging.getLogger("wandb").propagate = False  # it has files of its own; the feeder's log is for the run
        self.errors = (*_ERRORS, self._wandb.Error)
        self._config, self._run_key = config, run_key
        self._told_file = config.run_dir / "wandb" / "told.json"
        self._told: dict[str, int] = {}
        self._run: Any = None

    def begin(self) -> None:
        if self._run is not None:
            return
        self._told_file.parent.mkdir(parents=True, exist_ok=True)
        if self._told_file.exists():
            self._told = {kind: int(step) for kind, step in json.loads(self._told_file.read_text()).items()}
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "katana"),
            id=self._run_key,
            name=self._config.name,
            resume="allow",
            dir=self._config.run_dir,
            config=self._config.model_dump(),
            settings=self._wandb.Settings(
                silent=True,  # asks nothing on a terminal
                console="off",  # the feeder's log is no experiment's output
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                x_disable_stats=True,  # of the feeder's host, which trains nothing
                finish_timeout=_FINISH_S,
            ),
        )
        # Evaluations come late: by W&B's own step, which may only rise, they would be refused.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        log.info("wandb: %s", self._run.url or f"offline; send it by: wandb sync {self._run.settings.sync_dir}")

    def show(self, point: TrackedPoint) -> None:
        if point.step > self._told.get(point.kind, -1):
            self._run.log({"step": point.step, **point.values})
            self._told[point.kind] = point.step

    def flush(self) -> None:
        write_json(self._told_file, self._told)

    def close(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.finish()


def make_tracker(name: str, config: Config, run_key: str) -> Tracker:
    """Raises ConfigError for a name that is none."""
    if name == "tensorboard":
        return TensorBoard(config.run_dir / "tensorboard")
    if name == "wandb":
        return WeightsAndBiases(config, run_key)
    raise ConfigError(f"tracking: {name!r} is not known; allowed: tensorboard, wandb")


# --- beside the run ----------------------------------------------------------------------------------------------


def turn(tracker: Tracker, follower: Follower, *, over: bool = False) -> bool:
    """Show what is new; returns whether there is more at once."""
    news = follower.look(over=over)
    if news.anew:
        tracker.begin()
    for point in news.points:
        tracker.show(point)
    if news.anew or news.points:
        tracker.flush()
    return news.more


def track(tracker: Tracker, folder: Path, stop: threading.Event) -> None:
    """Follow a run's folder until told to stop; show all that was written before. Raises one of `tracker.errors`."""
    follower = Follower(folder)
    try:
        while True:
            over = stop.is_set()  # asked before looking: what was written before the end is seen
            more = turn(tracker, follower, over=over)
            if over and not more:
                return
            if not more:
                stop.wait(_POLL_S)
    finally:
        tracker.close()


class Tracking:
    """The trackers of a run, each in a thread of its own beside the run. A context manager around the feeder's work.

    In the feeder's process, because there is one feeder a run and it ends last. The threads are daemons: a tracker that
    hangs, say on a network, must not keep the process.
    """

    def __init__(self, config: Config, run_key: str, names: Sequence[str]) -> None:
        """Raises ConfigError when a package is missing or a name is none."""
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
        """Show what is left; waits for it 8 s at most."""
        self._stop.set()
        deadline = time.monotonic() + _FINISH_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                log.warning("%s: not done after %.0f s, left behind", thread.name, _FINISH_S)

    def wait_for_evaluations(self, stop: threading.Event, within_s: float = _LAST_EVALUATION_S) -> None:
        """Wait until the weights that wait to be evaluated are, so that trackers show it; not where nothing tracks."""
        deadline = time.monotonic() + within_s
        said = False
        while self._threads and any((self._folder / "eval").glob("v*.json")) and not stop.is_set():
            if time.monotonic() > deadline:
                log.warning("the last evaluation is not done after %.0f s; trackers end without it", within_s)
                return
            if not said:
                log.info("trackers wait for the last evaluation, %.0f s at most", within_s)
                said = True
            metrics.turned("feeder")
            stop.wait(0.3)

    def _keep_on(self, name: str, config: Config, run_key: str) -> None:
        """Track; after a failure say so and begin again later."""
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
                    log.warning("tracking by %s failed (%s); the run goes on, next try in %.0f s", name, error, wait_s)
                self._stop.wait(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_RETRY_S)

    def _take(self, folder: Path) -> IO[str] | None:
        """The folder's lock: of two feeders, one of which has lost its lease, one tracks. None when told to stop."""
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            with contextlib.suppress(ConfigError):
                return lock(folder)
            if self._stop.wait(_POLL_S):
                return None
