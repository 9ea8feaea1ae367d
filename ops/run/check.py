"""`katana check`: what a config would run, and what is wrong with it, before anything starts."""

from __future__ import annotations

from collections import Counter
from typing import Any

from common import policies, policy_names
from common.compiler import has_cpp_compiler
from common.config import Config, ConfigError, Data, Loss, Reward
from common.pretrained import (
    HubUnavailable,
    ModelError,
    ModelFacts,
    Pair,
    attention_of,
    check_pair,
    is_hub_id,
    load_tokenizer,
)
from common.teachers import called
from ops.run.check_lora import check_lora
from ops.run.check_redis import check_redis
from ops.run.devices import absent, devices_of, unknown
from ops.run.findings import Findings
from ops.run.heads import whole_logits
from ops.run.memory import Machine, lines, machine_here, needs, server_lines, shape_in
from ops.run.tracking import missing
from ops.tasks.rows import DataMissing
from ops.tasks.source import TaskSource
from ops.tasks.templates import Templates

_PROMPTS_READ = 256


def check(config: Config, machine: Machine | None = None, *, examine: bool = False) -> Findings:
    """Models, tokenizers, stop set, lengths, prompts, devices and memory. Never raises for what it can report.

    machine: what to estimate memory for; None: this one.
    examine: also the student's output head, for which torch is loaded if the model is of an untested type.
    """
    found = Findings()
    pair = _check_models(config, found)
    if pair is not None:
        _check_prompts(config, found)
        whole = whole_logits(pair.student.folder, pair.student.model_type) if examine else ""
        if whole:
            found.lines.append(f"warning    {pair.student.folder}: {whole}")
        _estimate_memory(config, pair, machine or machine_here(), found, whole_logits=bool(whole))
        check_lora(config, pair, found)
    check_redis(config, found)
    found.problems += missing(config.tracking)
    _check_devices(config, found)
    _check_compiler(config, found)
    _add_summary(config, found)
    return found


def _check_models(config: Config, found: Findings) -> Pair | None:
    try:
        pair = check_pair(config, weights=False)  # the weights of a hub model are only downloaded by a run
    except HubUnavailable as error:
        found.unchecked.append(f"models: {error}; only the config was checked")
        return None
    except ModelError as error:
        found.problems.append(str(error))
        return None
    models = {"student": config.student.model}
    models |= {called(name): teacher.model for name, teacher in config.all_teachers.items()}
    facts_of = {"student": pair.student} | {called(name): facts for name, facts in pair.teachers.items()}
    for who, facts in facts_of.items():
        if facts.parameters_bytes == 0 and not is_hub_id(models[who]):
            found.problems.append(f"{who} {facts.folder}: contains no *.safetensors; Katana loads no other weights")
    stops = ", ".join(str(stop) for stop in pair.stop_ids)
    contexts = ", ".join(f"{who} {_context(facts)}" for who, facts in facts_of.items())
    found.lines += [
        *(f"{who:10} {facts.folder} ({facts.model_type})" for who, facts in facts_of.items()),
        f"tokenizer  shared, {pair.vocab_size} ids in use",
        f"stop set   {{{stops}}}: generation ends on any of them; together they are one outcome, STOP",
        f"lengths    {config.data.max_prompt_length} + {config.rollout.max_completion_length} tokens; contexts: "
        f"{contexts}",
    ]
    found.lines += [f"warning    {text}" for text in ends_outside(pair, config.data)]
    for who, facts in facts_of.items():
        if attention_of(facts.folder) == "eager":
            found.lines.append(
                f"warning    {who}: {facts.model_type} has no sdpa attention and runs with eager attention: it holds "
                "the scores of every query, head and token at once, which is slower and takes more memory in long texts"
            )
    return pair


def _context(facts: ModelFacts) -> str:
    """The context length. Position encodings without a table, such as ALiBi, state none in the config."""
    longest = facts.max_position_embeddings
    return "not stated in its config.json, so not checked" if longest is None else f"{longest} tokens"


def ends_outside(pair: Pair, data: Data) -> list[str]:
    """Warnings: a token that ends an answer by the tokenizer or the chat template is not in the stop set."""
    tokenizer = load_tokenizer(pair.student.folder)
    ends = {"the eos token of the tokenizer": tokenizer.eos_token_id}
    for name, token in _ends_of_turn(tokenizer, data).items():
        ends[f"the end of an answer in the chat template ({name})"] = token
    return [
        f"{what}, {tokenizer.convert_ids_to_tokens(token)!r} ({token}), is not in the stop set: a rollout that writes "
        f"it continues to the length limit; add it to eos_token_id in generation_config.json of {pair.student.folder}"
        for what, token in ends.items()
        if token is not None and token not in pair.stop_ids
    ]


