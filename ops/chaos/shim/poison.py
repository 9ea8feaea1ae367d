"""Makes marked rollouts poisonous in the process that imports it: they cannot be written, scored or trained on.

`$KATANA_CHAOS_POISON/write-<rid>`: the student's logits for that rollout, and the keys of its slot, are not finite.
    A vLLM server's answer has what vLLM says of such logits: log-probabilities of -9999 without a rank.
`$KATANA_CHAOS_POISON/score-<rid>`: the teacher's logits for that rollout, and the keys of its slot, are not finite.
`$KATANA_CHAOS_POISON/step-<rid>`: the student's logits for a micro-batch that holds it are not finite in the learner.
`$KATANA_CHAOS_POISON/hold-batch`: the learner does not go on from a batch that it has chosen, until the mark is gone.
A mark holds the ids of the processes that it has struck. What follows is the product's own: its forward has run, and
its checks find the numbers. Patched as modules are imported, for no model ships that does this to some texts alone.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def _marked(what: str, rid: str) -> bool:
    path = os.path.join(os.environ["KATANA_CHAOS_POISON"], f"{what}-{rid}")
    if not os.path.exists(path):
        return False
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")
    return True


def _spoil_scores(score: Any) -> None:
    inner = score.Scorer._score

    def spoilt(self: Any, batch: Any) -> None:
        rows = [row for row, run in enumerate(batch.runs) if _marked("score", run.key)]
        inner_states = self._model.states

        def infinite(*args: Any) -> Any:
            states = inner_states(*args)
            states[rows] = math.nan
            for layer in self._model._cache._slot_layers:
                layer.keys[batch.rows[rows]] = math.nan
            return states

        if rows:
            self._model.states = infinite
        try:
            inner(self, batch)
        finally:
            self._model.__dict__.pop("states", None)

    score.Scorer._score = spoilt


def _spoil_writes(decode: Any) -> None:
    inner = decode.Decoder._decode

    def spoilt(self: Any, ready: Any) -> Any:
        slots = [slot for slot in ready.tolist() if _marked("write", self._keys[slot])]
        forward = self._model.forward

        def infinite(rows: Any, *args: Any) -> Any:
            with decode.torch.inference_mode():
                logits = forward(rows, *args)
                at_work = range(len(logits)) if rows is None else rows.tolist()
                logits[[place for place, slot in enumerate(at_work) if slot in slots]] = math.nan
                for layer in self._model._cache._slot_layers:
                    layer.keys[slots] = math.nan
            return logits

        if slots:
            self._model.forward = infinite
        try:
            return inner(self, ready)
        finally:
            self._model.__dict__.pop("forward", None)

    decode.Decoder._decode = spoilt


def _spoil_answers(client: Any) -> None:
    inner = client.Client._send

    async def spoilt(self: Any, method: str, path: str, body: Any, timeout_s: float) -> Any:
        answer = await inner(self, method, path, body, timeout_s)
        if path == "/inference/v1/generate" and _marked("write", body["request_id"].partition("-")[0]):
            for choice in answer["choices"]:
                for token in choice["logprobs"]["content"]:
                    token |= {"logprob": -9999.0, "rank": None}
        return answer

    client.Client._send = spoilt


def _spoil_steps(gradients: Any) -> None:
    inner = gradients.kept_rows

    def spoilt(model: Any, head: Any, micro: Any) -> Any:
        rows = inner(model, head, micro)
        return rows * math.nan if any(_marked("step", rid) for rid in micro.rids) else rows

    gradients.kept_rows = spoilt


def _hold_batches(intake: Any) -> None:
    inner = intake.Intake.batch

    def held(self: Any, *args: Any) -> Any:
        batch = inner(self, *args)
        while batch is not None and _marked("hold", "batch"):
            time.sleep(0.05)
        return batch

    intake.Intake.batch = held


class _After:
    """A finder that lets the others find a module, and acts on it once it is loaded."""

    def __init__(self, name: str, act: Callable[[Any], None]) -> None:
        self._name, self._act = name, act

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name != self._name:
            return None
        from importlib.util import find_spec  # here: most interpreters that start never come to it

        sys.meta_path.remove(self)
        spec: Any = find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            self._act(module)

        spec.loader.exec_module = exec_module
        return spec


def begin() -> None:
    for name, act in (
        ("actors.engine.decode", _spoil_writes),
        ("actors.engine.score", _spoil_scores),
        ("actors.vllm.client", _spoil_answers),
        ("learner.gradients", _spoil_steps),
        ("learner.intake", _hold_batches),
    ):
        sys.meta_path.insert(0, _After(name, act))
