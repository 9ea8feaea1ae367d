"""Loss and gradients from a few rows of logits at a time, against autograd through all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peak_memory import peak_bytes
from torch import Tensor
from trajectories import STOPS, VOCAB, WIDTH, random_batch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from whole_logits import kept_logits, whole_outcomes

from common.config import Loss
from learner import pieces
from learner.batch import MicroBatch, micro_batches
from learner.head import LinearHead, OutputHead, UncastHead, WholeHead, keep_head_in_float32, output_head
from learner.loss import StudentOutcomes, diagnostics, token_losses
from learner.pieces import backward_in_pieces

SHAPE: dict[str, Any] = {
    "vocab_size": WIDTH,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
QWEN3 = SHAPE | {"head_dim": 8}
CAPPED = QWEN3 | {"layer_types": ["full_attention"] * 2, "attn_implementation": "eager"}
FAMILIES: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**QWEN3, tie_word_embeddings=True)),
    "qwen3, untied": lambda: Qwen3ForCausalLM(Qwen3Config(**QWEN3, tie_word_embeddings=False)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "capped": lambda: Gemma2ForCausalLM(Gemma2Config(**CAPPED, final_logit_softcapping=2.5)),
    "divided": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=3.0)),
    "scaled": lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.3)),
    "with a bias": lambda: PhiForCausalLM(PhiConfig(**SHAPE)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=WIDTH, n_embd=16, n_layer=2, n_head=4, n_positions=64)),
}
MODES = [
    Loss(),
    Loss(mode="reverse_kl_sampled", ratio_clip=3.0),
    Loss(mode="forward_kl_topk_tail"),
    Loss(mode="jsd_topk_tail", beta=0.3),
    Loss(mode="mixed", forward_weight=0.2),
]
SIZES = [(3, 5), (1, 9), (4, 2), (2, 2), (6, 7), (1, 1)]


def tiny(family: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    return model.to(dtype).eval()


def in_pieces(model: Any, head: OutputHead, micro: MicroBatch, mode: Loss) -> tuple[Tensor, StudentOutcomes]:
    def losses(student: StudentOutcomes, of_piece: MicroBatch) -> Tensor:
        return token_losses(mode, student, of_piece)

    rows = head.kept_rows(model, micro)
    return backward_in_pieces(head, rows, micro, losses, stop_ids=STOPS, vocab_size=VOCAB)


def whole(model: Any, micro: MicroBatch, mode: Loss) -> tuple[Tensor, StudentOutcomes]:
    student = whole_outcomes(kept_logits(model, micro), micro, STOPS, VOCAB)
    loss = (micro.weights * token_losses(mode, student, micro)).sum()
    loss.backward()
    return loss.detach(), student


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return found


def in_double(micro: MicroBatch) -> MicroBatch:
    changed = {name: getattr(micro, name) for name in micro.__slots__}
    floats = {
        name: value.double()
        for name, value in changed.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    return MicroBatch(**changed | floats)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


@pytest.fixture(autouse=True, params=[4, 256], ids=["seven pieces", "one piece"])
def rows_of_a_piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(pieces, "PIECE_ROWS", request.param)
    size: int = request.param
    return size


# Every loss of every family in float64; in float32 every loss of one family, and one loss of every family.
EXACT = [(family, torch.float64, 1e-10, mode) for family in FAMILIES for mode in MODES]
ROUNDED = [
    (family, torch.float32, 1e-5, mode) for family in FAMILIES for mode in MODES if family == "qwen3" or mode == Loss()
]


@pytest.mark.parametrize(
    ("family", "dtype", "limit", "mode"),
    [*EXACT, *ROUNDED],
    ids=lambda one: one.mode if isinstance(one, Loss) else str(one).removeprefix("torch."),
)
def test_loss_and_every_gradient_are_those_of_whole_logits(
    family: str, dtype: torch.dtype, limit: float, mode: Loss
) -> None:
    model = tiny(family, dtype)
    head = output_head(model)
    assert isinstance(head, LinearHead)
    (micro,) = micro_batches(random_batch(5, SIZES), max_tokens=1000)
    micro = in_double(micro) if dtype == torch.float64 else micro
    theirs, their_student = whole(model, micro, mode)
    expected = gradients(model)
    ours, student = in_pieces(model, head, micro, mode)
    assert relative(ours, theirs) < limit
    for name in ("logprobs", "tail", "sampled", "entropy", "overlap"):
        assert relative(getattr(student, name), getattr(their_student, name).detach()) < limit, name
    got = gradients(model)
    assert got.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in expected.items():
        assert relative(got[name], gradient) < limit, name
    # Added to what is there already, by autograd and in place alike.
    in_pieces(model, head, micro, mode)
    in_pieces(model, head, micro, mode)
    for name, gradient in gradients(model).items():
        assert relative(gradient, 2 * expected[name]) < limit, name


@pytest.mark.parametrize("scale", [0.3, 3.0, 100.0])
@pytest.mark.parametrize("support", [1, 4, VOCAB - len(STOPS)])
def test_sharp_and_broad_distributions_with_and_without_a_tail(scale: float, support: int) -> None:
    (micro,) = micro_batches(random_batch(3, [(1, 30)], support=support), max_tokens=100)
    if support == VOCAB - len(STOPS):
        micro = MicroBatch(**{name: getattr(micro, name) for name in micro.__slots__} | {"teacher_tail": None})
    logits = torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * scale
    for mode in MODES:
        ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
        student = whole_outcomes(theirs, micro, STOPS, VOCAB)
        loss = (micro.weights * token_losses(mode, student, micro)).sum()
        loss.backward()
        total, found = of_logits(ours, micro, mode)
        assert relative(total, loss.detach()) < 1e-9
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-14)
        assert ours.grad is not None and (ours.grad[:, VOCAB:] == 0).all()  # padding of the embedding learns nothing
        for name in ("kl_nats", "entropy_nats", "support_mass", "topk_overlap", "ratio_mean", "ratio_max"):
            one, other = (getattr(diagnostics(each, micro), name) for each in (found, student))
            assert one == pytest.approx(other, rel=1e-6, abs=1e-12), name


def of_logits(logits: Tensor, micro: MicroBatch, mode: Loss, **changes: Any) -> tuple[Tensor, StudentOutcomes]:
    settings: dict[str, Any] = {"stop_ids": STOPS, "vocab_size": VOCAB} | changes
    return backward_in_pieces(
        WholeHead(), logits, micro, lambda student, of_piece: token_losses(mode, student, of_piece), **settings
    )


EXTREMES = {
    "certain of one in the support": [1e4, *[0.0] * 13],
    "certain of a stop id": [*[0.0] * 5, 1e4, *[0.0] * 8],
    "certain of one in the tail": [*[0.0] * 11, 1e4, 0.0, 0.0],
    "nothing in the tail": [0.0] * 6 + [-math.inf] * 6 + [0.0] * 2,
    "no stop ids": [-math.inf if i in STOPS else float(i) for i in range(14)],
    "nothing in the support": [-math.inf, -math.inf, *[0.0] * 12],
}


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.mode)
@pytest.mark.parametrize("name", EXTREMES)
def test_no_nan_in_value_gradient_or_diagnostics(name: str, mode: Loss) -> None:
    (micro,) = micro_batches(random_batch(2, [(1, 12)], support=2), max_tokens=100)
    micro.support_ids.copy_(torch.tensor([[0, 1]]))
    micro.targets.copy_(torch.arange(12))  # every outcome is sampled once
    logits = torch.tensor([EXTREMES[name]]).repeat(12, 1).requires_grad_()
    total, student = of_logits(logits, micro, mode)
    assert torch.isfinite(total) and logits.grad is not None and torch.isfinite(logits.grad).all()
    found = diagnostics(student, micro)
    assert all(math.isfinite(getattr(found, name)) for name in found.__slots__)
    theirs = logits.detach().clone().requires_grad_()
    expected = (micro.weights * token_losses(mode, whole_outcomes(theirs, micro, STOPS, VOCAB), micro)).sum()
    expected.backward()
    # A mass of 0 is LOG_FLOOR here; there it is the log-sum-exp of several floors, a few nats more of 10,000.
    assert total.item() == pytest.approx(expected.item(), rel=3e-4, abs=1e-6)
    # The slope of a forward KL is -q however small p is: which of the ids at the floor get it differs between the two.
    if mode.mode not in ("forward_kl_topk_tail", "mixed"):
        torch.testing.assert_close(logits.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_what_is_not_finite_stays_so() -> None:
    (micro,) = micro_batches(random_batch(2, [(1, 6)]), max_tokens=100)
    logits = torch.zeros(6, WIDTH)
    logits[3, 1] = math.nan
    total, _ = of_logits(logits.requires_grad_(), micro, MODES[0])
    assert math.isnan(total)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stop_ids": []}, "stop_ids is"),
        ({"stop_ids": [1, 1]}, "expected distinct ids below 12"),
        ({"stop_ids": [12]}, "expected distinct ids below 12"),
        ({"stop_ids": [-1]}, "expected distinct ids below 12"),
        ({"vocab_size": 15}, "logits are 14 wide, the vocabulary 15"),
    ],
)
def test_stop_ids_and_widths_that_are_refused(changes: dict[str, Any], message: str) -> None:
    (micro,) = micro_batches(random_batch(2, [(1, 6)]), max_tokens=100)
    with pytest.raises(ValueError, match=message):
        of_logits(torch.zeros(6, WIDTH), micro, MODES[0], **changes)


# ------------------------------------------------------------------------------ rows and micro-batches


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
@pytest.mark.parametrize("kind", ["linear", "whole"])
def test_kept_rows_are_those_of_each_sequence_alone(family: str, kind: str) -> None:
    """Padding, batching and selecting before the head change nothing: compared with each row alone."""
    model = tiny(family)
    head = output_head(model) if kind == "linear" else WholeHead()
    batch = {row.rid: row for row in random_batch(0, SIZES)}
    for micro in micro_batches(list(batch.values()), max_tokens=30):
        logits = torch.empty(micro.kept_tokens, WIDTH, dtype=torch.float64)
        with torch.no_grad():
            head.logits(head.kept_rows(model, micro), logits)
        expected = []
        for row in (batch[rid] for rid in micro.rids):
            ids = torch.from_numpy(np.concatenate([row.prompt, row.tokens])).long()
            alone = model(input_ids=ids[None]).logits[0]
            expected.append(alone[len(row.prompt) - 1 : len(ids) - 1])
        torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-10, atol=1e-10)


def batch_gradient(model: Any, micros: list[MicroBatch], mode: Loss) -> tuple[float, dict[str, Tensor]]:
    """The batch's loss and its gradient, summed over micro-batches."""
    head = output_head(model)
    total = sum(in_pieces(model, head, in_double(micro), mode)[0].item() for micro in micros)
    return total, gradients(model)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.mode)
