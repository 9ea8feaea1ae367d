"""Names of rollouts: the id of an admission number, and the number of an id."""

from __future__ import annotations


def rid_of(index: int) -> str:
    """The id of the rollout with admission number `index`, from 0."""
    return f"r{index:09d}"


def number_of(rid: str) -> int:
    """The admission number of a rollout; -1 for an id that does not come from `rid_of`."""
    number = int(rid[1:]) if rid.isascii() and rid[1:].isdigit() else -1
    return number if number >= 0 and rid_of(number) == rid else -1
