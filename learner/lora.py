"""LoRA: a student of which only low-rank adapters are trained, by `peft`; its base is frozen."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from actors.engine.adapters import Adapter, header_of, merged, weights_digest
from common.config import Config, ConfigError, Lora
from common.draws import uniform_bits
from common.files import write_atomically
from common.pretrained import ModelError
from common.runfiles.names import ADAPTER
from learner.checkpoint import CheckpointState
from learner.head import OutputHead, output_head
from learner.student import TrainableStudent, load_trainable

_SHOWN = 12  # names of layers in an error


def make_student(folder: Path, config: Config) -> TrainableStudent:
    """The student of a config: with `learner.lora` its adapters alone are trained. Raises ModelError, ConfigError."""
    return TrainableStudent(folder, config) if config.learner.lora is None else LoraStudent(folder, config)


def missing() -> str | None:
    """What to install, if a package is not there that `learner.lora` needs."""
    if find_spec("peft") is not None:
        return None
    return "learner.lora needs the package peft: pip install 'katana-distill[lora]'"


def targets_of(model: Any, wanted: Sequence[str] | Literal["all-linear"]) -> list[str]:
    """The names of a model's layers that get an adapter. A name stands for itself and for all that end with it after a
    dot.

    The output head gets none: it is often the embedding too, and its product is computed in float32. Raises ModelError
    for a name that is no linear layer of the model, with the names that are.
    """
    head = model.get_output_embeddings()
    linear = [name for name, one in model.named_modules() if type(one) in (nn.Linear, Conv1D) and one is not head]
    if not linear:
        raise ModelError(f"learner.lora: {type(model).__name__} has no linear layers (torch.nn.Linear)")
    if wanted == "all-linear":
        return linear
    found: dict[str, None] = {}
    for name in wanted:
        matching = [one for one in linear if one == name or one.endswith(f".{name}")]
        if not matching:
            raise ModelError(_no_target(name, linear, [one for one, part in model.named_modules() if part is head]))
        found |= dict.fromkeys(matching)
    return [one for one in linear if one in found]


def _no_target(name: str, linear: Sequence[str], head: Sequence[str]) -> str:
    ends = list(dict.fromkeys(one.rpartition(".")[2] for one in linear))
    allowed = ", ".join(ends[:_SHOWN]) + (f" and {len(ends) - _SHOWN} more" if len(ends) > _SHOWN else "")
    why = ""
    if any(one == name or one.endswith(f".{name}") for one in head):
        why = " that may get an adapter (it is the output head)"
    return f"learner.lora.target_modules: {name!r} is not a linear layer of the student{why}; allowed: {allowed}"


def inject(model: Any, lora: Lora, targets: Sequence[str], *, of: str = "") -> Any:
    """Put adapters into a model, in place, and freeze all else; returns peft's config of them. `of`: the base."""
    peft: Any = importlib.import_module("peft")
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_shortest(model, targets),
        fan_in_fan_out=any(type(model.get_submodule(name)) is Conv1D for name in targets),
        base_model_name_or_path=of or None,
        task_type="CAUSAL_LM",
    )
    # Not get_peft_model: its wrapper would hide the arguments of the model's forward.
    peft.inject_adapter_in_model(settings, model)
    return settings


def _shortest(model: Any, targets: Sequence[str]) -> list[str]:
    """Names of layers for a reader of peft's config: their ends, if no other module's name ends so."""
    ends = {name.rpartition(".")[2] for name in targets}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    return sorted(ends) if meant == set(targets) else list(targets)


