"""Who is at fault when an engine fails: a rollout, or the process. What writers and teachers have in common."""

from __future__ import annotations

import logging

from actors.decode import ClosedChunk, Decoder

log = logging.getLogger("katana.engine")
ALONE_AFTER = 2  # takeovers without progress: whoever was taken over so often may be what ends workers
MOST_IN_A_ROW = 5  # rollouts that an engine fails on, and none between that it does not: it is not the rollouts


class EngineBroken(RuntimeError):
    """This process cannot write or score, whatever it is given: another one may."""


def out_of_memory(error: Exception) -> bool:
    """Whether it says so, on any device: PyTorch's CPU allocator raises a plain RuntimeError."""
    return isinstance(error, MemoryError) or any(
        words in str(error).lower() for words in ("out of memory", "can't allocate memory")
    )


def brief(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


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
