"""The two tiny models: how they are made, and those that ship."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data_sets import solution_of
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from common.config import Rollout, load
from common.pretrained import check_pair
from ops.cli.main import main
from ops.tasks.arithmetic import ALPHABET, Arithmetic, shifted, split_of
from ops.tasks.pretrain import (
    EOS,
    STUDENT,
    TEACHER,
    VOCABULARY,
    PretrainSettings,
    _command,
    bilingual,
    build_model,
    build_tokenizer,
    chain,
    document,
    encode,
    for_vllm,
    ids_of,
    measure,
    pretrain,
    untie,
    with_loops,
)

SHIPPED = Path(__file__).parents[3] / "ops" / "models"
CLEAN = replace(STUDENT.documents, ramble=0.0, loop=0.0, fault=0.0)


def test_the_tokenizer_is_one_token_a_signed_digit_or_character_and_loses_nothing(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    text = f"12+7-3?12+7=19;19-3=16#16\n4+5?{EOS}"
    for tokenizer in (build_tokenizer(), PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text) - len(EOS) + 1 - text.count("+") - text.count("-")
        assert ids[:-1] == ids_of(text.removesuffix(EOS))
        assert tokenizer("2+10-0")["input_ids"] == [VOCABULARY[token] for token in ("2", "+1", "0", "-", "0")]
        assert ids[-1] == tokenizer.eos_token_id == VOCABULARY[EOS]
        assert tokenizer.decode(ids) == text
        assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids
        assert [tokenizer.decode([VOCABULARY[character]]) for character in ALPHABET] == list(ALPHABET)


def test_the_tokenizer_refuses_what_is_not_in_its_alphabet() -> None:
    with pytest.raises(Exception, match="Missing"):
        build_tokenizer()("12 apples")


def test_a_clean_document_is_a_solved_training_problem() -> None:
    pieces = document(Arithmetic(), CLEAN, random.Random(1), limit=256)
    prompt, completion = pieces[0][0], "".join(text for text, _ in pieces[1:])
    assert split_of(prompt) == "train"
    assert completion == solution_of(prompt) + EOS
    assert pieces[0][1] is False
    assert all(learned for _, learned in pieces[1:])


def test_the_teacher_learns_what_follows_a_fault_but_not_the_fault() -> None:
    mix = replace(TEACHER.documents, fault=1.0, loop=0.0)
    pieces = list(chain("12+7-3?", mix, random.Random(3)))
    assert not any(learned for text, learned in pieces if "=" in text)
    last_step, answer = pieces[-2][0], pieces[-1]
    assert answer == (f"#{last_step.rpartition('=')[2]}", True)


def test_a_loop_of_the_student_fills_the_document() -> None:
    mix = replace(CLEAN, loop=1.0)
    ids, labels = encode(document(Arithmetic(), mix, random.Random(2), limit=250), limit=208)
    assert len(ids) == len(labels) == 208
    tokens = list(VOCABULARY)
    steps = "".join(tokens[index] for index in ids).split(";")[-6:-1]
    assert len(set(steps)) == 1


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_the_folders_load(tmp_path: Path) -> None:
    brief = PretrainSettings(
        teacher=replace(TEACHER, steps=3),
        student=replace(STUDENT, steps=3),
        measured_problems=2,
        max_completion_length=8,
    )
    for name in ("first", "second"):
        pretrain(tmp_path / name, seed=7, settings=brief, log=lambda line: None)
    pretrain(tmp_path / "other", which="student", seed=8, settings=brief, log=lambda line: None)
    assert not (tmp_path / "other" / "teacher").exists()
    for role in ("teacher", "student"):
        first = load_file(tmp_path / "first" / role / "model.safetensors")
        second = load_file(tmp_path / "second" / role / "model.safetensors")
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
        record = json.loads((tmp_path / "first" / role / "pretrain.json").read_text())
        assert record["command"] == f"katana pretrain --which {role} --seed 7"
        Qwen3ForCausalLM.from_pretrained(tmp_path / "first" / role)
    other = load_file(tmp_path / "other" / "student" / "model.safetensors")
    assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize(("role", "fewest", "most"), [("teacher", 350_000, 450_000), ("student", 120_000, 180_000)])
def test_a_shipped_folder_loads_and_has_the_size_it_claims(role: str, fewest: int, most: int) -> None:
    model = Qwen3ForCausalLM.from_pretrained(SHIPPED / role)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / role)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert fewest <= parameters <= most
    assert json.loads((SHIPPED / role / "pretrain.json").read_text())["parameters"] == parameters
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.vocab_size == len(tokenizer)
    assert model.dtype == torch.float32
    assert PretrainSettings().task.max_prompt_length + 160 <= model.config.max_position_embeddings


def test_the_shipped_weights_are_small() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 3_000_000


def test_an_exchanged_end_token_changes_nothing_but_its_id(tmp_path: Path) -> None:
    assert main(["pretrain", "--exchange-end", str(SHIPPED / "student"), "--out", str(tmp_path / "other")]) == 0
    config = load(
        SHIPPED.parent / "experiments" / "demo.yaml",
        [f"student.model={tmp_path / 'other'}", "rollout.stop_set=student"],
    )
    assert check_pair(config).stop_ids == (0,)
    assert set(check_pair(config.model_copy(update={"rollout": Rollout()})).stop_ids) == {0, 1}
    ids = torch.tensor([ids_of("12+7?12+7=19#19")])
    before, after = (
        Qwen3ForCausalLM.from_pretrained(folder)(input_ids=ids).logits
        for folder in (SHIPPED / "student", tmp_path / "other")
    )
    order = [1, 0, *range(2, before.shape[-1])]
    assert torch.equal(after[..., order], before)


def test_models_of_other_loops_say_so_in_their_records() -> None:
    settings = with_loops(student_loop=0.6, teacher_leaves=0.02)
    assert settings.teacher.documents.leave_loop == 0.02
    assert settings.student.documents.loop == 0.6
    assert _command("teacher", 3, settings.teacher) == "katana pretrain --which teacher --seed 3 --leave-loop 0.02"
    assert _command("student", 3, settings.student) == "katana pretrain --which student --seed 3 --loop 0.6"
    assert with_loops() == PretrainSettings()
    assert _command("student", 3, STUDENT) == "katana pretrain --which student --seed 3"


def test_half_of_the_documents_of_a_bilingual_student_are_in_the_other_dialect() -> None:
    settings = bilingual()
    assert _command("student", 3, settings.student, 50) == "katana pretrain --which student --seed 3 --bilingual"

    kinds = []
    for seed in range(60):
        mix = settings.student.documents
        plain = document(Arithmetic(), mix, random.Random(seed), 224)
        found = document(settings.task, mix, random.Random(seed), 224)
        other = [(text if text == EOS else shifted(text), learned) for text, learned in plain]
        assert found in (plain, other)
        kinds.append(found == other)
        assert encode(found, 224)[0]  # every token of it is known
    assert 15 <= sum(kinds) <= 45


def test_a_model_for_vllm_has_wide_heads_and_an_output_head_of_its_own(tmp_path: Path) -> None:
    recipe = for_vllm(with_loops(student_loop=0.6)).student
    model = build_model(recipe, 32)
    assert model.model.layers[0].self_attn.q_proj.out_features == 4 * 64
    assert model.config.hidden_size == 80
    text = torch.arange(2, 20)[None]
    before = model(input_ids=text).logits
    untie(model)
    assert torch.equal(model(input_ids=text).logits, before)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["lm_head.weight"], saved["model.embed_tokens.weight"])
    assert not Qwen3ForCausalLM.from_pretrained(tmp_path).config.tie_word_embeddings
    assert _command("student", 3, recipe) == "katana pretrain --which student --seed 3 --loop 0.6 --for-vllm"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("role", "problems", "samples", "lowest", "highest"),
    [("teacher", 64, 1, 0.95, 1.0), ("student", 64, 4, 0.25, 0.55)],
)
def test_shipped_models_are_as_good_as_they_should_be(
    role: str, problems: int, samples: int, lowest: float, highest: float
) -> None:
    settings = PretrainSettings(measured_problems=problems, measured_samples=samples)
    model = Qwen3ForCausalLM.from_pretrained(SHIPPED / role)
    assert lowest <= measure(model, settings, seed=11)[f"avg@{samples}"] <= highest
