"""The memory of a run by process, device and host: what `katana check` says, and the table of docs/scaling.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from common.config import Config
from common.config.sections import MOST_EVAL_SLOTS, MOST_VLLM_SLOTS
from common.memory import PROCESS_BYTES, SIZE, ModelShape, Part, Training, learner, scorer, shape_of, writer
from common.pretrained import attention_of, read_model_config, weight_files
from common.teachers import process
from ops.run.devices import gpus_here, spread

GB = 1_000_000_000
_LIGHT = ("feeder", "arbiter")  # processes without a model


@dataclass(frozen=True, slots=True)
class Machine:
    """What a run would have. gpu_bytes: memory of each GPU, None if it is not known."""

    gpus: int
    gpu_bytes: int | None = None


def machine_here(*, sizes: bool = False) -> Machine:
    """This machine, as torch sees it. sizes: with the memory of its smallest GPU, for which torch initialises CUDA."""
    gpus = gpus_here()
    if not sizes or not gpus:
        return Machine(gpus)
    import torch

    return Machine(gpus, min(torch.cuda.get_device_properties(index).total_memory for index in range(gpus)))


@dataclass(frozen=True, slots=True)
class Need:
    """What a process takes, on its device. slots: of a worker or the evaluator, as chosen for `auto`."""

    name: str
    device: str
    part: Part
    slots: int = 0


def shape_in(folder: Path) -> ModelShape:
    """The shape of the model in a folder; its parameters are counted by the size of its files, if they are there."""
    text = read_model_config(folder)
    stored = SIZE.get(str(text.get("dtype") or text.get("torch_dtype")), 4)
    parameters = sum(path.stat().st_size for path in weight_files(folder)) // stored
    return shape_of(text, parameters=parameters, eager=attention_of(folder) == "eager")


def needs(
    config: Config,
    student: ModelShape,
    teachers: Mapping[str, ModelShape],
    machine: Machine,
    *,
    vocab: int,
    whole_logits: bool = False,
) -> list[Need]:
    """Every process of the run with a model, in the order in which they are placed on a device.

    teachers: by name, as `Config.all_teachers`. vocab: logits that are used. whole_logits: the learner holds those of a
    whole micro-batch. `auto` slots take a quarter of what the processes before them leave on the device, as the engines
    do when they start.
    """
    found: list[Need] = []

    def left(device: str) -> int | None:
        if machine.gpu_bytes is None or not device.startswith("cuda"):
            return None
        return machine.gpu_bytes - sum(_on_device(one) for one in found if one.device == device)

    found += _before_servers(config, student)
    for name, device in spread(config, machine.gpus).items():
        ranks = [*_ranks(config, device)] if name == "learner" else [device]
        for rank, own in enumerate(ranks):
            one = _need(config, student, teachers, name, own, left(own), vocab, whole_logits)
            # Rank 0 alone publishes, and writes checkpoints.
            found.append(replace(one, part=replace(one.part, host=0)) if rank else one)
    return found


def _before_servers(config: Config, student: ModelShape) -> list[Need]:
    """Processes that have a vLLM server write: they hold published weights, those in use and those that come, and the
    largest tensor of the base while they merge adapters into its files."""
    names = [f"rollout-{n}" for n in range(config.rollout.workers)] if config.rollout.engine == "vllm" else []
    names += ["evaluator"] if config.eval.every_steps and config.eval.engine == "vllm" else []
    held, lora = {"published weights": 2 * SIZE[config.rollout.dtype] * student.parameters}, config.learner.lora
    if lora is not None:
        largest = student.hidden * max(student.vocab, student.inner, student.queries)
        held = {"published weights": 2 * SIZE["float32"] * student.adapter(lora.rank), "merging": 2 * 4 * largest}
    return [Need(name, "cpu", Part(held, sum(held.values()))) for name in names]


def _need(
    config: Config,
    student: ModelShape,
    teachers: Mapping[str, ModelShape],
    name: str,
    device: str,
    free: int | None,
    vocab: int,
    whole_logits: bool,
) -> Need:
    on_gpu, role = device.startswith("cuda"), name.partition("-")[0]
    if role == "learner":
        training = training_of(config, whole_logits=whole_logits)
        return Need(name, device, learner(student, training, on_gpu=on_gpu, published=config.rollout.dtype))
    rollout = config.rollout
    if role == "teacher":
        whose = next(one for one in config.all_teachers if name.rpartition("-")[0] == process(one))
        scoring, teacher = config.all_teachers[whose], teachers[whose]
        settings = {"dtype": scoring.dtype, "length": config.max_length, "prefill": scoring.prefill_tokens}
        part = scorer(teacher, slots=scoring.slots, vocab=vocab, **settings)  # type: ignore[arg-type]
        return Need(name, device, part, scoring.slots)
    given, most = (rollout.slots, config.most_slots) if role == "rollout" else (config.eval.slots, MOST_EVAL_SLOTS)
    slots = given if given != "auto" else _fitting(student, config, most, free)
    part = writer(
        student,
        dtype=rollout.dtype,
        slots=slots,
        length=config.max_length,
        prefill=rollout.prefill_tokens,
        top_p=rollout.top_p if role == "rollout" else config.eval.top_p,
        vocab=vocab,
    )
    if config.learner.lora:  # what the adapters are merged into is kept
        kept = SIZE[rollout.dtype] * student.linear
        part = replace(part, device={**part.device, "base": kept}, peak=part.peak + kept)
    return Need(name, device, part, slots)


def _fitting(shape: ModelShape, config: Config, most: int, free: int | None) -> int:
    """Slots that `auto` becomes where it is memory that decides (`actors.engine.width`)."""
    if free is None:
        return most
    a_slot = shape.cache(1, config.max_length, config.rollout.dtype)
    weights = SIZE[config.rollout.dtype] * shape.parameters
    return max(1, min(most, (free - weights - PROCESS_BYTES) // 4 // a_slot))


def training_of(config: Config, *, whole_logits: bool = False) -> Training:
    settings = config.learner
    return Training(
        dtype=settings.dtype,
        micro_batch=settings.micro_batch_tokens,
        longest=config.max_length,
        rank=settings.lora.rank if settings.lora else 0,
        checkpointing=settings.gradient_checkpointing,
        ranks=settings.nproc_per_node,
        whole_logits=whole_logits,
    )


def _ranks(config: Config, first: str) -> Iterator[str]:
    """The devices of the learner's processes, from the first one upwards."""
    kind, _, index = first.partition(":")
    for rank in range(config.learner.nproc_per_node):
        yield f"{kind}:{int(index or 0) + rank}" if kind == "cuda" else first


