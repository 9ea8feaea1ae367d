"""The command line: bad input is refused with exit code 2 and a message that names it and what is allowed."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from data_sets import put_rows, put_tiny_qwen3

from common.config import Config, ConfigError
from common.policy_names import BUILT_IN
from common.runfiles.making import lock
from common.wire.connect import connect
from ops.cli.main import main
from ops.compare.command import Request
from ops.compare.grid import read_rows, row_config
from ops.reach.embedded import EmbeddedRedis

ROOT = Path(__file__).parents[3]
DEMO = str(ROOT / "ops" / "experiments" / "demo.yaml")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    return captured.err


@pytest.fixture
def runs(tmp_path: Path) -> tuple[str, str]:
    return "--set", f"runs_dir={tmp_path}"


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("learner.max_step=3", "the nearest known one is 'learner.max_steps'"),
        ("lerner.max_steps=3", "the nearest known one is 'learner"),
        ("learner.max_steps=many", "learner.max_steps"),
        ("learner.weight_sync_steps=0", "learner.weight_sync_steps"),
        ("teacher.model=/no/such/folder", "/no/such/folder: there is no such folder"),
        ("rollout.max_completion_length=1000", "too short"),
        ("data.max_prompt_length=5", "data.max_prompt_length is 5"),
        ("redis.maxmemory_mb=20", None),
        ("data.task=poetry", "known tasks: arithmetic"),
        ("data.options={min_number: 3}", "data.options"),
        ("name=../elsewhere", "name"),
        ("nonsense", "expected section.key=value"),
    ],
)
def test_run_and_check_refuse_bad_settings(
    setting: str, told: str | None, runs: tuple[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    extra = ("--set", "learner.batch_size=4096") if told is None else ()
    told = told or "redis.maxmemory_mb: 20 MB, and a run of this config needs at least"
    assert told in refused(capsys, "run", DEMO, *runs, "--set", setting, *extra)
    assert told in refused(capsys, "check", DEMO, *runs, "--set", setting, *extra)
    assert not list(tmp_path.iterdir()), "something was written before the config was refused"


@pytest.mark.parametrize(
    ("config", "flags", "told"),
    [
        (
            "demo-teachers",
            ("--teacher", "math"),
            "--teacher math: the config has no such teacher; allowed: plain, shifted",
        ),
        ("demo-teachers", (), "--teacher is missing: a worker is for one of the teachers; allowed: plain, shifted"),
        (
            "demo",
            ("--teacher", "math"),
            "--teacher math: the config has one teacher, in `teacher`; leave --teacher out",
        ),
    ],
)
def test_a_teacher_worker_is_for_a_teacher_of_the_config(
    config: str, flags: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(ROOT / "ops" / "experiments" / f"{config}.yaml")
    assert told in refused(capsys, "teacher", path, *flags, "--set", "redis.url=redis://127.0.0.1:1/0")


def test_a_command_for_one_teacher_refuses_several(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(ROOT / "ops" / "experiments" / "demo-teachers.yaml")
    assert main(["pretrain", "--shift", "ops/models/teacher", "--out", str(tmp_path / "shifted")]) == 0
    told = refused(capsys, "bench", "score", path, "--set", f"teachers.shifted.model={tmp_path / 'shifted'}")
    assert "teachers (plain, shifted): this command works with one teacher" in told


def test_a_config_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no/such.yaml" in refused(capsys, "check", "no/such.yaml")


def test_check_shows_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", DEMO]) == 0
    told = capsys.readouterr().out
    for words in ("stop set", "tokenizer  shared", "memory", "redis      at most", "policy     kat", "ok"):
        assert words in told


@pytest.mark.parametrize(
    ("settings", "told", "untold"),
    [
        ([], "128 minima; calibrated on control; control arm 20%", "denominator"),
        (["termination.calibrate_on=completed"], "calibrated on completed; control arm", ""),
        (["termination.policy=kat_inverse", "termination.calibrate_on=all"], "calibrated on all; control arm", ""),
        (["termination.policy=kat_absolute"], "policy     kat_absolute", "calibrated on"),
        (["learner.num_iterations=3"], "steps of 32 trajectories, 3 updates on each, ", "1 updates"),
        (["learner.num_iterations=1"], "steps of 32 trajectories, reverse", "updates"),
        (["termination.policy=repetition"], "repetition: treated rollouts are cut at the first 8 tokens that", "η"),
        (["termination.policy=entropy"], "entropy: cut where the student's entropy stays low; W 16", ""),
        (["termination.policy=margin_change"], "cut where the teacher's margin falls for good: CUSUM", "η"),
        (["termination.policy=adaptive"], "windows that adapt, δ 0.05, blocks of 8 tokens, range 1 nats", "η"),
        (["loss.denominator=sequence"], "reverse_kl_topk_tail, denominator sequence, AdamW", "weighting"),
        (["loss.weighting=random_drop", "loss.retention=0.5"], "weighting random_drop (retention 0.5)", "warning"),
        (["loss.weighting=position"], "weighting position (half-life 64 tokens), AdamW", "retention"),
        (["loss.weighting=importance_position"], "weighting importance_position (γ 0.5), AdamW", "warning"),
        (["loss.weighting=entropy"], "weighting entropy (half at 0.5 nats)", "warning"),
        (["loss.weighting=random_drop"], "warning    loss.weighting random_drop drops nothing with loss.retention", ""),
        (["loss.retention=0.5"], "reverse_kl_topk_tail, AdamW", "retention"),
        (["loss.mode=jsd_topk_tail", "loss.beta=0.1"], "jsd_topk_tail, β 0.1, AdamW", "warning"),
        (["loss.mode=mixed"], "mixed, forward weight 0.5, AdamW", "warning"),
        (
            ["loss.beta=0.1"],
            "warning    loss.beta is set, and loss.mode reverse_kl_topk_tail does not read it: only",
            "",
        ),
        (["loss.mode=mixed", "loss.ratio_clip=2"], "does not read it: only reverse_kl_sampled does", "loss.beta"),
        (
            ["loss.mode=reverse_kl_sampled", "loss.estimator=clipped", "loss.horizon=all", "loss.discount=0.5"],
            "estimator clipped, return-to-go over all later tokens × 0.5, AdamW",
            "warning",
        ),
        (
            ["loss.mode=reverse_kl_sampled", "loss.horizon=3", "rollout.temperature=0.5"],
            "warning    loss.horizon adds",
            "",
        ),
        (
            ["loss.mode=reverse_kl_sampled", "loss.discount=0.5"],
            "without loss.horizon no later token counts",
            "estimator",
        ),
        (["loss.horizon=4"], "does not read it: only reverse_kl_sampled does", "return-to-go"),
        (["rollout.teacher_support=4"], "teacher support 4", "warning"),
        (["rollout.teacher_support=4", "loss.mode=reverse_kl_sampled"], "warning    rollout.teacher_support is 4", ""),
        (
            ["reward.mode=grpo", "data.num_generations=4", "loss.ratio_clip=2"],
            "reward grpo × 1 (4 rollouts a prompt, cut ones have none), AdamW",
            "warning",
        ),
        (
            ["reward.mode=grpo", "data.num_generations=3", "rollout.top_p=0.9"],
            "warning    reward.mode grpo is biased with rollout.top_p below 1",
            "",
        ),
        (["reward.mode=grpo", "data.num_generations=3"], "32 is no multiple of data.num_generations 3: groups", ""),
        (["reward.of_cut=kept"], "warning    reward.of_cut is set, and reward.mode none does not read it", "grpo"),
        (["termination.apply=mask"], "; mask: no rollout is stopped; the cut tokens are left out of the loss", ""),
        (["termination.policy=none", "termination.apply=mask"], "policy     none: no rollout is cut\n", "mask"),
        (["termination.policy=none", "termination.shadow=true"], "policy     none: no rollout is cut\n", "shadow"),
    ],
)
def test_check_shows_what_switches_change(
    settings: list[str], told: str, untold: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", DEMO, *(part for one in settings for part in ("--set", one))]) == 0
    said = capsys.readouterr().out
    assert told in said
    assert not untold or untold not in said


@pytest.mark.parametrize("name", BUILT_IN)
def test_check_describes_every_built_in_policy(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = (f"termination.policy={name}", "termination.hazard={9: 0.5}")
    assert main(["check", DEMO, *(part for one in settings for part in ("--set", one))]) == 0
    said = capsys.readouterr().out
    assert f"policy     {name}: " in said
    assert "custom" not in said and "your own" not in said


def test_check_shows_the_calibration_of_a_custom_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_calibrated.py").write_text(
        "from common.policies import Calibrated, NeverCut\n\n\n"
        "class Mine(NeverCut, Calibrated):\n    def __init__(self, settings, situation):\n        pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name, told in (
        ("own_calibrated:Mine", "a custom policy; calibrated on control; "),
        ("own_policy:Halved", "a custom policy; "),
    ):
        own = ("--set", f"termination.policy={name}", "--set", "termination.options={head: 4}")
        assert main(["check", DEMO, *own]) == 0
        assert f"{name}: {told}control arm 20%" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["check", "run", "feeder", "arbiter"])
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "the file has no such class"),
        ("Mine = 3", "the file holds something else under that name"),
        ("1 / 0", "the file fails when it is imported (ZeroDivisionError: division by zero, mine.py line 1)"),
        (None, "there is no such file"),
    ],
)
def test_a_file_without_a_policy_ends_the_commands_that_judge(
    command: str,
    text: str | None,
    told: str,
    tmp_path: Path,
    runs: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.path", [*sys.path])
    path = tmp_path / "elsewhere" / "mine.py"
    path.parent.mkdir()
    if text is not None:
        path.write_text(text)
    said = refused(capsys, command, DEMO, *runs, "--set", f"termination.policy={path}:Mine", "--set", "seed=3")
    assert f"termination.policy: '{path}:Mine': {told}" in said
    assert [one.name for one in tmp_path.iterdir()] == ["elsewhere"]


def test_check_reports_what_it_could_not_check_without_the_hub(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["check", str(ROOT / "ops" / "experiments" / "qwen3-math.yaml")]) == 0
    told = capsys.readouterr().out
    assert "unchecked  models: Qwen/Qwen3-1.7B-Base" in told
    assert "W 64, C 4, η 0.3, K 64" in told


def test_tokenizers_that_differ_are_refused_with_the_first_id(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "teacher"
    shutil.copytree(ROOT / "ops" / "models" / "teacher", other)
    text = (other / "tokenizer.json").read_text()
    tree: dict[str, Any] = json.loads(text)
    vocabulary = tree["model"]["vocab"]
    vocabulary["+"], vocabulary["-"] = vocabulary["-"], vocabulary["+"]
    (other / "tokenizer.json").write_text(json.dumps(tree))
    told = refused(capsys, "check", DEMO, "--set", f"teacher.model={other}")
    assert "tokenizers differ" in told
    assert "'+'" in told


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"layer_types": ["full_attention", "linear_attention"]},
            "layer 1 is 'linear_attention', which keeps a running",
        ),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' changes with the length"),
        (None, "no *.safetensors"),
    ],
)
def test_models_that_cannot_be_used_are_refused_before_anything_starts(
    change: dict[str, Any] | None, told: str, tmp_path: Path, runs: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "elsewhere" / "student"
    shutil.copytree(ROOT / "ops" / "models" / "student", other)
    if change is None:
        (other / "model.safetensors").unlink()
    else:
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | change))
    assert told in refused(capsys, "run", DEMO, *runs, "--set", f"student.model={other}")
    assert not (tmp_path / "demo").exists()


def test_a_redis_that_does_not_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("--set", f"redis.url=unix://{tmp_path}/none.sock", "--set", "liveness.redis_wait_s=0.3")
    assert "Redis does not answer" in refused(capsys, "feeder", DEMO, *settings)
    assert "redis.url: not set" in refused(capsys, "arbiter", DEMO)


def test_a_run_folder_that_exists(tmp_path: Path, runs: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "notes.txt").write_text("mine")
    told = refused(capsys, "run", DEMO, *runs)
    assert "exists already" in told
    assert "--resume" in told
    assert (tmp_path / "demo" / "notes.txt").read_text() == "mine"
    assert "nothing to resume" in refused(capsys, "run", DEMO, *runs, "--resume")


def test_clean_removes_a_runs_folder_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.yaml").write_text(Path(DEMO).read_text())
    assert "not a run's folder" in refused(capsys, "clean", str(folder))
    (folder / "run.json").write_text('{"run_key": "old-1"}')
    held = lock(folder)
    assert "a `katana run` is running in this folder" in refused(capsys, "clean", str(folder))
    held.close()
    assert main(["clean", str(folder)]) == 0
    assert not folder.exists()
    assert tmp_path.exists()


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    told = capsys.readouterr().out
    assert "katana run ops/experiments/demo.yaml" in told
    assert "exit codes" in told


def test_no_command_and_bad_flags_exit_with_2() -> None:
    for arguments in ([], ["run"], ["bench", "nothing"], ["eval", DEMO, "--model", "x", "--k", "0"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["top", DEMO, "--interval", "junk"], "argument --interval: 'junk': expected a number above 0"),
        (["health", "learner", DEMO, "--within", "0"], "argument --within: '0': expected a number above 0"),
        (["health", "learner", DEMO, "--within", "nan"], "argument --within: 'nan': expected a number above 0"),
        (["eval", DEMO, "--model", "x", "--k", "2.5"], "argument --k: '2.5': expected a whole number of at least 1"),
    ],
)
def test_an_invalid_number_is_reported_with_what_is_allowed(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


def test_pretrain_refuses_a_loop_for_documents_that_are_not_generated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", str(tmp_path / "out"))
    told = refused(capsys, "pretrain", "--which", "teacher", "--loop", "0.6", *out)
    assert "--loop is for the student's documents: use it with --which student or both" in told
    told = refused(capsys, "pretrain", "--which", "student", "--leave-loop", "0.02", *out)
    assert "--leave-loop is for the teacher's documents: use it with --which teacher or both" in told
    assert not (tmp_path / "out").exists()


def test_pretrain_refuses_to_change_models_that_it_copies_or_goes_on_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", str(tmp_path / "out"))
    told = refused(capsys, "pretrain", "--bilingual", "--which", "student", "--for-vllm", *out)
    assert "--bilingual needs --which student, and cannot be combined with --loop or --for-vllm" in told
    told = refused(capsys, "pretrain", "--shift", "ops/models/teacher", "--for-vllm", *out)
    assert "--shift trains no model: it cannot be combined with --loop, --leave-loop, --for-vllm or --bilingual" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "values"), [("--policies", ("none", "none,kat")), ("--seeds", ("0", "1")), ("--budget", ("steps",) * 2)]
)
def test_compare_refuses_an_option_that_is_given_twice(
    option: str, values: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["compare", DEMO, option, values[0], f"{option}={values[1]}"])
    assert exit_.value.code == 2
    said = f"argument {option}: given twice ({values[0]!r}, then {values[1]!r}); expected once"
    assert said in capsys.readouterr().err


def test_the_examples_with_custom_data_are_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The examples of README.md and docs/data.md, except for the models: nothing is wrong, and nothing unchecked."""
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    student, teacher = put_tiny_qwen3(tmp_path / "student", seed=1), put_tiny_qwen3(tmp_path / "teacher", seed=2)
    models = ["--set", f"student.model={student}", "--set", f"teacher.model={teacher}"]
    for section in ("rollout", "teacher", "learner", "eval"):  # this machine may have no GPU
        models += ["--set", f"{section}.device=cpu"]
    rows = [{"problem": f"What is {number} + 7?", "answer": str(number + 7)} for number in range(8)]
    put_rows(tmp_path / "train", rows, "jsonl")
    put_rows(tmp_path / "data" / "train", rows, "jsonl")
    (tmp_path / "my.yaml").write_text((ROOT / "docs" / "data.md").read_text().split("```yaml\n")[1].split("```")[0])
    shown = (ROOT / "README.md").read_text().replace("\\\n", " ").splitlines()
    [command] = [shlex.split(one) for one in shown if "--set data.path=train.jsonl" in one]
    assert command[:2] == ["katana", "run"]
    monkeypatch.chdir(tmp_path)
    for arguments in (["my.yaml"], command[2:]):
        assert main(["check", *arguments, *models]) == 0
        told = capsys.readouterr().out
        assert "prompts    8 rows of" in told
        assert "unchecked" not in told and "warning" not in told


