"""JSON lines: one process appends to a file, others read it meanwhile or afterwards.

Readers see whole lines: one without its line feed was torn off by a crash, or is being written, and was never
acknowledged. A whole line that cannot be read is raised as DamagedLine, unless the reader gives a `damaged` that takes
it, say a list's `append`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from common.config import ConfigError
from common.runfiles.fields import Object, Record, an_object

T = TypeVar("T")
R = TypeVar("R", bound=Record)
_RID = b'{"rid":"'  # how every line about a rollout begins
_AT_ONCE = 8 << 20  # bytes of one read: a file that is long already is not held whole beside what is made of it
BROKEN = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError)
"""What a damaged line or file raises when it is decoded."""


class DamagedLine(ConfigError):
    """A whole line that cannot be read, with its file, its number from 1, and why."""

    def __init__(self, path: Path, number: int, error: BaseException) -> None:
        self.path, self.number, self.why = path, number, why_of(error)
        super().__init__(
            f"{path}:{number}: damaged ({self.why}); expected one whole JSON object a line: put back the line as it "
            f"was written, or the file from a copy"
        )


def why_of(error: BaseException) -> str:
    """What a decoder said of damage."""
    return (str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}")[:200]


# --- reading ----------------------------------------------------------------------------------------------------------


def whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Where each whole line begins, in bytes, and the line; nothing where there is no file."""
    if not path.exists():
        return
    place = 0
    with path.open("rb") as file:
        for raw in file:
            if raw.endswith(b"\n"):
                yield place, raw
            place += len(raw)


def read_lines(
    path: Path,
    decode: Callable[[Any], Any] = an_object,
    *,
    damaged: Callable[[DamagedLine], object] | None = None,
    rids: Collection[str] | None = None,
) -> Iterator[Any]:
    """All lines, decoded; of `rids` alone where they are given: the others are not even parsed."""
    for number, (_, raw) in enumerate(whole_lines(path), start=1):
        if rids is not None and rid_of_line(raw) not in rids:
            continue
        try:
            value = _decoded(path, number, raw, decode)
        except DamagedLine as damage:
            if damaged is None:
                raise
            damaged(damage)
            continue
        yield value


def _decoded(path: Path, number: int, raw: bytes, decode: Callable[[Any], T]) -> T:
    try:
        return decode(json.loads(raw))
    except BROKEN as error:
        raise DamagedLine(path, number, error) from error


def rid_of_line(raw: bytes) -> str:
    """The id that a line begins with, unparsed; "" for a line that begins otherwise."""
    if not raw.startswith(_RID):
        return ""
    return raw[len(_RID) : len(_RID) + 40].partition(b'"')[0].decode("ascii", "replace")


class Tail(Generic[T]):
    """New lines of a file that grows: reads on where it stopped, and from the beginning where another file, cut back to
    a checkpoint, took the place.

    `renewed` counts how often that was, `broken` the lines that could not be read and were passed over.
    """

    def __init__(self, path: Path, decode: Callable[[Any], T]) -> None:
        self._path, self._decode, self._place, self._inode = path, decode, 0, -1
        self.renewed = self.broken = 0

    def read(self) -> list[T]:
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
        lines = [_parsed(raw, self._decode) for raw in data[:end].splitlines()]
        self.broken += lines.count(None)
        return [line for line in lines if line is not None]

    def _begin(self, facts: os.stat_result) -> None:
        if facts.st_ino == self._inode and facts.st_size >= self._place:
            return
        if self._inode != -1:
            self.renewed += 1
        self._place, self._inode = 0, facts.st_ino


def _parsed(raw: bytes, decode: Callable[[Any], T]) -> T | None:
    try:
        return decode(json.loads(raw))
    except BROKEN:
        return None


class Lines(Generic[R]):
    """A file of a run's folder whose lines are records of one kind. Where there is no file, there are no lines."""

    def __init__(self, path: Path, kind: type[R]) -> None:
        self.path, self._decode = path, kind.from_json

    def __call__(
        self, rids: Collection[str] | None = None, damaged: Callable[[DamagedLine], object] | None = None
    ) -> Iterator[R]:
        """All whole lines, or those of `rids`."""
        return read_lines(self.path, self._decode, damaged=damaged, rids=rids)

    def tail(self) -> Tail[R]:
        """To read on while the file grows."""
        return Tail(self.path, self._decode)

    def last(self, most_bytes: int) -> list[R]:
        """Whole lines at the end of the file, oldest first, out of its last bytes; damaged ones are left out."""
        try:
            with self.path.open("rb") as file:
                begin = max(0, file.seek(0, os.SEEK_END) - most_bytes)
                file.seek(begin)
                data = file.read(most_bytes)
        except FileNotFoundError:
            return []
        first = data.find(b"\n") + 1 if begin else 0  # what the limit fell into is no whole line
        lines = (_parsed(raw, self._decode) for raw in data[first : data.rfind(b"\n") + 1].splitlines())
        return [line for line in lines if line is not None]

    def placed(self) -> Iterator[tuple[int, R]]:
        """As `self()`, each with the byte at which it begins."""
        for number, (place, raw) in enumerate(whole_lines(self.path), start=1):
            yield place, _decoded(self.path, number, raw, self._decode)

    def at(self, places: Iterable[int]) -> dict[int, R]:
        """Lines that were read before, by the byte at which they begin."""
        if not (wanted := list(places)):
            return {}
        with self.path.open("rb") as file:
            return {place: self._decode(json.loads(_line_at(file, place))) for place in wanted}

    def open_cut_back(self, keeps: Callable[[R], bool]) -> IO[str]:
        """Open for appending, without the first line that is not to be kept and all behind it.

        The file is always a new one, so that a former writer, which has the old one open, cannot write into it.
        """
        draft = self.path.with_suffix(".tmp")
        with draft.open("wb") as file:
            for number, (_, raw) in enumerate(whole_lines(self.path), start=1):
                if not keeps(_decoded(self.path, number, raw, self._decode)):
                    break
                file.write(raw)
        os.replace(draft, self.path)
        return self.path.open("a")


def _line_at(file: IO[bytes], place: int) -> bytes:
    file.seek(place)
    return file.readline()


# --- writing ----------------------------------------------------------------------------------------------------------


def append_lines(file: FileIO | None, records: Sequence[Record]) -> None:
    """On disk when this returns."""
    if file is not None and records:
        data = b"".join(_json_line(record.to_json()) for record in records)
        while data:  # a raw file may take a part
            data = data[file.write(data) or 0 :]
        os.fsync(file.fileno())


def _json_line(value: Object) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def open_whole_lines(path: Path) -> FileIO:
    """Open for appending behind the last whole line: what a crash tore off was never acknowledged."""
    file = FileIO(path, "a+")
    size = file.seek(0, os.SEEK_END)
    end = size
    while end > 0:
        begin = max(0, end - 65536)
        file.seek(begin)
        newline = (file.read(end - begin) or b"").rfind(b"\n")
        if newline >= 0:
            end = begin + newline + 1
            break
        end = begin
    if end < size:
        file.truncate(end)
    file.seek(0, os.SEEK_END)
    return file
