"""Reads a model's folder without torch: its files, tokenizer, stop ids, lengths and layers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import Config
from common.teachers import called


class ModelError(ValueError):
    """A model or tokenizer that cannot be used. The message says what is wrong and what is allowed."""


class HubUnavailable(ModelError):
    """A hub id whose files are neither in the local cache nor available from the hub."""


PACKAGE_ROOT = Path(__file__).resolve().parent.parent
# Everything but weights: enough to check a config and to tokenize.
_SMALL = ["*.json", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """`vocab_size` is the width of the output head; `stop_ids` end a generation."""

    folder: Path
    model_type: str
    vocab_size: int
    max_position_embeddings: int | None
    stop_ids: tuple[int, ...]
    parameters_bytes: int


def find_model(model: str, *, weights: bool = True) -> Path:
    """The folder of a model: a local one, one that ships with Katana (`ops/models/…`), or a hub id.

    Raises:
        ModelError: neither a folder with a config.json nor an available hub id.
    """
    for folder in (Path(model).expanduser(), PACKAGE_ROOT / model):
        if (folder / "config.json").is_file():
            return folder
        if folder.is_dir():
            raise ModelError(
                f"{model}: the folder {folder} has no config.json; a model's folder is what save_pretrained writes"
            )
    if not is_hub_id(model):
        raise ModelError(f"{model}: there is no such folder, and a hub id has the form owner/name")
    from huggingface_hub import snapshot_download  # slow to import, and needed only for hub ids

    try:
        return Path(snapshot_download(model, allow_patterns=[*_SMALL, "*.safetensors"] if weights else _SMALL))
    except Exception as error:  # the hub's client raises its own errors and those of its transport
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise HubUnavailable(f"{model}: no such folder, and not available from the hub ({reason:.200})") from error


def is_hub_id(model: str) -> bool:
    """Whether a name that is not a local folder has the form of a hub id, owner/name."""
    folders = (Path(model).expanduser(), PACKAGE_ROOT / model)
    return not any(folder.is_dir() for folder in folders) and model[:1] not in "./~" and model.count("/") == 1


def model_type(model: str) -> str | None:
    """The `model_type` of a local model's config.json; None for one from the hub, or that cannot be used."""
    try:
        return None if is_hub_id(model) else str(_read_json(find_model(model) / "config.json").get("model_type"))
    except ModelError:
        return None


# Families of transformers whose attention torch's sdpa does not have: sinks, caps on the scores, or a code from before
# it. A test compares this with the classes.
_WITHOUT_SDPA = frozenset({"gemma2", "vaultgemma", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash"})


def attention_of(folder: Path) -> str:
    """The attention to load a model with, by its config.json: "sdpa", or "eager" for a family that has no other.

    It is named when loading: config.json itself may name one that needs packages of its own. Raises ModelError.
    """
    config = _read_json(folder / "config.json")
    types = {config.get("model_type"), read_model_config(folder).get("model_type")}
    return "eager" if types & _WITHOUT_SDPA else "sdpa"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error})") from error
    return value if isinstance(value, dict) else {}


