"""The shipped configs: none.yaml is demo.yaml without termination, and all of them say what they set."""

from __future__ import annotations

from pathlib import Path

import yaml

from common.config import load

EXPERIMENTS = Path(__file__).parents[2] / "ops" / "experiments"


def test_none_is_the_demo_without_termination() -> None:
    demo, none = (yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text()) for name in ("demo", "none"))
    assert (none.pop("name"), none["termination"].pop("policy")) == ("none", "none")
    assert (demo.pop("name"), demo["termination"].pop("policy")) == ("demo", "kat")
    assert none == demo


def test_qwen3_math_has_the_paper_s_setting() -> None:
    config = load(EXPERIMENTS / "qwen3-math.yaml")
    rule, learner, rollout = config.termination, config.learner, config.rollout
    assert (config.student.model, config.teacher.model) == ("Qwen/Qwen3-1.7B-Base", "Qwen/Qwen3-8B")
    assert (rule.window, rule.patience, rule.eta, rule.teacher_top_k) == (64, 4, 0.3, 64)
    assert (rule.min_calibration, rule.buffer_size, rule.warmup_steps) == (512, 4096, 50)
    assert (rollout.temperature, rollout.top_p, rollout.dtype) == (1.0, 0.95, "bfloat16")
    assert (learner.learning_rate, learner.schedule, learner.warmup_ratio) == (1e-6, "cosine", 0.03)


def test_every_setting_of_the_demo_is_explained_or_plain() -> None:
    lines = [line for line in (EXPERIMENTS / "demo.yaml").read_text().splitlines() if line.startswith("  ")]
    assert sum("#" in line for line in lines) >= 0.9 * len(lines)
