"""How many processes a learner is, and which device each has. What they do: tests/learner/test_sharded.py."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import DistStoreError, HashStore

from common.config import ConfigError, load
from common.pretrained import PACKAGE_ROOT
from ops.run import ranks
from ops.run.check import check
from ops.run.devices import devices_of
from ops.run.ranks import Others, rank_of_torchrun, ranks_beside, unused_part

DEMO = PACKAGE_ROOT / "ops" / "experiments" / "demo.yaml"
EXACT = ("deterministic=true", "learner.weight_sync_steps=1")


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cpu", ["cpu", "cpu", "cpu"]),
        ("cuda", ["cuda", "cuda:1", "cuda:2"]),
        ("cuda:2", ["cuda:2", "cuda:3", "cuda:4"]),
    ],
)
def test_each_rank_has_a_device_of_its_own_and_check_looks_at_all(device: str, expected: list[str]) -> None:
    config = load(DEMO, ["learner.nproc_per_node=3", f"learner.device={device}"])
    assert [config.learner.device_of(rank) for rank in range(3)] == expected
    assert [found for key, found in devices_of(config) if key == "learner.device"] == expected


def test_check_says_how_many_ranks_there_are() -> None:
    assert any("learner of 2 ranks" in line for line in check(load(DEMO, ["learner.nproc_per_node=2"])).lines)
    assert not any("ranks" in line for line in check(load(DEMO)).lines)


def others(size: int) -> Others:
    return Others(size, lambda _: None, {})


def test_torchrun_may_start_any_number_unless_the_config_names_one_or_depends_on_it() -> None:
    two = others(2)
    assert ranks_beside(load(DEMO), None) is None
    assert ranks_beside(load(DEMO), two) is two
    assert ranks_beside(load(DEMO, ["learner.nproc_per_node=2", *EXACT]), two) is two
    for settings in (["learner.nproc_per_node=4"], EXACT):
        with pytest.raises(ConfigError, match=r"learner.nproc_per_node is \d, but torchrun has started 2 processes"):
            ranks_beside(load(DEMO, settings), two)


def test_elsewhere_than_on_linux_the_ranks_are_for_torchrun_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks.sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="2 processes on Linux only; elsewhere start them with torchrun"):
        ranks_beside(load(DEMO, ["learner.nproc_per_node=2"]), None)


def test_a_rank_is_told_by_torchruns_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rank_of_torchrun() is None
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert rank_of_torchrun() == 1
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert rank_of_torchrun() is None


def test_ranks_that_torchrun_starts_anew_read_nothing_of_those_before_them() -> None:
    """torchrun keeps one store over its restarts: ranks that read the addresses of dead ones there do not meet."""
    store = HashStore()
    for start in range(3):
        store.set("katana/hello/2", "dead")  # of a rank that died before the others came
        with ThreadPoolExecutor(3) as ranks_at_once:
            parts = list(ranks_at_once.map(lambda rank: unused_part(store, rank, 3), range(3)))
        assert not parts[0].check(["address"])
        parts[1].set("address", str(start))
        assert [part.get("address") for part in parts] == [str(start).encode()] * 3


def test_a_rank_that_does_not_come_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_MEET_S", 0.2)
    store = HashStore()
    with pytest.raises(DistStoreError, match=r"the 2 ranks of the learner have not met within 0 s"):
        unused_part(store, 0, 2)
    store.set_timeout(timedelta(seconds=0.2))
    with pytest.raises(DistStoreError):
        unused_part(store, 1, 2)
