"""The run's cursor from those of several servers: whatever part of a trip arrived, no rollout is missed or twice."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from actors.cursors import Cursors, least_counts
from common.rids import rid_of
from common.wire.planes import Planes


def by_three(number: int) -> int:
    return number % 3


@pytest.mark.parametrize(
    ("counts", "following", "upcoming"),
    [
        ([0, 0, 0], 0, [(0, 1), (1, 1), (2, 1), (3, 2)]),
        ([1, 1, 1], 3, [(3, 2), (4, 2), (5, 2), (6, 3)]),
        ([2, 1, 1], 4, [(4, 2), (5, 2), (6, 3), (7, 3)]),  # the first of a new round alone
        ([0, 1, 1], 0, [(0, 1), (3, 2), (4, 2), (5, 2)]),  # the first server was not reached
        ([2, 0, 2], 1, [(1, 1), (4, 2), (6, 3), (7, 3)]),  # the second lacks two
        ([0, 0, 3], 0, [(0, 1), (1, 1), (3, 2), (4, 2)]),  # only the third was reached
        ([3, 3, 0], 2, [(2, 1), (5, 2), (8, 3), (9, 4)]),
    ],
)
def test_the_run_goes_on_at_the_first_number_that_its_own_server_lacks(
    counts: list[int], following: int, upcoming: list[tuple[int, int]]
) -> None:
    cursors = Cursors(counts, by_three)
    assert cursors.next == following
    assert cursors.upcoming(4) == upcoming
    admitted = {number for number in range(cursors.end) if number in cursors}
    assert [sum(by_three(number) == place for number in admitted) for place in range(3)] == counts


def test_one_server_goes_on_behind_its_cursor() -> None:
    cursors = Cursors([41], lambda number: 0)
    assert (cursors.next, cursors.end, cursors.upcoming(2)) == (41, 41, [(41, 42), (42, 43)])
    assert 40 in cursors and 41 not in cursors and -1 not in cursors
    cursors.admitted(41)
    assert (cursors.next, cursors.counts) == (42, [42])


def scattered(servers: int) -> Planes:
    """Only to ask where a rollout is."""
    planes = Planes.__new__(Planes)
    planes._parts = (None,) * servers  # type: ignore[assignment]
    return planes


@pytest.mark.parametrize("seed", range(20))
def test_any_interrupted_trips_admit_each_number_once(seed: int) -> None:
    rng = random.Random(seed)
    servers = rng.randint(2, 5)
    planes = scattered(servers)

    def place_of(number: int) -> int:
        return planes.place_of(rid_of(number))

    stored: list[list[int]] = [[] for _ in range(servers)]  # what each server admitted
    for _ in range(30):
        # A new feeder knows only how many each server has.
        cursors = Cursors([len(one) for one in stored], place_of)
        assert cursors.next == next(n for n in range(10_000) if n not in {m for one in stored for m in one})
        trip = cursors.upcoming(rng.randint(1, 12))
        for place in rng.sample(range(servers), rng.randint(0, servers)):  # the servers that the trip reached
            own = [(number, cursor) for number, cursor in trip if place_of(number) == place]
            for number, cursor in own[: rng.randint(0, len(own))]:  # and how far
                assert cursor == len(stored[place]) + 1, "each follows the one before, or the server refuses it"
                stored[place].append(number)
                cursors.admitted(number)
        assert cursors.counts == [len(one) for one in stored]
    everything = [number for one in stored for number in one]
    assert len(set(everything)) == len(everything)
    assert all(one == sorted(one) for one in stored)
    assert least_counts(everything, servers, place_of) == [len(one) for one in stored]


@pytest.mark.parametrize(
    ("numbers", "counts"),
    [((), [0, 0, 0]), ((0,), [1, 0, 0]), ((7,), [0, 3, 0]), ((7, 2), [0, 3, 1]), ((-1,), [0, 0, 0])],
)
def test_a_known_number_means_all_before_it_on_its_server(numbers: Sequence[int], counts: list[int]) -> None:
    assert least_counts(numbers, 3, by_three) == counts
    assert least_counts(numbers, 1, lambda number: 0) == [max((*numbers, -1)) + 1]


def test_rollouts_are_spread_evenly_and_each_server_uses_all_shards() -> None:
    planes, shards = scattered(4), 16
    planes.shards = shards
    rids = [rid_of(number) for number in range(8000)]
    used: list[set[int]] = [set() for _ in range(4)]
    count = [0] * 4
    for rid in rids:
        place = planes.place_of(rid)
        count[place] += 1
        used[place].add(planes.shard_of(rid))
    assert min(count) > 1800
    assert all(len(one) == shards for one in used)
