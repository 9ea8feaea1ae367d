"""New lines of a growing JSON-lines file, for those who look on while others write it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

_AT_ONCE = 8 << 20  # bytes of one read: a file that is long already is not held whole beside what is made of it


class Tail:
    """Reads on where it stopped; from the beginning where another file took the place, cut back to a checkpoint.

    `renewed` counts how often that was, `broken` the lines that could not be read and were passed over.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._place, self._inode = path, 0, -1
        self.renewed = self.broken = 0

    def read(self) -> list[dict[str, Any]]:
        """New whole lines, of about 8 MB at most: nothing left is an empty list. Nothing where there is no file."""
        try:
            with self._path.open("rb") as file:
                self._begin(os.fstat(file.fileno()))
                file.seek(self._place)
                data = file.read(_AT_ONCE)
                data += file.readline()  # the line that the limit fell into
        except FileNotFoundError:
            return []
        end = data.rfind(b"\n") + 1
        self._place += end
        lines = [_parsed(raw) for raw in data[:end].splitlines()]
        self.broken += lines.count(None)
        return [line for line in lines if line is not None]

    def _begin(self, facts: os.stat_result) -> None:
        if facts.st_ino == self._inode and facts.st_size >= self._place:
            return
        if self._inode != -1:
            self.renewed += 1
        self._place, self._inode = 0, facts.st_ino


def last_lines(path: Path, most_bytes: int) -> list[dict[str, Any]]:
    """Whole lines at the end of a file, oldest first, out of its last bytes; those that cannot be read are left out."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            begin = max(0, size - most_bytes)
            file.seek(begin)
            data = file.read(most_bytes)
    except FileNotFoundError:
        return []
    first = data.find(b"\n") + 1 if begin else 0  # what the limit fell into is no whole line
    lines = [_parsed(raw) for raw in data[first : data.rfind(b"\n") + 1].splitlines()]
    return [line for line in lines if line is not None]


def _parsed(raw: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None
