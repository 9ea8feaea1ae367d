"""Checkpoints: all that a learner needs to continue as if it had never stopped.

    checkpoints/step-00000012/    model.safetensors       each tensor once, tied ones under their first name; with LoRA
                                                          the adapter alone
                                  optimizer.safetensors   "{parameter}/{exp_avg | exp_avg_sq | step}"
                                  state.json              counters, consumed rollouts, random number states
                                  manifest.json           size and sha256 of the other three; written last
    checkpoints/step-00000012.tmp/   being written, or left by a crash: never read, removed by the next save
    checkpoints/step-00000012.old/   an earlier checkpoint of the same step, while the new one replaces it

The invariant: when `save` returns, its checkpoint survives a power cut; until then, the previous one does. Consumed
trajectories are acknowledged only after `save` has returned, so losing a checkpoint after that would lose them.

No pickle anywhere: loading a checkpoint runs no code from it. The tensors are whole, also those of a model that is
sharded over several ranks (`learner.sharded` gathers them), so any number of ranks continues from any checkpoint.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.config import ConfigError

logger = logging.getLogger(__name__)

FORMAT = 1
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
STATE, MANIFEST = "state.json", "manifest.json"

HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")
"""The keys of a parameter group that affect the update; foreach, fused and similar ones depend on the device."""

_NAME = re.compile(r"step-(\d{8,})(\.old)?")
_LEFTOVER = re.compile(r"step-\d{8,}(\.old)?\.tmp")


Snapshot = Callable[[Tensor], Tensor]
"""A whole copy on the CPU of a tensor of the model or the optimizer."""

Place = Callable[[Tensor, Tensor], Tensor]
"""A saved tensor in the form that another tensor has: on its device, or this rank's shard."""


class TornCheckpointError(RuntimeError):
    """A checkpoint differs from what was saved: a file is missing, short, altered or unreadable."""


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointState:
    """A learner between two steps.

    step: optimizer steps done. policy_version: the newest published version (a separate count).
    consumed: ids of the rollouts that this state was trained on: they may be acknowledged once it is saved, and must
        not be trained on again.
    counters: running totals, e.g. of tokens.
    model: tensors by name, each once. optimizer: tensors by "{parameter}/{key}".
    optimizer_groups: for each parameter group its parameters' "names" and its hyperparameters.
    rng: generator states by device: "cpu", and "cuda:0" ... if CUDA is in use.
    adapter: with LoRA, the digest of the model that the tensors belong to ("base"), and what they are scaled with;
        None for a whole model.
    """

    step: int
    policy_version: int
    consumed: tuple[str, ...]
    counters: Mapping[str, int]
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    optimizer_groups: tuple[Mapping[str, Any], ...]
    rng: Mapping[str, bytes]
    adapter: Mapping[str, Any] | None = None


# ------------------------------------------------------------------------------ from and to live objects