# Other names that model families use for the name on the left; a test compares this with transformers' own configs.
# (Importing transformers' maps takes seconds, and brings torch.)
OTHER_NAMES = {
    "max_position_embeddings": (
        "n_positions",
        "max_seq_len",
        "n_ctx",
        "seq_length",
        "model_max_length",
        "context_length",
    ),
    "hidden_size": ("n_embd", "d_model", "embedding_size"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads", "attention_heads"),
}


def read_model_config(folder: Path) -> dict[str, Any]:
    """The text model's part of config.json; names of OTHER_NAMES are resolved. Raises ModelError."""
    config = _read_json(folder / "config.json")
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        raise ModelError(f"{folder}/config.json: no vocab_size and no text_config with one; is this a causal LM?")
    found = dict(text)
    for name, others in OTHER_NAMES.items():
        value = next((text[one] for one in (name, *others) if text.get(one) is not None), None)
        found[name] = value
        if value is not None and (type(value) is not int or value < 1):
            raise ModelError(f"{folder}/config.json: {name} is {value!r}; allowed: a whole number above 0")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads weights from: model.safetensors, or those that its index names. Other files
    (such as consolidated.safetensors) are copies of the same weights. Raises ModelError."""
    whole = folder / "model.safetensors"
    if whole.is_file():
        return [whole]
    named = _read_json(folder / "model.safetensors.index.json").get("weight_map")
    if not isinstance(named, dict):  # no index: go by their names
        return sorted(path for path in folder.glob("*.safetensors") if path.stem != "consolidated")
    names = sorted({str(name) for name in named.values()})
    return [folder / name for name in names if (folder / name).is_file()]


def _ids(value: Any, where: str) -> list[int]:
    """The ids that an eos_token_id names: one, several, or none. Raises ModelError for an invalid id."""
    if value is None:
        return []
    found: list[Any] = [one for one in value if one is not None] if isinstance(value, list) else [value]
    for one in found:
        if type(one) is not int or one < 0:
            raise ModelError(
                f"{where}: eos_token_id is {value!r:.60}; allowed: a token id from 0, a list of them, or null"
            )
    return found


def read_facts(folder: Path) -> ModelFacts:
    """Raises ModelError if config.json lacks a required key or the model names no stop token."""
    config = _read_json(folder / "config.json")
    text = read_model_config(folder)
    if type(text.get("vocab_size")) is not int:
        raise ModelError(f"{folder}/config.json: no vocab_size; is this a causal language model?")
    stops: list[int] = []
    generation = _read_json(folder / "generation_config.json")
    for name, source in (("generation_config.json", generation), ("config.json", config), ("config.json", text)):
        stops += _ids(source.get("eos_token_id"), f"{folder}/{name}")
    if not stops:
        raise ModelError(f"{folder}: neither generation_config.json nor config.json names an eos_token_id")
    return ModelFacts(
        folder=folder,
        model_type=str(config.get("model_type")),
        vocab_size=int(text["vocab_size"]),
        max_position_embeddings=text.get("max_position_embeddings"),
        stop_ids=tuple(dict.fromkeys(stops)),
        parameters_bytes=sum(path.stat().st_size for path in weight_files(folder)),
    )


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of token ids, as it is judged and as it is shown: every character, without clean-up of spaces."""
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def load_tokenizer(folder: Path) -> Any:
    """A fast tokenizer, without importing torch. Raises ModelError."""
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{folder}: no tokenizer.json; Katana needs a fast tokenizer")
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder))
    except (KeyError, TypeError, AttributeError) as error:  # transformers does not validate it
        raise ModelError(
            f"{folder}: the tokenizer cannot be loaded: {type(error).__name__} {error}; look at tokenizer_config.json "
            f"(a list of chat templates has a name and a template each)"
        ) from error


@dataclass(frozen=True, slots=True)
class Pair:
    """Student and teachers, checked against each other.

    `teachers` are by name, as `Config.all_teachers`. `stop_ids` is U, the union of all models' stop ids, the student's
    first: generation ends on any of U, and all of U is one outcome, STOP, whichever teacher scores a rollout.
    (`rollout.stop_set: student` leaves the teachers' out.) `vocab_size` is the number of logits that are used; the rest
    of a wider head is padding.
    """

    student: ModelFacts
    teachers: Mapping[str, ModelFacts]
    stop_ids: tuple[int, ...]
    vocab_size: int

    @property
    def teacher(self) -> ModelFacts:
        """The one teacher. Raises KeyError if there are several: `Config.only_teacher` has refused that before."""
        return self.teachers[""]


def check_pair(config: Config, *, weights: bool = True) -> Pair:
    """Find all models and check tokenizers, widths of the heads, and lengths, of each teacher against the student.

    Raises:
        ModelError: names the model, of several teachers the teacher, the place and what is allowed.
    """
    student = read_facts(find_model(config.student.model, weights=weights))
    ours = load_tokenizer(student.folder).get_vocab()
    teachers, ids = {}, max(ours.values()) + 1
    for name, settings in config.all_teachers.items():
        with _of_teacher(name):
            teachers[name] = read_facts(find_model(settings.model, weights=weights))
            theirs = load_tokenizer(teachers[name].folder).get_vocab()
            compare_tokenizers(ours, theirs)
        ids = max(ids, max(theirs.values()) + 1)
    union = [*student.stop_ids, *(stop for facts in teachers.values() for stop in facts.stop_ids)]
    stop_ids = tuple(dict.fromkeys(union if config.rollout.stop_set == "union" else student.stop_ids))
    for who, facts in {"student": student, **{called(name): facts for name, facts in teachers.items()}}.items():
        _check_layers(who, facts.folder)
        if reason := unfit(read_model_config(facts.folder), config.max_length):
            raise ModelError(f"{who} {facts.folder}: {reason}")
        if facts.vocab_size < ids:
            raise ModelError(
                f"{who} {facts.folder}: its logits are {facts.vocab_size} wide, the tokenizer has {ids} ids"
            )
        longest = facts.max_position_embeddings
        if longest is not None and longest < config.max_length:
            raise ModelError(
                f"{who} {facts.folder}: context of {longest} tokens is too short for data.max_prompt_length "
                f"{config.data.max_prompt_length} + rollout.max_completion_length "
                f"{config.rollout.max_completion_length} = {config.max_length}"
            )
    if max(stop_ids) >= ids:
        raise ModelError(f"stop id {max(stop_ids)} is outside the tokenizer's {ids} ids")
    return Pair(student, teachers, stop_ids, ids)


@contextmanager
def _of_teacher(name: str) -> Iterator[None]:
    """Names the one of several teachers that an error is about."""
    try:
        yield
    except ModelError as error:
        if not name:
            raise
        raise type(error)(f"{called(name)}: {error}") from error


