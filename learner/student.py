"""The student in training: a model, its optimizer, and what leaves them: published weights, checkpoints, `model/`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from common.config import Config, LearnerSettings
from common.failing import brief
from common.pretrained import ModelError, Pair, attention_of, load_tokenizer
from learner.batch import Trajectory, micro_batches
from learner.checkpoint import CheckpointState, capture, restore, snapshot_of, untied_tensors
from learner.gradients import Busy, add_gradients, rows_of
from learner.head import OutputHead, keep_head_in_float32, output_head
from learner.layers import checkpoint_layers, compile_layers
from learner.loss import Diagnostics, merged
from learner.returns import with_returns
from learner.weighting import shares_of


class TrainableStudent:
    """The model of `folder` with float32 parameters on the learner's device, and AdamW. Raises ModelError."""

    header: dict[str, str] | None = None
    """Metadata of the files with published weights."""
    adapter: dict[str, Any] | None = None
    """What a checkpoint must agree with, where only an adapter is trained."""

    def __init__(self, folder: Path, config: Config) -> None:
        self._folder, self._config, self._settings = folder, config, config.learner
        self._load(self._settings.device)
        self.optimizer = adamw(self.model, self._settings)

    def _load(self, device: str) -> None:
        """Make `model` and `head`. Raises ModelError."""
        self.model = self._make_model(device)
        self.head = self._find_head()
        if self._settings.compile:
            compile_layers(self.model)
        if self._settings.gradient_checkpointing:
            checkpoint_layers(self.model)

    def _make_model(self, device: str) -> Any:
        return load_trainable(self._folder, device)

    def _find_head(self) -> OutputHead:
        return output_head(self.model)

    def add_gradients(
        self,
        batch: Sequence[Trajectory],
        pair: Pair,
        *,
        max_tokens: int,
        busy: Busy,
        between: Callable[[], None],
    ) -> tuple[float, Diagnostics]:
        """Add the gradients of a batch's mean loss to the model's; returns the loss in nats and the diagnostics.

        max_tokens: padded tokens of a micro-batch. busy, between: as in `learner.gradients`.
        """
        config = self._config
        micros = micro_batches(
            with_returns(batch, config.loss),
            max_tokens=max_tokens,
            denominator=config.loss.denominator,
            shares=shares_of(config.loss, config.seed),
        )
        rows = partial(rows_of, self.model, self.head, config)
        device = self._settings.device
        total, parts = add_gradients(rows, self.head, micros, config, pair, device=device, busy=busy, between=between)
        return total, merged(parts)

    def clip(self) -> float:
        """Clip the gradients to `learner.max_grad_norm`; returns their norm before."""
        return float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._settings.max_grad_norm))

    def step(self, rate: float) -> None:
        """One step of the optimizer with this learning rate; no gradients are left."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.forget_gradients()

    def forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What the workers load: tensors by the model's names, tied ones once, in `dtype`, on the CPU."""
        return {name: _as(tensor, dtype) for name, tensor in untied_tensors(self.model).items()}

    def write(self, folder: Path) -> None:
        """Write a folder that transformers loads: config, weights, tokenizer, generation settings."""
        self._save(folder, None)

    def _save(self, folder: Path, state: dict[str, Tensor] | None) -> None:
        """`state`: the whole tensors, where they are not the model's own."""
        self._write_model(folder, state)
        load_tokenizer(self._folder).save_pretrained(folder)
        source = self._folder / "generation_config.json"
        if source.is_file():
            (folder / source.name).write_bytes(source.read_bytes())

    def _write_model(self, folder: Path, state: dict[str, Tensor] | None) -> None:
        self.model.save_pretrained(folder, state_dict=state)

    def capture(
        self, *, step: int, policy_version: int, consumed: Sequence[str], counters: dict[str, int]
    ) -> CheckpointState:
        """What a checkpoint holds, copied to the CPU."""
        return capture(
            self.model,
            self.optimizer,
            step=step,
            policy_version=policy_version,
            consumed=consumed,
            counters=counters,
            snapshot=self._whole,
            adapter=self.adapter,
        )

    def _whole(self, tensor: Tensor) -> Tensor:
        """A copy on the CPU of a tensor of the model or the optimizer."""
        return snapshot_of(tensor)

    def _placed(self, saved: Tensor, like: Tensor) -> Tensor:
        """A saved tensor in the form that `like` has."""
        return saved

    def restore(self, state: CheckpointState) -> None:
        """Continue from a checkpoint. Raises ValueError, before anything is changed, if it is of another model."""
        restore(self.model, self.optimizer, state, self._placed, self.adapter)


def adamw(model: torch.nn.Module, settings: LearnerSettings) -> torch.optim.AdamW:
    """Of all parameters that are not frozen."""
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
    )


def load_trainable(folder: Path, device: str) -> Any:
    """The student with float32 parameters: in bfloat16, updates of 1e-6 are lost. Raises ModelError."""
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=torch.float32,
            attn_implementation=attention_of(folder),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except Exception as error:  # a model's code may raise anything for an unexpected config
        raise ModelError(f"{folder}: cannot be loaded ({brief(error)})") from error
    keep_head_in_float32(model)
    # With dropout, p_θ of a token would differ between worker and learner.
    return model.to(device).eval()


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach().to("cpu")
    return (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
