"""How much memory each role takes, by formula, from a model's shape and the config. No torch.

What operations keep was counted with torch's hooks and its allocator, and the formulas are the counts (DECISIONS.md,
113); tests/ops/run/test_memory_estimates.py holds them against the roles' own engines. Python, torch's libraries and
the context of a GPU come on top: `PROCESS_BYTES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.footprint import LEARNER_PIECE_ROWS, TEACHER_PIECE_ROWS

SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
PROCESS_BYTES = 500_000_000
"""Of a process that has imported torch and transformers: on the host, and roughly again for its context on a GPU."""

_HEAD_COPIES = 2  # of a piece's logits, float32: log-probabilities, and exponentials that become the gradient
_SCORED_COPIES = 3  # of a piece's logits
_DRAWN_COPIES, _NUCLEUS_COPIES = 7, 11  # of a decode step's logits, float32; the second with top_p below 1: it sorts

_QK_NORM = frozenset({"qwen3", "qwen3_moe", "gemma3", "gemma3_text", "olmo2", "olmo3"})
_FOUR_NORMS = frozenset({"gemma2", "gemma3", "gemma3_text"})


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What memory depends on. parameters: all, tied ones once. queries, keys: width of a layer's queries, and of its
    keys. inner: width of the MLP, of as many experts as a token has. vocab: width of the head."""

    parameters: int
    layers: int
    hidden: int
    queries: int
    keys: int
    heads: int
    inner: int
    vocab: int
    tied: bool
    qk_norm: bool = False
    four_norms: bool = False
    eager: bool = False

    @property
    def outside(self) -> int:
        """Parameters of embedding and head."""
        return (1 if self.tied else 2) * self.vocab * self.hidden

    @property
    def linear(self) -> int:
        """Parameters of the layers."""
        return max(0, self.parameters - self.outside)

    def adapter(self, rank: int) -> int:
        """Parameters of LoRA on every linear layer: A [rank, in] and B [out, rank] of seven layers of a block."""
        attention = 2 * (self.hidden + self.queries) + 2 * (self.hidden + self.keys)
        return self.layers * rank * (attention + 3 * (self.hidden + self.inner))

    def cache(self, slots: int, length: int, dtype: str) -> int:
        """Keys and values of slots, with the position that padding is written to."""
        return 2 * self.layers * self.keys * slots * (length + 1) * SIZE[dtype]


