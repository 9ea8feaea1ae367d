"""The one config tree: read once, validated whole, frozen, passed down.

Every key stands in `sections.py`, how a file is read in `loading.py`.
"""

from common.config.loading import (
    MAX_CONFIG_BYTES,
    check_resume,
    flatten,
    keys,
    load,
    parse,
    redis_settings,
    resumable,
)
from common.config.sections import (
    Benchmark,
    Checkpoints,
    Config,
    ConfigError,
    Data,
    Eval,
    FeederSettings,
    LearnerSettings,
    Liveness,
    Lora,
    Loss,
    Metrics,
    Redis,
    Reward,
    Rollout,
    Student,
    Teacher,
    Termination,
)

__all__ = [
    "MAX_CONFIG_BYTES",
    "Benchmark",
    "Checkpoints",
    "Config",
    "ConfigError",
    "Data",
    "Eval",
    "FeederSettings",
    "LearnerSettings",
    "Liveness",
    "Lora",
    "Loss",
    "Metrics",
    "Redis",
    "Reward",
    "Rollout",
    "Student",
    "Teacher",
    "Termination",
    "check_resume",
    "flatten",
    "keys",
    "load",
    "parse",
    "redis_settings",
    "resumable",
]
