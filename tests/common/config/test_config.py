"""The config: what is refused, in which words, and what a value may look like."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import MAX_CONFIG_BYTES, Config, ConfigError, check_resume, keys, load, parse, resumable
from common.pretrained import PACKAGE_ROOT

LEAST = "student: {model: s}\nteacher: {model: t}\n"
SEVERAL = "student: {model: s}\nteachers: {math: {model: a}, code: {model: b}}\ndata: {teacher_key: kind}\n"
SHIPPED = sorted((PACKAGE_ROOT / "ops" / "experiments").glob("*.yaml"))


def refusal(text: str | bytes, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text, overrides)
    return str(caught.value)


def leaf(config: Config, dotted: str) -> Any:
    value: Any = config
    for name in dotted.split("."):
        value = getattr(value, name)
    return value


# --- what is accepted ---


def test_everything_but_the_two_models_has_a_default() -> None:
    config, with_lora, several = parse(LEAST), parse(LEAST + "learner: {lora: {}}"), parse(SEVERAL)
    with_url, with_command = (
        parse(LEAST, [f"rollout.vllm.{one}", f"eval.vllm.{one}"]) for one in ("urls=['http://a']", "command=['{port}']")
    )
    assert {name for name, default, _ in keys() if default == "required"} == {"student.model", "teacher.model"}
    for name, default, meaning in keys():
        assert meaning.endswith((".", "…", ")")), f"{name} has no meaning"
        if default != "required":
            of = with_lora if name.startswith("learner.lora.") else several if name == "teacher" else config
            if ".vllm." in name:  # one of these two is given
                of = with_command if name.endswith(".urls") else with_url
            assert leaf(of, name) == yaml.safe_load(default), name


def test_an_optional_section_is_made_by_setting_one_of_its_keys() -> None:
    assert parse(LEAST).learner.lora is None
    for text in (LEAST, LEAST + "learner: {lora: null}"):
        lora = parse(text, ["learner.lora.alpha=1e1"]).learner.lora
        assert lora is not None and (lora.rank, lora.alpha, lora.target_modules) == (16, 10.0, "all-linear")
    assert parse(LEAST, ["learner.lora.rank=8", "learner.lora=null"]).learner.lora is None
    named = parse(LEAST, ["learner.lora.target_modules=[q_proj, v_proj]"])
    assert parse(named.to_yaml()) == named


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner.lora.rank=0", "learner.lora.rank: Input should be greater than or equal to 1"),
        ("learner.lora.dropout=1", "learner.lora.dropout: Input should be less than 1"),
        ("learner.lora.r=8", "unknown key 'learner.lora.r'; the nearest known one is 'learner.lora."),
        ("learner.lora.target_modules=q_proj", "target_modules: expected all-linear, or a list of names of layers"),
        ("learner.lora.target_modules=[]", "target_modules: expected all-linear, or a list of names of layers"),
    ],
)
def test_what_lora_refuses(override: str, message: str) -> None:
    assert message in refusal(LEAST, override)


def test_dropout_is_refused_where_the_loss_needs_the_student_that_wrote() -> None:
    text = refusal(LEAST, "learner.lora.dropout=0.1", "loss.mode=reverse_kl_sampled")
    assert "learner.lora.dropout is 0.1; with loss.mode reverse_kl_sampled only 0 is allowed" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.num_generations=1",), "data.num_generations is 1, and at least 2 are needed"),
        (
            ("data.task=dataset", "data.path=x.jsonl", "data.verifier=none", "eval.every_steps=0"),
            "reward.mode grpo needs verdicts: data.verifier is none; allowed: math-verify, exact",
        ),
        (("reward.weight=0",), "reward.weight: Input should be greater than 0"),
        (("reward.of_cut=wrong",), "reward.of_cut: Input should be 'none', 'as_wrong' or 'kept'"),
        (("reward.mode=rloo",), "reward.mode: Input should be 'none', 'grpo' or 'reinforce_leave_one_out'"),
        (("learner.lora.dropout=0.1",), "learner.lora.dropout is 0.1; with reward.mode grpo only 0 is allowed"),
    ],
)
def test_what_a_reward_needs(overrides: tuple[str, ...], message: str) -> None:
    least = ("reward.mode=grpo", "data.num_generations=4")
    assert parse(LEAST, least).reward.weight == 1.0
    assert message in refusal(LEAST, *least, *overrides)


def test_without_a_mode_nothing_of_a_reward_is_read() -> None:
    assert parse(LEAST, ["reward.of_cut=kept", "reward.weight=3"]).data.num_generations == 1


def test_adapters_are_trained_by_one_process() -> None:
    text = refusal(LEAST, "learner.lora.rank=8", "learner.nproc_per_node=2")
    assert "learner.nproc_per_node is 2; with learner.lora only 1 is allowed" in text


def test_a_resumed_run_keeps_its_adapters() -> None:
    before = parse(LEAST, ["learner.lora.rank=8"])
    for change in ("learner.lora.rank=16", "learner.lora.alpha=8", "learner.lora.target_modules=[q_proj]"):
        with pytest.raises(ConfigError, match=r"learner\.lora: .* cannot become .* on --resume"):
            check_resume(before, parse(LEAST, ["learner.lora.rank=8", change]))
    with pytest.raises(ConfigError, match=r"learner\.lora: .* cannot become None on --resume"):
        check_resume(before, parse(LEAST))


def test_the_papers_values_are_the_defaults() -> None:
    rule = parse(LEAST).termination
    assert (rule.window, rule.patience, rule.stride, rule.eta, rule.teacher_top_k) == (64, 4, 1, 0.3, 64)
    assert (rule.min_calibration, rule.buffer_size, rule.warmup_steps, rule.control_fraction) == (512, 4096, 50, 0.05)
    assert (rule.calibrate_on, rule.control_trains, rule.policy) == ("control", "kept", "kat")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_config_loads(path: Path) -> None:
    config = load(path)
    assert parse(config.to_yaml()) == config


def test_there_are_shipped_configs() -> None:
    assert "demo.yaml" in {path.name for path in SHIPPED}


def test_the_tree_survives_yaml() -> None:
    config = parse(LEAST, ["data.options={max_numbers: 3}", "loss.ratio_clip=2", "learner.learning_rate=1e-7",
                           "name=a.b-c_1", "student.model='true'"])  # fmt: skip
    again = parse(config.to_yaml())
    assert again == config
    assert again.learner.learning_rate == 1e-7
    assert again.data.options == {"max_numbers": 3}
    assert again.student.model == "true"


def test_a_horizon_needs_an_estimator_that_weighs_by_advantages() -> None:
    sampled = LEAST + "loss: {mode: reverse_kl_sampled, estimator: %s, horizon: %s}"
    assert parse(sampled % ("clipped", "all")).loss.horizon == "all"
    assert "loss: horizon is 8; with estimator k2 only 0 is allowed" in refusal(sampled % ("k2", "8"))
    assert "loss: horizon is 'all'; with estimator k3 only 0 is allowed" in refusal(sampled % ("k3", "all"))
    clipped = LEAST + "loss: {mode: reverse_kl_sampled, estimator: clipped, ratio_clip: 2}"
    assert "loss: ratio_clip is 2; with estimator clipped only null is allowed" in refusal(clipped)
    parse(LEAST + "loss: {estimator: k2, horizon: 8}")  # not read by the default mode


def test_a_config_is_frozen() -> None:
    config = parse(LEAST)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 4  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        config.learner.batch_size = 4  # type: ignore[misc]


@pytest.mark.parametrize("text", ["1e-6", "1.0e-6", "0.000001", "'1e-6'"])
def test_small_numbers_are_floats_however_they_are_written(text: str) -> None:
    assert parse(LEAST + f"learner: {{learning_rate: {text}}}").learner.learning_rate == 1e-6
    assert parse(LEAST, [f"learner.learning_rate={text}"]).learner.learning_rate == 1e-6


def test_an_integer_stands_for_a_float_and_not_the_other_way_round() -> None:
    config = parse(LEAST + "rollout: {temperature: 2}\nloss: {ratio_clip: 3}")
    assert (config.rollout.temperature, config.loss.ratio_clip) == (2.0, 3.0)
    assert isinstance(config.rollout.temperature, float)
    assert "learner.max_steps" in refusal(LEAST + "learner: {max_steps: 2.5}")
    assert "learner.max_steps" in refusal(LEAST + "learner: {max_steps: 2.0}")


def test_length_and_folder_follow_from_the_keys() -> None:
    config = parse(LEAST + "name: x\nruns_dir: /r\ndata: {max_prompt_length: 5}")
    assert config.max_length == 5 + 192
    assert config.run_dir == Path("/r/x")


# --- what is refused, and how ---


@pytest.mark.parametrize(
    ("text", "unknown", "nearest"),
    [
        ("learnr: {max_steps: 3}", "learnr", "learner"),
        ("learner: {max_step: 3}", "learner.max_step", "learner.max_steps"),
        ("termination: {pateince: 3}", "termination.pateince", "termination.patience"),
        ("rollout: {top_k: 3}", "rollout.top_k", "rollout.top_p"),
        ("termination: {learning_rate: 3}", "termination.learning_rate", "learner.learning_rate"),
        ("nmae: x", "nmae", "name"),
    ],
)
def test_an_unknown_key_names_the_nearest(text: str, unknown: str, nearest: str) -> None:
    assert f"unknown key {unknown!r}; the nearest known one is {nearest!r}" in refusal(LEAST + text)


def test_a_key_like_no_other_names_the_sections() -> None:
    message = refusal(LEAST + "zzzzqqqq: 1")
    assert "unknown key 'zzzzqqqq'; known sections: " in message
    assert "termination" in message


def test_all_that_is_wrong_is_said_at_once() -> None:
    message = refusal("student: {model: s}\nlearner: {max_steps: x, batchsize: 3}")
    assert "teacher: missing; this key has no default" in message
    assert "learner.max_steps: " in message
    assert "'learner.batch_size'" in message


@pytest.mark.parametrize(
    ("text", "where", "found"),
    [
        ("learner: {max_steps: many}", "learner.max_steps", "'many'"),
        ("learner: {max_steps: true}", "learner.max_steps", "True"),
        ("learner: {max_steps: '7'}", "learner.max_steps", "'7'"),
        ("learner: {learning_rate: true}", "learner.learning_rate", "True"),
        ("learner: {learning_rate: fast}", "learner.learning_rate", "'fast'"),
        ("learner: {learning_rate: [1]}", "learner.learning_rate", "[1]"),
        ("learner: 5", "learner", "5"),
        ("learner:", "learner", "None"),
        ("name: 5", "name", "5"),
        ("feeder: {record_traces: 1}", "feeder.record_traces", "1"),
        ("data: {options: {a: b}}", "data.options.a", "'b'"),
        ("termination: {policy: kta}", "termination.policy", "'kta'"),
        ("rollout: {dtype: int8}", "rollout.dtype", "'int8'"),
        # Ranges.
        ("learner: {max_steps: 0}", "learner.max_steps", "0"),
        ("learner: {max_generated_tokens: 0}", "learner.max_generated_tokens", "0"),
        ("learner: {learning_rate: 0}", "learner.learning_rate", "0.0"),
        ("learner: {learning_rate: .nan}", "learner.learning_rate", "nan"),
        ("learner: {learning_rate: .inf}", "learner.learning_rate", "inf"),
        ("learner: {learning_rate: 1e999}", "learner.learning_rate", "inf"),
        ("learner: {beta1: 1}", "learner.beta1", "1.0"),
        ("rollout: {top_p: 1.01}", "rollout.top_p", "1.01"),
        ("rollout: {teacher_support: -1}", "rollout.teacher_support", "-1"),
        ("rollout: {teacher_support: 2.5}", "rollout.teacher_support", "2.5"),
        ("loss: {mode: forward_kl}", "loss.mode", "'forward_kl'"),
        ("loss: {beta: -0.1}", "loss.beta", "-0.1"),
        ("loss: {beta: 1.1}", "loss.beta", "1.1"),
        ("loss: {forward_weight: 2}", "loss.forward_weight", "2.0"),
        ("loss: {importance_gamma: -0.5}", "loss.importance_gamma", "-0.5"),
        ("loss: {estimator: k4}", "loss.estimator", "'k4'"),
        ("loss: {clip_range: 0}", "loss.clip_range", "0.0"),
        ("loss: {clip_range: 1}", "loss.clip_range", "1.0"),
        ("loss: {horizon: -1}", "loss.horizon", "-1"),
        ("loss: {horizon: some}", "loss.horizon", "'some'"),
        ("loss: {horizon: true}", "loss.horizon", "True"),
        ("loss: {discount: 0}", "loss.discount", "0.0"),
        ("loss: {discount: 1.1}", "loss.discount", "1.1"),
        ("rollout: {top_p: 0}", "rollout.top_p", "0.0"),
        ("termination: {eta: 1}", "termination.eta", "1.0"),
        ("termination: {control_fraction: -0.1}", "termination.control_fraction", "-0.1"),
        ("redis: {shards: 0}", "redis.shards", "0"),
        ("redis: {maxmemory_mb: 19}", "redis.maxmemory_mb", "19"),
        ("metrics: {port: 65536}", "metrics.port", "65536"),
        ("seed: -1", "seed", "-1"),
        ("seed: 2147483648", "seed", "2147483648"),
        ("name: ../up", "name", "'../up'"),
        ("name: a/b", "name", "'a/b'"),
        ("name: ''", "name", "''"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(text: str, where: str, found: str) -> None:
    message = refusal(LEAST + text)
    assert f"{where}: " in message
    assert message.endswith(f"found {found}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("liveness: {claim_s: 5.9}", "claim_s 5.9 is under three heartbeats (6 s)"),
        ("liveness: {busy_s: 7}", "busy_s 7 is under claim_s 8"),
        ("termination: {control_fraction: 0}", "calibrate_on: control needs a control arm"),
        ("termination: {min_calibration: 5000}", "min_calibration 5000 is above buffer_size 4096"),
        ("termination: {window: 193}", "= 193 is above rollout.max_completion_length 192"),
        ("termination: {window: 64, grace_tokens: 129}", "= 193 is above rollout.max_completion_length 192"),
        ("termination: {policy: fixed, fixed_tokens: 193}", "nothing would be cut"),
        ("data: {task: dataset}", "task: dataset and path need each other"),
        ("data: {path: rows.jsonl}", "task: dataset and path need each other"),
        ("data: {system_prompt: x}", "system_prompt is for chat templates: it needs chat: true"),
        ("data: {template_options: {enable_thinking: false}}", "template_options is for chat templates"),
        ("data: {task: dataset, path: rows.jsonl}", "name benchmarks in eval.data, or set eval.every_steps: 0"),
        ("eval: {data: {amc: {path: amc.jsonl}}}", "eval.data needs data.task: dataset"),
        ("data: {task: dataset, path: r, verifier: none}\neval: {data: {a: {path: a}}}", "data.verifier is none"),
        ("eval: {data: {'a b': {path: a}}}", "'a b' is not a name for a benchmark"),
        (
            "eval: {data: {amc: {path: a, prompt: q}}}",
            "unknown key 'eval.data.amc.prompt'; a benchmark has the keys path",
        ),
        ("eval: {data: {amc: {k: 8}}}", "eval.data.amc.path: missing"),
    ],
)
def test_keys_that_do_not_fit_each_other_are_refused(text: str, words: str) -> None:
    assert words in refusal(LEAST + text)


@pytest.mark.parametrize(
    "text",
    [
        "learner: {weight_sync_steps: 9}",
        "learner: {weight_sync_steps: 4, max_staleness: 0}",
        "learner: {weight_sync_steps: 1, max_staleness: 0}",
        "liveness: {claim_s: 6}",
        "termination: {control_fraction: 0, calibrate_on: all}",
        "termination: {control_fraction: 0, policy: none}",
        "termination: {window: 192}",
        "termination: {window: 500, policy: none}",
        "termination: {policy: fixed, fixed_tokens: 192}",
    ],
)
def test_keys_that_just_fit_each_other_are_taken(text: str) -> None:
    parse(LEAST + text)


# --- --set ---


def test_overrides_are_read_as_yaml_and_the_last_one_counts() -> None:
    config = parse(
        LEAST,
        [
            "learner.max_steps=7",
            "rollout.top_p=0.5",
            "feeder.record_traces=false",
            "feeder.concurrency=null",
            "data.options={max_numbers: 4}",
            "data.options.min_numbers=2",
            "name=other",
            "learner.max_steps=8",
            "termination.policy=none",
        ],
    )
    assert (config.learner.max_steps, config.rollout.top_p, config.name) == (8, 0.5, "other")
    assert (config.feeder.record_traces, config.feeder.concurrency) == (False, None)
    assert config.data.options == {"max_numbers": 4, "min_numbers": 2}


def test_what_follows_the_first_equals_sign_is_the_value() -> None:
    assert parse(LEAST, ["student.model=a=b"]).student.model == "a=b"
    assert parse(LEAST, ["redis.url=unix:///s?db=1"]).redis.url == "unix:///s?db=1"


# --- several teachers ---


def test_one_teacher_is_a_teacher_without_a_name() -> None:
    one, several = parse(LEAST), parse(SEVERAL)
    assert {name: teacher.model for name, teacher in one.all_teachers.items()} == {"": "t"}
    assert {name: teacher.model for name, teacher in several.all_teachers.items()} == {"math": "a", "code": "b"}
    assert one.only_teacher.model == "t"
    with pytest.raises(ConfigError, match=r"teachers \(math, code\): this command works with one teacher"):
        _ = several.only_teacher
    assert parse(several.to_yaml()) == several and parse(one.to_yaml()) == one


def test_each_of_several_teachers_has_the_keys_of_one() -> None:
    config = parse(SEVERAL, ["teachers.math.slots=4", "teachers.code.workers=2", "teachers.bio.model=c"])
    assert [(teacher.slots, teacher.workers) for teacher in config.all_teachers.values()] == [(4, 1), (32, 2), (32, 1)]
    message = refusal(SEVERAL, "teachers.math.slot=4")
    assert "unknown key 'teachers.math.slot'; a teacher has the keys model, dtype, device" in message
    assert "teachers.math.slots: " in refusal(SEVERAL, "teachers.math.slots=0")
    assert "teachers.bio.model: missing" in refusal(SEVERAL, "teachers.bio.slots=4")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SEVERAL + "teacher: {model: t}", "teacher: given beside teachers (math, code); allowed: one teacher in"),
        (SEVERAL.replace("{teacher_key: kind}", "{}"), "teachers needs data.teacher_key"),
        (LEAST + "data: {teacher_key: kind}", "data.teacher_key needs teachers"),
        (SEVERAL.replace("math:", "a:b:"), "'a:b' is not a name for a teacher; allowed: up to 32 letters"),
        (SEVERAL.replace("math:", "'':"), "'' is not a name for a teacher"),
        (SEVERAL.replace("math:", f"{'m' * 33}:"), "is not a name for a teacher"),
        ("student: {model: s}\nteachers: {}", "teacher: missing; this key has no default"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(text: str, words: str) -> None:
    assert words in refusal(text)


def test_a_resumed_run_may_change_of_several_teachers_what_it_may_of_one() -> None:
    before = parse(SEVERAL)
    check_resume(before, parse(SEVERAL, ["teachers.math.workers=3", "teachers.code.device=auto"]))
    for item, words in (
        ("teachers.math.model=c", "teachers.math.model: 'a' cannot become 'c'"),
        ("teachers.bio.model=c", "teachers.bio.model: None cannot become 'c'"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_resume(before, parse(SEVERAL, [item]))
        assert words in str(caught.value)
    with pytest.raises(ConfigError, match=r"teacher\.model: 't' cannot become None"):
        check_resume(parse(LEAST), before)


def test_deterministic_is_for_each_of_several_teachers() -> None:
    for item in ("teachers.code.device=cuda", "teachers.code.device_map=auto"):
        key, value = item.split("=")
        assert f"{key} is {value!r}; with deterministic only" in refusal(SEVERAL, "deterministic=true", item)


def test_overrides_leave_what_an_alias_shares_alone() -> None:
    config = parse("student: &model {model: s}\nteacher: *model", ["teacher.model=t"])
    assert (config.student.model, config.teacher.model) == ("s", "t")


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("learner.max_steps", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("", "expected section.key=value"),
        ("seed.x=3", "'seed' is not a section"),
        ("learner.max_steps.x=3", "'max_steps' is not a section"),
        ("learner.max_steps=[", "not valid YAML"),
        ("seed=2001-99-99", "not valid YAML"),
        ("seed=!!int ''", "not valid YAML"),
        ("seed=!!python/object:os.system x", "not valid YAML"),
        ("seed=" + "[" * 3000, "not valid YAML"),
        ("learner.max_stesp=3", "the nearest known one is 'learner.max_steps'"),
        ("..=3", "unknown key"),
        ("learner.max_steps=3.5", "learner.max_steps"),
    ],
)
def test_a_bad_override_says_what_is_wrong(item: str, words: str) -> None:
    text = LEAST + "seed: 1\nlearner: {max_steps: 2}\n"
    assert words in refusal(text, item)


# --- whatever is fed in ---


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"- 1",
        b"just text",
        b"\x00\x01\x02",
        b"\xff\xfe\x00\x00",
        bytes(range(256)),
        b"a: [1",
        b"{" * 5000,
        b"- " * 20000,
        b"a: " * 3000,
        b"a: &a [*a]",
        b"&root\nstudent: *root\nteacher: *root",
        LEAST.encode() + b"learner: &l {max_steps: *l}",
        b"2001-99-99",
        b"!!int ''",
        b"!!bool x",
        b"!!float ''",
        b"!!timestamp x",
        b"!!binary '?'",
        b"!!python/object/apply:os.system [true]",
        b"{[a]: 1}",
        b"1: 2\n2.5: 3\nnull: 4",
        LEAST.encode() + b"data: {options: {1: 2}}",
        LEAST.encode() + b"seed: 0x" + b"f" * 5000,
        LEAST.encode() + b"seed: " + b"9" * 5000,
        LEAST.encode() + b"learner: {learning_rate: " + b"9" * 4000 + b"}",
        LEAST.encode() + b'name: "\\ud800"',
        LEAST.encode() + b"seed: 1\nseed: x",
        b"#" * (MAX_CONFIG_BYTES + 1),
        b"a: " + b"x" * (MAX_CONFIG_BYTES + 1),
    ],
)
def test_rubbish_is_a_config_error(raw: bytes) -> None:
    assert len(refusal(raw)) < 3000


def test_a_short_yaml_that_unfolds_without_end_is_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    message = refusal("\n".join([*lines, "student: *a11", "teacher: {model: *a11}"]))
    assert "student: " in message
    assert len(message) < 10_000


@given(st.binary(max_size=300) | st.text(max_size=300))
@settings(max_examples=150, deadline=None)
def test_any_bytes_or_text_are_a_config_or_a_config_error(raw: bytes | str) -> None:
    refusal(raw)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from([name for name, _, _ in keys()])


@given(st.lists(st.tuples(names, values), min_size=1, max_size=4))
@settings(max_examples=250, deadline=None)
def test_any_value_anywhere_is_taken_and_comes_back_or_is_refused(changes: list[tuple[str, Any]]) -> None:
    tree: dict[str, Any] = {"student": {"model": "s"}, "teacher": {"model": "t"}}
    for name, value in changes:
        section, _, last = name.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[last] = value
    text = yaml.safe_dump(tree, allow_unicode=True)
    try:
        config = parse(text)
    except ConfigError:
        return
    assert parse(config.to_yaml()) == config
    assert all(math.isfinite(number) for number in numbers_of(config.model_dump()))


def numbers_of(tree: Any) -> list[float]:
    if isinstance(tree, dict):
        return [number for value in tree.values() for number in numbers_of(value)]
    return [tree] if isinstance(tree, float) else []


@given(st.text(max_size=40), st.text(max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_override_is_taken_or_is_a_config_error(path: str, value: str) -> None:
    try:
        parse(LEAST, [f"{path}={value}"])
    except ConfigError:
        return


def test_a_file_that_cannot_be_read_is_a_config_error(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            load(path)
    (tmp_path / "c.yaml").write_text("student: {}")
    with pytest.raises(ConfigError, match=r"c\.yaml: student\.model: missing"):
        load(tmp_path / "c.yaml")


# --- resume ---


def test_a_resumed_run_may_change_where_and_how_long_it_runs() -> None:
    before = parse(LEAST)
    check_resume(before, before)
    check_resume(before, parse(LEAST, ["learner.max_steps=7", "rollout.workers=3", "redis.url=redis://x"]))
    check_resume(before, parse(LEAST, ["learner.max_generated_tokens=9000"]))


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("learner.batch_size=3", "learner.batch_size: 32 cannot become 3"),
        ("seed=3", "seed: 0 cannot become 3"),
        ("student.model=other", "student.model: 's' cannot become 'other'"),
        ("data.options={max_numbers: 4}", "data.options: {} cannot become {'max_numbers': 4}"),
        ("redis.shards=8", "redis.shards: 16 cannot become 8"),
    ],
)
def test_a_resumed_run_may_not_change_what_is_on_record(item: str, words: str) -> None:
    with pytest.raises(
        ConfigError, match=r"Keys that may change: checkpoints\.every_s, checkpoints\.every_steps"
    ) as caught:
        check_resume(parse(LEAST), parse(LEAST, [item]))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("learner.weight_sync_steps=2", "learner.weight_sync_steps is 2; with deterministic only 1 is allowed"),
        ("teacher.device=cuda", "teacher.device is 'cuda'; with deterministic only 'cpu' is allowed"),
        ("rollout.device=auto", "rollout.device is 'auto'; with deterministic only 'cpu' is allowed"),
        ("checkpoints.every_s=60", "checkpoints.every_s is 60; with deterministic only null is allowed"),
        (
            "learner.max_generated_tokens=9",
            "learner.max_generated_tokens is 9; with deterministic only null is",
        ),
    ],
)
def test_what_deterministic_does_not_go_with(item: str, words: str) -> None:
    parse(LEAST, [item])
    with pytest.raises(ConfigError) as caught:
        parse(LEAST, ["deterministic=true", item])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "key", ["rollout.threads", "learner.threads", "learner.micro_batch_tokens", "learner.nproc_per_node"]
)
def test_a_deterministic_run_may_not_change_the_order_of_its_sums(key: str) -> None:
    check_resume(parse(LEAST), parse(LEAST, [f"{key}=3"]))
    before = parse(LEAST, ["deterministic=true"])
    check_resume(before, parse(LEAST, ["deterministic=true", "rollout.slots=3", "learner.max_steps=7"]))
    with pytest.raises(ConfigError, match=f"{key}: .* cannot become 3"):
        check_resume(before, parse(LEAST, ["deterministic=true", f"{key}=3"]))
    with pytest.raises(ConfigError, match="deterministic: True cannot become False"):
        check_resume(before, parse(LEAST))


def test_what_decides_an_order_of_sums_is_not_resumable_where_runs_are_deterministic() -> None:
    assert resumable(deterministic=False) - resumable(deterministic=True) == {
        "learner.nproc_per_node",
        "rollout.threads",
        "teacher.threads",
        "learner.threads",
        "learner.micro_batch_tokens",
        "learner.gradient_checkpointing",
        "learner.compile",
        "rollout.engine",
    }


# --- who a role is to Redis ---

SERVED = LEAST + "redis: {url: 'redis://h:6379/0'"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LEAST + "redis: {url: 'redis://:s3cret@h:1/0'}", "redis.url: user and password do not belong in a URL"),
        (LEAST + "redis: {url: 'redis://me:s3cret@h:1/0'}", "redis.username and redis.password_file"),
        (LEAST + "redis: {url: 'redis://h:1/0?password=s3cret'}", "redis.username and redis.password_file"),
        (LEAST + "redis: {url: 'redis://:s3/cret@h:1/0'}", "redis.username and redis.password_file"),
        (LEAST + "redis: {url: 'redis://:s3cret#@h:1/0'}", "redis.username and redis.password_file"),
        (SERVED + ", broker_url: 'unix://:s3cret@/s'}", "redis.broker_url: user and password do not belong"),
        (LEAST + "redis: {url: 'rediss://h:1/0?ssl_cert_reqs=none'}", "allowed: redis://HOST:PORT/DB"),
        (LEAST + "redis: {url: 'http://h:1/0'}", "allowed: redis://HOST:PORT/DB"),
        (LEAST + "redis: {url: 'redis://h:1;redis://g:1'}", "allowed: redis://HOST:PORT/DB"),
        (LEAST + "redis: {url: h}", "allowed: redis://HOST:PORT/DB"),
        (LEAST + "redis: {password_file: s3cret}", "redis: password_file needs redis.url"),
        (LEAST + "redis: {ca_file: s3cret}", "redis: ca_file needs redis.url"),
        (SERVED + ", username: s3cret}", "redis: username needs password_file"),
        (SERVED + ", password_file: '{rolle}'}", "redis: password_file: only {role} is filled in"),
        (SERVED + ", username: '{role', password_file: p}", "redis: username: only {role} is filled in"),
        (SERVED + ", cert_file: c}", "redis: cert_file and key_file need each other"),
        (SERVED + ", ca_file: c}", "redis: ca_file is for TLS: url or broker_url must begin with rediss://"),
    ],
)
def test_what_lets_nobody_in_is_refused_and_no_secret_is_shown(text: str, words: str) -> None:
    message = refusal(text)
    assert words in message
    assert "s3" not in message


def test_a_role_is_filled_in() -> None:
    names = {"username": "k-{role}", "password_file": "/s/{role}", "ca_file": "c", "cert_file": "d", "key_file": "k"}
    config = parse(LEAST + yaml.safe_dump({"redis": {"url": "rediss://h:1/0", **names}}))
    assert config.redis.access("learner") == names | {"username": "k-learner", "password_file": "/s/learner"}
    assert parse(config.to_yaml()) == config
    assert set(parse(LEAST).redis.access("learner").values()) == {None}


@pytest.mark.parametrize(
    ("url", "broker"),
    [
        ("redis://h:1/0", "redis://h:1/1"),
        ("redis://h", "redis://h/1"),
        ("rediss://[::1]:6379/3", "rediss://[::1]:6379/1"),
        ("unix:///a b/redis.sock?db=0", "unix:///a b/redis.sock?db=1"),
    ],
)
def test_the_broker_is_database_1_unless_it_is_named(url: str, broker: str) -> None:
    assert parse(LEAST, [f"redis.url='{url}'"]).redis.broker == broker
    assert parse(LEAST, [f"redis.url='{url}'", "redis.broker_url='redis://b:1/2'"]).redis.broker == "redis://b:1/2"


def test_text_that_cannot_be_printed_is_refused() -> None:
    for text in ("a\\0b", "a\\nb", "\\ud800", "a\\Lb"):
        assert "runs_dir: contains a character that cannot be printed" in refusal(LEAST + f'runs_dir: "{text}"')
    assert "options: contains a character" in refusal(LEAST + 'data: {options: {"a\\0": 1}}')
    assert parse(LEAST + "runs_dir: /läufe/走").runs_dir == "/läufe/走"


@pytest.mark.parametrize(
    "text", ["seed: 1\nseed: 2\n", "termination: {policy: random_matched, hazard: {5: 0.1, 5: 0.2}}\n"]
)
def test_a_key_that_is_there_twice_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="a key occurs twice"):
        parse(LEAST + text)


def test_the_learner_does_not_compute_in_float16() -> None:
    told = refusal(LEAST, "learner.dtype=float16")
    assert "learner.dtype" in told
    assert "loss scaling" in told and "allowed: float32, bfloat16" in told
