"""What is read of a model's folder, and that student and teacher fit each other: on folders made by hand."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from samples import make_config
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from common.config import Config
from common.pretrained import (
    PACKAGE_ROOT,
    HubUnavailable,
    ModelError,
    check_pair,
    compare_tokenizers,
    find_model,
    load_tokenizer,
    read_facts,
)

WORDS = ["<pad>", "<eos>", "<end>", *"abcdefghijklmnopq"]  # 20 ids


def put_model(
    folder: Path,
    words: list[str] | None = None,
    *,
    generation: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A folder as save_pretrained writes it, without weights."""
    folder.mkdir(parents=True)
    words = WORDS if words is None else words
    values = {"model_type": "toy", "vocab_size": len(words), "max_position_embeddings": 512, "eos_token_id": 1} | config
    (folder / "config.json").write_text(json.dumps({name: value for name, value in values.items() if value != "drop"}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    if words:
        vocabulary = {word: index for index, word in enumerate(words)}
        Tokenizer(WordLevel(vocabulary, unk_token="<pad>")).save(str(folder / "tokenizer.json"))
    return folder


def pair_config(tmp_path: Path, **overrides: Any) -> Config:
    models = {"student": {"model": str(tmp_path / "student")}, "teacher": {"model": str(tmp_path / "teacher")}}
    return make_config(tmp_path, **(models | overrides))


# --- stop ids ---


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (1, None, (1,)),
        ([2, 1], None, (2, 1)),
        (1, {"eos_token_id": 2}, (2, 1)),
        (1, {"eos_token_id": [5, 1, 5]}, (5, 1)),
        ("drop", {"eos_token_id": 3}, (3,)),
        (0, None, (0,)),
        (None, {"eos_token_id": [4, None]}, (4,)),
    ],
)
def test_stop_ids_are_those_of_both_files_in_order(tmp_path: Path, config: Any, generation: Any, expected: Any) -> None:
    facts = read_facts(put_model(tmp_path / "m", eos_token_id=config, generation=generation))
    assert facts.stop_ids == expected


def test_a_model_without_any_stop_id_is_refused(tmp_path: Path) -> None:
    folder = put_model(tmp_path / "m", eos_token_id="drop", generation={"eos_token_id": []})
    with pytest.raises(ModelError, match=r"neither generation_config\.json nor config\.json names an eos_token_id"):
        read_facts(folder)


def test_the_stop_set_is_the_union_with_the_students_own_first(tmp_path: Path) -> None:
    put_model(tmp_path / "student", eos_token_id=[3, 1])
    put_model(tmp_path / "teacher", eos_token_id=[1, 2], generation={"eos_token_id": [5]})
    pair = check_pair(pair_config(tmp_path))
    assert pair.stop_ids == (3, 1, 5, 2)
    assert pair.vocab_size == 20
    assert check_pair(pair_config(tmp_path, rollout={"stop_set": "student"})).stop_ids == (3, 1)


def test_a_stop_id_outside_the_tokenizer_is_refused(tmp_path: Path) -> None:
    put_model(tmp_path / "student")
    put_model(tmp_path / "teacher", eos_token_id=25, vocab_size=32)
    with pytest.raises(ModelError, match="stop id 25 is outside the tokenizer's 20 ids"):
        check_pair(pair_config(tmp_path))


# --- facts ---


def test_facts_are_read_from_a_text_config_where_there_is_one(tmp_path: Path) -> None:
    text = {"vocab_size": 7, "max_position_embeddings": 99, "eos_token_id": 4}
    folder = put_model(tmp_path / "m", text_config=text, vocab_size="drop", eos_token_id="drop")
    facts = read_facts(folder)
    assert (facts.vocab_size, facts.max_position_embeddings, facts.stop_ids) == (7, 99, (4,))
    assert facts.model_type == "toy"