def _ends_of_turn(tokenizer: Any, data: Data) -> dict[str, int | None]:
    """The special token that each chat template in use puts after an answer; None where there is none.

    A template that fails or is missing is skipped here: `_check_prompts` reports it.
    """
    answer = "An answer."
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    found: dict[str, int | None] = {}
    if not data.chat:
        return found
    try:
        templates = Templates(tokenizer, data)
        for name in templates.names:
            text = templates.apply(messages, {}, "a trial", name=name, add_generation_prompt=False)
            after = text.rpartition(answer)[2].strip()
            ids: list[int] = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
            found[name] = next((token for token in ids if token in tokenizer.all_special_ids), None)
    except ConfigError:
        pass
    return found


def _check_compiler(config: Config, found: Findings) -> None:
    if config.rollout.compile == "on" and config.rollout.device == "cpu" and not has_cpp_compiler():
        found.unchecked.append(
            "rollout.compile is 'on', and no C++ compiler is here: a run on this machine needs g++, or CXX to name one"
        )


def _check_devices(config: Config, found: Findings) -> None:
    """A missing device is reported as unchecked, not as a problem: the config may be for another machine."""
    for key, device in devices_of(config):
        if device == "cpu":
            continue
        if wrong := unknown(device):
            found.problems.append(f"{key}: {wrong}")
        elif missing_here := absent(device):
            found.unchecked.append(f"{key}: {missing_here}; a run on this machine needs it")


def _check_prompts(config: Config, found: Findings) -> None:
    for name in (None, *config.eval.data):
        what = "prompts   " if name is None else "benchmark "
        try:
            source = TaskSource(config, "eval" if name else "train", name)
            source.rehearse()
            # Loading a data set has already checked every row.
            read = min(_PROMPTS_READ, source.count or _PROMPTS_READ)
            longest = max(len(source.prompt(index)) for index in range(read))
        except DataMissing as error:
            found.unchecked.append(f"{what.strip()}: {error}; a run needs it")
        except (ConfigError, ModelError) as error:
            found.problems.append(str(error))
        else:
            found.lines.append(f"{what} {_rows_text(config, source, name)}; the longest of {read} has {longest} tokens")
            if config.teachers and name is None:
                found.lines += _by_teacher(config, source)
            of = f"eval.data.{name}: " if name else ""
            lines = [f"warning    {of}{text}" for text in source.notes]
            # A note on the chat template repeats for each benchmark: it is printed once.
            found.lines += [line for line in lines if line.replace(of, "") not in found.lines]


def _ranks_text(ranks: int) -> str:
    return f" of {ranks} ranks" if ranks > 1 else ""


def _rows_text(config: Config, source: TaskSource, name: str | None) -> str:
    if source.count is None:
        return f"task {config.data.task!r}"
    skipped = f", {source.skipped} more are skipped" if source.skipped else ""
    if name is None:
        return f"{source.count} rows of {config.data.path}{skipped}, judged by {config.data.verifier}"
    one = config.eval.data[name]
    used = min(source.count, one.problems or source.count)
    return f"{name}: {used} of {source.count} rows of {one.path}{skipped}, {one.k or config.eval.k} samples each"


def _by_teacher(config: Config, source: TaskSource) -> list[str]:
    """How many rows each teacher has, or of a task without rows how many of its first problems; a warning for one
    without any."""
    counts = source.by_teacher
    unit = f"{source.count} rows" if counts else f"the first {_PROMPTS_READ} problems"
    if not counts:
        counts = Counter(source.teacher(index) for index in range(_PROMPTS_READ))
    shares = ", ".join(f"{name} {counts.get(name, 0)}" for name in config.teachers)
    lines = [f"rows       by teacher, of {unit}: {shares}"]
    return lines + [
        f"warning    {called(name)} has no row: its workers would wait for ever"
        for name in config.teachers
        if not counts.get(name)
    ]


def _estimate_memory(
    config: Config, pair: Pair, machine: Machine, found: Findings, *, whole_logits: bool = False
) -> None:
    student = shape_in(pair.student.folder)
    teachers = {name: shape_in(facts.folder) for name, facts in pair.teachers.items()}
    needed = needs(config, student, teachers, machine, vocab=pair.vocab_size, whole_logits=whole_logits)
    found.lines += [*lines(needed, machine), *server_lines(config, student)]


