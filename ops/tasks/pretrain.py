"""Make the two tiny models that ship with Katana: a teacher that is right, and a base student that is not.

Both are Qwen3 models over a tokenizer of single characters and signed digits ("+7"). Their training data differ:

* The teacher reads clean chains, each closed by the end token, and also *faulty beginnings*: a wrong result,
  a skipped number, a step repeated, a second problem after the answer. The fault itself has no loss,
  so the teacher never learns to make one; it learns to continue sensibly from another model's text.
  That makes its signal meaningful on the student's prefixes, and it also causes the agreement trap: after a wrong
  result, or in a loop, it agrees with what comes next.
* The student reads the same problems in the style of a web crawl: half are not closed but continue with the
  next problem, some fall into one step repeated to the end. It is trained briefly, so it is wrong often.

The teacher leaves a loop with a small probability at each repetition. If loops never ended, they
would take up most tokens of a batch and teach only repetition.
"""

from __future__ import annotations

import json
import platform
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from common.pretrained import find_model, read_facts
from ops.tasks.arithmetic import ALPHABET, SHIFTS, Addition, Arithmetic, shifted, steps_of, terms_of

PAD, EOS = "<pad>", "<eos>"
SIGNED = tuple(f"{sign}{digit}" for sign in "+-" for digit in range(1, 10))
VOCABULARY = {token: index for index, token in enumerate([PAD, EOS, *ALPHABET, *SIGNED])}
PAD_ID, EOS_ID = VOCABULARY[PAD], VOCABULARY[EOS]
TOKEN = r"[+-][1-9]|[\s\S]"
"""A signed digit is one token: the next number of a prompt is then found in a single attention step."""
IGNORED = -100
"""The label that `Qwen3ForCausalLM` leaves out of its loss."""

Role = Literal["teacher", "student"]
Piece = tuple[str, bool]
"""Text (or EOS), and whether a loss falls on it."""


@dataclass(frozen=True, slots=True)
class DocumentMix:
    """Composition of the documents; each number is a probability.

    ramble: after an answer, another problem instead of the end token.
    loop: a document has a step that is repeated.
    leave_loop: after each repetition, the next step follows.
    fault: a step has a wrong result, or skips a number.
    learns_faults: whether faults have a loss too.
    """

    ramble: float
    loop: float
    leave_loop: float
    fault: float
    learns_faults: bool


@dataclass(frozen=True, slots=True)
class Recipe:
    """One model's shape, documents and training.

    sharpness: factor of the logits after training, through the weight of the last norm.
    head_dim: width of a head; None: hidden_size / heads. untied: the output head is saved as a tensor of its own.
    """

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    steps: int
    batch_documents: int
    peak_lr: float
    documents: DocumentMix
    sharpness: float = 1.0
    head_dim: int | None = None
    untied: bool = False


TEACHER = Recipe(
    hidden_size=112,
    intermediate_size=256,
    layers=3,
    heads=4,
    steps=2200,
    batch_documents=24,
    peak_lr=4e-3,
    documents=DocumentMix(ramble=0.1, loop=0.04, leave_loop=0.15, fault=0.015, learns_faults=False),
    # The faults in its data leave some mass on wrong tokens at every step; sharpened, as post-training sharpens a
    # teacher, it is also right at temperature 1.
    sharpness=2.0,
)
STUDENT = Recipe(
    hidden_size=80,
    intermediate_size=200,
    layers=2,
    heads=4,
    steps=1600,
    batch_documents=24,
    peak_lr=4e-3,
    documents=DocumentMix(ramble=0.5, loop=0.12, leave_loop=0.0, fault=0.0, learns_faults=True),
    # After training it is right in 61 % of its tries; flattened, in 41 %. Training learns the single step all at once,
    # so the number of steps cannot set how often the model is right.
    sharpness=0.85,
)