def test_the_size_of_the_weights_is_that_of_their_files(tmp_path: Path) -> None:
    folder = put_model(tmp_path / "m")
    (folder / "a.safetensors").write_bytes(b"x" * 10)
    (folder / "b.safetensors").write_bytes(b"x" * 7)
    assert read_facts(folder).parameters_bytes == 17


@pytest.mark.parametrize("text", ["{", "\x00", "[" * 100_000])
def test_a_broken_config_json_is_named(tmp_path: Path, text: str) -> None:
    folder = put_model(tmp_path / "m")
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_facts(folder)


@pytest.mark.parametrize("text", ["[]", "{}", '{"vocab_size": "many"}', '{"text_config": 5}', '{"vocab_size": true}'])
def test_a_config_json_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    folder = put_model(tmp_path / "m")
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match="vocab_size"):
        read_facts(folder)


# --- finding ---


def test_a_folder_is_found_as_it_is_named_or_under_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = put_model(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    assert find_model(str(folder)) == folder
    assert find_model("m").resolve() == folder
    assert find_model("ops/models/student") == PACKAGE_ROOT / "ops/models/student"


def test_a_folder_without_config_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(ModelError, match=r"has no config\.json") as caught:
        find_model(str(tmp_path / "m"))
    assert str(tmp_path / "m") in str(caught.value)


@pytest.mark.parametrize("name", ["absent", "./absent", "/absent/model", "a/b/c", "~/absent"])
def test_a_name_that_is_neither_a_folder_nor_a_hub_id_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="there is no such folder, and a hub id has the form owner/name") as caught:
        find_model(name)
    assert not isinstance(caught.value, HubUnavailable)


def test_a_hub_id_that_cannot_be_had_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    began = time.monotonic()
    with pytest.raises(HubUnavailable, match="owner/no-such-model: no such folder, and not available from the hub"):
        find_model("owner/no-such-model")
    assert time.monotonic() - began < 5


# --- student and teacher ---


def test_the_shipped_models_fit_each_other(tmp_path: Path) -> None:
    config = make_config(tmp_path, student={"model": "ops/models/student"}, teacher={"model": "ops/models/teacher"})
    pair = check_pair(config)
    assert pair.stop_ids
    assert pair.vocab_size <= min(pair.student.vocab_size, pair.teacher.vocab_size)


def test_tokenizers_that_differ_are_refused_with_the_first_id(tmp_path: Path) -> None:
    other = list(WORDS)
    other[7], other[9] = other[9], other[7]
    put_model(tmp_path / "student")
    put_model(tmp_path / "teacher", other)
    with pytest.raises(ModelError, match=r"the tokenizers differ: id 7 is 'e' for the student and 'g' for the teacher"):
        check_pair(pair_config(tmp_path))


def test_a_few_more_ids_on_one_side_are_allowed(tmp_path: Path) -> None:
    put_model(tmp_path / "student")
    put_model(tmp_path / "teacher", [*WORDS, "<more>"])
    with pytest.raises(ModelError, match=r"student .*: its logits are 20 wide, the tokenizer has 21 ids"):
        check_pair(pair_config(tmp_path))
    (tmp_path / "student" / "config.json").write_text('{"vocab_size": 24, "eos_token_id": 1}')
    assert check_pair(pair_config(tmp_path)).vocab_size == 21


def test_a_tokenizer_that_shares_little_is_refused() -> None:
    ours = {str(index): index for index in range(100)}
    compare_tokenizers(ours, {str(index): index for index in range(90)})
    with pytest.raises(ModelError, match="100 and 89 ids, 89 of them shared"):
        compare_tokenizers(ours, {str(index): index for index in range(89)})


def test_a_head_narrower_than_the_ids_is_refused(tmp_path: Path) -> None:
    put_model(tmp_path / "student")
    put_model(tmp_path / "teacher", vocab_size=19)
    with pytest.raises(ModelError, match=r"teacher .*teacher: its logits are 19 wide, the tokenizer has 20 ids"):
        check_pair(pair_config(tmp_path))