Asked = list[tuple[Config, Request]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The arguments that `katana compare` passes on; nothing is run."""
    found: Asked = []

    def compare(base: Config, name: str | None, request: Request) -> int:
        found.append((base, request))
        return 0

    monkeypatch.setattr("ops.compare.command.compare", compare)
    return found


def test_a_budget_of_tokens_without_a_number_is_that_of_the_config(
    asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", DEMO, "--budget", "tokens", "--set", "learner.max_generated_tokens=900"]) == 0
    [(_, request)] = asked
    assert request.budget == "tokens:900"
    assert "learner.max_generated_tokens" in refused(capsys, "compare", DEMO, "--budget", "tokens")


def test_a_base_need_not_be_valid_with_a_policy_that_no_row_has(
    asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = ("--set", "termination.control_fraction=0")
    assert main(["compare", DEMO, "--policies", "none,fixed", *bare]) == 0
    [(base, request)] = asked
    assert base.termination.control_fraction == 0
    assert request.overrides == ["termination.control_fraction=0"]
    fixed = row_config(base, read_rows("fixed", [])[0], None).termination
    assert (fixed.policy, fixed.control_fraction) == ("fixed", 0)
    with pytest.raises(ConfigError, match=r"row 'kat': .*calibrate_on: control needs a control arm"):
        row_config(base, read_rows("kat", [])[0], None)
    # A row that leaves the policy to the config has that of the config.
    told = refused(capsys, "compare", DEMO, "--policies", "none", "--variant", "short:loss.retention=0.5", *bare)
    assert "demo.yaml: " in told and "calibrate_on: control needs a control arm" in told
    # An error with any policy is reported unchanged.
    told = refused(capsys, "compare", DEMO, "--policies", "none", *bare, "--set", "learner.max_step=3")
    assert "learner.max_steps" in told


def test_a_runs_folder_may_replace_the_config_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "moved"
    folder.mkdir()
    (folder / "config.yaml").write_text(Path(DEMO).read_text())
    (folder / "run.json").write_text('{"run_key": "demo-1"}')
    assert main(["check", str(folder)]) == 0
    capsys.readouterr()
    assert f"no run with a Redis of its own in {folder}" in refused(capsys, "dead", str(folder))
    assert "metrics.port: 0" in refused(capsys, "health", "learner", str(folder))
    (folder / "config.yaml").unlink()
    assert str(folder / "config.yaml") in refused(capsys, "check", str(folder))


def test_eval_measures_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    model = str(ROOT / "ops" / "models" / "teacher")
    assert main(["eval", DEMO, "--model", model, "--k", "2", "--set", "eval.problems=16"]) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores["k"] == 2
    assert scores["n"] == 16
    assert scores["avg@k"] > 0.9


def test_check_checks_the_memory_of_the_redis_in_the_config(
    embedded_redis: EmbeddedRedis, capsys: pytest.CaptureFixture[str]
) -> None:
    """A batch must fit into three quarters of its memory, or the run cannot continue. For a run that never waits, the
    worst case in flight must fit, including trajectories that are trained and not checkpointed."""
    client = connect(embedded_redis.url)
    limit = client.config_get("maxmemory")["maxmemory"]
    url = ("--set", f"redis.url={embedded_redis.url}")
    try:
        assert main(["check", DEMO, *url]) == 0
        capsys.readouterr()
        client.config_set("maxmemory", 18 << 20)
        told = refused(capsys, "check", DEMO, *url, "--set", "learner.batch_size=512")
        assert f"maxmemory of {embedded_redis.url}: 18 MB, and a run of this config needs at least 30 MB" in told
        assert main(["check", DEMO, *url]) == 0
        told = capsys.readouterr().out
        assert f"warning    maxmemory of {embedded_redis.url}: up to" in told
        assert "above 75 % of 18 MB: the run will wait for memory" in told and "Raise it to 20 MB" in told
        client.config_set("maxmemory", 0)
        assert main(["check", DEMO, *url]) == 0
        assert "is not set: when the machine is full the server is killed" in capsys.readouterr().out
        client.config_set("maxmemory-policy", "allkeys-lru")
        assert "allowed: noeviction" in refused(capsys, "check", DEMO, *url)
    finally:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", limit)
        client.close()