@dataclass(frozen=True, slots=True)
class PretrainSettings:
    """Everything that determines the weights, besides the seed and the versions of the packages."""

    task: Arithmetic = field(default_factory=Arithmetic)
    teacher: Recipe = TEACHER
    student: Recipe = STUDENT
    context_tokens: int = 256
    document_tokens: int = 224
    warmup_steps: int = 60
    weight_decay: float = 0.05
    measured_problems: int = 128
    measured_samples: int = 4
    max_completion_length: int = 192
    begin: str | None = None  # a model to go on from; None: random weights


def build_tokenizer(context_tokens: int = 256) -> PreTrainedTokenizerFast:
    """Return the tokenizer: a token a signed digit or other character, besides the end and padding tokens.

    Encoding a character outside the alphabet raises, rather than dropping it silently.
    """
    tokenizer = Tokenizer(WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(TOKEN), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=context_tokens,
        clean_up_tokenization_spaces=False,
    )


def build_model(recipe: Recipe, context_tokens: int) -> Qwen3ForCausalLM:
    """Return a new model (float32, full attention, tied embeddings), drawn from torch's generator."""
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        head_dim=recipe.head_dim or recipe.hidden_size // recipe.heads,
        max_position_embeddings=context_tokens,
        # The usual 0.02 is meant for widths in the thousands; 1 / sqrt(width) would be 0.1 here.
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=VOCABULARY[EOS],
        pad_token_id=VOCABULARY[PAD],
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=VOCABULARY[EOS],
        pad_token_id=VOCABULARY[PAD],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    return model


def chain(prompt: str, mix: DocumentMix, rng: random.Random) -> Iterator[Piece]:
    """Yield the solution of `prompt` up to and with its answer, with the faults that `mix` asks for.

    After a fault the chain continues consistently: the next step starts from the result as written.
    """
    value, terms = terms_of(prompt)
    looping = rng.randrange(len(terms)) if rng.random() < mix.loop else -1
    at, written = 0, False
    while at < len(terms):
        faulty = rng.random() < mix.fault
        if faulty and at + 1 < len(terms) and rng.random() < 0.5:
            at += 1
        step = steps_of(value, terms[at : at + 1])[0]
        if faulty:
            step = Addition(step.value, step.term, max(10, step.result + rng.choice([-10, -2, -1, 1, 2, 10])))
        if written:
            yield ";", True
        yield step.text, mix.learns_faults or not faulty
        value, written = step.result, True
        if looping >= 0 and at >= looping:
            yield from _loop(step, mix, rng)
            looping = -1
        at += 1
    yield f"#{value}", True


def _loop(step: Addition, mix: DocumentMix, rng: random.Random) -> Iterator[Piece]:
    """Yield `step` again and again; the first repetition is the fault, the others follow from it."""
    yield f";{step.text}", mix.learns_faults
    while rng.random() >= mix.leave_loop:
        yield f";{step.text}", True


def document(task: Arithmetic, mix: DocumentMix, rng: random.Random, limit: int) -> list[Piece]:
    """Return one document: problems with their solutions, to the end token or to `limit` characters. Of the task's
    `shifted_percent` of the documents all of the text is in the other dialect."""
    pieces = _plain_document(replace(task, shifted_percent=0), mix, rng, limit)
    if task.shifted_percent and rng.randrange(100) < task.shifted_percent:
        return [(text if text == EOS else shifted(text), learned) for text, learned in pieces]
    return pieces


def _plain_document(task: Arithmetic, mix: DocumentMix, rng: random.Random, limit: int) -> list[Piece]:
    pieces: list[Piece] = []
    length = 0
    while True:
        problem = task.problem(rng.getrandbits(62), split="train", seed=0)
        # The first problem is always given; a loss on random numbers would drown that of the chain.
        pieces.append((problem.prompt, bool(pieces)))
        for piece in chain(problem.prompt, mix, rng):
            pieces.append(piece)
            length += len(piece[0])
            if length >= limit:
                return pieces
        length += len(problem.prompt)
        if rng.random() >= mix.ramble:
            return [*pieces, (EOS, True)]
        # The teacher must close an answer; a second problem after it has no loss.
        pieces.append(("\n", mix.learns_faults))