def _add_summary(config: Config, found: Findings) -> None:
    rule = config.termination
    windows = f"W {rule.window}, C {rule.patience}, grace {rule.grace_tokens}, stride {rule.stride}"
    since = f"active from policy version {rule.warmup_steps}"
    arm = f"control arm {rule.control_fraction:.0%}"
    on = f"calibrated on {rule.calibrate_on}; {arm}"
    calibrated = (
        f"W {rule.window}, C {rule.patience}, η {rule.eta:g}, K {rule.teacher_top_k}, "
        f"grace {rule.grace_tokens}, stride {rule.stride}; {since} and {rule.min_calibration} minima; {on}"
    )
    text = {
        "none": "no rollout is cut",
        "fixed": f"every treated rollout is cut at {rule.fixed_tokens} tokens",
        "scheduled": f"every treated rollout is cut at {rule.fixed_tokens} tokens, growing to {rule.scheduled_tokens} "
        f"over {rule.scheduled_steps} steps",
        "random": f"treated rollouts are cut at a random length, 1 to {config.rollout.max_completion_length} tokens",
        "random_matched": f"treated rollouts are cut at random, {len(rule.hazard)} positions × {rule.hazard_scale:g}; "
        f"{since}",
        "repetition": f"treated rollouts are cut at the first {rule.ngram} tokens that come twice; {arm}",
        "kat": calibrated,
        "kat_absolute": f"{windows}, floor {rule.floor_nats:g} nats; {since}; {arm}",
        "kat_inverse": f"cut where divergence stays high; {calibrated}",
        "entropy": f"cut where the student's entropy stays low; {calibrated}",
        "margin_change": f"cut where the teacher's margin {rule.margin_side}s for good: CUSUM against the mean of "
        f"{rule.window} tokens after grace {rule.grace_tokens}, drift {rule.margin_drift:g}, threshold "
        f"{rule.margin_threshold:g} nats; {since}; {arm}",
        "adaptive": f"cut where the mean divergence has fallen: windows that adapt, δ {rule.adaptive_delta:g}, blocks "
        f"of {rule.adaptive_block} tokens, range {rule.adaptive_range:g} nats, grace {rule.grace_tokens}; {since}; "
        f"{arm}",
    }.get(rule.policy, f"a custom policy; {on if _is_calibrated(rule.policy) else arm}")
    cuts = rule.policy != "none"  # shadow and mask have no effect without cuts
    if cuts and rule.shadow:
        text += "; shadow: verdicts are recorded, not applied"
    elif cuts and rule.apply == "mask":
        text += "; mask: no rollout is stopped; the cut tokens are left out of the loss"
    learner = config.learner
    found.lines += [
        f"policy     {rule.policy}: {text}",
        f"training   {_length_text(config)} of {learner.batch_size} trajectories{_reuse_text(config)}, "
        f"{_loss_text(config)}{_reward_text(config)}, "
        f"AdamW {learner.learning_rate:g} {learner.schedule}, weights every {learner.weight_sync_steps}, staleness up "
        f"to {learner.max_staleness}",
        f"processes  feeder, arbiter, learner{_ranks_text(learner.nproc_per_node)}, {config.rollout.workers} rollout, "
        + ", ".join(f"{teacher.workers} {called(name)}" for name, teacher in config.all_teachers.items())
        + (f", evaluator (every {config.eval.every_steps} steps)" if config.eval.every_steps else ""),
    ]
    found.lines += [*_loss_warnings(config), *_reward_warnings(config)]


def _reuse_text(config: Config) -> str:
    updates = config.learner.num_iterations
    return f", {updates} updates on each" if updates > 1 else ""


_READ_BY = {
    "beta": "jsd_topk_tail",
    "forward_weight": "mixed",
    **dict.fromkeys(("estimator", "ratio_clip", "clip_range", "horizon", "discount"), "reverse_kl_sampled"),
}
"""Keys of the section `loss` that one mode reads."""


