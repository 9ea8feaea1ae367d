"""Engines by a config: those of a worker process, loaded once and kept across its tasks, and one that samples."""

from __future__ import annotations

import logging
import time
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from transformers import PreTrainedModel

from actors.engine import Decoder, Scorer, Writer
from actors.engine.adapters import weights_digest
from actors.engine.base_files import BaseFiles
from actors.engine.compiled import Choice, CompileError, is_wanted
from actors.engine.models import load_model
from actors.engine.width import fast_slots
from actors.vllm.chunks import Outcomes
from common.config import Config, Rollout, Teacher, parse
from common.config.sections import MOST_EVAL_SLOTS, MOST_VLLM_SLOTS
from common.pretrained import ModelError, Pair, check_pair, find_model, is_hub_id, read_facts

log = logging.getLogger("katana.engine")
_SAMPLED_CHUNK = 1024  # that a server is asked for at a time, so that one answer takes no longer than that of a rollout
Stamp = tuple[tuple[str, int, int, int], ...]


class Engines:
    """Student and teacher engines of one config, each made when first asked for."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._scorers: dict[str, Scorer] = {}
        self.pair: Pair = check_pair(config)

    @cached_property
    def writer(self) -> Writer:
        """What writes rollouts, by `rollout.engine`."""
        if self._config.rollout.engine == "vllm":
            return self._before_a_server()
        return self.decoder

    def _before_a_server(self) -> Writer:
        from actors.vllm.writer import VllmWriter  # only where it is used: it brings an HTTP client

        config, student = self._config, self.pair.student
        assert config.rollout.vllm is not None
        return VllmWriter(
            config.rollout.vllm,
            student,
            outcomes=Outcomes(
                self.pair.stop_ids,
                self.pair.vocab_size,
                student.vocab_size,
                config.termination.teacher_top_k,
                config.rollout.top_p,
            ),
            slots=min(MOST_VLLM_SLOTS, config.most_slots) if config.rollout.slots == "auto" else config.rollout.slots,
            max_length=config.max_length,
            chunk_tokens=config.rollout.chunk_tokens,
            base=_base_files(config, student.folder),
        )

    @cached_property
    def decoder(self) -> Decoder:
        """The student's slots, with the weights of the model's folder until others are swapped in."""
        config, rollout = self._config, self._config.rollout
        model, slots = self._load(self.pair.student.folder, rollout), config.most_slots
        if rollout.slots == "auto" and not config.deterministic:
            slots = fast_slots(model, most=slots, length=config.max_length)
        decoder = Decoder(
            model,
            slots=slots,
            max_length=config.max_length,
            stop_ids=self.pair.stop_ids,
            vocab_size=self.pair.vocab_size,
            teacher_top_k=config.termination.teacher_top_k,
            chunk_tokens=rollout.chunk_tokens,
            prefill_tokens=rollout.prefill_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            alone=config.deterministic,
            base=_base(config, self.pair.student.folder),
        )
        if not config.deterministic:
            compile_step(decoder, rollout.compile)
        return decoder

    def scorer(self, name: str = "") -> Scorer:
        """The engine of a teacher, by its name."""
        if name not in self._scorers:
            self._scorers[name] = self._scorer(name)
        return self._scorers[name]

    def _scorer(self, name: str) -> Scorer:
        config, teacher = self._config, self._config.all_teachers[name]
        return Scorer(
            self._load(self.pair.teachers[name].folder, teacher, teacher.device_map),
            slots=teacher.slots,
            max_slots=teacher.max_slots,
            max_length=config.max_length,
            stop_ids=self.pair.stop_ids,
            vocab_size=self.pair.vocab_size,
            prefill_tokens=teacher.prefill_tokens,
            teacher_support=config.rollout.teacher_support,
        )

    def _load(self, folder: Path, role: Rollout | Teacher, device_map: str | None = None) -> PreTrainedModel:
        """The model on the role's device; this process then computes with the role's threads."""
        torch.set_num_threads(role.threads)
        vocab_size = self.pair.vocab_size
        return load_model(folder, dtype=role.dtype, device=role.device, vocab_size=vocab_size, device_map=device_map)


def sampler(
    config: Config, pair: Pair, folder: Path, *, dtype: str, device: str, temperature: float, top_p: float
) -> Decoder:
    """An engine that writes whole completions with the model in `folder`, to be judged and not trained on: by the
    run's stop set and lengths, in the evaluator's slots. Raises ModelError."""
    torch.set_num_threads(config.eval.threads)
    model, slots = load_model(folder, dtype=dtype, device=device, vocab_size=pair.vocab_size), config.eval.slots
    if slots == "auto":
        slots = fast_slots(model, most=MOST_EVAL_SLOTS, length=config.max_length)
    decoder = Decoder(
        model,
        slots=slots,
        max_length=config.max_length,
        stop_ids=pair.stop_ids,
        vocab_size=pair.vocab_size,
        teacher_top_k=1,
        chunk_tokens=config.rollout.max_completion_length,  # what is written comes in one piece
        prefill_tokens=config.rollout.prefill_tokens,
        temperature=temperature,
        top_p=top_p,
        base=_base(config, folder) if folder == pair.student.folder else None,
    )
    if config.rollout.compile != "off":  # an evaluation is too short for what pays on a CPU only in the long run
        compile_step(decoder, "auto")
    return decoder


def sampler_before_a_server(config: Config, pair: Pair, folder: Path) -> Writer:
    """Like `sampler`, by a vLLM server that has no other purpose: `eval.vllm`. It is to be attached, and has no weights
    until some are swapped in. Raises ModelError."""
    from actors.vllm.writer import VllmWriter  # only where it is used: it brings an HTTP client

    settings, model = config.eval, read_facts(folder)
    assert settings.vllm is not None
    return VllmWriter(
        settings.vllm,
        model,
        section="eval.vllm",
        outcomes=Outcomes(pair.stop_ids, pair.vocab_size, model.vocab_size, 1, settings.top_p),
        slots=MOST_EVAL_SLOTS if settings.slots == "auto" else settings.slots,
        max_length=config.max_length,
        chunk_tokens=_SAMPLED_CHUNK,
        temperature=settings.temperature,
        base=_base_files(config, folder) if folder == pair.student.folder else None,
    )


def compile_step(decoder: Decoder, choice: Choice) -> None:
    """Compile the step of a new decoder if `rollout.compile` says so. Where that fails, `auto` goes on without; `on`
    raises ModelError."""
    if not is_wanted(choice, decoder.device):
        return
    began = time.monotonic()
    try:
        decoder.compile()
    except CompileError as error:
        if choice == "on":
            raise ModelError(f"rollout.compile is 'on', and {error}") from error
        log.warning("not compiled: %s", error)
    else:
        log.info("the decode step is compiled, in %.0f s", time.monotonic() - began)


def _base(config: Config, folder: Path) -> str | None:
    """The digest of the weights in a folder, where adapters may come that were trained on it."""
    return weights_digest(folder) if config.learner.lora is not None else None


def _base_files(config: Config, folder: Path) -> BaseFiles | None:
    """The same, for a writer that holds no model."""
    return BaseFiles(folder, getattr(torch, config.rollout.dtype)) if config.learner.lora is not None else None


def engines_for(config: Config) -> Engines:
    """The engines of a config; a task of another run with the same config and models finds them loaded."""
    models = (config.student.model, *(teacher.model for teacher in config.all_teachers.values()))
    return _loaded(config.to_yaml(), *map(_stamp, models))


@lru_cache(maxsize=1)
def _loaded(config_yaml: str, *_stamps: Stamp) -> Engines:
    return Engines(parse(config_yaml))


def _stamp(model: str) -> Stamp:
    """Names, inodes, sizes and times of a model's files, which change when it is overwritten. None for one from the
    hub, whose folder is named by its revision."""
    if is_hub_id(model):
        return ()
    facts = ((path.name, path.stat()) for path in sorted(find_model(model).iterdir()))
    return tuple((name, fact.st_ino, fact.st_size, fact.st_mtime_ns) for name, fact in facts)
