"""How many slots a decoder gets by `auto`."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.engine import SlotModel, width
from actors.engine.loaded import Engines
from actors.engine.width import fast_slots, worth
from common.config import ConfigError, parse
from common.config.loading import load
from tests.actors.engine.test_engine import qwen3

DEMO = Path("ops/experiments/demo.yaml")


@pytest.mark.parametrize(
    ("few_ms", "many_ms", "most", "slots"),
    [
        (2.0, 2.0, 160, 160),  # rows cost nothing: as many as may be
        (2.0, 4.8, 160, 160),  # 1.6 ms and 0.05 a row: 320
        (2.0, 4.8, 16, 16),
        (8.0, 64.0, 160, 8),  # all of it is the rows' own: more of them gain nothing
        (10.0, 38.0, 160, 120),  # 6 ms and 0.5 a row
        (5.0, 4.0, 160, 160),  # a measurement that went wrong: more rows cannot take less time
    ],
)
def test_more_rows_while_they_make_a_token_cheaper(few_ms: float, many_ms: float, most: int, slots: int) -> None:
    assert worth(8, few_ms / 1000, 64, many_ms / 1000, most) == slots


def test_a_model_is_measured() -> None:
    assert 8 <= fast_slots(qwen3(), most=40, length=48) <= 40
    assert fast_slots(qwen3(), most=3, length=48) == 3


@pytest.mark.parametrize(("fit", "most", "slots"), [(12, 40, 12), (70, 200, 70), (3, 40, 3)])
def test_no_more_than_a_quarter_of_the_free_memory_holds(
    monkeypatch: pytest.MonkeyPatch, fit: int, most: int, slots: int
) -> None:
    a_slot = 2 * 2 * 2 * 8 * 49 * 4  # keys and values of 2 layers, 2 heads of 8, 48 tokens and the scrap one, float32
    monkeypatch.setattr(width, "free_bytes", lambda device: 4 * fit * a_slot)
    monkeypatch.setattr(width, "worth", lambda few, few_s, many, many_s, most: most)
    largest = []
    grow = SlotModel.grow
    monkeypatch.setattr(SlotModel, "grow", lambda self, count: largest.append(count) or grow(self, count))
    assert fast_slots(qwen3(), most=most, length=48) == slots
    assert all(count <= fit for count in largest)  # what is measured fits too


def test_a_worker_s_engine_has_them() -> None:
    assert 8 <= Engines(load(DEMO, ["rollout.slots=auto"])).decoder.slots <= 96  # 32 a step, staleness up to 4
    assert Engines(load(DEMO, ["rollout.slots=5"])).decoder.slots == 5


def test_auto_by_the_config_alone() -> None:
    def most(*changes: str) -> int:
        return parse("student: {model: a}\nteacher: {model: b}\n", list(changes)).most_slots

    assert most("rollout.slots=7") == 7
    assert most("learner.batch_size=32", "learner.max_staleness=4") == 96
    assert most("learner.batch_size=32", "learner.max_staleness=4", "rollout.workers=3") == 32
    assert most("learner.batch_size=32", "learner.max_staleness=0") == 32
    assert most("learner.batch_size=8", "learner.weight_sync_steps=4") == 112  # 8 · (4 · 4 - 2)
    assert most("learner.batch_size=32", "feeder.concurrency=50") == 50
    assert most("learner.batch_size=512", "learner.max_staleness=4") == 256
    assert most("learner.batch_size=32", "learner.max_staleness=4", "deterministic=true") == 32


@pytest.mark.parametrize("value", ["many", "0", "-3", "1.5", "true", "null"])
def test_other_slots_are_refused_in_one_sentence(value: str) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.slots: expected a whole number of at least 1, or auto, found .+$"):
        load(DEMO, [f"rollout.slots={value}"])