@pytest.mark.parametrize("denominator", ["kept", "sequence"])
def test_micro_batched_gradient_equals_the_unbatched_one(mode: Loss, denominator: Any) -> None:
    """Cut small, cut whole, or each trajectory run alone and averaged by hand: the same gradient."""
    model = tiny("qwen3")
    batch = random_batch(5, SIZES)
    cuts = [micro_batches(batch, max_tokens=limit, denominator=denominator) for limit in (1, 20, 10_000)]
    assert [len(cut) for cut in cuts] == [6, 3, 1]
    results = [batch_gradient(model, cut, mode) for cut in cuts]

    kept = sum(n for _, n in SIZES)
    loss = torch.zeros((), dtype=torch.float64)
    for row in batch:
        (alone,) = micro_batches([row], max_tokens=1)
        student = whole_outcomes(kept_logits(model, alone), alone, STOPS, VOCAB)
        losses = token_losses(mode, student, alone)
        loss = loss + (losses.sum() / kept if denominator == "kept" else losses.mean() / len(batch))
    loss.backward()
    expected = gradients(model)
    for value, got in results:
        assert value == pytest.approx(loss.item(), rel=1e-6)
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------ heads


@pytest.mark.parametrize("family", ["qwen3", "qwen3, untied"])
def test_the_head_computes_in_float32_under_autocast(family: str) -> None:
    model = tiny(family, torch.float32)
    keep_head_in_float32(model)
    assert type(model.lm_head) is UncastHead
    tied = family == "qwen3"
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    head = output_head(model)
    (micro,) = micro_batches(random_batch(0, SIZES), max_tokens=1000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = head.kept_rows(model, micro)
        kept = kept_logits(model, micro)
    rows = rows.detach().to(torch.bfloat16).requires_grad_()  # as a trunk without a norm in float32 would end
    logits = torch.empty(len(rows), WIDTH)
    with torch.no_grad():
        head.logits(rows, logits)
    exact = rows.detach().double() @ model.lm_head.weight.detach().double().T
    torch.testing.assert_close(logits.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kept.detach(), logits, rtol=2e-2, atol=2e-2)  # the rows were rounded

    def losses(student: StudentOutcomes, of_piece: MicroBatch) -> Tensor:
        return token_losses(Loss(), student, of_piece)

    backward_in_pieces(head, rows, micro, losses, stop_ids=STOPS, vocab_size=VOCAB)
    exact.requires_grad_()
    loss = token_losses(Loss(), whole_outcomes(exact, micro, STOPS, VOCAB), micro)
    (micro.weights * loss).sum().backward()
    assert rows.grad is not None and rows.grad.dtype == torch.bfloat16 and exact.grad is not None
    expected = exact.grad.T @ rows.detach().double()
    assert relative(model.lm_head.weight.grad.double(), expected) < 1e-5
    by_rows = exact.grad @ model.lm_head.weight.detach().double()
    assert relative(rows.grad.double(), by_rows) < 1e-2


def test_a_frozen_head_gets_no_gradient_and_the_trunk_the_same() -> None:
    model = tiny("qwen3, untied")
    (micro,) = micro_batches(random_batch(5, SIZES), max_tokens=1000)
    head = output_head(model)
    in_pieces(model, head, micro, MODES[0])
    expected = gradients(model)
    model.lm_head.weight.requires_grad_(False)
    in_pieces(model, head, micro, MODES[0])
    got = gradients(model)
    assert expected.keys() - got.keys() == {"lm_head.weight"}
    assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize(
    ("family", "scale", "cap"),
    [("qwen3", 1.0, None), ("divided", 1 / 3, None), ("scaled", 0.3, None), ("capped", 1.0, 2.5)],
)
def test_what_a_model_does_to_its_logits_is_found(family: str, scale: float, cap: float | None) -> None:
    for dtype in (torch.float64, torch.float32):
        model = tiny(family, dtype)
        head = output_head(model)
        assert isinstance(head, LinearHead) and head.scale == pytest.approx(scale, rel=1e-6)
        assert (head.cap, head.layer) == (cap, model.lm_head)
        assert "forward" not in vars(model.lm_head)


class Squared(Qwen3ForCausalLM):  # type: ignore[no-untyped-call]
    def forward(self, **kwargs: Any) -> Any:
        output = super().forward(**kwargs)
        output.logits = output.logits + 0.01 * output.logits**2
        return output


class Odd(torch.nn.Linear):
    pass


def with_an_odd_head() -> Any:
    model = Qwen3ForCausalLM(Qwen3Config(**QWEN3, tie_word_embeddings=False))
    model.lm_head.__class__ = Odd
    return model


@pytest.mark.parametrize("make", [lambda: Squared(Qwen3Config(**QWEN3)), with_an_odd_head], ids=["squared", "odd"])
def test_a_model_of_another_kind_has_whole_logits_and_the_same_gradients(
    make: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    head = output_head(model)
    assert head == WholeHead()
    assert "logits of a whole micro-batch are held in memory" in caplog.text
    (micro,) = micro_batches(random_batch(5, SIZES), max_tokens=1000)
    theirs, _ = whole(model, micro, MODES[0])
    expected = gradients(model)
    ours, _ = in_pieces(model, head, micro, MODES[0])
    assert relative(ours, theirs) < 1e-9
    for name, gradient in gradients(model).items():
        assert relative(gradient, expected[name]) < 1e-9, name


def test_a_model_that_cannot_select_gives_the_same() -> None:
    model = tiny("qwen3")

    class Plain(torch.nn.Module):
        def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
            return SimpleNamespace(logits=model(input_ids=input_ids, use_cache=use_cache).logits)

    (micro,) = micro_batches(random_batch(0, SIZES), max_tokens=1000)
    torch.testing.assert_close(kept_logits(Plain(), micro), kept_logits(model, micro))


# ------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("cast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3", "capped"])
def test_a_step_holds_less_than_a_tenth_of_the_logits(family: str, cast: bool, rows_of_a_piece: int) -> None:
    """The head's own gradient, which is the parameter's, is there before, as after a first micro-batch."""
    vocab, tokens = 5000, 8192 * rows_of_a_piece // 256
    torch.manual_seed(0)
    shape = {"vocab_size": vocab, "hidden_size": 8, "intermediate_size": 8, "tie_word_embeddings": False}
    kind, settings = (Qwen3ForCausalLM, QWEN3) if family == "qwen3" else (Gemma2ForCausalLM, CAPPED)
    config = kind.config_class(**settings | shape)  # type: ignore[attr-defined]
    model: Any = kind(config).eval()
    keep_head_in_float32(model)
    (micro,) = micro_batches(random_batch(0, [(1, tokens)]), max_tokens=10**6)
    head = output_head(model)
    assert isinstance(head, LinearHead) and (head.cap is None) == (family == "qwen3")
    rows = torch.randn(tokens, 8, dtype=torch.bfloat16 if cast else torch.float32).requires_grad_()
    model.lm_head.weight.grad = torch.zeros_like(model.lm_head.weight)

    def step() -> None:
        backward_in_pieces(
            head, rows, micro, lambda student, part: token_losses(MODES[0], student, part),
            stop_ids=STOPS, vocab_size=vocab,
        )  # fmt: skip

    assert peak_bytes(step) < 0.1 * 4 * tokens * vocab
