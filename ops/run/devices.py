"""Which devices torch has on this machine; checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from actors.placing import AUTO
from common.config import Config
from common.teachers import process, section


def devices_of(config: Config) -> Iterator[tuple[str, str]]:
    """Key and value of every device that a config names and somebody computes on; `auto` is not one."""
    named = [("rollout.device", config.rollout.device)] if config.rollout.engine == "slots" else []
    named += [(f"{section(name)}.device", teacher.device) for name, teacher in config.all_teachers.items()]
    if config.learner.device != AUTO:
        named += [("learner.device", config.learner.device_of(rank)) for rank in range(config.learner.nproc_per_node)]
    if config.eval.every_steps and config.eval.engine == "slots":
        named.append(("eval.device", config.eval.device))
    yield from ((key, device) for key, device in named if device != AUTO)


def spread(config: Config, gpus: int) -> dict[str, str]:
    """The device of each process of a run on one machine with so many GPUs, by the process's name.

    `auto`, with one GPU, is that one for all. With several, the learner has the first ones, one for each of its
    processes: it needs the most memory. Teacher workers (teacher after teacher), rollout workers and the evaluator are
    dealt over the others in this order; over all, if none is left. Who has a vLLM server write needs none.
    """
    given = {"learner": config.learner.device}
    for name, teacher in config.all_teachers.items():
        given |= {f"{process(name)}-{n}": teacher.device for n in range(teacher.workers)}
    if config.rollout.engine == "slots":
        given |= {f"rollout-{n}": config.rollout.device for n in range(config.rollout.workers)}
    if config.eval.every_steps and config.eval.engine == "slots":
        given |= {"evaluator": config.eval.device}
    others = [name for name in given if name != "learner"]
    everywhere = [f"cuda:{index}" for index in range(gpus)] or ["cpu"]
    free = everywhere[config.learner.nproc_per_node :] or everywhere
    chosen = {name: free[place % len(free)] for place, name in enumerate(others)}
    named = {"learner": everywhere[0], **chosen}
    return {name: named[name] if device == AUTO else device for name, device in given.items()}


def uses_auto(config: Config) -> bool:
    """Whether a device of the config is `auto`."""
    teachers = (teacher.device for teacher in config.all_teachers.values())
    return AUTO in (config.rollout.device, config.learner.device, config.eval.device, *teachers)


def gpus_here() -> int:
    """How many GPUs torch sees; CUDA is not initialised."""
    return _count("cuda")


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