def test_a_wider_head_is_padding(tmp_path: Path) -> None:
    put_model(tmp_path / "student", vocab_size=32)
    put_model(tmp_path / "teacher", vocab_size=64)
    assert check_pair(pair_config(tmp_path)).vocab_size == 20


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_context_that_is_too_short_is_refused(tmp_path: Path, who: str) -> None:
    for name in ("student", "teacher"):
        put_model(tmp_path / name, max_position_embeddings=127 if name == who else 128)
    with pytest.raises(ModelError, match=rf"{who} .*: context of 127 tokens is too short .* 64 \+ .* 64 = 128"):
        check_pair(pair_config(tmp_path))
    check_pair(pair_config(tmp_path, rollout={"max_completion_length": 63}))


LONG = {"short_factor": [1.0], "long_factor": [2.0]}


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"rope_scaling: rope type 'dynamic' changes with the "),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, r"allowed: types that do not \(default, linear"),
        ({"rope_parameters": {"rope_type": "dynamic", "alpha": 9.0}}, "rope type 'dynamic'"),
        (
            {"rope_parameters": {"sliding": {"rope_type": "default"}, "full": {"rope_type": "dynamic"}}},
            r"rope_parameters\.full: rope type 'dynamic'",
        ),
        (
            {"rope_parameters": LONG | {"rope_type": "longrope", "original_max_position_embeddings": 127}},
            r"'longrope' changes beyond original_max_position_embeddings, 127 tokens; allowed: data\.max_prompt_length "
            r"\+ rollout\.max_completion_length up to 127, not 128",
        ),
        ({"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 127}, "'su' changes beyond"),
        ({"rope_scaling": LONG | {"type": "yarn"}, "original_max_position_embeddings": 127}, "'yarn' changes beyond"),
        ({"attn_temperature_tuning": True}, "attn_temperature_tuning: .* allowed: models without it"),
        ({"alibi": True}, "alibi: .* allowed: rotary or learned positions"),
        ({"keep_window_size": 127}, "keep_window_size: beyond 127 tokens .* out; allowed: .* not 128"),
        ({"text_config": {"vocab_size": 20, "keep_window_size": 127}}, "keep_window_size"),
    ],
)
def test_positions_that_go_wrong_in_slots_are_refused(tmp_path: Path, who: str, config: Any, says: str) -> None:
    for name in ("student", "teacher"):
        put_model(tmp_path / name, **config if name == who else {})
    with pytest.raises(ModelError, match=rf"^{who} .*{who}: .*{says}"):
        check_pair(pair_config(tmp_path), weights=False)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_scaling": None, "rope_parameters": None},
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}},
        {"rope_parameters": {"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 16}},
        {"rope_parameters": {"full": {"rope_type": "default"}, "sliding": None}},
        {"rope_parameters": LONG | {"rope_type": "longrope", "original_max_position_embeddings": 128}},
        {"rope_scaling": LONG | {"type": "longrope"}},  # switches at the context's end, which is checked anyway
        {"model_type": "hunyuan_v1_dense", "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}},
        {"keep_window_size": 128, "attn_temperature_tuning": False, "alibi": False},
    ],
)
def test_positions_that_do_not_change_within_the_run_are_allowed(tmp_path: Path, config: Any) -> None:
    put_model(tmp_path / "student", **config)
    put_model(tmp_path / "teacher")
    check_pair(pair_config(tmp_path), weights=False)


def test_a_model_without_a_fast_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        load_tokenizer(put_model(tmp_path / "m", []))


@pytest.mark.slow
def test_a_tokenizer_is_loaded_without_torch(tmp_path: Path) -> None:
    folder = put_model(tmp_path / "m")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from common.pretrained import load_tokenizer\n"
        f"assert load_tokenizer(Path({str(folder)!r})).get_vocab()['a'] == 3\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, cwd=PACKAGE_ROOT).returncode == 0
