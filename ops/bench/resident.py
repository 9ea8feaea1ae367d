"""Memory that this process has had: the most so far, and how to begin to count anew.

On Linux from the kernel's own account of the process (`VmHWM`). `getrusage` will not do there: a process that was
started by a larger one has that one's size as its most.
"""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_mb(device: str) -> float:
    """The most memory so far, in MB: of the process (CPU), or allocated on the device (CUDA)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / (1 << 20)
    if (most := _mb("VmHWM")) is not None:
        return most
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def forget_peak(device: str) -> float:
    """Let the most memory so far be what is in use now, which is returned, in MB.

    Where the system cannot do that, it is the most so far: what was freed before is then not counted again.
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / (1 << 20)
    try:
        _RESET.write_text("5")
    except OSError:
        return peak_mb(device)
    now = _mb("VmRSS")
    return peak_mb(device) if now is None else now


def _mb(name: str) -> float | None:
    """A figure of the kernel's account; None where there is none."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1]) / 1024
