"""The sections of the config tree: every key with its default, limits and meaning. `loading.py` reads a file into it.

A key's meaning is its `Field` description; the table of docs/configuration.md is made from these, and a test compares
the two. What `--resume` may change is marked on the key.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from common import policy_names
from common.teachers import ALLOWED, is_name, section

MOST_SLOTS = 256  # that `auto` chooses
MOST_EVAL_SLOTS = 64  # the same, of the evaluator
MOST_VLLM_SLOTS = 64  # the same, before a vLLM server: with more it does no other work, and a worker only waits

_SERVER = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+")

Dtype = Literal["float32", "bfloat16", "float16"]
Tracker = Literal["tensorboard", "wandb"]
TemplateColumn = Literal["tools", "documents", "chat_template_kwargs"]
LossMode = Literal["reverse_kl_topk_tail", "forward_kl_topk_tail", "jsd_topk_tail", "mixed", "reverse_kl_sampled"]

# A key that `--resume` may change: where and how long things run. The record of a run depends on all others.
_RESUMABLE: dict[str, JsonValue] = {"resumable": "always"}
# The same, but it changes the order in which floats are summed.
_UNLESS_DETERMINISTIC: dict[str, JsonValue] = {"resumable": "unless deterministic"}


class ConfigError(ValueError):
    """A config that cannot be used. The message says what is wrong, where, and what is allowed."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_text(self) -> Self:
        """YAML does not preserve all line separators, and a path cannot contain a zero byte."""
        for name, value in self:
            for text in [*value, *value.values()] if isinstance(value, dict) else [value]:
                if isinstance(text, str) and not text.isprintable():
                    raise ValueError(f"{name}: contains a character that cannot be printed, such as a line break")
        return self


def _count_or_auto(value: object) -> object:
    """One sentence, not one for each type that a key may have."""
    if value == "auto" or (type(value) is int and value >= 1):
        return value
    raise ValueError(f"expected a whole number of at least 1, or auto, found {value!r:.40}")


class Student(Section):
    model: str = Field(description="Student: a local folder or a hub id of a causal LM.")


class Teacher(Section):
    model: str = Field(description="Teacher: a local folder or a hub id; its tokenizer must equal the student's.")
    dtype: Dtype = Field("float32", description="Teacher's dtype.")
    device: str = Field(
        "cpu",
        json_schema_extra=_RESUMABLE,
        description="Teacher's device: cpu, cuda, cuda:1 …; `auto`: see `rollout.device`.",
    )
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = Field(
        None,
        json_schema_extra=_RESUMABLE,
        description="How a teacher that is too large for one GPU is spread over all that a worker sees, by "
        "transformers (pip install accelerate); null: it is on `teacher.device` alone.",
    )
    threads: int = Field(
        1, ge=1, json_schema_extra=_UNLESS_DETERMINISTIC, description="torch threads of a teacher worker (CPU)."
    )
    workers: int = Field(
        1, ge=1, json_schema_extra=_RESUMABLE, description="Teacher workers that `katana run` starts on this machine."
    )
    slots: int = Field(
        32, ge=1, json_schema_extra=_RESUMABLE, description="Rollouts whose KV cache a teacher worker keeps at first."
    )
    max_slots: int = Field(
        256,
        ge=1,
        json_schema_extra=_RESUMABLE,
        description="Most of them: when rollouts come back whose cache was dropped, a worker doubles its slots while a "
        "quarter of the free memory holds the new ones.",
    )
    prefill_tokens: int = Field(2048, ge=1, description="Most tokens, padding included, of one forward pass.")


class Data(Section):
    task: str = Field("arithmetic", description="`arithmetic` (built in), or `dataset`: rows of `data.path`.")
    options: dict[str, int] = Field(default_factory=dict, description="Sizes for the task `arithmetic`.")
    path: str | None = Field(
        None,
        description="Task `dataset`: a JSONL or Parquet file, a folder of them, or what `Dataset.save_to_disk` wrote.",
    )
    prompt_key: str = Field(
        "prompt", min_length=1, description="Column of the prompt, text or chat messages; dots select nested columns."
    )
    answer_key: str = Field(
        "answer", min_length=1, description="Column of the answer; in a worked solution its \\boxed{} or #### is used."
    )
    teacher_key: str | None = Field(
        None,
        min_length=1,
        description="With `teachers`: column of the name of a row's teacher; of the task `arithmetic`: `dialect`.",
    )
    verifier: Literal["math-verify", "exact", "none"] = Field(
        "math-verify", description="What judges completions: `math-verify`, `exact` (equal text) or `none`."
    )
    chat: bool = Field(
        False, description="Prompts go through the tokenizer's chat template; a text becomes one user message."
    )
    template: str | None = Field(
        None,
        description="Chat: which of the tokenizer's named templates; null: `default`, and for a row with tools "
        "`tool_use`, if there is one.",
    )
    template_options: dict[str, bool | str] = Field(
        default_factory=dict, description="Switches for the chat template, such as enable_thinking, date_string."
    )
    template_columns: list[TemplateColumn] = Field(
        default_factory=lambda: [*get_args(TemplateColumn)],
        description="Chat: columns besides the prompt that go to the template, in rows that have them.",
    )
    system_prompt: str | None = Field(None, description="Chat: system message of prompts that have none.")
    prompt_suffix: str = Field("", description="Text appended to every prompt; in a chat, to the last user message.")
    too_long: Literal["error", "skip"] = Field(
        "error", description="A row whose prompt is longer than max_prompt_length is an error, or is left out."
    )
    special_tokens: Literal["refuse", "skip"] = Field(
        "refuse", description="Chat: a row that spells a special token is an error, or is left out."
    )
    num_generations: int = Field(1, ge=1, description="Rollouts for each prompt.")
    max_prompt_length: int = Field(64, ge=1, description="Longest prompt, in tokens; see `data.too_long`.")

    @model_validator(mode="after")
    def _check(self) -> Data:
        if (self.task == "dataset") != (self.path is not None):
            raise ValueError("task: dataset and path need each other")
        for name in ("template", "template_options", "system_prompt"):
            if getattr(self, name) and not self.chat:
                raise ValueError(f"{name} is for chat templates: it needs chat: true")
        if self.special_tokens == "skip" and not self.chat:
            raise ValueError("special_tokens: skip needs chat: true; plain texts are not checked for special tokens")
        if len(set(self.template_columns)) != len(self.template_columns):
            raise ValueError("template_columns: a column is named twice")
        return self


