"""The engines of a worker, on the shipped models and by a run's config."""

from __future__ import annotations

from samples import Run
from transformers import PreTrainedModel

from actors.engine.decode import Decoder
from actors.engine.models import load_model
from actors.engine.score import Scorer
from common.pretrained import PACKAGE_ROOT, read_facts

STUDENT, TEACHER = (PACKAGE_ROOT / "ops" / "models" / name for name in ("student", "teacher"))
VOCAB, STOPS = read_facts(STUDENT).vocab_size, read_facts(STUDENT).stop_ids


def load_shipped(name: str) -> PreTrainedModel:
    """`student` or `teacher`."""
    return load_model({"student": STUDENT, "teacher": TEACHER}[name], dtype="float32", device="cpu", vocab_size=VOCAB)


def decoder_of(run: Run, model: PreTrainedModel) -> Decoder:
    return Decoder(
        model,
        slots=run.config.rollout.slots,
        max_length=run.config.max_length,
        stop_ids=STOPS,
        vocab_size=VOCAB,
        teacher_top_k=run.config.termination.teacher_top_k,
        chunk_tokens=run.config.rollout.chunk_tokens,
        prefill_tokens=256,
        alone=run.config.deterministic,
    )


def scorer_of(run: Run, model: PreTrainedModel) -> Scorer:
    return Scorer(
        model,
        slots=next(iter(run.config.all_teachers.values())).slots,
        max_length=run.config.max_length,
        stop_ids=STOPS,
        vocab_size=VOCAB,
        prefill_tokens=256,
        teacher_support=run.config.rollout.teacher_support,
    )
