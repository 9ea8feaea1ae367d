"""How many slots a decoder should have: measured on the model and the device that it will use.

A decode step of r rows takes about a + b · r seconds: a for reading the weights and for starting every operation, b for
a row's own arithmetic and cache. More rows make a token cheaper until b · r is most of it.
"""

from __future__ import annotations

import logging
import time

import numpy as np
import torch
from transformers import PreTrainedModel

from actors.engine.memory import free_bytes
from actors.engine.slots import SlotModel

log = logging.getLogger("katana.engine")

FEWEST = 8
_PROBED = (FEWEST, 64)  # rows
_TIMES, _LONGEST_S = 20, 1.0  # so many steps of each, or for so long; the fastest counts
_OVERHEAD = 0.1  # more slots are worth it while a / r is more than this share of b


def fast_slots(model: PreTrainedModel, *, most: int, length: int) -> int:
    """How many slots, of `length` tokens each: as many as make a token cheaper, at most `most`, and at most what a
    quarter of the device's free memory holds."""
    if most <= FEWEST:
        return most
    few, many = _PROBED[0], min(_PROBED[1], most)
    slots = SlotModel(model, slots=few, capacity=length)
    few_s = _step_s(slots, few)
    if (free := free_bytes(slots.device)) is not None:
        most = max(1, min(most, free // 4 // slots.slot_bytes))
    if most < many or not slots.grow(many):  # memory decides, and there is too little of it to measure more rows
        return min(most, many)
    many_s = _step_s(slots, many)
    chosen = worth(few, few_s, many, many_s, most)
    text = "a step of %d rows takes %.1f ms, of %d rows %.1f ms: %d slots of at most %d"
    log.info(text, few, 1e3 * few_s, many, 1e3 * many_s, chosen, most)
    return chosen


def worth(few: int, few_s: float, many: int, many_s: float, most: int) -> int:
    """The number of rows from which on more of them are not much cheaper, by the times of two steps."""
    each = max(0.0, (many_s - few_s) / (many - few)) if many > few else 0.0
    fixed = max(0.0, few_s - each * few)
    if each * most * _OVERHEAD <= fixed:
        return most
    return min(most, max(FEWEST, int(fixed / (each * _OVERHEAD))))


def _step_s(slots: SlotModel, rows: int) -> float:
    """Seconds of the fastest of several decode steps in the middle of the slots' texts.

    On a CPU they are the processor's, not those of the clock: when a worker starts, so do others on the same cores.
    """
    ones, at = np.ones(rows, dtype=np.int64), np.full(rows, slots.capacity // 2, dtype=np.int64)
    on_cpu = slots.device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    times: list[float] = []
    while len(times) < _TIMES and sum(times) < _LONGEST_S:
        began = clock()
        slots.forward(np.arange(rows), ones[:, None], at, ones, [0])
        if not on_cpu:
            torch.accelerator.synchronize()
        times.append(clock() - began)
    return min(times)