class LoraStudent(TrainableStudent):
    """Adapters in float32 and their AdamW moments; the base is frozen.

    With `learner.dtype: bfloat16` the linear layers of the base are kept in bfloat16: autocast would convert them in
    every forward to the same numbers. Head, embeddings and norms, which it does not convert, stay float32. Raises
    ModelError, ConfigError.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        if (problem := missing()) is not None:
            raise ConfigError(problem)
        assert config.learner.lora is not None
        self._lora: Lora = config.learner.lora
        self._of, self._seed, self._updates = _absolute(config.student.model), config.seed, 0
        super().__init__(folder, config)
        base, self._scaling = weights_digest(folder), self._lora.alpha / self._lora.rank
        self.header = header_of(base, self._scaling)
        self.adapter = {
            "base": base,
            "rank": self._lora.rank,
            "alpha": self._lora.alpha,
            "transposed": self._peft_settings.fan_in_fan_out,
        }
        self._seed_dropout()

    def _make_model(self, device: str) -> Any:
        model = load_trainable(self._folder, "cpu")
        linear = [model.get_submodule(name) for name in targets_of(model, "all-linear")]
        self._peft_settings = inject(model, self._lora, targets_of(model, self._lora.target_modules), of=self._of)
        for layer in linear:  # not before: the adapters would be of that dtype too
            layer.to(getattr(torch, self._settings.dtype))
        model = model.to(device).eval()
        if self._lora.dropout:  # of the adapters alone
            for _, layer in _layers(model):
                layer.lora_dropout.train()
        return model

    def _find_head(self) -> OutputHead:
        dtype = getattr(torch, self._settings.dtype)
        kind = torch.device(self._settings.device).type
        with torch.autocast(kind, dtype=dtype, enabled=dtype != torch.float32):  # as in every forward
            return output_head(self.model)

    def forget_gradients(self) -> None:
        super().forget_gradients()
        self._seed_dropout()

    def step(self, rate: float) -> None:
        self._updates += 1
        super().step(rate)

    def _seed_dropout(self) -> None:
        """Each try of an update leaves out the same inputs, be it the first, or after a failure or a restart."""
        if self._lora.dropout:
            torch.manual_seed(uniform_bits(self._seed, "dropout", self._updates) >> 1)

    def weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The adapter: workers hold the base, and merge the two in their own dtype. float32, whatever `dtype`."""
        return self._adapter().tensors()

    def _adapter(self) -> Adapter:
        assert self.adapter is not None
        return Adapter(self.adapter["base"], self._scaling, factors_of(self.model))

    def _write_model(self, folder: Path, state: dict[str, Tensor] | None) -> None:
        """Base and adapter merged into `folder`, and beside it `adapter/`, which peft loads onto the base."""
        self._write_adapter(folder.with_name(ADAPTER))
        whole = load_trainable(self._folder, "cpu")
        parameters = dict(whole.named_parameters())
        for name, factors in self._adapter().factors.items():
            parameters[name].data = merged(parameters[name].data, *factors, self._scaling)
        whole.save_pretrained(folder)

    def _write_adapter(self, folder: Path) -> None:
        self._peft_settings.inference_mode = True  # who trains it further says so
        self._peft_settings.save_pretrained(str(folder))
        state = {
            f"base_model.model.{name}.lora_{part}.weight": getattr(layer, f"lora_{part}")["default"].weight
            for name, layer in _layers(self.model)
            for part in "AB"
        }
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        path = folder / "adapter_model.safetensors"
        write_atomically(path, lambda draft: save_file(on_cpu, draft, {"format": "pt"}))

    def restore(self, state: CheckpointState) -> None:
        super().restore(state)
        self._updates = _updates(self.optimizer)
        self._seed_dropout()


def _updates(optimizer: torch.optim.AdamW) -> int:
    """Updates that it has made: a step of the learner may have several."""
    return max((int(moments["step"]) for moments in optimizer.state.values()), default=0)


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    """peft's layers by the name of the layer that each one has replaced."""
    return ((name, one) for name, one in model.named_modules() if hasattr(one, "lora_A") and hasattr(one, "base_layer"))


def factors_of(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """An adapter's `left` and `right` by parameter of the base, on the CPU."""
    found = {}
    for name, layer in _layers(model):
        a, b = (getattr(layer, f"lora_{part}")["default"].weight.detach().cpu() for part in "AB")
        found[f"{name}.weight"] = _factors(a, b, transposed=layer.fan_in_fan_out)
    return found


def weights_in(state: CheckpointState) -> Mapping[str, Tensor] | Adapter:
    """The weights of a checkpoint, for a worker's `swap`: all of a model, or an adapter."""
    if state.adapter is None:
        return state.model
    facts, a_end, b_end = state.adapter, ".lora_A.default.weight", ".lora_B.default.weight"
    factors = {
        f"{name.removesuffix(a_end)}.weight": _factors(
            a, state.model[name.removesuffix(a_end) + b_end], transposed=facts["transposed"]
        )
        for name, a in state.model.items()
        if name.endswith(a_end)
    }
    return Adapter(facts["base"], facts["alpha"] / facts["rank"], factors)


def _factors(a: Tensor, b: Tensor, *, transposed: bool) -> tuple[Tensor, Tensor]:
    """B and A, or the transposes of A and B where the weight is [in, out]."""
    return (a.t().contiguous(), b.t().contiguous()) if transposed else (b.contiguous(), a.contiguous())


def _absolute(model: str) -> str:
    """A model as a config of peft names it: a hub id, or a folder that is found from anywhere."""
    folder = Path(model).expanduser()
    return str(folder.absolute()) if folder.is_dir() else model
