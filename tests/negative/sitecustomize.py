"""Breaks one guarantee of the product on purpose, so that a run without it can be shown to fail the checker.

Python imports this file by itself where tests/negative is on PYTHONPATH; KATANA_SABOTAGE names what is broken:

    owner      a rollout's scripts no longer ask who owns it
    early_ack  the learner acknowledges a step when it is done, not with the checkpoint that holds it
    trim       the stream of chunks is trimmed by length
    label      a rollout worker takes the label of another run's weights for one of its own

Each is a patch applied right after the product's module was imported. One that no longer fits the product raises
there: a control must not be switched off by a change of what it breaks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

_OWNER = {
    "beat": ("state[1] ~= nonce", "not state[1]"),
    "chunk": ("state[2] ~= nonce", "not state[2]"),
    "count": ("redis.call('HGET', rollout(rid), 'owner') ~= nonce", "not redis.call('HGET', rollout(rid), 'owner')"),
    "release": ("redis.call('HGET', rollout(rid), 'owner') == nonce", "redis.call('HGET', rollout(rid), 'owner')"),
}
_TRIM = {"chunk": ("key('chunks:' .. lane), '*'", "key('chunks:' .. lane), 'MAXLEN', 20, '*'")}


def _rewrite(streams: Any, changes: dict[str, tuple[str, str]]) -> None:
    """Load scripts with one expression of theirs replaced."""
    source = streams._source

    def sabotaged(name: str) -> str:
        text: str = source(name)
        if name in changes:
            before, after = changes[name]
            if text.count(before) != 1:
                raise RuntimeError(f"{name}.lua: {before!r} is there {text.count(before)} times, expected once")
            text = text.replace(before, after)
        return text

    streams._source = sabotaged


def _acknowledge_early(train: Any) -> None:
    learner = train.Learner
    step, checkpoint = learner.step, learner.checkpoint

    def step_and_settle(self: Any, batch: list[Any]) -> None:
        lags = [self.version - one.trajectory.oldest_version for one in batch]
        step(self, batch)
        pairs = zip(batch, lags, strict=True)
        endings = [train.Ending(one.entry, one.trajectory.rid, "trained", "", lag) for one, lag in pairs]
        self._intake.settle(endings)

    def checkpoint_without_settling(self: Any) -> None:
        self._intake.settle = lambda endings: None  # hides the method of its class
        try:
            checkpoint(self)
        finally:
            del self._intake.settle

    learner.step, learner.checkpoint = step_and_settle, checkpoint_without_settling


def _take_any_label(weights: Any) -> None:
    known = weights.version_in

    def version_in(label: str, run: str) -> Any:
        return known(label, label.split(":")[1] if label.count(":") == 3 else run)

    weights.version_in = version_in


_SABOTAGE: dict[str, tuple[str, Callable[[Any], None]]] = {
    "owner": ("common.wire.plane", lambda streams: _rewrite(streams, _OWNER)),
    "early_ack": ("learner.train", _acknowledge_early),
    "trim": ("common.wire.plane", lambda streams: _rewrite(streams, _TRIM)),
    "label": ("actors.vllm.weights", _take_any_label),
}


class _After:
    """A finder that lets the others find a module, and acts on it once it is loaded."""

    def __init__(self, name: str, act: Callable[[Any], None]) -> None:
        self._name, self._act = name, act

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name != self._name:
            return None
        from importlib.util import find_spec  # here: most interpreters that start never come to it

        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec: Any = find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            self._act(module)

        spec.loader.exec_module = exec_module
        return spec


def _begin(sabotage: str | None) -> None:
    if sabotage is None:
        return
    if sabotage not in _SABOTAGE:
        # `site` swallows every other exception.
        raise SystemExit(f"KATANA_SABOTAGE={sabotage}: one of {', '.join(_SABOTAGE)} is known")
    sys.meta_path.insert(0, _After(*_SABOTAGE[sabotage]))  # type: ignore[arg-type]


_begin(os.environ.get("KATANA_SABOTAGE"))
