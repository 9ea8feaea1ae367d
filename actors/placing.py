"""Which device `auto` is, in a process of a role."""

from __future__ import annotations

import os

from common.config import Config

AUTO = "auto"
DEVICE = "KATANA_DEVICE"
"""The variable by which `katana run` tells a role's process its device (`ops.run.devices.spread`)."""


def device_here(setting: str) -> str:
    """The device that a config's `device` means in this process.

    `auto` is what `katana run` has chosen for it. In a process that was started by itself, as in a cluster, it is the
    first GPU that torch sees, or the CPU.
    """
    if setting != AUTO:
        return setting
    if chosen := os.environ.get(DEVICE):
        return chosen
    import torch  # only where a device is used anyway

    return "cuda" if torch.cuda.is_available() else "cpu"


def with_learner_here(config: Config) -> Config:
    """The config with the learner's device in this process."""
    learner = config.learner.model_copy(update={"device": device_here(config.learner.device)})
    return config.model_copy(update={"learner": learner})