class Vllm(Section):
    urls: list[str] = Field(
        default_factory=list,
        json_schema_extra=_RESUMABLE,
        description="Servers that are there already: `http://host:port`. Each worker uses one of them.",
    )
    command: list[str] = Field(
        default_factory=list,
        json_schema_extra=_RESUMABLE,
        description="A server that each worker starts, watches and ends: its program and arguments, in which `{port}` "
        "and `{model}` are replaced.",
    )
    start_timeout_s: float = Field(
        600.0, gt=0, json_schema_extra=_RESUMABLE, description="How long a worker waits at its start for the server."
    )
    request_timeout_s: float = Field(
        120.0, gt=0, json_schema_extra=_RESUMABLE, description="How long the server may take for one chunk."
    )
    patience_s: float = Field(
        120.0,
        gt=0,
        json_schema_extra=_RESUMABLE,
        description="How long a server may not be usable before the worker ends and its rollouts go to others.",
    )

    @field_validator("urls")
    @classmethod
    def _check_urls(cls, urls: list[str]) -> list[str]:
        for url in urls:
            if not _SERVER.fullmatch(url):
                raise ValueError(
                    f"{url!r:.80} is not the address of a server; allowed: http://host:port, nothing after"
                )
        if len(set(urls)) != len(urls):
            raise ValueError("a server is named twice")
        return urls

    @field_validator("command")
    @classmethod
    def _check_command(cls, command: list[str]) -> list[str]:
        if command and not any("{port}" in part for part in command):
            raise ValueError("the command lacks {port}: the port that the worker has chosen for the server")
        return command

    @model_validator(mode="after")
    def _check(self) -> Vllm:
        if bool(self.urls) == bool(self.command):
            found = "both" if self.urls else "neither"
            raise ValueError(f"found {found}; one is needed: urls (servers that are there) or command (one to start)")
        return self


