"""The learner: consumes trimmed trajectories, steps, checkpoints, publishes weights. Off the queue.

Invariant: a trajectory is acknowledged after the fsync of the checkpoint that holds it, and a checkpoint names the
rollouts it holds; so nothing is skipped and nothing is trained twice, wherever the learner is killed.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from common import metrics
from common.config import Config
from common.failing import brief, out_of_memory
from common.footprint import free_bytes, rollout_bytes
from common.pretrained import ModelError, Pair, load_tokenizer
from common.pulse import Pulse
from common.wire import scripts
from common.wire.lease import Lease, LeaseLost
from common.wire.plane import Plane, RedisUnavailable, RunGone, Stopping
from common.wire.scripts import Ending, Published
from common.wire.weights import BadWeights, WeightsRef, newest_version, publish, read_pointer, retain
from learner.batch import Trajectory, micro_batches
from learner.budget import GeneratedTokens
from learner.checkpoint import capture, load_newest, restore, save, untied_tensors
from learner.culprits import StepImpossible, culprits, witness
from learner.intake import Intake, Received
from learner.journal import Journal
from learner.loss import Diagnostics, diagnostics, keep_head_in_float32, kept_logits, log_outcomes, merged, token_losses
from learner.schedule import learning_rate, learning_rate_by_tokens
from learner.weighting import shares_of

log = logging.getLogger("katana.learner")
STARVED_S = 2.0  # without a batch, before the learner asks whether Redis has room for one
_NOT_THE_STEP = (LeaseLost, RunGone, RedisUnavailable, Stopping)  # what ends a learner whatever it is at
_FEWEST_ASIDE = 8  # set aside without a step between them, and at least two batches: it is not the trajectories


class Learner:
    """One at a time acts on a run: it holds the lease `learner`."""

    def __init__(self, config: Config, plane: Plane, pair: Pair, stop: threading.Event) -> None:
        self._config, self._plane, self._pair, self._stop = config, plane, pair, stop
        torch.set_num_threads(config.learner.threads)
        torch.manual_seed(config.seed)
        self.model = _load(pair.student.folder, config)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learner.learning_rate,
            betas=(config.learner.beta1, config.learner.beta2),
            weight_decay=config.learner.weight_decay,
        )
        self._lease = Lease(plane, "learner", config.liveness.learner_lease_s)
        live = config.liveness
        self._pulse = Pulse(
            self._lease.beat, every_s=live.learner_lease_s / 3, turn_s=live.learner_lease_s, busy_s=live.busy_s
        )
        self._intake = Intake(
            plane,
            self._lease,
            # Each resume announces the same weights as a new version: what they wrote is not older for that.
            max_staleness=sys.maxsize if config.deterministic else config.learner.max_staleness,
            vocab_size=pair.vocab_size,
        )
        self.step_count = 0
        self.version = -1
        limited = config.learner.max_generated_tokens is not None
        self._generated = GeneratedTokens(plane, config.run_dir / "counted.json" if limited else None)
        self._micro_batch_tokens = config.learner.micro_batch_tokens
        self._careful = False  # the learner before ended without a word: what ended it may come again
        self._aside = 0  # trajectories set aside since the last step
        self._since_checkpoint: list[tuple[Received, int]] = []  # with the staleness it was trained at
        self._tokens_trained = 0
        self._idle_s = 0.0
        self._working_since = time.monotonic()
        self._starved_at = time.monotonic() + STARVED_S  # when the wait for a batch becomes too long
        self._lock = config.run_dir / ".learner.lock"
        self._journal = Journal(config)

    def run(self, *, until_idle: bool = False) -> None:
        """Train to the end (see `done`), or until told to stop; a checkpoint is written either way.

        Raises LeaseLost, RunGone, RedisUnavailable, Stopping, TornCheckpointError, StepImpossible.
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
        """Whether the step that was last done is the run's last: it reached `max_steps`, or what had been generated by
        then `max_generated_tokens`. Asked of one step it always answers the same, after a restart too."""
        settings = self._config.learner
        spent = settings.max_generated_tokens is not None and self.tokens_generated >= settings.max_generated_tokens
        return spent or self.step_count >= settings.max_steps

    @property
    def tokens_generated(self) -> int:
        """In the whole run, as counted at the last step."""
        return self._generated.total

    def open(self) -> None:
        """Take the lease."""
        self._lease.acquire(self._stop, wait_s=60.0)

    def close(self) -> None:
        """Let go of the lease and the files; nothing is written any more."""
        self._lease.drop()
        self._journal.close()

    # --- start and end -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Go on from the newest good checkpoint, or begin; then announce the weights."""
        folder = self._config.run_dir
        consumed: tuple[str, ...] = ()
        generated = 0
        with self._pulse.busy("the start"), self._lease.exclusively(self._lock):  # a former learner wrote its last
            state = load_newest(folder / "checkpoints")
            if state is not None:
                restore(self.model, self.optimizer, state)
                self.step_count, consumed = state.step, state.consumed
                self.version = state.policy_version
                self._tokens_trained = state.counters.get("tokens_trained", 0)
                generated = state.counters.get("tokens_generated", 0)
                log.info("going on from step %d", self.step_count)
            self._generated.go_on(self.step_count, generated)
            self._journal.open(self.step_count)
            # A Redis that lost the run forgot the pointer; the file names remember.
            self.version = max(self.version, newest_version(folder / "weights"))
        self.version = max(self.version, self.announced())
        self._careful = self._plane.policy().get("learning", "0") != "0"
        self._lease.advance("learning", 1)
        self._intake.recover(consumed)
        self._lease.advance("covered", self.step_count)
        self.publish()

    def announced(self) -> int:
        """The version that Redis holds; -1 where it holds none that can be read."""
        try:
            found = read_pointer(self._plane.policy())
        except BadWeights as error:
            metrics.dead_letters.labels("weights").inc()
            log.warning("ignored, going on from version %d: %s", self.version, error)
            return -1
        return found[0].version if found else -1

    def _finish(self) -> None:
        """Write `model/`, and tell the feeder that no more is wanted."""
        folder = self._config.run_dir / "model"
        source = self._pair.student.folder / "generation_config.json"
        with self._pulse.busy("the model"), self._lease.exclusively(self._lock):
            self.model.save_pretrained(folder)
            load_tokenizer(self._pair.student.folder).save_pretrained(folder)
            if source.is_file():
                (folder / source.name).write_bytes(source.read_bytes())
        self._lease.advance("state", "trained")
        log.info("trained %d steps, %d tokens", self.step_count, self._tokens_trained)

    # --- a step ------------------------------------------------------------------------------------------------

    def next_batch(self, block_s: float) -> list[Received] | None:
        self._lease.keep()
        self._pulse.turn()
        waited = time.monotonic()
        batch = self._intake.batch(self._config.learner.batch_size, self.version, block_s)
        self._idle_s += time.monotonic() - waited
        if batch is None and time.monotonic() >= self._starved_at:
            self._make_room()
        return batch

    def _make_room(self) -> None:
        """Where no batch comes because nobody has weights to write it with, publish them again; where Redis has no room
        for another batch, let go of what was trained: a checkpoint must cover it first.

        Else each would wait for the other: the checkpoint for the steps that are left until it is due, they for
        rollouts, and those for the memory that trained ones hold until the checkpoint.
        """
        self._starved_at = time.monotonic() + STARVED_S
        if self._plane.policy().get("refused") == str(self.version):
            log.warning("no batch comes and a worker could not take version %d: published again", self.version)
            self.publish()
        if not self._since_checkpoint:
            return
        memory = self._plane.memory()
        if free_bytes(memory) < self._config.learner.batch_size * rollout_bytes(self._config):
            log.info("no batch comes and Redis is short of memory: checkpoint at step %d", self.step_count)
            self.checkpoint()

    def step(self, batch: list[Received]) -> None:
        """One optimizer step on a batch, its line in metrics.jsonl, weights and checkpoint where they are due.

        No step where a trajectory is at fault: it is set aside, and the others wait for the next batch. Raises
        StepImpossible where none is.
        """
        began = time.monotonic()
        if self._careful and not self._came_through(batch):
            return
        settings = self._config.learner
        staleness = [self.version - one.trajectory.oldest_version for one in batch]
        rate = self._learning_rate(batch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        try:
            loss, norm, seen = self._gradients([one.trajectory for one in batch])
        except FloatingPointError as error:
            self._find_fault(batch, str(error))
            return
        self._aside = 0
        with self._pulse.busy("the optimizer's step"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
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
        if self.step_count % self._config.checkpoints.every_steps == 0 or self.done:
            self.checkpoint()
        self._starved_at = time.monotonic() + STARVED_S

    def _idle_ratio(self) -> float:
        """Share of the time since it was last asked for that the learner waited for a batch."""
        now = time.monotonic()
        idle, self._idle_s = self._idle_s, 0.0
        whole, self._working_since = now - self._working_since, now
        return idle / max(whole, 1e-9)

    def _gradients(self, batch: list[Trajectory]) -> tuple[float, float, Diagnostics]:
        """As `_backward`. Raises FloatingPointError, with the reason, where there is no finite loss and gradient, and
        whatever the model raised: no gradient is left then, and nothing has changed."""
        while True:
            try:
                return self._backward(batch)
            except _NOT_THE_STEP:
                raise
            except Exception as error:
                failed = error.with_traceback(None)  # whose frames hold what memory is short of
            self.optimizer.zero_grad(set_to_none=True)
            if not self._economize(batch, failed):
                raise FloatingPointError(brief(failed))

    def _economize(self, batch: list[Trajectory], error: Exception) -> bool:
        """After an out-of-memory, take half as many tokens in a micro-batch from now on. False where that changes
        nothing, or where memory was not what was short. Deterministic: gradients are summed as they always were."""
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
        """Why these have no gradients; '' where they have, which are thrown away."""
        return self._reason([one.trajectory for one in part])

    def _reason(self, trajectories: list[Trajectory]) -> str:
        try:
            self._gradients(trajectories)
        except FloatingPointError as error:
            return str(error)
        self.optimizer.zero_grad(set_to_none=True)
        return ""

    def _find_fault(self, batch: list[Received], reason: str) -> None:
        """Set aside the trajectories at fault; the others wait. Raises StepImpossible where none is."""
        step = self.step_count + 1
        if wrong := self._reason([witness(batch[0].trajectory)]):
            raise StepImpossible(
                f"step {step}: {reason}; nor can a trajectory be trained on that any learner can: {wrong}"
            )
        guilty = culprits(batch, self._why_not)
        if not guilty:
            raise StepImpossible(f"step {step}: {reason}; of its {len(batch)} trajectories none fails by itself")
        self._aside += len(guilty)
        if self._aside >= max(_FEWEST_ASIDE, 2 * len(batch)):
            raise StepImpossible(
                f"step {step}: {self._aside} trajectories in a row cannot be trained on, the last: {reason}"
            )
        self._set_aside(batch, guilty)

    def _came_through(self, batch: list[Received]) -> bool:
        """Try each trajectory by itself, said before and after: one that nobody came back from is set aside."""
        most = self._config.liveness.max_attempts
        guilty = []
        for one in batch:
            rid = one.trajectory.rid
            begun = self._plane.attempt(rid, "learner")
            if begun > most:
                guilty.append((one, f"{begun - 1} learners ended while they tried it, and nothing else"))
                continue
            self._why_not([one])  # what fails and does not end the process is found out by the step
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
        """Gradients of the batch's mean loss, clipped: (loss in nats, gradient norm before, diagnostics)."""
        config, stop_ids = self._config, self._pair.stop_ids
        loss, parts = 0.0, []
        for micro in micro_batches(
            batch,
            max_tokens=self._micro_batch_tokens,
            denominator=config.loss.denominator,
            shares=shares_of(config.loss, config.seed),
        ):
            micro = micro.to(config.learner.device)
            with self._pulse.busy("a micro-batch"):
                with self._cast():
                    logits = kept_logits(self.model, micro)
                outcomes = log_outcomes(logits, stop_ids, self._pair.vocab_size)
                losses = token_losses(
                    config.loss.mode, outcomes, micro, stop_ids=stop_ids, ratio_clip=config.loss.ratio_clip
                )
                part = (micro.weights * losses).sum()
                part.backward()  # type: ignore[no-untyped-call]
                loss += float(part.detach())
                parts.append(diagnostics(outcomes.detach(), micro, stop_ids=stop_ids))
            self._lease.keep()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.learner.max_grad_norm)
        seen = merged(parts)
        if not all(map(math.isfinite, (loss, float(norm), *astuple(seen)))):
            raise FloatingPointError(
                f"the loss is {loss:g}, the gradient norm {float(norm):g}, the KL {seen.kl_nats:g}"
            )
        return loss, float(norm), seen

    def _cast(self) -> Any:
        settings = self._config.learner
        dtype = getattr(torch, settings.dtype)
        return torch.autocast(torch.device(settings.device).type, dtype=dtype, enabled=dtype != torch.float32)

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
        """Write the weights as the next version and announce them; the version never goes back."""
        folder = self._config.run_dir / "weights"
        self.version += 1
        dtype = getattr(torch, self._config.rollout.dtype)
        with self._pulse.busy("weights"), self._lease.exclusively(self._lock):
            state = {name: _as(tensor, dtype) for name, tensor in untied_tensors(self.model).items()}
            ref = publish(folder, self.version, lambda path: save_file(state, path))
            if self._wants_eval(ref):
                _keep_for_eval(self._config.run_dir, ref, self.step_count, self._tokens_trained)
            retain(folder, self._config.learner.max_staleness + 2)
        answer = self._lease.call(scripts.publish(ref.version, self.step_count, ref.file, ref.sha256))
        if answer.word is Published.OLD:
            # A higher one stands there, or this one does (our script ran, its answer was lost): go past it.
            self.version = answer.version
            self.publish()
            return
        metrics.policy_version.labels("learner").set(self.version)

    def _wants_eval(self, ref: WeightsRef) -> bool:
        every = self._config.eval.every_steps
        if every == 0:
            return False
        sync = self._config.learner.weight_sync_steps
        # The first publication at or behind a multiple of every_steps; always version 0 and the last.
        return ref.version == 0 or self.done or self.step_count % every < min(sync, every)

    def checkpoint(self) -> None:
        """Write a checkpoint; then, and only then, acknowledge what it holds."""
        with self._pulse.busy("a checkpoint"):
            self._save()
        # Before the trajectories are taken off: the feeder may count too many in flight for a moment, never too few.
        self._lease.advance("covered", self.step_count)
        self._intake.settle(
            [Ending(one.entry, one.trajectory.rid, "trained", staleness=lag) for one, lag in self._since_checkpoint]
        )
        self._since_checkpoint = []
        self._generated.covered(self.step_count)
        self._careful = False

    def _save(self) -> None:
        state = capture(
            self.model,
            self.optimizer,
            step=self.step_count,
            policy_version=self.version,
            consumed=[one.trajectory.rid for one, _ in self._since_checkpoint],
            counters={"tokens_trained": self._tokens_trained, "tokens_generated": self.tokens_generated},
        )
        with self._lease.exclusively(self._lock):
            save(self._config.run_dir / "checkpoints", state, keep=self._config.checkpoints.keep)
            self._journal.sync()


def _load(folder: Path, config: Config) -> Any:
    """The student, its parameters float32: steps of 1e-6 vanish in bfloat16 ones. Raises ModelError."""
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=torch.float32,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except Exception as error:  # the code of a model may raise anything over a config that it did not expect
        raise ModelError(f"{folder}: cannot be loaded ({brief(error)})") from error
    keep_head_in_float32(model)
    # Dropout would make p_θ of the same token differ between worker and learner.
    return model.to(config.learner.device).eval()


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach().to("cpu")
    return (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()


def _keep_for_eval(run_dir: Path, ref: WeightsRef, step: int, tokens_trained: int) -> None:
    """Link the weights into `eval/`, where retention does not reach; the evaluator removes them."""
    folder = run_dir / "eval"
    folder.mkdir(exist_ok=True)
    target = folder / ref.file
    target.unlink(missing_ok=True)
    os.link(run_dir / "weights" / ref.file, target)
    note = {"version": ref.version, "step": step, "tokens_trained": tokens_trained, "sha256": ref.sha256}
    draft = target.with_suffix(".tmp")
    draft.write_text(json.dumps(note))
    os.replace(draft, target.with_suffix(".json"))
