"""The student over several ranks: parameters, gradients and moments are sharded by FSDP2, each rank trains on a share
of every batch, and whole tensors are gathered one at a time for what leaves it.

The numbers are those of one process, but for the order of sums: parameters stay float32, and `learner.dtype` is what
the forward is cast to, by autocast as there (FSDP's own mixed precision would also round the head).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from common.config import Config
from common.pretrained import Pair
from learner.balance import balanced
from learner.batch import MicroBatch, Trajectory
from learner.checkpoint import CheckpointState, check_restorable, untied_tensors
from learner.gradients import Busy, add_gradients, rows_of
from learner.head import OutputHead
from learner.loss import Diagnostics, merged
from learner.ranks import Ranks
from learner.returns import with_returns
from learner.student import TrainableStudent, adamw
from learner.weighting import shares_of


class Root(nn.Module):
    """The model as FSDP's root: what is outside the blocks (embedding, head) then stays whole from the beginning of a
    forward to the end of its backward, in which `learner.pieces` uses the head, and adds to its gradient, by itself."""

    def __init__(self, model: nn.Module, head: OutputHead, config: Config) -> None:
        super().__init__()
        self.model, self._head, self._config = model, head, config

    def forward(self, micro: MicroBatch) -> Tensor:
        """As `learner.gradients.rows_of`."""
        return rows_of(self.model, self._head, self._config, micro)


class ShardedStudent(TrainableStudent):
    """A rank's part of the student. The methods of TrainableStudent are called on rank 0, which tells the others to do
    the same (`follow`); what they return is whole there, and means nothing on the others.

    Any of them raises RankFailed, after which the learner must end. Raises ModelError.
    """

    def __init__(self, folder: Path, config: Config, ranks: Ranks) -> None:
        self._folder, self._config, self._settings, self._ranks = folder, config, config.learner, ranks
        for turn in range(ranks.size):  # one after the other: the host holds one whole copy at a time
            if turn == ranks.rank:
                self._load("cpu")
                self._root = _sharded(Root(self.model, self.head, config), self.model, ranks.mesh)
            with ranks.together("loading the student"):
                ranks.all_gather([0.0])
        self.optimizer = adamw(self.model, self._settings)

    def add_gradients(
        self,
        batch: Sequence[Trajectory],
        pair: Pair,
        *,
        max_tokens: int,
        busy: Busy,
        between: Callable[[], None],
    ) -> tuple[float, Diagnostics]:
        """As of one process; `max_tokens` are those of a rank's micro-batch."""
        config = self._config
        own, *others = balanced(
            with_returns(batch, config.loss),
            self._ranks.size,
            max_tokens=max_tokens,
            denominator=config.loss.denominator,
            shares=shares_of(config.loss, config.seed),
        )
        with busy():
            self._ranks.tell("add_share", shares=[packed(share) for share in others])
        return self.add_share(own, pair, busy=busy, between=between)

    def add_share(
        self, share: Sequence[MicroBatch], pair: Pair, *, busy: Busy, between: Callable[[], None]
    ) -> tuple[float, Diagnostics]:
        """This rank's part of `add_gradients`; returns loss and diagnostics of all ranks together."""
        with self._ranks.together("the gradients"):
            total, parts = add_gradients(
                self._root,
                self.head,
                share,
                self._config,
                pair,
                device=self._ranks.device,
                busy=busy,
                between=between,
            )
            seen = astuple(merged(parts)) if parts else (0.0,) * len(fields(Diagnostics))
            with busy():  # the slowest rank is waited for
                rows = self._ranks.all_gather([total, *seen])
        found = [Diagnostics(int(tokens), *rest) for _, tokens, *rest in rows if tokens]
        return sum(row[0] for row in rows), merged(found)

    def clip(self) -> float:
        self._ranks.tell("clip")
        with self._ranks.together("the gradients' norm"):
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._settings.max_grad_norm)
            return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def step(self, rate: float) -> None:
        self._ranks.tell("step", rate)
        with self._ranks.together("the optimizer's step"):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def forget_gradients(self) -> None:
        self._ranks.tell("forget_gradients")
        self.optimizer.zero_grad(set_to_none=True)

    def weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        self._ranks.tell("weights", _name(dtype))
        with self._ranks.together("publishing weights"):
            tensors = untied_tensors(self.model)
            return {name: self._whole(_cast(tensor, dtype)) for name, tensor in tensors.items()}

    def write(self, folder: Path) -> None:
        self._ranks.tell("write")
        with self._ranks.together("the model"):
            state = {name: self._whole(tensor) for name, tensor in untied_tensors(self.model).items()}
        if self._ranks.leads:
            self._save(folder, state)

    def capture(
        self, *, step: int, policy_version: int, consumed: Sequence[str], counters: dict[str, int]
    ) -> CheckpointState:
        self._ranks.tell("capture")
        with self._ranks.together("a checkpoint"):
            return super().capture(step=step, policy_version=policy_version, consumed=consumed, counters=counters)

    def restore(self, state: CheckpointState) -> None:
        check_restorable(self.model, self.optimizer, state)
        self._ranks.tell("restore", *_outline(state))
        with self._ranks.together("restoring a checkpoint"):
            super().restore(state)

    def _whole(self, tensor: Tensor) -> Tensor:
        """On rank 0 a copy on the CPU of a tensor that all ranks hold, gathered; elsewhere nothing.

        One at a time: no device ever holds more than its shards and the largest tensor.
        """
        whole = tensor.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        return whole.to("cpu", copy=True).contiguous() if self._ranks.leads else torch.empty(0)

    def _placed(self, saved: Tensor, like: Tensor) -> Tensor:
        """Rank 0's `saved` in the form of `like`: this rank's shard of it, or a copy."""
        whole = torch.empty_like(saved, device=self._ranks.device) if saved.is_meta else saved.to(self._ranks.device)
        if isinstance(like, DTensor) and saved.dim():  # the optimizer's count of steps has no dimension
            return distribute_tensor(whole, like.device_mesh, like.placements)
        return self._ranks.broadcast(whole)


