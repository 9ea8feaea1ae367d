"""Memory that is left: what the system and the container say."""

from pathlib import Path

import pytest
import torch

from actors.engine import memory
from actors.engine.memory import free_bytes

CPU = torch.device("cpu")


def put(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_this_machine_has_some() -> None:
    found = free_bytes(CPU)
    assert found is not None and found > 1 << 20


@pytest.mark.parametrize(
    ("limit", "used", "left"), [("5000000", "4000000", 1_000_000), ("max", "1", 2048 * 1024), ("1", "9", 0)]
)
def test_the_least_of_system_and_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, used: str, left: int
) -> None:
    monkeypatch.setattr(memory, "_MEMINFO", put(tmp_path / "meminfo", "MemFree: 7 kB\nMemAvailable:    2048 kB\n"))
    monkeypatch.setattr(memory, "_LIMITS", ((put(tmp_path / "max", limit), put(tmp_path / "now", used)),))
    assert free_bytes(CPU) == left


def test_a_system_that_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "absent")
    monkeypatch.setattr(memory, "_LIMITS", ((tmp_path / "absent", tmp_path / "absent"),))
    assert free_bytes(CPU) is None
    assert free_bytes(torch.device("mps")) is None