def ids_of(text: str) -> list[int]:
    """Return the ids of a text, or of EOS; the same as the tokenizer's, without its overhead."""
    return [VOCABULARY[token] for token in ([EOS] if text == EOS else re.findall(TOKEN, text))]


def encode(pieces: list[Piece], limit: int) -> tuple[list[int], list[int]]:
    """Return the ids of a document and its labels, each at most `limit` long."""
    ids: list[int] = []
    labels: list[int] = []
    for text, learned in pieces:
        piece = ids_of(text)
        ids += piece
        labels += piece if learned else [IGNORED] * len(piece)
    return ids[:limit], labels[:limit]


def batches(
    settings: PretrainSettings, recipe: Recipe, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (ids, labels), each int64 [documents, tokens], without end.

    Batches are cut from a pool sorted by length, so that little of a batch is padding.
    """
    pool_batches = 8
    while True:
        pool = [
            encode(
                document(settings.task, recipe.documents, rng, settings.document_tokens),
                settings.document_tokens,
            )
            for _ in range(pool_batches * recipe.batch_documents)
        ]
        pool.sort(key=lambda pair: len(pair[0]))
        starts = list(range(0, len(pool), recipe.batch_documents))
        rng.shuffle(starts)
        for start in starts:
            yield _padded(pool[start : start + recipe.batch_documents])


def _padded(pairs: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(ids) for ids, _ in pairs)
    ids = torch.tensor([ids + [VOCABULARY[PAD]] * (longest - len(ids)) for ids, _ in pairs])
    labels = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in pairs])
    return ids, labels


def train(
    model: Qwen3ForCausalLM,
    settings: PretrainSettings,
    recipe: Recipe,
    rng: random.Random,
    log: Callable[[str], None],
) -> None:
    """Train `model` in place on next tokens, then sharpen it; the rate warms up and falls linearly to zero."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.peak_lr, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    source = batches(settings, recipe, rng)
    model.train()
    for step in range(recipe.steps):
        rate = min((step + 1) / settings.warmup_steps, 1 - step / recipe.steps)
        for group in optimizer.param_groups:
            group["lr"] = recipe.peak_lr * rate
        ids, labels = next(source)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step + 1 == recipe.steps:
            log(f"step {step:5d}  loss {loss.item():.4f}")
    with torch.no_grad():
        model.model.norm.weight.mul_(recipe.sharpness)
    model.train(False)


@torch.inference_mode()
def sample(model: Qwen3ForCausalLM, prompts: list[str], *, limit: int, seed: int) -> list[tuple[str, int, bool]]:
    """Return (completion, its tokens, whether the end token closed it) for each prompt, at temperature 1.

    `limit` is the longest completion in tokens. The draw depends on `seed` and on all prompts together.
    """
    torch.manual_seed(seed)
    encoded = [ids_of(prompt) for prompt in prompts]
    longest = max(map(len, encoded))
    ids = torch.tensor([[VOCABULARY[PAD]] * (longest - len(prompt)) + prompt for prompt in encoded])
    written = model.generate(  # type: ignore[misc]
        input_ids=ids, attention_mask=(ids != VOCABULARY[PAD]).long(), max_new_tokens=limit, do_sample=True
    )
    return [_read(row) for row in written[:, longest:].tolist()]


def _read(row: list[int]) -> tuple[str, int, bool]:
    """Return the text before the end token, its tokens with the end token, and whether there is one."""
    ended = VOCABULARY[EOS] in row
    kept = row[: row.index(VOCABULARY[EOS])] if ended else row
    tokens = list(VOCABULARY)
    return "".join(tokens[index] for index in kept), len(kept) + ended, ended


def measure(model: Qwen3ForCausalLM, settings: PretrainSettings, *, seed: int) -> dict[str, float]:
    """Return the model's figures on held-out problems, a few samples each at temperature 1.

    avg@1 is over the first sample of each problem, avg@k over all; `mean_length` is in tokens with the end
    token; `end_rate` is the share of completions that the end token closed.
    """
    count, samples = settings.measured_problems, settings.measured_samples
    problems = [settings.task.problem(index, split="eval", seed=0) for index in range(count)]
    rounds = [
        sample(model, [p.prompt for p in problems], limit=settings.max_completion_length, seed=seed + number)
        for number in range(samples)
    ]
    right = [
        [settings.task.verify(p, text) for p, (text, _, _) in zip(problems, completions, strict=True)]
        for completions in rounds
    ]
    everything = [completion for completions in rounds for completion in completions]
    return {
        "avg@1": sum(right[0]) / count,
        f"avg@{samples}": sum(map(sum, right)) / (count * samples),
        f"pass@{samples}": sum(map(any, zip(*right, strict=True))) / count,
        "mean_length": sum(length for _, length, _ in everything) / len(everything),
        "end_rate": sum(ended for _, _, ended in everything) / len(everything),
    }


def pretrain(
    out: Path,
    *,
    which: Literal["teacher", "student", "both"] = "both",
    seed: int = 0,
    settings: PretrainSettings | None = None,
    log: Callable[[str], None] = print,
) -> None:
    """Train, measure and save the models asked for, into `out/teacher` and `out/student`.

    The same seed, settings and package versions give the same weights, bit for bit, on the same kind of
    processor; one torch thread is used, because the order of a sum depends on the number of threads.
    """
    settings = settings or PretrainSettings()
    roles: tuple[Role, ...] = ("teacher", "student") if which == "both" else (which,)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            for role in roles:
                _make(out / role, role, settings, seed, log)
    finally:
        torch.set_num_threads(threads)


def with_loops(*, student_loop: float | None = None, teacher_leaves: float | None = None) -> PretrainSettings:
    """The shipped settings with another share of looping documents for the student, and another probability with which
    the teacher leaves a loop at each repetition; None: as shipped."""
    student, teacher = STUDENT.documents, TEACHER.documents
    if student_loop is not None:
        student = replace(student, loop=student_loop)
    if teacher_leaves is not None:
        teacher = replace(teacher, leave_loop=teacher_leaves)
    return PretrainSettings(teacher=replace(TEACHER, documents=teacher), student=replace(STUDENT, documents=student))


def for_vllm(settings: PretrainSettings) -> PretrainSettings:
    """The same models as vLLM can run and swap them on a CPU: heads 64 wide, and an output head of its own, since its
    reload there leaves a tied one as it was."""
    teacher, student = (replace(recipe, head_dim=64, untied=True) for recipe in (settings.teacher, settings.student))
    return replace(settings, teacher=teacher, student=student)


def untie(model: Qwen3ForCausalLM) -> None:
    """Give a model an output head of its own, in place: for now equal to the embedding."""
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())


