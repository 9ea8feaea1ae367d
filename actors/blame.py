"""Who is at fault when an engine fails: a rollout, or the process. What writers and teachers have in common."""

from __future__ import annotations

import logging
from collections.abc import Callable

from actors.engine.decode import ClosedChunk, Decoder
from common.failing import brief, out_of_memory

log = logging.getLogger("katana.engine")
ALONE_AFTER = 2  # takeovers without progress: whoever was taken over so often may be what ends workers
_MOST_IN_A_ROW = 5  # rollouts that an engine fails on, and none between that it does not: it is not the rollouts
_MOST_REMEMBERED = 1000  # rollouts at fault; a few attempts later each is dead


class EngineBroken(RuntimeError):
    """This process cannot write or score, whatever it is given: another one may."""


class Blame:
    """Failures of one engine, each of one rollout by itself. `prove`: the engine's own test; `deed`: what it does to a
    rollout, as a participle; `model`: whose model it has."""

    def __init__(self, prove: Callable[[], None], *, deed: str, model: str) -> None:
        self._prove, self._deed, self._model = prove, deed, model
        self._rids: set[str] = set()  # that it failed on since it last succeeded
        self._at_fault: set[str] = set()  # that it failed on before it succeeded with others

    def succeeded(self) -> None:
        """The engine works: what it failed on before is at fault itself, and does not count against it again."""
        if len(self._at_fault) > _MOST_REMEMBERED:
            self._at_fault.clear()
        self._at_fault |= self._rids
        self._rids.clear()

    def of(self, rid: str, error: Exception) -> None:
        """A rollout is at fault. Raises EngineBroken where it is this process."""
        if rid not in self._at_fault:
            self._rids.add(rid)
        if len(self._rids) >= _MOST_IN_A_ROW:
            raise EngineBroken(f"{len(self._rids)} rollouts in a row cannot be {self._deed}, the last: {brief(error)}")
        try:
            self._prove()
        except Exception as broken:
            raise EngineBroken(
                f"{brief(error)}; nor does the {self._model} pass its own test: {brief(broken)}"
            ) from error


def step_or_part(
    decoder: Decoder, keys: list[str], *, may_economize: bool
) -> tuple[list[ClosedChunk], list[tuple[str, Exception]]]:
    """One step of the rollouts `keys`: chunks that it closed, and those on which the model failed, each with its error.

    Of what fails together each half is tried, down to the rollout that fails by itself.
    """
    try:
        return decoder.step(keys), []
    except Exception as error:
        failed = error.with_traceback(None)  # whose frames hold what memory is short of
    if may_economize and out_of_memory(failed) and (tokens := decoder.economize()):
        log.warning("out of memory: at most %d tokens in a prefill from now on (%s)", tokens, brief(failed))
        return step_or_part(decoder, keys, may_economize=True)
    if len(keys) == 1:
        return [], [(keys[0], failed)]
    closed, failures = [], []
    for half in (keys[: len(keys) // 2], keys[len(keys) // 2 :]):
        of_half = step_or_part(decoder, half, may_economize=may_economize)
        closed += of_half[0]
        failures += of_half[1]
    return closed, failures