class Rollout(Section):
    engine: Literal["slots", "vllm"] = Field(
        "slots",
        json_schema_extra=_UNLESS_DETERMINISTIC,
        description="Who writes: `slots`, in the worker's own process, or `vllm`, a server (docs/vllm.md).",
    )
    vllm: Vllm | None = Field(
        None, json_schema_extra=_RESUMABLE, description="The server of `engine: vllm`; null: there is none."
    )
    dtype: Dtype = Field("float32", description="Student's dtype in generation; weights are published in it.")
    device: str = Field(
        "cpu",
        json_schema_extra=_RESUMABLE,
        description="Device of a rollout worker. `auto`: `katana run` spreads its processes over the GPUs of the "
        "machine, the learner's on their own if there are several (`katana check` says how); a role by itself takes "
        "the first GPU that it sees, without one the CPU.",
    )
    threads: int = Field(
        1, ge=1, json_schema_extra=_UNLESS_DETERMINISTIC, description="torch threads of a rollout worker (CPU)."
    )
    workers: int = Field(
        1, ge=1, json_schema_extra=_RESUMABLE, description="Rollout workers that `katana run` starts on this machine."
    )
    slots: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        json_schema_extra=_RESUMABLE,
        description="Rollouts a worker writes at a time; `auto`: as many as make it faster, measured when it starts.",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        json_schema_extra=_RESUMABLE,
        description="Whether the decode step is compiled when a worker starts (torch.compile; on CUDA with CUDA "
        "graphs); `auto`: on CUDA.",
    )
    prefill_tokens: int = Field(2048, ge=1, description="Most tokens, padding included, of one prefill pass.")
    chunk_tokens: int = Field(
        16,
        ge=1,
        description="Tokens of a full chunk: longer ones cost less processor time, and a stop comes later. Where "
        "nothing can stop a rollout yet, or ever, chunks have 64 or more.",
    )
    max_unscored_chunks: int = Field(2, ge=1, description="Chunks a rollout may be ahead of the teacher.")
    max_completion_length: int = Field(192, ge=1, description="Most tokens of a rollout.")
    teacher_support: int = Field(
        0,
        ge=0,
        description="K': outcomes that the teacher thinks likeliest beside the student's support, added to it in the "
        "loss, not in what a policy sees (docs/losses.md).",
    )
    temperature: float = Field(1.0, gt=0, description="Sampling temperature.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus mass.")
    stop_set: Literal["union", "student"] = Field(
        "union",
        description="What ends a rollout, as one outcome: the stop ids of both models, or only the student's (to "
        "measure the cost of that).",
    )

    @field_validator("compile", mode="before")
    @classmethod
    def _read_compile(cls, value: object) -> object:
        """YAML reads `on` and `off` as booleans."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @field_validator("slots", mode="before")
    @classmethod
    def _slots_or_auto(cls, value: object) -> object:
        return _count_or_auto(value)

    @model_validator(mode="after")
    def _check(self) -> Rollout:
        if self.engine == "vllm" and self.vllm is None:
            raise ValueError("engine vllm needs vllm.urls (servers that are there) or vllm.command (one to start)")
        if self.engine == "vllm" and self.temperature != 1.0:
            raise ValueError(
                f"temperature is {self.temperature:g}; with engine vllm only 1 is allowed: the server does not say "
                f"what another temperature divides by"
            )
        return self


class Termination(Section):
    policy: str = Field(
        "kat",
        description="What ends a rollout early: `none`, `fixed`, `scheduled`, `random`, `random_matched`, "
        "`repetition`, `kat`, `kat_absolute`, `kat_inverse`, `entropy`, `margin_change`, `adaptive`, or a "
        "custom one, `path/to/file.py:ClassName` or `package.module:ClassName` (docs/policies.md).",
    )
    apply: Literal["stop", "mask"] = Field(
        "stop", description="A cut stops the writing, or only leaves the tokens after it out of the loss."
    )
    shadow: bool = Field(
        False, description="Verdicts are recorded and not applied: everything is written and trained on."
    )
    window: int = Field(64, ge=1, description="W: tokens in a window.")
    patience: int = Field(4, ge=1, description="C: consecutive windows below the threshold that trigger a cut.")
    stride: int = Field(1, ge=1, description="Tokens between evaluated windows.")
    grace_tokens: int = Field(0, ge=0, description="Tokens at the start that no window covers.")
    eta: float = Field(0.3, gt=0, lt=1, description="η: the threshold is the (1 − η) quantile of window minima.")
    teacher_top_k: int = Field(64, ge=1, description="K: outcomes of the support besides STOP.")
    min_calibration: int = Field(512, ge=1, description="Minima needed before the rule is active.")
    buffer_size: int = Field(4096, ge=1, description="Minima kept (first in, first out).")
    warmup_steps: int = Field(50, ge=0, description="Policy version from which the rule may be active.")
    control_fraction: float = Field(0.05, ge=0, le=1, description="Share of rollouts that are never stopped.")
    calibrate_on: Literal["control", "completed", "all"] = Field(
        "control", description="Rollouts whose minima fill the buffer once the rule is active."
    )
    control_trains: Literal["kept", "whole"] = Field(
        "kept", description="Trained tokens of a control rollout: those the policy would have kept, or all."
    )
    fixed_tokens: int = Field(64, ge=1, description="Policy `fixed`: tokens kept; `scheduled`: kept at step 0.")
    scheduled_tokens: int = Field(192, ge=1, description="Policy `scheduled`: tokens kept from `scheduled_steps` on.")
    scheduled_steps: int = Field(100, ge=1, description="Policy `scheduled`: steps in which the tokens kept grow.")
    floor_nats: float = Field(0.01, gt=0, description="Policy `kat_absolute`: the threshold of window means.")
    hazard: dict[int, float] = Field(
        default_factory=dict,
        description="Policy `random_matched`: chance of a cut at a token, by its position; `katana match` makes it.",
    )
    hazard_scale: float = Field(1.0, gt=0, description="Policy `random_matched`: every chance is multiplied by this.")
    detection_tokens: int = Field(0, ge=0, description="Policy `random_matched`: tokens cut up to where it fires.")
    ngram: int = Field(8, ge=2, description="Policy `repetition`: n, tokens of the n-gram that must come twice.")
    margin_side: Literal["fall", "rise"] = Field(
        "fall",
        description="Policy `margin_change`: which change of log q − log p of the sampled token cuts: the teacher "
        "turns away, or begins to agree.",
    )
    margin_drift: float = Field(
        0.5,
        ge=0,
        description="Policy `margin_change`: nats a token by which the margin may differ from its first mean.",
    )
    margin_threshold: float = Field(
        8.0, gt=0, description="Policy `margin_change`: nats of what goes beyond that, summed up, that trigger a cut."
    )
    adaptive_delta: float = Field(
        0.05, gt=0, lt=1, description="Policy `adaptive`: δ, the chance of a cut where the mean has not changed."
    )
    adaptive_block: int = Field(8, ge=1, description="Policy `adaptive`: tokens between two places of a possible cut.")
    adaptive_range: float = Field(
        1.0, gt=0, description="Policy `adaptive`: nats that a token's divergence counts at most."
    )
    options: dict[str, float] = Field(default_factory=dict, description="Numbers for a policy of your own.")

    def stops(self, arm: str) -> bool:
        """Whether a cut ends the writing of a rollout of this arm."""
        return arm == "treated" and self.apply == "stop" and not self.shadow

    def trains_whole(self, arm: str) -> bool:
        """Whether a rollout of this arm is trained beyond its cut."""
        return self.shadow or (arm == "control" and self.control_trains == "whole")

    @field_validator("policy")
    @classmethod
    def _check_policy(cls, name: str) -> str:
        policy_names.check(name)
        return name

    @field_validator("hazard")
    @classmethod
    def _check_hazard(cls, hazard: dict[int, float]) -> dict[int, float]:
        for position, chance in hazard.items():
            if position < 1 or not 0 <= chance <= 1:
                raise ValueError(f"{position}: {chance}; allowed: positions from 1, chances from 0 to 1")
        return hazard

    @model_validator(mode="after")
    def _check(self) -> Termination:
        calibrated = self.policy in policy_names.CALIBRATED
        if self.policy == "random_matched" and not self.hazard:
            raise ValueError("policy random_matched needs hazard: `katana match RUN` makes it from a run of kat")
        if self.policy == "scheduled" and self.scheduled_tokens < self.fixed_tokens:
            raise ValueError(
                f"scheduled_tokens {self.scheduled_tokens} is below fixed_tokens {self.fixed_tokens}; "
                f"a schedule must grow"
            )
        if calibrated and self.calibrate_on == "control" and self.control_fraction == 0:
            raise ValueError(
                "calibrate_on: control needs a control arm, but control_fraction is 0; "
                "allowed: control_fraction above 0, or calibrate_on: completed | all"
            )
        if self.min_calibration > self.buffer_size:
            raise ValueError(
                f"min_calibration {self.min_calibration} is above buffer_size {self.buffer_size}; "
                f"the rule would never be active"
            )
        return self


class Loss(Section):
    mode: LossMode = Field(
        "reverse_kl_topk_tail",
        description="Loss on a kept token: reverse KL, forward KL, generalised JSD or a mixture of both KLs, over "
        "STOP, support and tail; or reverse KL estimated from the sampled token alone (docs/losses.md).",
    )
    beta: float = Field(
        0.5,
        ge=0,
        le=1,
        description="`jsd_topk_tail`: β, the teacher's share in the mixture that both are compared with; 0 is the "
        "forward KL, 1 the reverse KL.",
    )
    forward_weight: float = Field(
        0.5, ge=0, le=1, description="`mixed`: weight w of the forward KL; the reverse KL has 1 - w."
    )
    denominator: Literal["kept", "sequence", "generated"] = Field(
        "kept",
        description="Mean over the batch's kept tokens; mean over sequences of their means; or the sum over kept "
        "tokens divided by the tokens generated (up to the trigger, for stopped rollouts).",
    )
    weighting: Literal["uniform", "random_drop", "position", "importance_position", "entropy"] = Field(
        "uniform",
        description="Weight of kept tokens: all equal; a random share of them (`retention`); decreasing with position; "
        "decreasing with what both models have disagreed on before (IW-OPD); or growing with the student's entropy "
        "when it wrote them.",
    )
    retention: float = Field(1.0, gt=0, le=1, description="`random_drop`: share of kept tokens that count.")
    position_half_life: float = Field(
        64.0, gt=0, description="`position`: tokens after which the weight of a token has halved."
    )
    entropy_half: float = Field(
        0.5, gt=0, description="`entropy`: nats at which a token has half of the greatest weight; large: proportional."
    )
    importance_gamma: float = Field(
        0.5, ge=0, description="`importance_position`: γ; the first token counts 1 + γ, the last at least 1."
    )
    estimator: Literal["k1", "k2", "k3", "clipped"] = Field(
        "k1",
        description="`reverse_kl_sampled`: how the divergence is estimated: `k1` and `k2` (the same gradient, other "
        "values), `k3` (in effect forward KL), `clipped` (k1 as PPO's clipped surrogate).",
    )
    ratio_clip: float | None = Field(
        None,
        gt=0,
        description="`reverse_kl_sampled`, and `reward` in every mode: largest p_θ/p_sampled; null: not clipped.",
    )
    clip_range: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="Estimator `clipped`: a token has no gradient once p_θ/p_rollout is beyond 1 ± this in the "
        "direction in which it is pushed.",
    )
    horizon: Annotated[int, Field(ge=0)] | Literal["all"] = Field(
        0,
        description="`reverse_kl_sampled`, k1 and clipped: later tokens, `all` or none (0), whose cost is added to a "
        "token's own (return-to-go).",
    )
    discount: float = Field(
        1.0, gt=0, le=1, description="Return-to-go: factor by which a later token counts less for each token between."
    )

    @field_validator("horizon", mode="before")
    @classmethod
    def _tokens_or_all(cls, value: object) -> object:
        """One sentence, not one for each type that it may have."""
        if value == "all" or (type(value) is int and value >= 0):
            return value
        raise ValueError(f"expected a whole number of tokens, 0 for none, or all, found {value!r:.40}")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mode != "reverse_kl_sampled":
            return self  # none of these is read then
        if self.horizon != 0 and self.estimator not in ("k1", "clipped"):
            raise ValueError(
                f"horizon is {self.horizon!r}; with estimator {self.estimator} only 0 is allowed: its slope is not an "
                f"advantage to which the cost of later tokens could be added"
            )
        if self.ratio_clip is not None and self.estimator == "clipped":
            raise ValueError(
                f"ratio_clip is {self.ratio_clip:g}; with estimator clipped only null is allowed: clip_range is its "
                f"limit"
            )
        return self


class Reward(Section):
    mode: Literal["none", "grpo", "reinforce_leave_one_out"] = Field(
        "none",
        description="What a verifier's verdicts on the `data.num_generations` rollouts of a prompt become, beside the "
        "teacher (docs/reward.md): nothing; the reward less the group's mean, over its standard deviation; or the "
        "reward less the mean of the others.",
    )
    weight: float = Field(1.0, gt=0, description="Of the reward's term, beside the distillation loss.")
    of_cut: Literal["none", "as_wrong", "kept"] = Field(
        "none",
        description="Reward of a rollout whose writing was stopped: none; that of a wrong one; or what the verifier "
        "says of the kept tokens.",
    )


class Lora(Section):
    """Low-rank adapters (arXiv 2106.09685): a linear layer with weight W computes with W + alpha / rank · B A."""

    rank: int = Field(16, ge=1, description="r: A is [r, in], B is [out, r].")
    alpha: float = Field(32.0, gt=0, description="B A is multiplied by alpha / rank.")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of A's inputs that a gradient leaves out; what the workers write with has none.",
    )
    target_modules: list[str] | Literal["all-linear"] = Field(
        "all-linear",
        description="Linear layers that get an adapter, by the ends of their names such as q_proj; `all-linear`: all "
        "but the output head.",
    )

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names_or_all(cls, value: object) -> object:
        """One sentence, not one for each type that it may have."""
        if value == "all-linear" or (isinstance(value, list) and value and all(isinstance(one, str) for one in value)):
            return value
        raise ValueError(f"expected all-linear, or a list of names of layers, found {value!r:.60}")


class LearnerSettings(Section):
    dtype: Dtype = Field(
        "float32",
        description="Dtype that the learner computes in, float32 or bfloat16; parameters and moments are float32.",
    )
    device: str = Field(
        "cpu",
        json_schema_extra=_RESUMABLE,
        description="Device of the learner; of several processes each has its own, from this one upwards: cuda:2, "
        "cuda:3 …; `auto`: see `rollout.device`.",
    )
    nproc_per_node: int = Field(
        1,
        ge=1,
        json_schema_extra=_UNLESS_DETERMINISTIC,
        description="Processes of the learner, on one machine: parameters, gradients and moments are sharded over them "
        "(FSDP2), and each trains on a share of every batch.",
    )
    threads: int = Field(
        1, ge=1, json_schema_extra=_UNLESS_DETERMINISTIC, description="torch threads of the learner (CPU)."
    )
    max_steps: int = Field(
        100, ge=1, json_schema_extra=_RESUMABLE, description="Steps of the run, at most: each trains on one batch."
    )
    max_generated_tokens: int | None = Field(
        None,
        ge=1,
        json_schema_extra=_RESUMABLE,
        description="The run ends with the step at which the rollout workers have written this many tokens, kept or "
        "not, in both arms; learning rate and warm-up follow this count, not the steps. null: max_steps alone.",
    )
    batch_size: int = Field(32, ge=1, description="Trajectories of a step.")
    num_iterations: int = Field(
        1,
        ge=1,
        description="Updates on each batch, each with the step's learning rate (docs/losses.md).",
    )
    micro_batch_tokens: int = Field(
        8192,
        ge=1,
        json_schema_extra=_UNLESS_DETERMINISTIC,
        description="Most padded tokens in one forward and backward.",
    )
    gradient_checkpointing: bool = Field(
        False,
        json_schema_extra=_UNLESS_DETERMINISTIC,
        description="The activations inside a layer are computed again in the backward pass and not kept: less memory, "
        "about a third more time.",
    )
    compile: bool = Field(
        False,
        json_schema_extra=_UNLESS_DETERMINISTIC,
        description="The layers are compiled by torch.compile; needs a C++ compiler, and on CUDA Triton.",
    )
    learning_rate: float = Field(1e-6, gt=0, description="AdamW: peak learning rate.")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="Learning rate after warm-up.")
    warmup_ratio: float = Field(
        0.03,
        ge=0,
        lt=1,
        description="Share of max_steps (of max_generated_tokens, if set) with a rising learning rate.",
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW β₁.")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW β₂.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient norm is clipped here.")
    max_staleness: int = Field(4, ge=0, description="Oldest usable kept token, in policy versions.")
    weight_sync_steps: int = Field(
        1, ge=1, description="Steps between published weights, that is for each policy version."
    )
    lora: Lora | None = Field(
        None, description="Train low-rank adapters and leave the model as it is (docs/lora.md); null: train the model."
    )

    @property
    def fresh_steps(self) -> int:
        """Steps in which a rollout may be trained before it is stale, if it begins with the first of its version."""
        return (self.max_staleness + 1) * self.weight_sync_steps

    @property
    def steps_in_time(self) -> int:
        """Steps that may be made while a rollout is written, so that it can wait for one more before it is stale: those
        of max_staleness versions, less half of one, since its own may be nearly over, and at least one. Below 1: none.
        """
        return self.max_staleness * self.weight_sync_steps - max(1, self.weight_sync_steps // 2)

    def device_of(self, rank: int) -> str:
        """The device of one of its processes."""
        kind, _, index = self.device.partition(":")
        return f"{kind}:{int(index or 0) + rank}" if kind == "cuda" and rank else self.device

    @field_validator("dtype")
    @classmethod
    def _check_dtype(cls, dtype: Dtype) -> Dtype:
        if dtype == "float16":
            raise ValueError(
                "float16 gradients vanish or overflow without loss scaling, which the learner does not do; "
                "allowed: float32, bfloat16"
            )
        return dtype


class Checkpoints(Section):
    every_steps: int = Field(
        10,
        ge=1,
        json_schema_extra=_RESUMABLE,
        description="Steps between checkpoints; trained trajectories are acknowledged only by a checkpoint.",
    )
    every_s: float | None = Field(
        None,
        gt=0,
        json_schema_extra=_RESUMABLE,
        description="Seconds: a step after which so many have passed since the last checkpoint ends with one, even "
        "before `every_steps`; null: steps alone.",
    )
    keep: int = Field(2, ge=1, json_schema_extra=_RESUMABLE, description="Checkpoints kept.")


class Benchmark(Section):
    """One of `eval.data`. null: as in `data` and `eval`."""

    path: str = Field(description="As data.path.")
    prompt_key: str | None = Field(None, min_length=1, description="null: data.prompt_key.")
    answer_key: str | None = Field(None, min_length=1, description="null: data.answer_key.")
    problems: int | None = Field(None, ge=1, description="The first rows; null: all.")
    k: int | None = Field(None, ge=1, description="null: eval.k.")


class Eval(Section):
    every_steps: int = Field(
        25, ge=0, json_schema_extra=_RESUMABLE, description="Steps between evaluations; 0: none at all."
    )
    problems: int = Field(64, ge=1, description="Held-out problems.")
    k: int = Field(4, ge=1, description="Samples a problem, for avg@k and pass@k.")
    engine: Literal["slots", "vllm"] = Field(
        "slots",
        json_schema_extra=_RESUMABLE,
        description="Who writes samples: `slots`, in the evaluator's own process, or `vllm`, a server of its own "
        "(docs/vllm.md).",
    )
    vllm: Vllm | None = Field(
        None,
        json_schema_extra=_RESUMABLE,
        description="The server of `engine: vllm`, none of `rollout.vllm`: it has the weights that are evaluated.",
    )
    data: dict[str, Benchmark] = Field(
        default_factory=dict,
        description="Task `dataset`: benchmarks by name, each with a `path` and, where they differ, `prompt_key`, "
        "`answer_key`, `problems` (null: all rows) and `k`.",
    )
    temperature: float = Field(1.0, gt=0, description="Sampling temperature of the evaluation.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus mass of the evaluation.")
    device: str = Field(
        "cpu", json_schema_extra=_RESUMABLE, description="Device of the evaluator; `auto`: see `rollout.device`."
    )
    threads: int = Field(1, ge=1, json_schema_extra=_RESUMABLE, description="torch threads of the evaluator (CPU).")
    slots: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        64,
        json_schema_extra=_RESUMABLE,
        description="Samples written at a time; `auto`: up to 64, as many as make it faster and a quarter of the "
        "device's free memory holds.",
    )

    @field_validator("slots", mode="before")
    @classmethod
    def _slots_or_auto(cls, value: object) -> object:
        return _count_or_auto(value)

    @model_validator(mode="after")
    def _check(self) -> Eval:
        if self.engine == "vllm" and self.vllm is None:
            raise ValueError("engine vllm needs vllm.urls (a server that is there) or vllm.command (one to start)")
        if self.vllm is not None and len(self.vllm.urls) > 1:
            raise ValueError(f"vllm.urls names {len(self.vllm.urls)} servers; the evaluator uses one")
        return self

    @field_validator("data")
    @classmethod
    def _check_names(cls, data: dict[str, Benchmark]) -> dict[str, Benchmark]:
        for name in data:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
                raise ValueError(f"{name!r} is not a name for a benchmark; allowed: letters, digits, '-' and '_'")
        return data


class FeederSettings(Section):
    concurrency: int | None = Field(
        None,
        ge=1,
        json_schema_extra=_RESUMABLE,
        description="Rollouts being written at a time; null: 1.25 × the slots of the live workers, and no more than "
        "can be trained before the longest are stale.",
    )
    record_traces: bool = Field(True, description="Write tokens and divergences of every rollout to traces.jsonl.")
    record_views: bool = Field(
        False,
        description="Write student entropy and log-probabilities of the sampled tokens to traces.jsonl too, so that "
        "`katana replay` can judge by policies that read them. What the run's own policy reads is written in any case.",
    )
    record_audit: bool = Field(False, description="Write the writer of each chunk to audit.jsonl, for the checker.")


_REDIS_URL = re.compile(
    r"rediss?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[0-9]{0,4})?|unix:///[^?#;]+(\?db=[0-9]{1,4})?"
)
_TLS_FILES = ("ca_file", "cert_file", "key_file")


class Redis(Section):
    url: str | None = Field(
        None, json_schema_extra=_RESUMABLE, description="Data Redis; null: an embedded one (`katana run` only)."
    )
    data: list[str] = Field(
        default=[],
        max_length=64,
        json_schema_extra=_RESUMABLE,
        description="Data servers of a run that needs several, in place of `url`: each rollout is on one of them. "
        "Their number and order stay as the run was begun.",
    )
    broker_url: str | None = Field(
        None, json_schema_extra=_RESUMABLE, description="Celery's broker; null: database 1 of `url`."
    )
    username: str | None = Field(
        None,
        json_schema_extra=_RESUMABLE,
        description="ACL user of both; `{role}` in it stands for the role; null: the default user.",
    )
    password_file: str | None = Field(
        None,
        json_schema_extra=_RESUMABLE,
        description="File whose first line is the password of both; may contain `{role}`.",
    )
    ca_file: str | None = Field(
        None,
        json_schema_extra=_RESUMABLE,
        description="`rediss://`: PEM file of the authority that signed the servers' certificates.",
    )
    cert_file: str | None = Field(
        None, json_schema_extra=_RESUMABLE, description="`rediss://`: PEM file of the client certificate."
    )
    key_file: str | None = Field(
        None, json_schema_extra=_RESUMABLE, description="`rediss://`: PEM file of the key to `cert_file`."
    )
    maxmemory_mb: int = Field(
        512, ge=20, json_schema_extra=_RESUMABLE, description="Memory limit of the embedded Redis."
    )
    shards: int = Field(16, ge=1, le=1024, description="Chunk streams.")

    @field_validator("data", mode="before")
    @classmethod
    def _read_data(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given

    @field_validator("data")
    @classmethod
    def _check_data(cls, urls: list[str]) -> list[str]:
        if len(set(urls)) < len(urls):
            raise ValueError("a server is named twice")
        for url in urls:
            cls._check_url(url)
        return urls

    @model_validator(mode="before")
    @classmethod
    def _one_address(cls, values: Any) -> Any:
        """A list of one is `url`; of a longer one `url` is the first."""
        if not isinstance(values, dict) or not (data := values.get("data")):
            return values
        first = data if isinstance(data, str) else data[0] if isinstance(data, list) else None
        if not (isinstance(first, str) and _REDIS_URL.fullmatch(first)):
            return values  # refused as a value of `data`, which is what was written
        if values.get("url") not in (None, first):
            raise ValueError("url and data name different servers: give one of them, or url as the first of data")
        alone = isinstance(data, str) or (isinstance(data, list) and len(data) == 1)
        return values | {"url": first, "data": [] if alone else data}

    @field_validator("url", "broker_url")
    @classmethod
    def _check_url(cls, url: str | None) -> str | None:
        # The refused URL is not shown: it may contain a password.
        if url is None or _REDIS_URL.fullmatch(url):
            return url
        if "@" in url or "password" in url:
            raise ValueError(
                "user and password do not belong in a URL, which is logged and stored with the run: "
                "set redis.username and redis.password_file"
            )
        raise ValueError("allowed: redis://HOST:PORT/DB, rediss://HOST:PORT/DB (TLS), unix:///PATH?db=DB")

    @model_validator(mode="after")
    def _check_access(self) -> Redis:
        given = [name for name in ("username", "password_file", *_TLS_FILES) if getattr(self, name) is not None]
        if given and self.url is None:
            raise ValueError(f"{given[0]} needs redis.url; the embedded Redis accepts only the user that started it")
        if self.username is not None and self.password_file is None:
            raise ValueError("username needs password_file: a user without a password is refused")
        for name in ("username", "password_file"):
            left = (getattr(self, name) or "").replace("{role}", "")
            if "{" in left or "}" in left:
                raise ValueError(f"{name}: only {{role}} is filled in; other braces are not allowed")
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file need each other")
        tls = any((url or "").startswith("rediss://") for url in (self.url, self.broker_url, *self.data))
        if not tls and given and given[-1] in _TLS_FILES:
            raise ValueError(f"{given[-1]} is for TLS: url or broker_url must begin with rediss://")
        return self

    @property
    def servers(self) -> tuple[str, ...]:
        """All data servers, the home first; empty for an embedded one."""
        return tuple(self.data) or ((self.url,) if self.url is not None else ())

    @property
    def broker(self) -> str:
        """`broker_url`, or database 1 of `url`."""
        if self.broker_url is not None:
            return self.broker_url
        url = self.url or ""
        if url.startswith("unix://"):
            return url.partition("?")[0] + "?db=1"
        scheme, _, rest = url.partition("://")
        return f"{scheme}://{rest.partition('/')[0]}/1"

    def access(self, role: str) -> dict[str, str | None]:
        """A role's credentials for both servers, and how their certificates are checked: keywords of `connect`."""
        filled = {name: getattr(self, name) for name in ("username", "password_file", *_TLS_FILES)}
        return {name: value and value.replace("{role}", role) for name, value in filled.items()}


