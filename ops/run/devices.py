"""Which devices torch has on this machine; checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from common.config import Config


def devices_of(config: Config) -> Iterator[tuple[str, str]]:
    """Key and value of every device that a config names."""
    yield "rollout.device", config.rollout.device
    yield "teacher.device", config.teacher.device
    yield "learner.device", config.learner.device
    if config.eval.every_steps:
        yield "eval.device", config.eval.device


def unknown(device: str) -> str | None:
    """Why a name is not a device that torch knows, or None."""
    import torch

    try:
        found = torch.device(device)
    except RuntimeError:
        return f"{device!r} is not a device that torch knows; allowed here: {_allowed()}"
    if found.type == "cpu" and found.index not in (None, 0):
        return f"{device!r}: there is only one cpu; allowed here: {_allowed()}"
    return None


def absent(device: str) -> str | None:
    """Why a device that torch knows is not available on this machine, or None."""
    import torch

    found = torch.device(device)
    count = 1 if found.type == "cpu" else _count(found.type)
    if count == 0:
        return f"{device!r}: this machine, or this build of torch, has no {found.type}; allowed here: {_allowed()}"
    if found.index is not None and found.index >= count:
        return f"{device!r}: torch sees {count} {found.type} device(s), from 0; allowed here: {_allowed()}"
    return None


def problem_with(device: str) -> str | None:
    """Why a device cannot be used here, or None. Imports torch unless the device is `cpu`."""
    return None if device == "cpu" else unknown(device) or absent(device)


def _count(kind: str) -> int:
    """How many devices of a kind torch sees; 0 for a kind that it cannot compute on here."""
    import torch

    module = getattr(torch, kind, None)
    if module is None or not getattr(module, "is_available", lambda: False)():
        return 0
    return int(module.device_count())


def _allowed() -> str:
    import torch

    found = ["cpu"]
    for kind in ("cuda", "xpu"):
        found += [f"{kind}:{index}" for index in range(_count(kind))]
    return ", ".join([*found, "mps"] if torch.backends.mps.is_available() else found)