def _on_device(need: Need) -> int:
    return need.part.peak + (PROCESS_BYTES if need.device.startswith("cuda") else 0)


def by_device(found: list[Need]) -> dict[str, int]:
    """Bytes at most on each device: the peaks of its processes together, which seldom meet, and their contexts."""
    total: dict[str, int] = {}
    for one in found:
        device = "cuda:0" if one.device == "cuda" else one.device
        total[device] = total.get(device, 0) + _on_device(replace(one, device=device))
    return dict(sorted(total.items()))


def on_host(found: list[Need]) -> int:
    """Bytes on the host: the processes themselves, and what those on GPUs hold beside them. The rest of what is on the
    CPU is in `by_device`."""
    processes = (len(found) + len(_LIGHT)) * PROCESS_BYTES
    return processes + sum(one.part.host for one in found)


def lines(found: list[Need], machine: Machine) -> list[str]:
    """What `katana check` prints."""
    said = []
    if any(one.device.startswith("cuda") for one in found):
        placed = ", ".join(f"{one.name} {one.device}" for one in found)
        said.append(f"devices    {machine.gpus} GPU{'' if machine.gpus == 1 else 's'}: {placed}")
    for one in found:
        parts = ", ".join(f"{name} {_text(size)}" for name, size in one.part.device.items() if size)
        slots = f" with {one.slots} slots" if one.slots else ""
        said.append(f"memory     {one.name} on {one.device}{slots}: at most {_text(one.part.peak)} ({parts})")
    for device, size in by_device(found).items():
        known = machine.gpu_bytes if device.startswith("cuda") else None
        fits = "" if known is None else f" of {_text(known)}" + (": too much" if size > known else "")
        said.append(f"memory     {device}: {_text(size)}{fits} if all are at their peak")
    said.append(
        f"memory     host: {_text(on_host(found))} for {len(found) + len(_LIGHT)} processes, copies of weights and of "
        "a checkpoint (all of this is an estimate)"
    )
    return said