class Liveness(Section):
    heartbeat_s: float = Field(
        2.0, gt=0, json_schema_extra=_RESUMABLE, description="Seconds between a worker's heartbeats."
    )
    claim_s: float = Field(
        8.0, gt=0, json_schema_extra=_RESUMABLE, description="Seconds of silence after which another worker takes over."
    )
    busy_s: float = Field(
        600.0,
        gt=0,
        json_schema_extra=_RESUMABLE,
        description="How long a worker or the learner may spend in one operation (a forward, reading weights, a "
        "checkpoint) and still send heartbeats.",
    )
    lease_s: float = Field(3.0, gt=0, json_schema_extra=_RESUMABLE, description="Lease of feeder and arbiter.")
    learner_lease_s: float = Field(
        10.0, gt=0, json_schema_extra=_RESUMABLE, description="Lease of the learner; renewed between micro-batches."
    )
    shift_s: float = Field(
        3600.0,
        gt=0,
        json_schema_extra=_RESUMABLE,
        description="Longest duration of a worker task (Celery), in seconds.",
    )
    max_attempts: int = Field(
        3, ge=1, json_schema_extra=_RESUMABLE, description="Failures without progress before a rollout is dead."
    )
    redis_wait_s: float = Field(
        60.0, gt=0, json_schema_extra=_RESUMABLE, description="How long a role waits for a Redis that does not answer."
    )

    @model_validator(mode="after")
    def _check(self) -> Liveness:
        if self.claim_s < 3 * self.heartbeat_s:
            raise ValueError(
                f"claim_s {self.claim_s:g} is under three heartbeats ({3 * self.heartbeat_s:g} s): "
                f"a live worker's rollouts would be taken away"
            )
        if self.busy_s < self.claim_s:
            raise ValueError(
                f"busy_s {self.busy_s:g} is under claim_s {self.claim_s:g}: declared work would be given less time "
                f"than an iteration of the loop"
            )
        return self


