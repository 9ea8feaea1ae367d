"""JSON lines: one process appends to a file, others read it at the same time or later.

Readers see only complete lines: a line without its line feed was torn by a crash, or is being written, and was never
acknowledged. A complete line that cannot be read raises DamagedLine, unless the reader passes `damaged`, which gets the
error, for example a list's `append`.
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
_RID = b'{"rid":"'  # every line about a rollout begins so
_AT_ONCE = 8 << 20  # bytes per read, so that a long file is never in memory as a whole
BROKEN = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError)
"""The errors that decoding a damaged line or file raises."""


class DamagedLine(ConfigError):
    """A complete line that cannot be read, with its file, its number from 1, and the reason."""

    def __init__(self, path: Path, number: int, error: BaseException) -> None:
        self.path, self.number, self.why = path, number, why_of(error)
        super().__init__(
            f"{path}:{number}: damaged ({self.why}); expected one JSON object per line: restore the original "
            f"line, or the file from a copy"
        )


def why_of(error: BaseException) -> str:
    """The message of a decoding error."""
    return (str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}")[:200]


# --- reading ----------------------------------------------------------------------------------------------------------


def whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Offset in bytes and contents of each complete line; none if there is no file."""
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
    """All lines, decoded; with `rids` only theirs, and the others are not parsed."""
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
    """The rollout id at the beginning of a line, without parsing it; "" if there is none."""
    if not raw.startswith(_RID):
        return ""
    return raw[len(_RID) : len(_RID) + 40].partition(b'"')[0].decode("ascii", "replace")


class Tail(Generic[T]):
    """New lines of a growing file: continues where it stopped, or at the beginning if the file was replaced by one that
    is cut back to a checkpoint.

    `renewed` counts the replacements, `broken` the unreadable lines, which are skipped.
    """

    def __init__(self, path: Path, decode: Callable[[Any], T]) -> None:
        self._path, self._decode, self._place, self._inode = path, decode, 0, -1
        self.renewed = self.broken = 0

    def read(self) -> list[T]:
        """New complete lines, about 8 MB at most; empty if there are none, or no file."""
        try:
            with self._path.open("rb") as file:
                self._begin(os.fstat(file.fileno()))
                file.seek(self._place)
                data = file.read(_AT_ONCE)
                data += file.readline()  # the rest of the line at the limit
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
    """A file in a run's folder whose lines are records of one kind. A missing file has no lines."""

    def __init__(self, path: Path, kind: type[R]) -> None:
        self.path, self._decode = path, kind.from_json

    def __call__(
        self, rids: Collection[str] | None = None, damaged: Callable[[DamagedLine], object] | None = None
    ) -> Iterator[R]:
        """All complete lines, or those of `rids`."""
        return read_lines(self.path, self._decode, damaged=damaged, rids=rids)

    def tail(self) -> Tail[R]:
        """A reader that follows the growing file."""
        return Tail(self.path, self._decode)

    def last(self, most_bytes: int) -> list[R]:
        """Complete lines in the last `most_bytes` of the file, oldest first; damaged ones are skipped."""
        try:
            with self.path.open("rb") as file:
                begin = max(0, file.seek(0, os.SEEK_END) - most_bytes)
                file.seek(begin)
                data = file.read(most_bytes)
        except FileNotFoundError:
            return []
        first = data.find(b"\n") + 1 if begin else 0  # the line at the limit is not complete
        lines = (_parsed(raw, self._decode) for raw in data[first : data.rfind(b"\n") + 1].splitlines())
        return [line for line in lines if line is not None]

    def placed(self) -> Iterator[tuple[int, R]]:
        """As `self()`, each with its byte offset."""
        for number, (place, raw) in enumerate(whole_lines(self.path), start=1):
            yield place, _decoded(self.path, number, raw, self._decode)

    def at(self, places: Iterable[int]) -> dict[int, R]:
        """The lines at these byte offsets, by offset."""
        if not (wanted := list(places)):
            return {}
        with self.path.open("rb") as file:
            return {place: self._decode(json.loads(_line_at(file, place))) for place in wanted}

    def open_cut_back(self, keeps: Callable[[R], bool]) -> IO[str]:
        """Open for appending, cut back before the first line for which `keeps` is false.

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
    """Append records; they are on disk when this returns."""
    if file is not None and records:
        data = b"".join(_json_line(record.to_json()) for record in records)
        while data:  # a raw file may write only a part
            data = data[file.write(data) or 0 :]
        os.fsync(file.fileno())


def _json_line(value: Object) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def open_whole_lines(path: Path) -> FileIO:
    """Open for appending after the last complete line: a line torn by a crash was never acknowledged."""
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
