"""The learner: consumes trimmed trajectories, steps, checkpoints, publishes weights. Off the queue.

Invariant: a trajectory is acknowledged after the fsync of the checkpoint that holds it, and a checkpoint names the
rollouts it holds; so nothing is skipped and nothing is trained twice, wherever the learner is killed.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from common import metrics
from common.config import Config
from common.messages import row_digest
from common.pretrained import ModelError, Pair, load_tokenizer
from common.streams import Lease, Plane
from common.weights import BadWeights, WeightsRef, newest_version, publish, read_pointer, retain
from learner.batch import Trajectory, micro_batches
from learner.checkpoint import CheckpointState, capture, load_newest, restore, save, untied_tensors
from learner.intake import Intake, Received
from learner.loss import Diagnostics, diagnostics, kept_logits, log_outcomes, merged, token_losses
from learner.schedule import learning_rate
from learner.weighting import shares_of

log = logging.getLogger("katana.learner")


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
        self._intake = Intake(
            plane,
            self._lease,
            # Each resume announces the same weights as a new version: what they wrote is not older for that.
            max_staleness=sys.maxsize if config.deterministic else config.learner.max_staleness,
            vocab_size=pair.vocab_size,
        )
        self.step_count = 0
        self.version = -1
        self._since_checkpoint: list[tuple[Received, int]] = []  # with the staleness it was trained at
        self._tokens_trained = 0
        self._idle_s = 0.0
        self._working_since = time.monotonic()
        self._lock = config.run_dir / ".learner.lock"
        self._lines: dict[str, IO[str]] = {}

    def run(self, *, until_idle: bool = False) -> None:
        """Train to `learner.max_steps`, or until told to stop; a checkpoint is written either way.

        Raises LeaseLost, RunGone, RedisUnavailable, Stopping, TornCheckpointError.
        """
        self._lease.take(self._stop, wait_s=60.0)
        try:
            self.start()
            while not self._stop.is_set() and self.step_count < self._config.learner.max_steps:
                batch = self._next_batch(block_s=0.01 if until_idle else 0.1)
                if batch is not None:
                    self.step(batch)
                elif until_idle:
                    break
            if self._since_checkpoint:
                self.checkpoint()
            if self.step_count >= self._config.learner.max_steps:
                self._finish()
        finally:
            self._lease.drop()
            self.close()

    def close(self) -> None:
        """Let go of the files; nothing is written any more."""
        for file in self._lines.values():
            file.close()

    # --- start and end -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Go on from the newest good checkpoint, or begin; then announce the weights."""
        folder = self._config.run_dir
        consumed: tuple[str, ...] = ()
        with self._lease.exclusively(self._lock):  # a former learner has written its last
            state = load_newest(folder / "checkpoints")
            if state is not None:
                restore(self.model, self.optimizer, state)
                self.step_count, consumed = state.step, state.consumed
                self.version = state.policy_version
                self._tokens_trained = state.counters.get("tokens_trained", 0)
                log.info("going on from step %d", self.step_count)
            for name in ("metrics.jsonl", "trained.jsonl"):
                self._lines[name] = _go_on(folder / name, self.step_count)
            # A Redis that lost the run forgot the pointer; the file names remember.
            self.version = max(self.version, newest_version(folder / "weights"))
        self.version = max(self.version, self._announced())
        self._intake.recover(consumed)
        self._lease.advance("covered", self.step_count)
        self.publish()

    def _announced(self) -> int:
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
        with self._lease.exclusively(self._lock):
            self.model.save_pretrained(folder)
            load_tokenizer(self._pair.student.folder).save_pretrained(folder)
            if source.is_file():
                (folder / source.name).write_bytes(source.read_bytes())
        self._lease.advance("state", "trained")
        log.info("trained %d steps, %d tokens", self.step_count, self._tokens_trained)

    # --- a step ------------------------------------------------------------------------------------------------

    def _next_batch(self, block_s: float) -> list[Received] | None:
        self._lease.keep()
        waited = time.monotonic()
        batch = self._intake.batch(self._config.learner.batch_size, self.version, block_s)
        self._idle_s += time.monotonic() - waited
        return batch

    def step(self, batch: list[Received]) -> None:
        """One optimizer step on a batch, its line in metrics.jsonl, weights and checkpoint where they are due."""
        began = time.monotonic()
        settings = self._config.learner
        staleness = [self.version - one.trajectory.oldest_version for one in batch]
        rate = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, norm, seen = self._backward([one.trajectory for one in batch])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step_count += 1
        self._tokens_trained += seen.tokens
        self._since_checkpoint += list(zip(batch, staleness, strict=True))
        for lag in staleness:
            metrics.policy_lag.labels("learner").observe(lag)
        if self.step_count % settings.weight_sync_steps == 0 or self.step_count == settings.max_steps:
            self.publish()
        else:
            self._lease.advance("step", self.step_count)
        self._write_line(batch, staleness, loss, norm, rate, seen, time.monotonic() - began)
        if self.step_count % self._config.checkpoints.every_steps == 0 or self.step_count == settings.max_steps:
            self.checkpoint()

    def _backward(self, batch: list[Trajectory]) -> tuple[float, float, Diagnostics]:
        """Gradients of the batch's mean loss, clipped: (loss in nats, gradient norm before, diagnostics)."""
        config, stop_ids = self._config, self._pair.stop_ids
        loss, parts = 0.0, []
        for micro in micro_batches(
            batch,
            max_tokens=config.learner.micro_batch_tokens,
            denominator=config.loss.denominator,
            shares=shares_of(config.loss, config.seed),
        ):
            micro = micro.to(config.learner.device)
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
        if not torch.isfinite(norm):
            raise FloatingPointError(f"step {self.step_count + 1}: the gradient norm is {float(norm)}")
        return loss, float(norm), merged(parts)

    def _cast(self) -> Any:
        settings = self._config.learner
        dtype = getattr(torch, settings.dtype)
        return torch.autocast(torch.device(settings.device).type, dtype=dtype, enabled=dtype != torch.float32)

    def _learning_rate(self) -> float:
        settings = self._config.learner
        return learning_rate(
            self.step_count,
            base=settings.learning_rate,
            schedule=settings.schedule,
            warmup_steps=round(settings.warmup_ratio * settings.max_steps),
            max_steps=settings.max_steps,
        )

    def _write_line(
        self,
        batch: list[Received],
        staleness: list[int],
        loss: float,
        norm: float,
        rate: float,
        seen: Diagnostics,
        step_s: float,
    ) -> None:
        now = time.monotonic()
        idle, self._idle_s = self._idle_s, 0.0
        whole, self._working_since = now - self._working_since, now
        idle_ratio = idle / max(whole, 1e-9)
        line = {
            "step": self.step_count,
            "policy_version": self.version,
            "loss": loss,
            "kl": seen.kl_nats,
            "entropy": seen.entropy_nats,
            "support_mass": seen.support_mass,
            "ratio_mean": seen.ratio_mean,
            "ratio_max": seen.ratio_max,
            "grad_norm": norm,
            "learning_rate": rate,
            "trajectories": len(batch),
            "tokens_trained": seen.tokens,
            "tokens_trained_total": self._tokens_trained,
            "mean_kept": seen.tokens / len(batch),
            "staleness_mean": sum(staleness) / len(staleness),
            "staleness_max": max(staleness),
            "stale_dropped": dict(self._intake.dropped),
            "step_s": step_s,
            "idle_ratio": idle_ratio,
            "unix_s": time.time(),
        }
        self._append("metrics.jsonl", line)
        self._append("trained.jsonl", _trained_line(self.step_count, self.version, batch))
        metrics.learner_steps.inc()
        metrics.learner_tokens.inc(seen.tokens)
        metrics.learner_loss.set(loss)
        metrics.learner_step_seconds.observe(step_s)
        metrics.learner_idle.set(idle_ratio)

    def _append(self, name: str, line: dict[str, Any]) -> None:
        self._lines[name].write(json.dumps(line, allow_nan=False) + "\n")
        self._lines[name].flush()

    # --- weights and checkpoints -------------------------------------------------------------------------------

    def publish(self) -> None:
        """Write the weights as the next version and announce them; the version never goes back."""
        folder = self._config.run_dir / "weights"
        self.version += 1
        dtype = getattr(torch, self._config.rollout.dtype)
        state = {name: _as(tensor, dtype) for name, tensor in untied_tensors(self.model).items()}
        with self._lease.exclusively(self._lock):
            ref = publish(folder, self.version, lambda path: save_file(state, path))
            if self._wants_eval(ref):
                _keep_for_eval(self._config.run_dir, ref, self.step_count, self._tokens_trained)
            retain(folder, self._config.learner.max_staleness + 2)
        reply = self._lease.call("publish", ref.version, self.step_count, ref.file, ref.sha256)
        if reply[0] == b"old":
            # A higher one stands there, or this one does (our script ran, its answer was lost): go past it.
            self.version = int(reply[1])
            self.publish()
            return
        metrics.policy_version.labels("learner").set(self.version)

    def _wants_eval(self, ref: WeightsRef) -> bool:
        every = self._config.eval.every_steps
        if every == 0:
            return False
        step, last = self.step_count, self._config.learner.max_steps
        sync = self._config.learner.weight_sync_steps
        # The first publication at or behind a multiple of every_steps; always version 0 and the last.
        return ref.version == 0 or step == last or step % every < min(sync, every)

    def checkpoint(self) -> None:
        """Write a checkpoint; then, and only then, acknowledge what it holds."""
        settings = self._config.learner
        state: CheckpointState = capture(
            self.model,
            self.optimizer,
            step=self.step_count,
            policy_version=self.version,
            schedule={
                "name": settings.schedule,
                "base": settings.learning_rate,
                "max_steps": settings.max_steps,
            },
            consumed=[one.trajectory.rid for one, _ in self._since_checkpoint],
            counters={"tokens_trained": self._tokens_trained},
        )
        with self._lease.exclusively(self._lock):
            save(self._config.run_dir / "checkpoints", state, keep=self._config.checkpoints.keep)
            for file in self._lines.values():
                os.fsync(file.fileno())
        # Before the trajectories are taken off: the feeder may count too many in flight for a moment, never too few.
        self._lease.advance("covered", self.step_count)
        self._intake.settle(
            [(one.entry, one.trajectory.rid, "trained", "", lag) for one, lag in self._since_checkpoint]
        )
        self._since_checkpoint = []


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
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: cannot be loaded ({' '.join(str(error).split())[:300]})") from error
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


def _trained_line(step: int, version: int, batch: list[Received]) -> dict[str, Any]:
    """What a step was trained on: rollout, tokens, digest (8 bytes) of their ids as little-endian int32."""
    trajectories = [one.trajectory for one in batch]
    return {
        "step": step,
        "policy_version": version,
        "rids": [one.rid for one in trajectories],
        "tokens": [len(one.tokens) for one in trajectories],
        "digests": [row_digest(one.tokens) for one in trajectories],
    }


def _go_on(path: Path, step: int) -> IO[str]:
    """Open for appending, without the lines behind `step`: those steps will be done again.

    The file is always a new one, so that a former learner, which has the old one open, cannot write into it.
    """
    draft = path.with_suffix(".tmp")
    with draft.open("w") as file:
        file.writelines(_lines_up_to(path, step) if path.exists() else ())
    os.replace(draft, path)
    return path.open("a")


def _lines_up_to(path: Path, step: int) -> Iterator[str]:
    with path.open() as file:
        for line in file:
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                return
            yield line