class Metrics(Section):
    host: str = Field("127.0.0.1", json_schema_extra=_RESUMABLE, description="Address that metrics are served on.")
    port: int = Field(
        0, ge=0, le=65535, json_schema_extra=_RESUMABLE, description="Port of a role started alone; 0: any free one."
    )


class Config(Section):
    """The whole tree. Build it with `load`."""

    name: str = Field(
        "run",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        json_schema_extra=_RESUMABLE,
        description="Name of the run.",
    )
    runs_dir: str = Field(
        "runs", json_schema_extra=_RESUMABLE, description="Folder of the runs' folders; shared by all hosts."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of data, arms, sampling and torch.")
    deterministic: bool = Field(
        False,
        description="A run, resumed or not, ends with the same weights, bit for bit, on the same machine. Generation "
        "is about 11 times slower: there is one batch at a time, and rows are not computed together.",
    )
    trace: bool = Field(
        False,
        json_schema_extra=_RESUMABLE,
        description="Each process writes what it does when, and the stages of rollouts, to the run's folder, for "
        "`katana trace`.",
    )
    student: Student
    teachers: dict[str, Teacher] = Field(
        default_factory=dict,
        description="Several teachers by name, each with the keys of `teacher`; `data.teacher_key` says whose a row "
        "is (docs/teachers.md).",
    )
    teacher: Teacher | None = Field(None, description="The one teacher of all rows; null: `teachers` names several.")
    data: Data = Field(default_factory=Data)
    rollout: Rollout = Field(default_factory=Rollout)
    termination: Termination = Field(default_factory=Termination)
    loss: Loss = Field(default_factory=Loss)
    reward: Reward = Field(default_factory=Reward)
    learner: LearnerSettings = Field(default_factory=LearnerSettings)
    checkpoints: Checkpoints = Field(default_factory=Checkpoints)
    eval: Eval = Field(default_factory=Eval)
    feeder: FeederSettings = Field(default_factory=FeederSettings)
    redis: Redis = Field(default_factory=Redis)
    liveness: Liveness = Field(default_factory=Liveness)
    metrics: Metrics = Field(default_factory=Metrics)
    tracking: list[Tracker] = Field(
        default_factory=list,
        json_schema_extra=_RESUMABLE,
        description="Experiment trackers: `tensorboard`, `wandb`.",
    )

    @field_validator("tracking")
    @classmethod
    def _check_tracking(cls, names: list[Tracker]) -> list[Tracker]:
        if len(set(names)) != len(names):
            raise ValueError("a tracker is named twice")
        return names

    @field_validator("teachers")
    @classmethod
    def _check_teachers(cls, teachers: dict[str, Teacher]) -> dict[str, Teacher]:
        for name in teachers:
            if not is_name(name):
                raise ValueError(f"{name!r:.60} is not a name for a teacher; allowed: {ALLOWED}")
        return teachers

    @field_validator("teacher")
    @classmethod
    def _check_teacher(cls, teacher: Teacher | None, info: ValidationInfo) -> Teacher | None:
        several = info.data.get("teachers")
        if several is None:  # refused itself
            return teacher
        if teacher is None and not several:
            raise PydanticCustomError("missing", "Field required")
        if teacher is not None and several:
            raise ValueError(
                f"given beside teachers ({', '.join(several)}); allowed: one teacher in teacher, or all of several in "
                f"teachers"
            )
        return teacher

    @model_validator(mode="after")
    def _check(self) -> Config:
        self._check_teacher_key()
        policy = self.termination.policy
        if policy in ("fixed", "scheduled") and self.termination.fixed_tokens > self.rollout.max_completion_length:
            raise ValueError("termination.fixed_tokens is above rollout.max_completion_length; nothing would be cut")
        if policy == "repetition" and self.termination.ngram >= self.rollout.max_completion_length:
            raise ValueError(
                f"termination.ngram {self.termination.ngram} is not below rollout.max_completion_length "
                f"{self.rollout.max_completion_length}: none could come twice, nothing would be cut"
            )
        if policy in policy_names.OF_WINDOWS:
            first = self.termination.grace_tokens + self.termination.window
            if first > self.rollout.max_completion_length:
                raise ValueError(
                    f"termination.grace_tokens + window = {first} is above rollout.max_completion_length "
                    f"{self.rollout.max_completion_length}: no window would ever be evaluated"
                )
        rule = self.termination
        changes = {"margin_change": ("window + 2", rule.window + 2), "adaptive": ("2 × block", 2 * rule.adaptive_block)}
        if policy in changes:
            words, tokens = changes[policy]
            if rule.grace_tokens + tokens > self.rollout.max_completion_length:
                raise ValueError(
                    f"termination.grace_tokens + {words} = {rule.grace_tokens + tokens} is above "
                    f"rollout.max_completion_length {self.rollout.max_completion_length}: no change could be found, "
                    f"nothing would be cut"
                )
        lora = self.learner.lora
        if lora is not None and self.learner.nproc_per_node > 1:
            raise ValueError(
                f"learner.nproc_per_node is {self.learner.nproc_per_node}; with learner.lora only 1 is allowed: "
                f"adapters and their moments are small, and a frozen base is not sharded"
            )
        if lora is not None and lora.dropout and self.loss.mode == "reverse_kl_sampled":
            raise ValueError(
                f"learner.lora.dropout is {lora.dropout:g}; with loss.mode reverse_kl_sampled only 0 is allowed: its "
                f"ratio p_θ/p_sampled would be that of a student with dropout, which has written nothing"
            )
        self._check_evaluator_s_server()
        self._check_data()
        if self.reward.mode != "none":
            self._check_reward()
        if self.deterministic:
            self._check_deterministic()
        return self

    def _check_teacher_key(self) -> None:
        if self.teachers and self.data.teacher_key is None:
            raise ValueError("teachers needs data.teacher_key: the column that names the teacher of a row")
        if self.data.teacher_key is not None and not self.teachers:
            raise ValueError("data.teacher_key needs teachers: `teacher` is the one of all rows")

    def _check_data(self) -> None:
        if self.eval.data and self.data.task != "dataset":
            raise ValueError(f"eval.data needs data.task: dataset; the task {self.data.task!r} has its own problems")
        if self.data.task == "dataset" and self.eval.every_steps and not self.eval.data:
            raise ValueError("task dataset holds no rows out: name benchmarks in eval.data, or set eval.every_steps: 0")
        if self.eval.data and self.data.verifier == "none":
            raise ValueError("eval.data needs a verifier; data.verifier is none")

    def _check_reward(self) -> None:
        mode = self.reward.mode
        if self.data.num_generations < 2:
            raise ValueError(
                f"reward.mode {mode} compares the rollouts of a prompt: data.num_generations is "
                f"{self.data.num_generations}, and at least 2 are needed"
            )
        if self.data.task == "dataset" and self.data.verifier == "none":
            raise ValueError(
                f"reward.mode {mode} needs verdicts: data.verifier is none; allowed: math-verify, exact, with answers "
                f"in data.answer_key"
            )
        if self.learner.lora is not None and self.learner.lora.dropout:
            raise ValueError(
                f"learner.lora.dropout is {self.learner.lora.dropout:g}; with reward.mode {mode} only 0 is allowed: "
                f"its ratio p_θ/p_sampled would be that of a student with dropout, which has written nothing"
            )

    def _check_evaluator_s_server(self) -> None:
        if self.eval.engine != "vllm" or not self.eval.every_steps:
            return
        of_rollouts = self.rollout.vllm.urls if self.rollout.engine == "vllm" and self.rollout.vllm else []
        for url in self.eval.vllm.urls if self.eval.vllm else []:
            if url in of_rollouts:
                raise ValueError(
                    f"eval.vllm.urls: {url} is in rollout.vllm.urls too; the evaluator needs a server of its own: it "
                    f"judges one version, while that of the rollouts goes on to others"
                )

    def _check_deterministic(self) -> None:
        if self.redis.data:
            raise ValueError(
                f"redis.data names {len(self.redis.data)} servers; with deterministic only one is allowed: in which "
                f"order several answer changes from run to run"
            )
        if self.learner.max_generated_tokens is not None:
            raise ValueError(
                f"learner.max_generated_tokens is {self.learner.max_generated_tokens}; with deterministic only null is "
                f"allowed: how much the workers have written at a step depends on timing"
            )
        if self.checkpoints.every_s is not None:
            raise ValueError(
                f"checkpoints.every_s is {self.checkpoints.every_s:g}; with deterministic only null is allowed: where "
                f"a run can be resumed would depend on timing"
            )
        if self.learner.weight_sync_steps != 1:
            raise ValueError(
                f"learner.weight_sync_steps is {self.learner.weight_sync_steps}; with deterministic only 1 is allowed: "
                f"each batch is written with the weights of the step before"
            )
        for name, teacher in self.all_teachers.items():
            if teacher.device_map is not None:
                raise ValueError(
                    f"{section(name)}.device_map is {teacher.device_map!r}; with deterministic only null is "
                    f"allowed: other devices than 'cpu' sum in no fixed order"
                )
        if self.rollout.engine == "vllm":
            raise ValueError(
                "rollout.engine is 'vllm'; with deterministic only 'slots' is allowed: what a server draws depends on "
                "what else it writes"
            )
        if self.rollout.compile == "on":
            raise ValueError(
                "rollout.compile is 'on'; with deterministic only 'auto' and 'off' are allowed, which compile nothing "
                "then: how compiled code rounds depends on the number of rows"
            )
        devices = {"rollout": self.rollout.device, "learner": self.learner.device}
        devices |= {section(name): teacher.device for name, teacher in self.all_teachers.items()}
        for name, device in devices.items():
            if device != "cpu":
                raise ValueError(
                    f"{name}.device is {device!r}; with deterministic only 'cpu' is allowed: other devices sum in no "
                    f"fixed order"
                )

    @property
    def all_teachers(self) -> dict[str, Teacher]:
        """The teachers by name; one that has no name, the section `teacher`, is ''."""
        return self.teachers if self.teacher is None else {"": self.teacher}

    @property
    def only_teacher(self) -> Teacher:
        """For what works with one teacher. Raises ConfigError if there are several."""
        if self.teacher is None:
            raise ConfigError(f"teachers ({', '.join(self.teachers)}): this command works with one teacher, `teacher`")
        return self.teacher

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def stores_view(self) -> bool:
        """Whether teachers store the view of each chunk: something may read it. They import no custom policy."""
        read = policy_names.may_read_view(self.termination.policy) or self.loss.weighting == "entropy"
        return read or self.feeder.record_views

    @property
    def max_length(self) -> int:
        """Longest sequence of prompt and completion, in tokens."""
        return self.data.max_prompt_length + self.rollout.max_completion_length

    @property
    def most_slots(self) -> int:
        """`rollout.slots`, or the most that `auto` becomes: a worker's share of the rollouts that the feeder admits at
        a time if all are equally long. A deterministic run admits a batch."""
        if self.rollout.slots != "auto":
            return self.rollout.slots
        steps = 1 if self.deterministic else max(1, self.learner.steps_in_time)
        admitted = self.feeder.concurrency or steps * self.learner.batch_size
        return min(MOST_SLOTS, -(-admitted // self.rollout.workers))

    def to_yaml(self) -> str:
        tree = self.model_dump()
        if self.redis.data:
            tree["redis"]["url"] = None  # it is the first of them, also when others are set
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
