"""Which rollouts have been admitted, when each data server counts its own. Pure.

A server admits its rollouts in the order of their numbers, and its cursor says how many. One trip admits on several
servers and may reach some of them only, so the run goes on at the first number that its own server has not admitted,
and passes over the later ones that theirs have. With one server nothing is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence


class Cursors:
    """`counts`: rollouts admitted so far, by server; `place_of`: the server of the rollout with a number."""

    def __init__(self, counts: Sequence[int], place_of: Callable[[int], int]) -> None:
        self.counts = list(counts)
        self._place_of = place_of
        self._ahead: set[int] = set()  # admitted, above `next`
        self.next = sum(counts) if len(counts) == 1 else self._first_missing()

    def _first_missing(self) -> int:
        left, number, first = list(self.counts), 0, -1
        while any(left):
            place = self._place_of(number)
            if left[place]:
                left[place] -= 1
                if first >= 0:
                    self._ahead.add(number)
            elif first < 0:
                first = number
            number += 1
        return number if first < 0 else first

    @property
    def end(self) -> int:
        """Above all numbers that were admitted."""
        return max(self._ahead, default=self.next - 1) + 1

    def __contains__(self, number: int) -> bool:
        """Whether the rollout with a number was admitted."""
        return 0 <= number < self.next or number in self._ahead

    def upcoming(self, count: int) -> list[tuple[int, int]]:
        """The next numbers to admit, each with the cursor of its server after it."""
        found: list[tuple[int, int]] = []
        after, number = list(self.counts), self.next
        while len(found) < count:
            if number not in self._ahead:
                place = self._place_of(number)
                after[place] += 1
                found.append((number, after[place]))
            number += 1
        return found

    def admitted(self, number: int) -> None:
        """A rollout was admitted: of those of its server the next one."""
        self.counts[self._place_of(number)] += 1
        self._ahead.add(number)
        while self.next in self._ahead:
            self._ahead.remove(self.next)
            self.next += 1


def least_counts(numbers: Iterable[int], servers: int, place_of: Callable[[int], int]) -> list[int]:
    """How many rollouts each server admitted at least, by numbers that were admitted."""
    highest = [-1] * servers
    for number in numbers:
        place = place_of(number)
        highest[place] = max(highest[place], number)
    if servers == 1:
        return [highest[0] + 1]
    counts = [0] * servers
    for number in range(max(highest) + 1):
        place = place_of(number)
        counts[place] += number <= highest[place]
    return counts
