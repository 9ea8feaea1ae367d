"""Groups whose members are on three data servers: read as one, and decided on one of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from samples import make_config, make_head

from common.rids import rid_of
from common.wire import scripts
from common.wire.connect import connect
from common.wire.lease import Lease
from common.wire.plane import Plane
from common.wire.planes import create_on, open_planes
from learner.groups import Groups
from ops.reach.embedded import EmbeddedRedis

GROUP = 3


class Spread:
    """A run on three servers; feeder and learner are played by their leases."""

    def __init__(self, servers: list[EmbeddedRedis], folder: Path) -> None:
        clients = [connect(server.url) for server in servers]
        config = make_config(folder, redis={"data": [server.url for server in servers]})
        create_on(clients, config, "spread")
        self.plane: Plane = open_planes(config, clients, "spread")
        self.feeder, self.learner = Lease(self.plane, "feeder", 600.0), Lease(self.plane, "learner", 600.0)
        for lease in (self.feeder, self.learner):
            lease.acquire(self.plane.parts[0]._stop)
        self._cursors = [0] * len(servers)

    def admit(self, *numbers: int) -> None:
        for number in numbers:
            rid = rid_of(number)
            place = self.plane.place_of(rid)
            self._cursors[place] += 1
            call = scripts.admit(rid, make_head(rid).encode(), self._cursors[place])
            assert self.feeder.call(call) is scripts.Admitted.OK

    def stand(self, number: int, standing: str) -> None:
        assert self.feeder.call(scripts.reward(rid_of(number), standing)) == standing

    def groups(self) -> Groups:
        """Those of a new learner."""
        return Groups(self.plane, self.learner, "reinforce_leave_one_out", GROUP)


@pytest.fixture
def spread(three_servers: list[EmbeddedRedis], tmp_path: Path) -> Iterator[Spread]:
    yield Spread(three_servers, tmp_path)


def test_a_group_is_read_from_all_servers_and_given_up_on_one(spread: Spread) -> None:
    rids = [rid_of(number) for number in range(6)]
    assert len({spread.plane.place_of(rid) for rid in rids[:GROUP]}) > 1
    spread.admit(0, 1, 2, 3)
    groups = spread.groups()
    for number, standing in ((0, "right"), (1, "wrong"), (3, "right")):
        spread.stand(number, standing)
    assert groups.choose([*rids[:2], rids[3]], 3, lambda place: False) is None, "number 2 is being written"
    spread.stand(2, "wrong")
    assert groups.choose([*rids[:2], rids[3]], 3, lambda place: False) == [0, 1, 2]
    for found in (groups, spread.groups()):
        assert found.choose(rids[:4], 4, lambda place: False) == [0, 1, 2, 3]
        assert found.outcome(rids[0]).advantages == {rids[0]: 1.0, rids[1]: -0.5, rids[2]: -0.5}
        assert found.outcome(rids[3]).without(rids[3]) == "split"
    spread.admit(4, 5)
    for number in (4, 5):
        spread.stand(number, "wrong")
    later = spread.groups()
    assert later.choose(rids[3:], 3, lambda place: False) == [0, 1, 2]
    assert {later.outcome(rid).without(rid) for rid in rids[3:]} == {"split"}


def test_a_member_that_a_lost_server_took_decides_its_group(spread: Spread) -> None:
    rids = [rid_of(number) for number in range(3)]
    spread.admit(0, 1, 2)
    spread.stand(0, "right")
    groups = spread.groups()
    assert groups.choose(rids[:1], 1, lambda place: False) is None
    spread.stand(2, "lost")
    assert groups.choose(rids[:1], 1, lambda place: False) == [0]
    assert groups.outcome(rids[0]).without(rids[0]) == "lost"