def follow(student: ShardedStudent, pair: Pair, ranks: Ranks) -> None:
    """On all ranks but 0: do what rank 0 tells, until it ends the learner. Raises RankFailed."""

    def nothing() -> None: ...

    def add_share(share: bytes) -> None:
        student.add_share(unpacked(share), pair, busy=contextlib.nullcontext, between=nothing)

    def take_capture() -> None:
        student.capture(step=0, policy_version=0, consumed=(), counters={})

    does: dict[str, Callable[..., object]] = {
        "add_share": add_share,
        "clip": student.clip,
        "step": student.step,
        "forget_gradients": student.forget_gradients,
        "weights": lambda dtype: student.weights(getattr(torch, dtype)),
        "write": lambda: student.write(Path()),
        "capture": take_capture,
        "restore": lambda *outline: student.restore(_placeholders(*outline)),
    }
    while (told := ranks.hear())[0] != "end":
        does[told[0]](*told[1:])


def packed(share: Sequence[MicroBatch]) -> bytes:
    """Micro-batches as safetensors: `{position}.{field}`, and the rollouts' ids as text."""
    tensors: dict[str, Tensor] = {}
    for place, micro in enumerate(share):
        rids = torch.tensor(list("\n".join(micro.rids).encode()), dtype=torch.uint8)
        held = {field.name: getattr(micro, field.name) for field in fields(micro)} | {"rids": rids}
        tensors |= {f"{place}.{name}": tensor for name, tensor in held.items() if tensor is not None}
    return save_tensors(tensors)


def unpacked(share: bytes) -> list[MicroBatch]:
    held: dict[int, dict[str, Any]] = {}
    for key, tensor in load_tensors(share).items():
        place, _, name = key.partition(".")
        held.setdefault(int(place), {"teacher_tail": None})[name] = tensor
    for values in held.values():
        values["rids"] = tuple(values["rids"].numpy().tobytes().decode().split())
    return [MicroBatch(**held[place]) for place in sorted(held)]


def _sharded(root: Root, model: Any, mesh: DeviceMesh) -> Root:
    """Shard the parameters in place: each block is a unit, and what is outside the blocks is another."""
    blocks = set(model._no_split_modules or ())
    for module in [one for one in model.modules() if type(one).__name__ in blocks]:
        fully_shard(module, mesh=mesh)
    fully_shard(root, mesh=mesh)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # The weights of a micro-batch are those of the whole batch: gradients are summed, not averaged. Gloo has
            # no operation that scales and sums.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return root


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _outline(state: CheckpointState) -> tuple[Any, ...]:
    """What the other ranks must know of a state to receive it: names, dtypes and shapes."""
    parts = [
        {name: [_name(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
        for tensors in (state.model, state.optimizer)
    ]
    return (*parts, [dict(group) for group in state.optimizer_groups])


def _placeholders(model: dict[str, Any], optimizer: dict[str, Any], groups: list[dict[str, Any]]) -> CheckpointState:
    """A state of this outline, without data."""
    empty = [
        {name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for name, (dtype, shape) in part.items()}
        for part in (model, optimizer)
    ]
    return CheckpointState(
        step=0,
        policy_version=0,
        consumed=(),
        counters={},
        model=empty[0],
        optimizer=empty[1],
        optimizer_groups=tuple(groups),
        rng={},
    )