def _text(size: int) -> str:
    return f"{size / GB:.1f} GB" if size >= GB else f"{size / 1_000_000:,.0f} MB"


def server_lines(config: Config, student: ModelShape) -> list[str]:
    """What `katana check` prints of vLLM servers: they are no processes of the run, wherever they are."""
    dtype = config.rollout.dtype
    weights, a_slot = SIZE[dtype] * student.parameters, student.cache(1, config.max_length, dtype)
    found = []
    for key, settings, slots in (
        ("rollout", config.rollout, config.rollout.slots),
        ("eval", config.eval, config.eval.slots),
    ):
        if settings.engine == "vllm" and (key == "rollout" or config.eval.every_steps):
            many = MOST_VLLM_SLOTS if slots == "auto" else slots
            found.append(
                f"memory     the vLLM server of {key}.vllm: weights {_text(weights)}, and keys and values "
                f"{_text(a_slot)} for each rollout at full length: {_text(many * a_slot)} for {many}, as many as one "
                f"{'rollout worker' if key == 'rollout' else 'evaluator'} has there; with less, some wait"
            )
    return found


# --- the table of docs/scaling.md ------------------------------------------------------------------------------------

_QWEN3: Mapping[str, tuple[int, int, int, int, bool]] = {
    # layers, hidden, intermediate, heads, tied
    "0.6B": (28, 1024, 3072, 16, True),
    "1.7B": (28, 2048, 6144, 16, True),
    "4B": (36, 2560, 9728, 32, True),
    "8B": (36, 4096, 12288, 32, False),
    "14B": (40, 5120, 17408, 40, False),
}
"""Public shapes; all have 8 key heads, heads of 128 and 151,936 rows of embedding."""

_LENGTH, _MICRO_BATCH, _PREFILL, _SLOTS, _VOCAB = 9216, 16384, 16384, 16, 151_669


def qwen3(size: str) -> ModelShape:
    layers, hidden, inner, heads, tied = _QWEN3[size]
    return shape_of(
        {
            "model_type": "qwen3",
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151_936,
            "tie_word_embeddings": tied,
        }
    )


def scaling_table() -> list[str]:
    """Memory by role, for each size of Qwen3, as Markdown: GB."""
    ranks = (1, 2, 4, 8)
    head = " | ".join(f"{n} GPU{'s' if n > 1 else ''}" for n in ranks)
    rows = [
        f"| Qwen3 | trained | learner: {head} | checkpoint | rollout, {_SLOTS} slots | a slot | as a teacher |",
        "| --- | --- |" + " --- |" * (len(ranks) + 4),
    ]
    for size in _QWEN3:
        shape = qwen3(size)
        drawn = writer(
            shape, dtype="bfloat16", slots=_SLOTS, length=_LENGTH, prefill=_PREFILL, top_p=0.95, vocab=_VOCAB
        )
        scored = scorer(shape, dtype="bfloat16", slots=8, length=_LENGTH, prefill=_PREFILL, vocab=_VOCAB)
        for rank in (0, 16):
            figures = []
            for n in ranks[:1] if rank else ranks:  # adapters are trained by one process
                training = Training("bfloat16", _MICRO_BATCH, _LENGTH, rank=rank, checkpointing=True, ranks=n)
                peak = learner(shape, training, on_gpu=True, published="bfloat16").peak
                figures.append(f"{peak / GB:.0f}" if peak + PROCESS_BYTES <= 80 * GB else f"({peak / GB:.0f})")
            figures += ["–"] * (len(ranks) - len(figures))
            saved = 12 * (shape.adapter(rank) if rank else shape.parameters)
            cells = [
                size,
                f"LoRA, rank {rank}" if rank else "all",
                *figures,
                f"{saved / GB:.1f}" if saved >= GB else f"{saved / GB:.2f}",
                f"{drawn.peak / GB:.0f}",
                f"{shape.cache(1, _LENGTH, 'bfloat16') / GB:.2f}",
                f"{scored.peak / GB:.0f}",
            ]
            rows.append("| " + " | ".join(cells) + " |")
    return rows