def bilingual() -> PretrainSettings:
    """For a student that knows a little of both dialects: the shipped one, trained on for a while with half of the
    documents in the other dialect. One that has never seen the other marks gives them no probability, and reverse KL
    hardly moves what has none."""
    recipe = replace(STUDENT, steps=300, peak_lr=2e-3)
    return PretrainSettings(task=Arithmetic(shifted_percent=50), student=recipe, begin="ops/models/student")


def exchange_end(source: Path, out: Path) -> None:
    """Copy a shipped model so that its end token has another id, that of the padding token: as good as before.

    Base and instruct models often end with different tokens; this makes such a pair, for rollout.stop_set. Raises
    ModelError if `source` cannot be loaded.
    """
    _rename(source, out, {PAD_ID: EOS_ID, EOS_ID: PAD_ID}, {"eos_token_id": PAD_ID, "pad_token_id": EOS_ID})


def shift(source: Path, out: Path) -> None:
    """Copy a shipped model so that it reads and writes the dialect SHIFTED: as good at it as before at the other.

    What the model computes stays; the marks of SHIFTS have each other's rows of the embedding. This makes a second
    teacher in a second. Raises ModelError if `source` cannot be loaded.
    """
    _rename(source, out, {VOCABULARY[old]: VOCABULARY[new] for old, new in SHIFTS.items()}, {})