def _loss_warnings(config: Config) -> list[str]:
    """Of settings that have no effect, and of a bias that another setting causes."""
    loss, rollout, found = config.loss, config.rollout, []
    for key, mode in _READ_BY.items():
        if key == "ratio_clip" and config.reward.mode != "none":
            continue  # it bounds the reward's ratio in every mode
        if loss.mode != mode and getattr(loss, key) != Loss.model_fields[key].default:
            found.append(f"loss.{key} is set, and loss.mode {loss.mode} does not read it: only {mode} does")
    if loss.mode == "reverse_kl_sampled":
        if rollout.top_p < 1:
            found.append(
                "loss.mode reverse_kl_sampled is biased with rollout.top_p below 1: tokens outside the nucleus are "
                "never sampled, so their share of the gradient is missing"
            )
        if rollout.teacher_support:
            found.append(
                f"rollout.teacher_support is {rollout.teacher_support}, and loss.mode reverse_kl_sampled reads the "
                f"sampled token alone: it only costs memory"
            )
        if loss.horizon != 0 and (rollout.temperature != 1 or rollout.top_p < 1):
            found.append(
                "loss.horizon adds the cost of what was sampled, and with a rollout.temperature other than 1 or a "
                "rollout.top_p below 1 that is not the text of the student whose divergence is lowered"
            )
        if loss.horizon == 0 and loss.discount != 1:
            found.append("loss.discount is set, and without loss.horizon no later token counts")
    if loss.weighting == "random_drop" and loss.retention == 1:
        found.append(
            "loss.weighting random_drop drops nothing with loss.retention 1: it is the same as uniform; set "
            "loss.retention to the share of kept tokens that should count"
        )
    return [f"warning    {one}" for one in found]


def _is_calibrated(policy: str) -> bool:
    """Whether a policy, built in or custom, is calibrated on minima. One that cannot be imported was already refused
    when the config was read."""
    try:
        return issubclass(policies.find(policy), policies.Calibrated)
    except policy_names.PolicyError:
        return False


def _loss_text(config: Config) -> str:
    """The loss mode and every setting that differs from the default."""
    loss = config.loss
    parts: list[str] = [loss.mode]
    if config.rollout.teacher_support:
        parts.append(f"teacher support {config.rollout.teacher_support}")
    if loss.mode == "jsd_topk_tail":
        parts.append(f"β {loss.beta:g}")
    if loss.mode == "mixed":
        parts.append(f"forward weight {loss.forward_weight:g}")
    if loss.mode == "reverse_kl_sampled" and loss.estimator != "k1":
        parts.append(f"estimator {loss.estimator}")
    if loss.mode == "reverse_kl_sampled" and loss.horizon != 0:
        parts.append(
            f"return-to-go over {loss.horizon} later tokens" + (f" × {loss.discount:g}" * (loss.discount != 1))
        )
    if loss.denominator != "kept":
        parts.append(f"denominator {loss.denominator}")
    if loss.weighting == "random_drop":
        parts.append(f"weighting random_drop (retention {loss.retention:g})")
    elif loss.weighting == "position":
        parts.append(f"weighting position (half-life {loss.position_half_life:g} tokens)")
    elif loss.weighting == "importance_position":
        parts.append(f"weighting importance_position (γ {loss.importance_gamma:g})")
    elif loss.weighting == "entropy":
        parts.append(f"weighting entropy (half at {loss.entropy_half:g} nats)")
    return ", ".join(parts)


def _reward_warnings(config: Config) -> list[str]:
    """As `_loss_warnings`, of the reward."""
    reward, found = config.reward, []
    if reward.mode == "none":
        for key in ("weight", "of_cut"):
            if getattr(reward, key) != Reward.model_fields[key].default:
                found.append(f"reward.{key} is set, and reward.mode none does not read it")
    elif config.rollout.top_p < 1:
        found.append(
            f"reward.mode {reward.mode} is biased with rollout.top_p below 1: tokens outside the nucleus are never "
            f"sampled, so their share of the gradient is missing"
        )
    if reward.mode != "none" and config.learner.batch_size % config.data.num_generations:
        found.append(
            f"learner.batch_size {config.learner.batch_size} is no multiple of data.num_generations "
            f"{config.data.num_generations}: groups that a batch splits are trained without reward"
        )
    return [f"warning    {one}" for one in found]


def _reward_text(config: Config) -> str:
    reward = config.reward
    if reward.mode == "none":
        return ""
    of_cut = {"none": "cut ones have none", "as_wrong": "cut ones count as wrong", "kept": "of cut ones what is kept"}
    groups = f"{config.data.num_generations} rollouts a prompt, {of_cut[reward.of_cut]}"
    return f", reward {reward.mode} × {reward.weight:g} ({groups})"


def _length_text(config: Config) -> str:
    tokens = config.learner.max_generated_tokens
    if tokens is None:
        return f"{config.learner.max_steps} steps"
    return f"until {tokens:,} tokens are generated, at most {config.learner.max_steps} steps"