def shape_of(text: Mapping[str, Any], *, parameters: int = 0, eager: bool = False) -> ModelShape:
    """The shape of a model by its config.json, as `common.pretrained.read_model_config` gives it.

    parameters: if they are known; 0: counted, for a decoder with gated MLPs or experts.
    """

    def number(*names: str, default: int = 0) -> int:
        return next((int(text[name]) for name in names if isinstance(text.get(name), int) and text[name]), default)

    hidden, layers = number("hidden_size"), number("num_hidden_layers")
    heads = number("num_attention_heads", default=1)
    head_dim = number("head_dim", default=hidden // heads)
    keys = number("num_key_value_heads", "num_kv_heads", default=1 if text.get("multi_query") else heads) * head_dim
    vocab, tied = number("vocab_size"), bool(text.get("tie_word_embeddings", False))
    experts = number("num_experts", "num_local_experts", "n_routed_experts")
    width = number("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", default=4 * hidden)
    inner = number("moe_intermediate_size", default=width) if experts else width
    active = number("num_experts_per_tok", "num_experts_per_token", default=2) if experts else 1
    if not parameters:
        attention = 2 * hidden * (heads * head_dim + keys)
        layer = attention + 3 * hidden * inner * max(1, experts) + 2 * hidden
        parameters = layers * layer + (1 if tied else 2) * vocab * hidden + hidden
    family = str(text.get("model_type"))
    return ModelShape(
        parameters=parameters,
        layers=layers,
        hidden=hidden,
        queries=heads * head_dim,
        keys=keys,
        heads=heads,
        inner=inner * active,
        vocab=vocab,
        tied=tied,
        qk_norm=family in _QK_NORM,
        four_norms=family in _FOUR_NORMS,
        eager=eager,
    )


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one process. device: by what takes them, which are never all at their peak at once; peak: at most at a
    time. host: beside it, if the device is a GPU."""

    device: dict[str, int]
    peak: int
    host: int = 0


@dataclass(frozen=True, slots=True)
class Training:
    """How the learner trains. rank: of LoRA, 0 without. micro_batch: tokens of one forward, padding included, at least
    those of the longest text; longest: of that. ranks: processes that share the parameters. whole_logits: those of a
    micro-batch are held at once (`learner.head.WholeHead`)."""

    dtype: str
    micro_batch: int
    longest: int
    rank: int = 0
    checkpointing: bool = False
    ranks: int = 1
    whole_logits: bool = False


def learner(shape: ModelShape, training: Training, *, on_gpu: bool, published: str) -> Part:
    """A rank of the learner. published: the dtype of its weights for the workers."""
    half = SIZE[training.dtype] == 2
    trained = shape.adapter(training.rank) if training.rank else shape.parameters
    tokens, share = max(training.micro_batch, training.longest), 1 / training.ranks
    base = (2 * shape.linear + 4 * shape.outside) if half else 4 * shape.parameters
    weights = int((base + 4 * trained if training.rank else 4 * trained) * share)
    gradients, moments = int(4 * trained * share), int(8 * trained * share)
    casts = 2 * (0 if training.rank else shape.linear) if half else 0
    layer = tokens * _kept_by_layer(shape, half=half) + _scores(shape, tokens, training.longest, half=half)
    kept = 4 * tokens * shape.hidden * shape.layers + layer if training.checkpointing else shape.layers * layer
    gathered = 0
    if training.ranks > 1:  # FSDP: embedding and head are whole while a micro-batch runs, and one block at a time
        block = shape.linear // max(1, shape.layers)
        gathered = int(8 * (shape.outside + 2 * block) * (1 - share))
    head = _HEAD_COPIES * 4 * min(LEARNER_PIECE_ROWS, tokens) * shape.vocab + 2 * 4 * tokens * shape.hidden
    if training.whole_logits:
        head += 2 * 4 * tokens * shape.vocab  # they, and their gradient
    # The gradients of a layer's MLP while its backward runs.
    passing = tokens * (3 * shape.inner * SIZE[training.dtype] + 4 * shape.hidden)
    running = gradients + casts + gathered + kept + max(head, passing)
    stepping = gradients + (4 * int(trained * share) if on_gpu else 0)  # torch's loops over all parameters at once
    return Part(
        device={
            "weights": weights,
            "gradients": gradients,
            "moments": moments,
            "weights in bfloat16": casts,
            "gathered": gathered,
            "activations": kept,
            "head": head,
        },
        peak=weights + moments + max(running, stepping),
        # Rank 0: a checkpoint is copied before it is written, and weights before they are published.
        host=12 * trained + (4 * trained if training.rank else SIZE[published] * shape.parameters),
    )


def writer(shape: ModelShape, *, dtype: str, slots: int, length: int, prefill: int, top_p: float, vocab: int) -> Part:
    """A rollout worker, or the evaluator: `slots` texts of up to `length` tokens; `prefill` tokens in a forward."""
    copies = _NUCLEUS_COPIES if top_p < 1 else _DRAWN_COPIES
    return _engine(shape, dtype, slots, length, prefill, draws=copies * 4 * slots * vocab, base=True)


def scorer(shape: ModelShape, *, dtype: str, slots: int, length: int, prefill: int, vocab: int) -> Part:
    """A teacher worker."""
    draws = _SCORED_COPIES * 4 * min(TEACHER_PIECE_ROWS, prefill) * vocab + SIZE[dtype] * prefill * shape.hidden
    return _engine(shape, dtype, slots, length, prefill, draws=draws, base=False)


def _engine(shape: ModelShape, dtype: str, slots: int, length: int, prefill: int, *, draws: int, base: bool) -> Part:
    size, prefill = SIZE[dtype], min(prefill, slots * length)
    weights, cache = size * shape.parameters, shape.cache(slots, length, dtype)
    # A forward of some rows copies these rows' keys and values of one layer; its mask is one byte for each place.
    copied = cache // max(1, shape.layers)
    attention = copied + prefill * (2 * shape.queries + 2 * shape.keys) * size
    attention += _scores(shape, prefill, length, half=size == 2)
    forward = max(attention, prefill * (4 * shape.inner + shape.hidden) * size) + prefill * length
    return Part(
        device={"weights": weights, "cache": cache, "a forward": forward, "draws": draws},
        peak=weights + cache + max(forward, draws),
        # Weights arrive as a file, and are read into tensors; the model itself is loaded on the host first.
        host=(2 if base else 1) * weights,
    )


def _kept_by_layer(shape: ModelShape, *, half: bool) -> int:
    """Bytes that a layer keeps of a token for its backward pass.

    In float32: six times the residual's width (two norms, their inputs and outputs), queries and keys twice each,
    beside them once more before their norms, and the MLP four times. Under autocast, what linear layers read and
    attention works on is bfloat16, norms and residual stay float32.
    """
    residual = (26 if half else 24) + (16 if shape.four_norms else 0)
    attention = (4 if half else 8) + ((6 if half else 8) if shape.qk_norm else 0)
    return residual * shape.hidden + attention * (shape.queries + shape.keys) + (8 if half else 16) * shape.inner


def _scores(shape: ModelShape, tokens: int, length: int, *, half: bool) -> int:
    """Bytes of eager attention's scores and probabilities, [heads, tokens, length] in two dtypes."""
    return shape.heads * tokens * length * (2 * (2 if half else 4)) if shape.eager else 0
