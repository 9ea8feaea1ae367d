"""The learner: trains on trimmed trajectories, writes checkpoints, publishes weights. Not a Celery worker.

Invariant: a trajectory is acknowledged after the fsync of the checkpoint that covers it, and a checkpoint lists its
rollouts; so no trajectory is skipped or trained twice, wherever the learner is killed.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path

import torch
from safetensors.torch import save_file

from common import metrics, tracing
from common.config import Config
from common.failing import brief, out_of_memory
from common.footprint import free_bytes, rollout_bytes
from common.pretrained import Pair
from common.pulse import Pulse
from common.runfiles.names import CHECKPOINTS, COUNTED, LEARNER_LOCK, MODEL, TO_EVALUATE, WEIGHTS
from common.runfiles.records import StepReuse, ToEvaluate
from common.wire import scripts
from common.wire.lease import Lease
from common.wire.plane import Plane
from common.wire.scripts import Ending, Published
from common.wire.weights import BadWeights, WeightsRef, newest_version, publish, read_pointer, retain
from learner.batch import Trajectory
from learner.budget import GeneratedTokens
from learner.checkpoint import load_newest, save
from learner.culprits import StepImpossible, culprits, witness
from learner.groups import Groups
from learner.intake import Intake, Received
from learner.journal import Journal
from learner.lora import make_student
from learner.loss import Diagnostics
from learner.ranks import NOT_THE_STEP, RankFailed
from learner.schedule import learning_rate, learning_rate_by_tokens
from learner.student import TrainableStudent

log = logging.getLogger("katana.learner")
STARVED_S = 2.0  # without a batch, before the learner checks whether Redis has room for one
_FEWEST_ASIDE = 8  # if so many, and at least two batches, are set aside in a row, the trajectories are not at fault


class Learner:
    """One at a time acts on a run: it holds the lease `learner`."""

    def __init__(
        self,
        config: Config,
        plane: Plane,
        pair: Pair,
        stop: threading.Event,
        student: Callable[[Path, Config], TrainableStudent] = make_student,
    ) -> None:
        """`student` makes it, of the folder of its model."""
        self._config, self._plane, self._pair, self._stop = config, plane, pair, stop
        torch.set_num_threads(config.learner.threads)
        torch.manual_seed(config.seed)
        self.student = student(pair.student.folder, config)
        self._lease = Lease(plane, "learner", config.liveness.learner_lease_s)
        live = config.liveness
        self._pulse = Pulse(
            self._lease.beat, every_s=live.learner_lease_s / 3, turn_s=live.learner_lease_s, busy_s=live.busy_s
        )
        self._intake = Intake(
            plane,
            self._lease,
            # Each resume announces the same weights as a new version, which does not make their rollouts older.
            max_staleness=sys.maxsize if config.deterministic else config.learner.max_staleness,
            vocab_size=pair.vocab_size,
            entropies=config.loss.weighting == "entropy",
            groups=Groups.of(config, plane, self._lease),
        )
        self.step_count = 0
        self.version = -1
        limited = config.learner.max_generated_tokens is not None
        self._generated = GeneratedTokens(plane, config.run_dir / COUNTED if limited else None)
        self._micro_batch_tokens = config.learner.micro_batch_tokens
        self._careful = False  # the last learner crashed, and its trajectories may be the cause
        self._aside = 0  # trajectories set aside since the last step
        self._since_checkpoint: list[tuple[Received, int]] = []  # with the staleness in training
        self._tokens_trained = 0
        self._idle_s = 0.0
        self._working_since = self._checkpointed_at = time.monotonic()
        self._starved_at = time.monotonic() + STARVED_S  # when the wait for a batch becomes too long
        self._lock = config.run_dir / LEARNER_LOCK
        self._journal = Journal(config)

    def run(self, *, until_idle: bool = False) -> None:
        """Train to the end (see `done`), or until stopped; a checkpoint is written either way.

        Raises LeaseLost, RunGone, RedisUnavailable, Stopping, TornCheckpointError, StepImpossible, RankFailed.
        """
        self.open()
        try:
            with self._pulse:
                self._train(until_idle)
            self._lease.advance("learning", 0)
        finally:
            self.close()

    def _train(self, until_idle: bool) -> None:
        self.start()
        while not self._stop.is_set() and not self.done:
            batch = self.next_batch(block_s=0.01 if until_idle else 0.1)
            if batch is not None:
                self.step(batch)
            elif until_idle:
                break
        if self._since_checkpoint:
            self.checkpoint()
        if self.done:
            self._finish()

    @property
    def done(self) -> bool:
        """Whether the last step was the last of the run: it reached `max_steps`, or the generated tokens reached
        `max_generated_tokens`. The answer for a step is always the same, even after a restart."""
        settings = self._config.learner
        spent = settings.max_generated_tokens is not None and self.tokens_generated >= settings.max_generated_tokens
        return spent or self.step_count >= settings.max_steps

    @property
    def tokens_generated(self) -> int:
        """Tokens generated in the whole run, as counted at the last step."""
        return self._generated.total

    def open(self) -> None:
        """Take the lease."""
        self._lease.acquire(self._stop, wait_s=60.0)

    def close(self) -> None:
        """Release the lease and close the files."""
        self._lease.drop()
        self._journal.close()

    # --- start and end -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Continue from the newest good checkpoint, or start at step 0; then announce the weights."""
        folder = self._config.run_dir
        consumed: tuple[str, ...] = ()
        generated = 0
        with self._pulse.busy("the start"), self._lease.exclusively(self._lock):  # a former learner has stopped writing
            state = load_newest(folder / CHECKPOINTS)
            if state is not None:
                self.student.restore(state)
                self.step_count, consumed = state.step, state.consumed
                self.version = state.policy_version
                self._tokens_trained = state.counters.get("tokens_trained", 0)
                generated = state.counters.get("tokens_generated", 0)
                log.info("continuing from step %d", self.step_count)
            self._generated.go_on(self.step_count, generated)
            self._journal.open(self.step_count)
            # If Redis lost the run, the pointer is gone, but the file names have the version.
            self.version = max(self.version, newest_version(folder / WEIGHTS))
        self.version = max(self.version, self.announced())
        self._careful = self._plane.policy().get("learning", "0") != "0"
        self._lease.advance("learning", 1)
        self._intake.recover(consumed)
        self._lease.advance("covered", self.step_count)
        self.publish()

    def announced(self) -> int:
        """The version that Redis holds; -1 if there is none or it cannot be read."""
        try:
            found = read_pointer(self._plane.policy())
        except BadWeights as error:
            metrics.dead_letters.labels("weights").inc()
            log.warning("ignored, continuing from version %d: %s", self.version, error)
            return -1
        return found[0].version if found else -1

    def _finish(self) -> None:
        """Write `model/`, and signal the feeder that training is over."""
        with self._pulse.busy("the model"), self._lease.exclusively(self._lock):
            self.student.write(self._config.run_dir / MODEL)
        self._lease.advance("state", "trained")
        log.info("trained %d steps, %d tokens", self.step_count, self._tokens_trained)

    # --- a step ------------------------------------------------------------------------------------------------

    def next_batch(self, block_s: float) -> list[Received] | None:
        self._lease.keep()
        self._pulse.turn()
        waited = time.monotonic()
        with tracing.span("waiting for a batch", "wait"):
            batch = self._intake.batch(self._config.learner.batch_size, self.version, block_s)
        self._idle_s += time.monotonic() - waited
        if batch is None and time.monotonic() >= self._starved_at:
            self._make_room()
        return batch

    def _make_room(self) -> None:
        """Without a batch: publish the weights again if a worker refused them; write a checkpoint if Redis has no room
        for another batch, so that the trained rollouts can be removed.

        Otherwise there is a deadlock: the checkpoint waits for more steps, these for rollouts, and these for the memory
        of trained rollouts, which is only free after the checkpoint.
        """
        self._starved_at = time.monotonic() + STARVED_S
        if self._plane.policy().get("refused") == str(self.version):
            log.warning("no batch comes and a worker refused version %d: published again", self.version)
            self.publish()
        if not self._since_checkpoint:
            return
        memory = self._plane.memory()
        if free_bytes(memory) < self._config.learner.batch_size * rollout_bytes(self._config):
            log.info("no batch comes and Redis is short of memory: checkpoint at step %d", self.step_count)
            self.checkpoint()

    def step(self, batch: list[Received]) -> None:
        """The updates on a batch; its line in metrics.jsonl; weights and checkpoint if they are due.

        If a trajectory is at fault there is no step: it is set aside, and the others go into the next batch. Raises
        StepImpossible if the step fails and no trajectory is at fault.
        """
        began = time.monotonic()
        if self._careful and not self._came_through(batch):
            return
        with tracing.span("step", step=self.step_count + 1, trajectories=len(batch)):
            self._step(batch, began)

    def _step(self, batch: list[Received], began: float) -> None:
        settings = self._config.learner
        staleness = [self.version - one.trajectory.oldest_version for one in batch]
        rate = self._learning_rate(batch)
        try:
            loss, norm, seen = self._gradients([one.trajectory for one in batch])
        except FloatingPointError as error:
            self._find_fault(batch, str(error))
            return
        self._aside = 0
        for one in batch:
            tracing.stage(one.trajectory.rid, "trained")
        self._update(rate)
        reused = self._reuse([one.trajectory for one in batch], rate)
        self.step_count += 1
        self._tokens_trained += seen.tokens
        self._generated.count(self.step_count)
        self._since_checkpoint += list(zip(batch, staleness, strict=True))
        for lag in staleness:
            metrics.policy_lag.labels("learner").observe(lag)
        if self.step_count % settings.weight_sync_steps == 0 or self.done:
            self.publish()
        else:
            self._lease.advance("step", self.step_count)
        self._journal.write(
            [one.trajectory for one in batch],
            seen,
            reused,
            step=self.step_count,
            policy_version=self.version,
            loss=loss,
            grad_norm=norm,
            learning_rate=rate,
            tokens_trained_total=self._tokens_trained,
            tokens_generated=self.tokens_generated,
            staleness=staleness,
            stale_dropped=self._intake.dropped,
            step_s=time.monotonic() - began,
            idle_ratio=self._idle_ratio(),
        )
        if self._checkpoint_is_due():
            self.checkpoint()
        self._starved_at = time.monotonic() + STARVED_S

    def _update(self, rate: float) -> None:
        with self._pulse.busy("the optimizer's step"):
            self.student.step(rate)

    def _reuse(self, batch: list[Trajectory], rate: float) -> StepReuse | None:
        """The other updates on a batch; None if `learner.num_iterations` is 1.

        They are of the same step: one checkpoint covers them all. A failure ends them. No trajectory is at fault then,
        since the first update worked, and none is put back, since the batch has been trained on.
        """
        most = self._config.learner.num_iterations
        reuse = StepReuse(1, None, None, None, None) if most > 1 else None
        for made in range(1, most):
            self._lease.keep()
            try:
                loss, _, seen = self._gradients(batch)
            except FloatingPointError as error:
                log.warning("step %d: %d of %d updates on its batch: %s", self.step_count + 1, made, most, error)
                break
            self._update(rate)
            reuse = StepReuse(made + 1, loss, seen.kl_nats, seen.ratio_mean, seen.ratio_max)
        return reuse

    def _checkpoint_is_due(self) -> bool:
        settings = self._config.checkpoints
        late = settings.every_s is not None and time.monotonic() >= self._checkpointed_at + settings.every_s
        return self.step_count % settings.every_steps == 0 or late or self.done

    def _idle_ratio(self) -> float:
        """Share of the time since the last call that the learner waited for a batch."""
        now = time.monotonic()
        idle, self._idle_s = self._idle_s, 0.0
        whole, self._working_since = now - self._working_since, now
        return idle / max(whole, 1e-9)

    def _gradients(self, batch: list[Trajectory]) -> tuple[float, float, Diagnostics]:
        """As `_backward`. Raises FloatingPointError, with the reason, if loss or gradient are not finite or the model
        raised an error: then no gradients are left, and nothing has changed."""
        while True:
            try:
                return self._backward(batch)
            except (*NOT_THE_STEP, RankFailed):
                raise
            except Exception as error:
                failed = error.with_traceback(None)  # its frames keep tensors in memory
            self.student.forget_gradients()
            if not self._economize(batch, failed):
                raise FloatingPointError(brief(failed))

    def _economize(self, batch: list[Trajectory], error: Exception) -> bool:
        """After an out-of-memory error, halve the tokens in a micro-batch from now on. False if that cannot help, for
        any other error, and in a deterministic run, which must not change how gradients are summed."""
        longest = max(one.length for one in batch)
        if (
            not out_of_memory(error)
            or self._config.deterministic
            or len(batch) == 1
            or self._micro_batch_tokens < longest
        ):
            return False
        self._micro_batch_tokens //= 2
        log.warning("at most %d tokens in a micro-batch from now on: %s", self._micro_batch_tokens, brief(error))
        return True

    def _why_not(self, part: Sequence[Received]) -> str:
        """Why these have no gradients; '' if they have. The gradients are discarded."""
        return self._reason([one.trajectory for one in part])

    def _reason(self, trajectories: list[Trajectory]) -> str:
        try:
            self._gradients(trajectories)
        except FloatingPointError as error:
            return str(error)
        self.student.forget_gradients()
        return ""

    def _find_fault(self, batch: list[Received], reason: str) -> None:
        """Set aside the trajectories at fault and put back the others. Raises StepImpossible if none is at fault."""
        step = self.step_count + 1
        if wrong := self._reason([witness(batch[0].trajectory)]):
            raise StepImpossible(f"step {step}: {reason}; a trajectory that always works fails too: {wrong}")
        guilty = culprits(batch, self._why_not)
        if not guilty:
            raise StepImpossible(f"step {step}: {reason}; none of its {len(batch)} trajectories fails alone")
        self._aside += len(guilty)
        if self._aside >= max(_FEWEST_ASIDE, 2 * len(batch)):
            raise StepImpossible(
                f"step {step}: {self._aside} trajectories in a row cannot be trained on, the last: {reason}"
            )
        self._set_aside(batch, guilty)

    def _came_through(self, batch: list[Received]) -> bool:
        """Try each trajectory alone and count the attempt: one that ended `max_attempts` learners is set aside."""
        most = self._config.liveness.max_attempts
        guilty = []
        for one in batch:
            rid = one.trajectory.rid
            begun = self._plane.attempt(rid, "learner")
            if begun > most:
                guilty.append((one, f"{begun - 1} learners ended while trying only this trajectory"))
                continue
            self._why_not([one])  # a failure that does not end the process is handled in the step
            self._plane.attempt_over(rid, "learner")
        self._set_aside(batch, guilty)
        return not guilty

    def _set_aside(self, batch: list[Received], guilty: list[tuple[Received, str]]) -> None:
        if not guilty:
            return
        for one, reason in guilty:
            self._intake.set_aside(one, reason)
        gone = {one.entry for one, _ in guilty}
        self._intake.put_back([one for one in batch if one.entry not in gone])

    def _backward(self, batch: list[Trajectory]) -> tuple[float, float, Diagnostics]:
        """Gradients of the batch's mean loss, clipped: (loss in nats, gradient norm before clipping, diagnostics)."""
        loss, seen = self.student.add_gradients(
            batch,
            self._pair,
            max_tokens=self._micro_batch_tokens,
            busy=lambda: self._pulse.busy("a micro-batch"),
            between=self._lease.keep,
        )
        norm = self.student.clip()
        if not all(map(math.isfinite, (loss, norm, *astuple(seen)))):
            raise FloatingPointError(f"the loss is {loss:g}, the gradient norm {norm:g}, the KL {seen.kl_nats:g}")
        return loss, norm, seen

    def _learning_rate(self, batch: list[Received]) -> float:
        settings = self._config.learner
        if settings.max_generated_tokens is not None:
            return learning_rate_by_tokens(
                self.tokens_generated,
                own=sum(one.trajectory.generated or len(one.trajectory.tokens) for one in batch),
                base=settings.learning_rate,
                schedule=settings.schedule,
                warmup_ratio=settings.warmup_ratio,
                max_tokens=settings.max_generated_tokens,
            )
        return learning_rate(
            self.step_count,
            base=settings.learning_rate,
            schedule=settings.schedule,
            warmup_steps=round(settings.warmup_ratio * settings.max_steps),
            max_steps=settings.max_steps,
        )

    # --- weights and checkpoints -------------------------------------------------------------------------------

    def publish(self) -> None:
        """Write the weights as the next version and announce them; versions never decrease."""
        folder = self._config.run_dir / WEIGHTS
        self.version += 1
        dtype = getattr(torch, self._config.rollout.dtype)
        with self._pulse.busy("publishing weights"), self._lease.exclusively(self._lock):
            state = self.student.weights(dtype)
            ref = publish(folder, self.version, lambda path: save_file(state, path, self.student.header))
            if self._wants_eval(ref):
                _keep_for_eval(self._config.run_dir, ref, self.step_count, self._tokens_trained)
            retain(folder, self._config.learner.max_staleness + 2)
        answer = self._lease.call(scripts.publish(ref.version, self.step_count, ref.file, ref.sha256))
        if answer.word is Published.OLD:
            # Redis has a higher version, or this one (the script ran, its answer was lost): publish the next.
            self.version = answer.version
            self.publish()
            return
        metrics.policy_version.labels("learner").set(self.version)

    def _wants_eval(self, ref: WeightsRef) -> bool:
        every = self._config.eval.every_steps
        if every == 0:
            return False
        sync = self._config.learner.weight_sync_steps
        # The first publication at or after a multiple of every_steps; always version 0 and the last.
        return ref.version == 0 or self.done or self.step_count % every < min(sync, every)

    def checkpoint(self) -> None:
        """Write a checkpoint, and after that acknowledge the trajectories that it covers."""
        with self._pulse.busy("a checkpoint"):
            self._save()
        # Before the trajectories are settled: the feeder may briefly count too many in flight, never too few.
        self._lease.advance("covered", self.step_count)
        self._intake.settle(
            [Ending(one.entry, one.trajectory.rid, "trained", staleness=lag) for one, lag in self._since_checkpoint]
        )
        self._since_checkpoint = []
        self._checkpointed_at = time.monotonic()
        self._generated.covered(self.step_count)
        self._careful = False

    def _save(self) -> None:
        state = self.student.capture(
            step=self.step_count,
            policy_version=self.version,
            consumed=[one.trajectory.rid for one, _ in self._since_checkpoint],
            counters={"tokens_trained": self._tokens_trained, "tokens_generated": self.tokens_generated},
        )
        with self._lease.exclusively(self._lock):
            save(self._config.run_dir / CHECKPOINTS, state, keep=self._config.checkpoints.keep)
            self._journal.sync()


def _keep_for_eval(run_dir: Path, ref: WeightsRef, step: int, tokens_trained: int) -> None:
    """Link the weights into `eval/`, which retention does not touch; the evaluator removes them."""
    folder = run_dir / TO_EVALUATE
    folder.mkdir(exist_ok=True)
    target = folder / ref.file
    target.unlink(missing_ok=True)
    os.link(run_dir / WEIGHTS / ref.file, target)
    draft = target.with_suffix(".tmp")
    draft.write_text(json.dumps(ToEvaluate(ref.version, step, tokens_trained, ref.sha256).to_json()))
    os.replace(draft, target.with_suffix(".json"))
