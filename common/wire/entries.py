"""Ids of streams' entries, where there are several data servers.

Two servers may give out the same id, so outside of `scripts.py` an id says where its entry is: `17-0@2` is entry `17-0`
of the server at place 2. The home, at place 0, and so a single server, has plain ids.
"""

from __future__ import annotations


def tagged(entry: bytes, place: int) -> bytes:
    """The id of an entry of the server at a place."""
    return entry if place == 0 else b"%b@%d" % (entry, place)


def bare(entry: bytes) -> bytes:
    """The id of an entry as its own server has it."""
    return entry.partition(b"@")[0]


def place_in(entry: bytes) -> int:
    """The place of the server that has an entry."""
    place = entry.partition(b"@")[2]
    return int(place) if place.isdigit() else 0


def age_order(entry: bytes) -> tuple[int, ...]:
    """Orders entries by when they were added, each by the clock of its server."""
    return tuple(int(part) for part in bare(entry).split(b"-"))