def _check_layers(who: str, folder: Path) -> None:
    """Refuse models that the slot engine cannot run, as far as config.json shows it; the engine tests the weights."""
    if reason := unfit_layers(read_model_config(folder)):
        raise ModelError(f"{who} {folder}: {reason}")


FULL, SLIDING = "full_attention", "sliding_attention"
_STATE = "keeps a running state, which padding would change and which cannot be taken back to an earlier token"
_UNFIT_LAYERS = {
    "chunked_attention": "sees its own chunk of the text only, for which slots have no mask",
    "linear_attention": _STATE,
    "mamba": _STATE,
    "conv": _STATE,
    "recurrent": _STATE,
}


def unfit_layers(text: Mapping[str, Any]) -> str | None:
    """Why the slot engine has no cache or no mask for one of a model's layers, and what is allowed; or None.

    `text`: a text model's configuration, as config.json has it or as transformers completes it.
    """
    for layer, kind in enumerate(text.get("layer_types") or []):
        if kind not in (FULL, SLIDING):
            reason = _UNFIT_LAYERS.get(kind, "is not known to slots")
            return f"layer {layer} is {kind!r}, which {reason}; allowed: {FULL!r}, {SLIDING!r}"
    for layer, kind in enumerate(text.get("attention_layers") or []):  # GPT-Neo's own name
        if kind != "global":
            return f"layer {layer} is {kind!r}, whose window is built into the model; allowed: 'global'"
    if shared := text.get("num_kv_shared_layers"):
        return f"num_kv_shared_layers: {shared} layers read the keys of others; allowed: models without them"
    return None


def unfit(text: Mapping[str, Any], length: int) -> str | None:
    """Why slots compute a model's positions wrongly in texts of up to `length` tokens, and what is allowed; or None.

    Mostly these are positions that change with the length of the text: keys in a cache were computed when the text was
    shorter, and rows of other lengths share a forward. The training would then differ from the generation without an
    error, since the engine's self-test is short. `text`: a text model's configuration, as config.json has it or as
    transformers completes it.
    """
    lengths = "data.max_prompt_length + rollout.max_completion_length"
    for where, rope in _ropes(text):
        kind = str(rope.get("rope_type") or rope.get("type"))
        # HunYuan's dynamic with an alpha is another method with the same name, and does not change with the length.
        fixed = rope.get("alpha") and str(text.get("model_type")).startswith("hunyuan")
        if "dynamic" in kind and not fixed:
            return (
                f"{where}: rope type {kind!r} changes with the length of the text; allowed: types that do not "
                f"(default, linear, yarn, llama3)"
            )
        # Phi-3 wrote "su" and "yarn" for it.
        if kind in ("longrope", "su") or "long_factor" in rope or "long_mscale" in rope:
            at = text.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
            at = at or text.get("max_position_embeddings")
            if type(at) is int and length > at:
                return (
                    f"{where}: rope type {kind!r} changes beyond original_max_position_embeddings, {at} tokens; "
                    f"allowed: {lengths} up to {at}, not {length}"
                )
    if text.get("attn_temperature_tuning"):  # Llama 4: takes positions from what the cache holds, not as they are given
        return "attn_temperature_tuning: scales attention by the length of the cache; allowed: models without it"
    if text.get("alibi"):  # Falcon: builds distances from a mask of one row a text, which slots do not have
        return "alibi: distances are not taken from a slot's positions; allowed: rotary or learned positions"
    window = text.get("keep_window_size")
    if type(window) is int and length > window:  # Doge
        return (
            f"keep_window_size: beyond {window} tokens attention leaves some out; "
            f"allowed: {lengths} up to {window}, not {length}"
        )
    return None


def _ropes(text: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rope settings of a configuration with their key: one for all layers, or one for each type of layer."""
    for key in ("rope_parameters", "rope_scaling"):  # the second is how it was spelled before transformers 5
        found = text.get(key)
        if not isinstance(found, dict):
            continue
        nested = {f"{key}.{kind}": one for kind, one in found.items() if isinstance(one, dict)}
        yield from nested.items() if nested else [(key, found)]


def compare_tokenizers(student: dict[str, int], teacher: dict[str, int]) -> None:
    """Every id that both have must be the same token. Raises ModelError with the first that differs."""
    by_id = {index: token for token, index in student.items()}
    for token, index in sorted(teacher.items(), key=lambda item: item[1]):
        if index in by_id and by_id[index] != token:
            raise ModelError(
                f"the tokenizers differ: id {index} is {by_id[index]!r} for the student and {token!r} for the "
                f"teacher; student and teacher must share one tokenizer"
            )
    shared = len(by_id.keys() & set(teacher.values()))
    if shared < 0.9 * max(len(by_id), len(teacher)):
        raise ModelError(
            f"the tokenizers differ: {len(by_id)} and {len(teacher)} ids, {shared} of them shared; student and "
            f"teacher must share one tokenizer"
        )