def snapshot_of(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def as_it_is(saved: Tensor, like: Tensor) -> Tensor:
    return saved


def capture(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    policy_version: int,
    consumed: Sequence[str],
    counters: Mapping[str, int],
    snapshot: Snapshot = snapshot_of,
    adapter: Mapping[str, Any] | None = None,
) -> CheckpointState:
    """Return a snapshot, copied to the CPU, of what is trained of a model, optimizer and torch's random number
    generators.

    The copy is needed because further training changes parameters and moments in place. Raises ValueError if the
    optimizer holds a parameter that is not the model's, or a state that is not a tensor.
    """
    groups = _group_names(model, optimizer)
    moments = {
        f"{name}/{key}": snapshot(_tensor(f"{name}/{key}", value))
        for names, group in zip(groups, optimizer.param_groups, strict=True)
        for name, parameter in zip(names, group["params"], strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return CheckpointState(
        step=step,
        policy_version=policy_version,
        consumed=tuple(consumed),
        counters=dict(counters),
        model={name: snapshot(tensor) for name, tensor in trained_tensors(model).items()},
        optimizer=moments,
        optimizer_groups=tuple(
            {"names": names} | {key: _plain(group[key]) for key in HYPERPARAMETERS if key in group}
            for names, group in zip(groups, optimizer.param_groups, strict=True)
        ),
        rng=_rng_states(),
        adapter=adapter,
    )


def restore(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: CheckpointState,
    place: Place = as_it_is,
    adapter: Mapping[str, Any] | None = None,
) -> None:
    """Restore `state` in place into a model and an optimizer of the same kind, and into torch's generators.

    Training continues bit for bit as from the captured state (on the same device and versions). Tied tensors are
    written once and stay tied. `state` is copied, never shared.

    Raises ValueError, before anything is changed, if `adapter`, names, shapes, dtypes or parameter groups differ.
    """
    _check_adapter(adapter, state.adapter)
    check_restorable(model, optimizer, state)
    with torch.no_grad():
        for name, target in trained_tensors(model).items():
            target.copy_(place(state.model[name], target))
    optimizer.load_state_dict(_packed_optimizer(model, optimizer, state, place))
    _set_rng_states(state.rng)


def check_restorable(model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: CheckpointState) -> None:
    """Raise ValueError if `state` is of another model or optimizer."""
    _check_tensors("model", trained_tensors(model), state.model)
    groups = _group_names(model, optimizer)
    if groups != [list(group["names"]) for group in state.optimizer_groups]:
        raise ValueError("optimizer: the parameter groups in the checkpoint differ in parameters or their order")
    held = {name for names in groups for name in names}
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in held}
    for name, tensor in state.optimizer.items():
        parameter, _, _ = name.rpartition("/")
        if parameter not in parameters:
            raise ValueError(f"optimizer: the checkpoint has {name}, which the model lacks")
        if tensor.dim() and tensor.shape != parameters[parameter].shape:  # a scalar is the step
            raise ValueError(f"optimizer: {name} is {list(tensor.shape)}, the parameter another shape")


def trained_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return what of `untied_tensors` training changes: all, or where some parameters are frozen those that are not."""
    found = untied_tensors(model)
    if all(parameter.requires_grad for parameter in model.parameters()):
        return found
    return {name: tensor for name, tensor in found.items() if tensor.requires_grad}


def untied_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers themselves by name; tied ones once, under their first name."""
    # keep_vars: without it every entry is a new view, and a tied tensor is two objects.
    by_identity: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        by_identity.setdefault(id(tensor), (name, tensor))
    return dict(by_identity.values())


def _tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is {type(value).__name__}, not a tensor")
    return value


def _plain(value: Any) -> Any:
    """Return a hyperparameter as JSON: a learning rate may be a tensor, betas are a tuple."""
    if isinstance(value, Tensor):
        return value.item()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _group_names(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Return the names of each group's parameters. Raises ValueError for a parameter that the model lacks."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    try:
        return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    except KeyError:
        raise ValueError("the optimizer holds a parameter that is not the model's") from None


def _check_adapter(own: Mapping[str, Any] | None, saved: Mapping[str, Any] | None) -> None:
    """Raise ConfigError unless both are None, or equal."""
    if own is None or saved is None:
        if own is saved:
            return
        kinds = ("a whole model", "an adapter") if saved is None else ("an adapter", "a whole model")
        raise ConfigError(f"the checkpoint is of {kinds[0]}, this run trains {kinds[1]} (learner.lora)")
    for key in {**own, **saved}:
        if own.get(key) != saved.get(key):
            raise ConfigError(
                f"the checkpoint's adapter cannot be continued: its {key} is {saved.get(key)}, that of this run "
                f"{own.get(key)}"
            )


def _check_tensors(what: str, targets: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless `saved` has the names, shapes and dtypes of `targets`."""
    if missing := sorted(targets.keys() - saved.keys()):
        raise ValueError(f"{what}: the checkpoint lacks {', '.join(missing)}")
    if unknown := sorted(saved.keys() - targets.keys()):
        raise ValueError(f"{what}: the checkpoint has {', '.join(unknown)}, which the {what} lacks")
    for name, target in targets.items():
        have, want = saved[name], target
        if have.shape != want.shape or have.dtype != want.dtype:
            raise ValueError(
                f"{what}: {name} is {have.dtype}{list(have.shape)} in the checkpoint, "
                f"{want.dtype}{list(want.shape)} in the {what}"
            )


def _packed_optimizer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: CheckpointState, place: Place
) -> dict[str, Any]:
    """Return the optimizer of `state` in the form of `load_state_dict`, which numbers the parameters."""
    groups = _group_names(model, optimizer)
    parameters = dict(model.named_parameters())
    position = {name: index for index, name in enumerate(name for names in groups for name in names)}
    packed: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.optimizer.items():
        parameter, _, key = name.rpartition("/")
        # load_state_dict does not copy, and steps would write into these tensors.
        packed.setdefault(position[parameter], {})[key] = place(tensor, parameters[parameter]).clone()
    param_groups = [
        group | {key: _as_hyperparameter(saved[key]) for key in HYPERPARAMETERS if key in saved}
        for group, saved in zip(optimizer.state_dict()["param_groups"], state.optimizer_groups, strict=True)
    ]
    return {"state": packed, "param_groups": param_groups}


def _as_hyperparameter(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _rng_states() -> dict[str, bytes]:
    states = {"cpu": torch.get_rng_state()}
    # Not is_available(): reading the state of an unused device would initialize it.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states |= {f"cuda:{i}": tensor for i, tensor in enumerate(torch.cuda.get_rng_state_all())}
    return {device: tensor.numpy().tobytes() for device, tensor in states.items()}


def _set_rng_states(states: Mapping[str, bytes]) -> None:
    for device, raw in states.items():
        state = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        if device == "cpu":
            torch.set_rng_state(state)
        elif int(device.removeprefix("cuda:")) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, device)
        else:
            logger.warning("random number state of %s not restored: no such device here", device)


# ------------------------------------------------------------------------------------------- saving


def save(folder: Path, state: CheckpointState, *, keep: int) -> Path:
    """Write `state` under `folder`, keep only the newest `keep` checkpoints, and return the path of the new one.

    On return the checkpoint is on disk, by fsync. After a crash at any moment before that, the previous one is still
    the newest, even if it is of the same step. Checkpoints of later steps (torn, or `load_newest` would have returned
    them) are not touched. Raises ValueError for keep < 1 or a state that is not JSON, and OSError.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}, expected at least 1")
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _fsync(folder.parent)
    for path in folder.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path)
    final = folder / f"step-{state.step:08d}"
    unfinished = _unfinished(final)
    _write(unfinished, state)
    if final.exists():
        # A directory cannot be replaced atomically: the former stays readable until the new one is in place.
        former = final.with_name(f"{final.name}.old")
        if former.exists():
            _discard(former)
        os.replace(final, former)
        _fsync(folder)
    os.replace(unfinished, final)
    _fsync(folder)
    _retain(folder, state.step, keep)
    return final


def _write(folder: Path, state: CheckpointState) -> None:
    """Write the four files into `folder`, which must not exist, and fsync them and it."""
    folder.mkdir()
    save_file(dict(state.model), folder / MODEL)
    save_file(dict(state.optimizer), folder / OPTIMIZER)
    (folder / STATE).write_text(_state_to_json(state), encoding="utf-8")
    files = {name: _fingerprint(folder / name) for name in (MODEL, OPTIMIZER, STATE)}
    manifest = json.dumps({"format": FORMAT, "files": files}, indent=1)
    for name in files:
        _fsync(folder / name)
    (folder / MANIFEST).write_text(manifest, encoding="utf-8")
    _fsync(folder / MANIFEST)
    _fsync(folder)


def _state_to_json(state: CheckpointState) -> str:
    fields = {
        "step": state.step,
        "policy_version": state.policy_version,
        "consumed": list(state.consumed),
        "counters": dict(state.counters),
        "optimizer_groups": [dict(group) for group in state.optimizer_groups],
        "rng": {device: base64.b64encode(raw).decode("ascii") for device, raw in state.rng.items()},
        "adapter": None if state.adapter is None else dict(state.adapter),
    }
    try:
        return json.dumps(fields, indent=1, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"the state is not JSON: {error}") from error


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _fsync(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp")


def _discard(path: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a partly removed one never looks torn."""
    os.replace(path, _unfinished(path))
    shutil.rmtree(_unfinished(path))


def _retain(folder: Path, step: int, keep: int) -> None:
    """Discard all but the newest `keep` checkpoints up to `step`, and all replaced ones."""
    kept = 0
    for path in _checkpoints(folder):
        match = _NAME.fullmatch(path.name)
        assert match is not None  # _checkpoints lists only such names
        if int(match[1]) > step:
            logger.warning("checkpoint %s is of a later step than the one just saved; left in place", path)
        elif match[2] or kept == keep:
            _discard(path)
        else:
            kept += 1


# ----------------------------------------------------------------------------------------- loading


def load_newest(folder: Path) -> CheckpointState | None:
    """Return the newest good checkpoint under `folder`; None if there are none, or no folder.

    A torn one is skipped with a warning that names the bad file. Raises TornCheckpointError if there are checkpoints
    and all are torn: an operator must decide whether to start again from step 0. Raises ValueError for a checkpoint
    of another format.
    """
    paths = _checkpoints(folder) if folder.is_dir() else []
    torn = []
    for path in paths:
        try:
            state = load(path)
        except TornCheckpointError as error:
            logger.warning("torn checkpoint skipped: %s", error)
            torn.append(path)
            continue
        for path in torn:  # kept for inspection, under a name that is not loaded
            os.replace(path, _free_name(path))
        return state
    if paths:
        raise TornCheckpointError(f"{folder}: all {len(paths)} checkpoints are torn, the newest is {paths[0].name}")
    return None


def _free_name(path: Path) -> Path:
    number = 0
    while (target := path.with_name(f"{path.name}.torn{number or ''}")).exists():
        number += 1
    return target


def load(path: Path) -> CheckpointState:
    """Return the checkpoint in directory `path`, with its tensors on the CPU.

    Raises TornCheckpointError, with the file, if one is missing, unreadable, or differs in size or digest from the
    manifest; ValueError for a checkpoint of another format.
    """
    _verify(path)
    tensors = {}
    for name in (MODEL, OPTIMIZER):
        try:
            tensors[name] = load_file(path / name)
        except SafetensorError as error:
            raise TornCheckpointError(f"{path / name} is not readable: {error}") from error
    try:
        fields = json.loads((path / STATE).read_text(encoding="utf-8"))
        return _state_from_json(fields, tensors[MODEL], tensors[OPTIMIZER])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TornCheckpointError(f"{path / STATE} is not readable: {error!r}") from error


def _checkpoints(folder: Path) -> list[Path]:
    """Return the directories of checkpoints, newest first; of the same step the replaced one last."""
    found = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    found.sort(key=lambda entry: (int(entry[0][1]), entry[0][2] is None), reverse=True)
    return [path for _, path in found]


def _verify(path: Path) -> None:
    """Raise TornCheckpointError unless the files match the manifest."""
    manifest = path / MANIFEST
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        version, files = content["format"], dict(content["files"])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise TornCheckpointError(f"{manifest} is missing") from error
    except (KeyError, TypeError, ValueError) as error:
        raise TornCheckpointError(f"{manifest} is not readable: {error!r}") from error
    if version != FORMAT:
        raise ValueError(f"{manifest}: format {version} is not known, expected {FORMAT}")
    for name in (MODEL, OPTIMIZER, STATE):
        try:
            found = _fingerprint(path / name)
        except FileNotFoundError as error:
            raise TornCheckpointError(f"{path / name} is missing") from error
        if found != files.get(name):
            raise TornCheckpointError(f"{path / name} is {found}, the manifest says {files.get(name)}")


def _state_from_json(fields: dict[str, Any], model: dict[str, Tensor], optimizer: dict[str, Tensor]) -> CheckpointState:
    return CheckpointState(
        step=int(fields["step"]),
        policy_version=int(fields["policy_version"]),
        consumed=tuple(fields["consumed"]),
        counters=dict(fields["counters"]),
        model=model,
        optimizer=optimizer,
        optimizer_groups=tuple(dict(group) for group in fields["optimizer_groups"]),
        rng={device: base64.b64decode(raw, validate=True) for device, raw in fields["rng"].items()},
        adapter=None if fields.get("adapter") is None else dict(fields["adapter"]),
    )