def _rename(source: Path, out: Path, names: Mapping[int, int], changes: dict[str, Any]) -> None:
    """Copy a model so that it takes the token `new` for what was the token `old`, for each `old: new` of `names`.
    `changes`: of the keys of its configurations. Raises ModelError."""
    facts = read_facts(find_model(str(source)))
    state = load_file(facts.folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):  # only one of them if they are tied
        if name in state:
            state[name][[*names.values()]] = state[name][[*names]]
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(facts.folder.glob("*.json")):
        text = path.read_text()
        if changes and path.name in ("config.json", "generation_config.json"):
            text = json.dumps(json.loads(text) | changes, indent=2) + "\n"
        (out / path.name).write_text(text)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})


def _command(role: Role, seed: int, recipe: Recipe, shifted_percent: int = 0) -> str:
    mix, other = recipe.documents, ""
    if role == "teacher" and mix.leave_loop != TEACHER.documents.leave_loop:
        other = f" --leave-loop {mix.leave_loop:g}"
    if role == "student" and mix.loop != STUDENT.documents.loop:
        other = f" --loop {mix.loop:g}"
    if recipe.untied:
        other += " --for-vllm"
    if shifted_percent:
        other += " --bilingual"
    return f"katana pretrain --which {role} --seed {seed}{other}"


def _make(folder: Path, role: Role, settings: PretrainSettings, seed: int, log: Callable[[str], None]) -> None:
    recipe = settings.teacher if role == "teacher" else settings.student
    started = time.monotonic()
    torch.manual_seed(seed)
    model = build_model(recipe, settings.context_tokens)
    if settings.begin is not None:
        model.load_state_dict(
            load_file(find_model(settings.begin) / "model.safetensors"), strict=False
        )  # tied: no head
    parameters = sum(parameter.numel() for parameter in model.parameters())
    log(f"{role}: {parameters} parameters, {recipe.steps} steps")
    train(model, settings, recipe, random.Random(f"{seed}:{role}"), log)
    train_s = time.monotonic() - started
    measured = measure(model, settings, seed=seed)
    log(f"{role}: {measured}")
    if recipe.untied:
        untie(model)
    model.save_pretrained(folder)
    build_tokenizer(settings.context_tokens).save_pretrained(folder)
    record = {
        "command": _command(role, seed, recipe, settings.task.shifted_percent),
        "seed": seed,
        "parameters": parameters,
        "train_s": round(train_s),
        "measured": measured,
        "recipe": asdict(recipe),
        "settings": {name: value for name, value in asdict(settings).items() if name not in ("teacher", "student")},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (folder / "pretrain.json").write_text(json.dumps(record, indent=2) + "\n")
    (folder / "README.md").write_text(_card(role, record))


def _card(role: Role, record: dict[str, Any]) -> str:
    """Return the folder's README: what this is, and how it was made."""
    figures = "\n".join(f"| {name} | {value:.3f} |" for name, value in record["measured"].items())
    purpose = (
        "The teacher of the demo: nearly always right, also after another model's beginnings."
        if role == "teacher"
        else "The base student of the demo: often wrong, with rambling and loops."
    )
    return f"""# {role}

{purpose}

A Qwen3 model of {record["parameters"]:,} parameters over characters and signed digits, made by

    {record["command"]}

in {record["train_s"]} s on one core; the settings and the versions of the packages are in `pretrain.json`. On held-out
problems, sampled at temperature 1:

| figure | value |
| --- | --- |
{figures}
"""
