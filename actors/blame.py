"""Whether a rollout or the process is at fault when an engine fails; for rollout and teacher workers."""

from __future__ import annotations

import logging
from collections.abc import Callable

from actors.engine.decode import ClosedChunk
from actors.engine.writer import Writer
from common.failing import brief, out_of_memory

log = logging.getLogger("katana.engine")
ALONE_AFTER = 2  # takeovers without progress: such a rollout may be what ends its workers
_MOST_IN_A_ROW = 5  # the engine failed on so many rollouts and on none succeeded between: the process is at fault
_MOST_REMEMBERED = 1000  # rollouts at fault; each is dead after a few more attempts


class EngineBroken(RuntimeError):
    """This process cannot write or score any rollout; another process may."""


class Blame:
    """Failures of one engine, each on a single rollout. `prove`: the engine's self-test, raises if it fails; `deed`:
    what it does to a rollout, as a participle; `model`: student or teacher."""

    def __init__(self, prove: Callable[[], None], *, deed: str, model: str) -> None:
        self._prove, self._deed, self._model = prove, deed, model
        self._rids: set[str] = set()  # failed since the engine last succeeded
        self._at_fault: set[str] = set()  # failed before the engine succeeded with others

    def succeeded(self) -> None:
        """The engine works: the rollouts on which it failed are at fault, and do not count against it again."""
        if len(self._at_fault) > _MOST_REMEMBERED:
            self._at_fault.clear()
        self._at_fault |= self._rids
        self._rids.clear()

    def of(self, rid: str, error: Exception) -> None:
        """Count a failure on a rollout. Raises EngineBroken if this process is at fault."""
        if rid not in self._at_fault:
            self._rids.add(rid)
        if len(self._rids) >= _MOST_IN_A_ROW:
            raise EngineBroken(f"{len(self._rids)} rollouts in a row cannot be {self._deed}, the last: {brief(error)}")
        try:
            self._prove()
        except Exception as broken:
            raise EngineBroken(f"{brief(error)}; the {self._model} fails its self-test too: {brief(broken)}") from error


def step_or_part(
    writer: Writer, keys: list[str], *, may_economize: bool
) -> tuple[list[ClosedChunk], list[tuple[str, Exception]]]:
    """One step of the rollouts `keys`: the chunks that it closed, and the rollouts that failed, each with its error.

    If a batch fails, each half is tried, down to the single rollout that fails.
    """
    try:
        return writer.step(keys), []
    except EngineBroken:
        raise
    except Exception as error:
        failed = error.with_traceback(None)  # its frames keep tensors in memory
    if may_economize and out_of_memory(failed) and (tokens := writer.economize()):
        log.warning("out of memory: at most %d tokens in a prefill from now on (%s)", tokens, brief(failed))
        return step_or_part(writer, keys, may_economize=True)
    if len(keys) == 1:
        return [], [(keys[0], failed)]
    closed, failures = [], []
    for half in (keys[: len(keys) // 2], keys[len(keys) // 2 :]):
        of_half = step_or_part(writer, half, may_economize=may_economize)
        closed += of_half[0]
        failures += of_half[1]
    return closed, failures
