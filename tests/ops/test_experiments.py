"""The shipped configs: none.yaml is demo.yaml without termination, and all of them say what they set."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from common.config import load
from ops.cli.main import command_line
from ops.compare.grid import read_budget, read_rows, row_config

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "ops" / "experiments"


def test_none_is_the_demo_without_termination() -> None:
    demo, none = (yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text()) for name in ("demo", "none"))
    assert (none.pop("name"), none["termination"].pop("policy")) == ("none", "none")
    assert (demo.pop("name"), demo["termination"].pop("policy")) == ("demo", "kat")
    assert none == demo


def test_the_demo_with_lora_is_the_demo_with_adapters_and_a_higher_rate() -> None:
    demo, lora = (yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text()) for name in ("demo", "demo-lora"))
    assert lora.pop("name") == "demo-lora" and demo.pop("name") == "demo"
    assert lora["learner"].pop("lora")["rank"] == 16
    assert lora["learner"].pop("learning_rate") > demo["learner"].pop("learning_rate")
    assert lora == demo


def test_chaos_before_vllm_servers_is_chaos_with_them_and_shorter_rollouts() -> None:
    plain, served = (yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text()) for name in ("chaos", "chaos-vllm"))
    assert served.pop("name") == "chaos-vllm" and plain.pop("name") == "chaos"
    assert served.pop("student") != plain.pop("student")
    assert served["rollout"].pop("engine") == "vllm" and "{port}" in served["rollout"].pop("vllm")["command"]
    longest = [one["rollout"].pop("max_completion_length") for one in (plain, served)]
    assert longest[0] > longest[1]
    assert served == plain


def test_qwen3_math_has_the_paper_s_setting() -> None:
    config = load(EXPERIMENTS / "qwen3-math.yaml")
    rule, learner, rollout = config.termination, config.learner, config.rollout
    assert (config.student.model, config.teacher.model) == ("Qwen/Qwen3-1.7B-Base", "Qwen/Qwen3-8B")
    assert (rule.window, rule.patience, rule.eta, rule.teacher_top_k) == (64, 4, 0.3, 64)
    assert (rule.min_calibration, rule.buffer_size, rule.warmup_steps) == (512, 4096, 50)
    assert (rollout.temperature, rollout.top_p, rollout.dtype) == (1.0, 0.95, "bfloat16")
    assert rollout.engine == "vllm" and rollout.vllm is not None
    assert (learner.learning_rate, learner.schedule, learner.warmup_ratio) == (1e-6, "cosine", 0.03)


def test_every_setting_of_the_demo_is_explained_or_plain() -> None:
    lines = [line for line in (EXPERIMENTS / "demo.yaml").read_text().splitlines() if line.startswith("  ")]
    assert sum("#" in line for line in lines) >= 0.9 * len(lines)


PLAYED = """\
import json, sys
from pathlib import Path

call = sys.argv[1:]
with open("calls", "a") as file:
    file.write(json.dumps(call) + "\\n")

def given(option):
    return call[call.index(option) + 1]

def report(folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.csv").write_text(call[0])
    (folder / f"{name}.png").write_text(call[0])
    (folder / f"{name}.md").write_text(f"![a]({name}.png)")

runs = Path("runs/evidence")
if call[0] == "compare":
    report(runs / given("--name"), "compare")
    for policy in given("--policies").split(","):
        for seed in range(int(given("--seeds")[-1]) + 1):
            (runs / given("--name") / f"{policy}-s{seed}").mkdir(exist_ok=True)
elif call[0] == "run":
    (runs / given("--name")).mkdir(parents=True)
    (runs / given("--name") / "summary.json").touch()
elif call[0] == "pretrain":
    folder = Path(given("--out"), *([given("--which")] if "--which" in call else []))
    folder.mkdir(parents=True)
    (folder / "pretrain.json").touch()
    (folder / "model.safetensors").touch()
else:
    assert Path(call[1]).is_dir(), f"no run {call[1]}"
    report(Path(call[1]) / call[0], call[0])
"""


def test_make_evidence_asks_for_what_katana_takes_and_keeps_what_it_gets(tmp_path: Path) -> None:
    """The script itself, with a katana that plays its part; asked again, it does no run twice."""
    script = tmp_path / "ops" / "experiments" / "evidence.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(EXPERIMENTS / "evidence.sh", script)
    katana = tmp_path / ".venv" / "bin" / "katana"
    katana.parent.mkdir(parents=True)
    katana.write_text(f"#!{sys.executable}\n{PLAYED}")
    katana.chmod(0o755)
    calls = []
    for _ in range(2):
        (tmp_path / "calls").unlink(missing_ok=True)
        done = subprocess.run(["bash", script], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        calls.append([json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()])
    assert {call[0] for call in calls[0]} == {"compare", "run", "replay", "audit", "pretrain"}
    assert {call[0] for call in calls[1]} == {"compare", "replay"}  # which know themselves what is done
    for call in calls[0]:
        _check(call)
    kept = sorted(path.name for path in (tmp_path / "docs" / "evidence").iterdir())
    made = [call for call in calls[0] if call[0] in ("compare", "replay", "audit")]
    assert len(kept) == 3 * len(made)
    for name in kept:
        if name.endswith(".md"):
            text = (tmp_path / "docs" / "evidence" / name).read_text()
            assert text == f"![a]({name[:-3]}.png)"


def _check(call: list[str]) -> None:
    def given(option: str) -> list[str]:
        return [value for name, value in itertools.pairwise(call) if name == option]

    sets = [one for one in given("--set") if not one.startswith(("student.model=", "teacher.model="))]
    command_line().parse_args(call)
    if call[0] == "compare":
        base = load(EXPERIMENTS / "demo.yaml", sets)
        budget = given("--budget")
        tokens = read_budget(budget[0]) if budget else None
        for row in read_rows(given("--policies")[0], given("--variant")):
            row_config(base, row, tokens)
    elif call[0] == "run":
        assert load(EXPERIMENTS / "demo.yaml", sets).termination.shadow
    elif call[0] == "replay":
        for sweep in given("--sweep"):
            key, _, values = sweep.partition("=")
            for value in values.split(","):
                load(EXPERIMENTS / "demo.yaml", [f"{key}={value}"])


def test_every_table_of_evidence_is_on_record() -> None:
    """No figure in a table of EVIDENCE.md that a command did not write."""
    written = {line for path in (ROOT / "docs" / "evidence").glob("*.md") for line in path.read_text().splitlines()}
    rows = [line for line in (ROOT / "EVIDENCE.md").read_text().splitlines() if line.startswith("|")]
    assert len(rows) > 30
    assert [row for row in rows if row not in written] == []
