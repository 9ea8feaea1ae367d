"""Weights for a rollout worker: a thread reads the announced file while the worker generates."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.engine.adapters import unpacked
from common import metrics
from common.wire.weights import BadWeights, WeightsRef, read_pointer, verified

log = logging.getLogger("katana.rollout")
_AGAIN_S = 2.0  # before refused weights are read again: they are large, and rarely better


@dataclass(frozen=True, slots=True)
class Weights:
    """One version in memory. `content`: as the writer read it: tensors by the model's names or an adapter, on the CPU,
    or the file itself; `step`: the optimizer step."""

    version: int
    step: int
    content: Any


class WeightsReader:
    """Reads one version at a time from a run's `weights/`, in its own thread.

    `refused` is called with a version that could not be read. `read`: from the content of a file to what is swapped in;
    refuses a version by raising an error.
    """

    def __init__(
        self,
        folder: Path,
        refused: Callable[[int], None] = lambda version: None,
        read: Callable[[bytes], Any] = unpacked,
    ) -> None:
        self._folder, self._refused, self._unpack = folder, refused, read
        self._thread: threading.Thread | None = None  # reads `_ref`, or has read it
        self._ref: WeightsRef | None = None
        self._found: Weights | Exception | None = None
        self._again_at = 0.0

    def newer(
        self, pointer: Mapping[str, str], at_work: int, *, step: int | None = None, wait: bool = False
    ) -> Weights | None:
        """The weights that the policy pointer announced, if they are newer than version `at_work` and have been read;
        called at every iteration. `step`: only weights of that step. `wait`: block until they have been read.

        A version that was read is returned even if a newer one was announced meanwhile; otherwise none would ever be,
        if reading takes longer than the interval between versions. A version that could not be read is refused and
        read again later, unless a newer one was announced meanwhile: then its file may be deleted.
        """
        try:
            ref, of_step = read_pointer(pointer) or (None, 0)
        except BadWeights as error:
            if self._due(step):
                self._refuse(error, at_work)
            return None
        if self._thread is None and ref and ref.version > at_work and step in (None, of_step) and self._due(step):
            self._begin(ref, of_step)
        if self._thread is None or (self._thread.is_alive() and not wait):
            return None
        self._thread.join()
        found, self._found, self._thread = self._found, None, None
        if isinstance(found, Exception):
            if ref is not None and ref == self._ref:
                self._refuse(found, at_work)
                self._refused(ref.version)
            return None
        return found

    def _due(self, step: int | None) -> bool:
        """Whether to read refused weights again; always if a rollout waits for the weights of its step."""
        return step is not None or time.monotonic() >= self._again_at

    def _refuse(self, error: Exception, at_work: int) -> None:
        metrics.dead_letters.labels("weights").inc()
        log.warning("weights refused, continuing with version %d: %s", at_work, error)
        self._again_at = time.monotonic() + _AGAIN_S

    def _begin(self, ref: WeightsRef, step: int) -> None:
        self._ref = ref
        self._thread = threading.Thread(target=self._read, args=(ref, step), name="weights", daemon=True)
        self._thread.start()

    def _read(self, ref: WeightsRef, step: int) -> None:
        try:
            # Not load_file: safetensors 0.8 leaks 1.5 kB at each call, 190 MB a day at 1.5 versions a second.
            self._found = Weights(ref.version, step, self._unpack(verified(self._folder, ref)))
        except Exception as error:
            self._found = error
