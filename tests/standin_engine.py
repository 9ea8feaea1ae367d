"""The engine of the stand-in for a vLLM server (vllm_standin.py): requests written together on the slots of one model.

It answers as vLLM 0.32 does (tests/servers asks both the same): a token drawn is in the answer whatever ends the
request, with the label that the weights had when it was drawn.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from actors.engine.models import load_model
from actors.engine.outcomes import sample, uniforms
from actors.engine.slots import SlotModel
from common.pretrained import read_facts

_STEP_S = 0.004  # at least, of a step: a server is no faster, and what tests do in the middle of a text happens there
FLOOR = -9999.0  # what JSON says for -inf and for what is not a number


class Broken(RuntimeError):
    """The model is gone: as after a reload that failed, where vLLM's process ends at the next token."""


@dataclass(eq=False)
class Request:
    """One request and, growing, its answer. `logprobs`: entries a token, None for no list at all."""

    name: str
    prompt: list[int]
    limit: int
    stop_ids: frozenset[int]
    logprobs: int | None
    temperature: float
    top_p: float
    seed: int
    tokens: list[int] = field(default_factory=list)
    content: list[dict[str, Any]] = field(default_factory=list)
    spans: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = None  # stop, length, abort; error where the model broke
    cached: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    def end(self, finish: str) -> None:
        self.finish = finish
        self.done.set()


class Engine:
    """Writes up to `slots` requests at a time, a token each a step.

    All state belongs to the thread in `run`: what others ask is done there, between two steps, in the order of asking.
    """

    def __init__(self, folder: Path, *, slots: int, max_model_len: int, logprobs_mode: str) -> None:
        facts = read_facts(folder)
        self.stop_ids, self.vocab_size = facts.stop_ids, facts.vocab_size
        model = load_model(folder, dtype="float32", device="cpu", vocab_size=facts.vocab_size)
        self._model = SlotModel(model, slots=slots, capacity=max_model_len)
        self._mode = logprobs_mode
        self._slots: list[Request | None] = [None] * slots
        self._waiting: deque[Request] = deque()
        self._asked: queue.SimpleQueue[tuple[Callable[[], None], Future[None]]] = queue.SimpleQueue()
        self._whole = True
        self.paused, self.version = False, "default"
        self.generated = 0

    def add(self, request: Request) -> None:
        self._ask(partial(self._waiting.append, request))

    def abort(self, names: list[str]) -> None:
        """End these requests with what they have; unknown names are nobody's."""
        self._ask(partial(self._abort, names))

    def pause(self, paused: bool) -> None:
        """Once paused nothing more is drawn; what is pending stays."""
        self._ask(partial(setattr, self, "paused", paused))

    def label(self, version: str) -> None:
        self._ask(partial(setattr, self, "version", version))

    def reload(self, folder: Path) -> None:
        """Other weights, between two tokens; the cache stays. Raises whatever is wrong, and the model is gone then."""
        self._ask(partial(self._reload, folder))

    def read(self, folder: Path) -> None:
        """As a reload that replaces single parameters, of a folder without any. Raises whatever is wrong; the model
        stays as it is."""
        if _tensors_in(folder):
            raise ValueError("the stand-in replaces no single parameters")

    def run(self) -> None:
        """Write for ever. Raises Broken, and whatever else the model raises; all that is pending ended then."""
        try:
            while True:
                self._do_what_was_asked()
                began = time.monotonic()
                self._step()
                time.sleep(max(0.0, _STEP_S - (time.monotonic() - began)))
        finally:
            for request in (*self._waiting, *self._slots):
                if request is not None:
                    request.end("error")

    def _ask(self, act: Callable[[], None]) -> None:
        done: Future[None] = Future()
        self._asked.put((act, done))
        done.result()

    def _do_what_was_asked(self) -> None:
        """All of it; and where there is nothing to write, wait for more."""
        while self.paused or not (self._waiting or any(self._slots)) or not self._asked.empty():
            act, done = self._asked.get()
            try:
                act()
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

    def _abort(self, names: list[str]) -> None:
        for request in (*self._waiting, *self._slots):
            if request is not None and request.name in names:
                self._end(request, "abort")

    def _reload(self, folder: Path) -> None:
        self._whole = False
        self._model.load(_tensors_in(folder))
        self._whole = True

    def _step(self) -> None:
        if not self._whole:
            raise Broken("the weights were not loaded to the end")
        for slot, held in enumerate(self._slots):
            if held is None and self._waiting:
                self._slots[slot] = self._waiting.popleft()
        self._prefill()
        held = [(slot, request) for slot, request in enumerate(self._slots) if request is not None]
        rows, requests = np.array([slot for slot, _ in held]), [request for _, request in held]
        texts = np.array([(request.prompt + request.tokens)[-1:] for request in requests])
        starts = np.array([request.cached for request in requests])
        logits = self._model.forward(rows, texts, starts, np.ones(len(rows), dtype=np.int64), [0])[:, 0]
        self._draw(requests, logits.float()[:, : self.vocab_size])

    def _prefill(self) -> None:
        """All of a new request's prompt but its last token, which the step itself forwards."""
        for slot, request in enumerate(self._slots):
            if request is not None and request.cached == 0 and (left := len(request.prompt) - 1):
                tokens = np.array([request.prompt[:-1]])
                self._model.forward(np.array([slot]), tokens, np.zeros(1, dtype=np.int64), np.array([left]), [])
                request.cached = left

    def _draw(self, requests: list[Request], logits: torch.Tensor) -> None:
        """One token for each, from `logits` [requests, vocabulary]."""
        raw = logits.log_softmax(dim=1)
        seeds = np.array([request.seed for request in requests], dtype=np.uint64)
        drawn = torch.from_numpy(uniforms(seeds, np.array([len(request.tokens) for request in requests])))
        chosen = torch.empty(len(requests), dtype=torch.int64)
        ways = [(request.temperature, request.top_p) for request in requests]
        for way in {*ways}:
            same = [row for row, other in enumerate(ways) if other == way]
            chosen[same] = sample(raw[same], drawn[same], *way)[0]
        listed = _listed(raw if self._mode == "raw_logprobs" else logits, chosen, [r.logprobs for r in requests])
        for request, token, content in zip(requests, chosen.tolist(), listed, strict=True):
            request.cached += 1
            self._take(request, token, content)

    def _take(self, request: Request, token: int, content: dict[str, Any] | None) -> None:
        if not request.spans or request.spans[-1]["version"] != self.version:
            request.spans.append({"version": self.version, "start": len(request.tokens), "end": 0})
        request.tokens.append(token)
        request.spans[-1]["end"] = len(request.tokens)
        self.generated += 1
        if content is not None:
            request.content.append(content)
        if token in request.stop_ids:
            self._end(request, "stop")
        elif len(request.tokens) == request.limit:
            self._end(request, "length")

    def _end(self, request: Request, finish: str) -> None:
        if request in self._waiting:
            self._waiting.remove(request)
        else:
            self._slots[self._slots.index(request)] = None
        request.end(finish)


def _tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {folder}")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _listed(values: torch.Tensor, chosen: torch.Tensor, entries: list[int | None]) -> list[dict[str, Any] | None]:
    """For each row of `values` [requests, vocabulary] the token drawn first, then by rank, cut at its `entries` (at
    least the token): one that is not among the most probable pushes the last of them out. None where it is None."""
    most = max((wanted or 0 for wanted in entries), default=0)
    top = values.topk(most, dim=1)  # more than there are is the end of vLLM too
    own = values.gather(1, chosen[:, None])
    ranks = (values >= own).sum(dim=1)  # 0 where the value is not a number
    found: list[dict[str, Any] | None] = []
    rows = (chosen.tolist(), own[:, 0].tolist(), ranks.tolist(), top.indices.tolist(), top.values.tolist())
    for wanted, token, value, rank, ids, numbers in zip(entries, *rows, strict=True):
        drawn = _entry(token, value, rank)
        rest = [_entry(one, number, place + 1) for place, (one, number) in enumerate(zip(ids, numbers, strict=True))]
        others = [entry for entry in rest[:wanted] if entry["token_id"] != token]
        found.append(None if wanted is None else {**drawn, "top_logprobs": [drawn, *others][: max(wanted, 1)]})
    return found


def _entry(token: int, value: float, rank: int) -> dict[str, Any]:
    return {"token_id": token, "logprob": max(value, FLOOR) if value == value else FLOOR, "rank": rank or None}
