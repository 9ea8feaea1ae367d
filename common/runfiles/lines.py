"""JSON lines: one process appends to a file, others read it meanwhile or afterwards.

Readers see whole lines: a line without its line feed was torn off by a crash, or is being written, and was never
acknowledged. Readers choose by `damaged` what happens to a whole line that cannot be read: it raises (`refuse`),
collects (a list's `append`) or does nothing (`skip`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import IO, Any, Generic, TypeVar, overload

from common.config import ConfigError

T = TypeVar("T")
Object = dict[str, Any]
_RID = b'{"rid":"'  # the beginning of every line about a rollout
_AT_ONCE = 8 << 20  # bytes of one read: a long file is not held in memory as a whole
_BROKEN = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError)


class DamagedLine(ConfigError):
    """A whole line that cannot be read, with its file, its number from 1, and the reason."""

    def __init__(self, path: Path, number: int, error: BaseException) -> None:
        why = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        super().__init__(
            f"{path}:{number}: damaged ({why[:200]}); expected one whole JSON object a line: put back the "
            f"line as it was written, or the file from a copy"
        )
        self.path, self.number, self.why = path, number, why[:200]


def refuse(damage: DamagedLine) -> None:
    raise damage


def skip(damage: DamagedLine) -> None:
    """Skip it."""


def an_object(value: Any) -> Object:
    """The decoder of lines that are only required to be objects."""
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {type(value).__name__}")
    return value


# --- reading ----------------------------------------------------------------------------------------------------------


def whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Byte offset and content of each whole line; nothing if there is no file."""
    if not path.exists():
        return
    place = 0
    with path.open("rb") as file:
        for raw in file:
            if raw.endswith(b"\n"):
                yield place, raw
            place += len(raw)


@overload
def read_lines(
    path: Path, *, damaged: Callable[[DamagedLine], None] = ..., rids: Collection[str] | None = ...
) -> Iterator[Object]: ...


@overload
def read_lines(
    path: Path,
    decode: Callable[[Any], T],
    *,
    damaged: Callable[[DamagedLine], None] = ...,
    rids: Collection[str] | None = ...,
) -> Iterator[T]: ...


def read_lines(
    path: Path,
    decode: Callable[[Any], Any] = an_object,
    *,
    damaged: Callable[[DamagedLine], None] = refuse,
    rids: Collection[str] | None = None,
) -> Iterator[Any]:
    """All lines, decoded; with `rids`, only theirs: the others are not even parsed."""
    for number, (_, raw) in enumerate(whole_lines(path), start=1):
        if rids is not None and rid_of_line(raw) not in rids:
            continue
        try:
            value = decode(json.loads(raw))
        except _BROKEN as error:
            damaged(DamagedLine(path, number, error))
            continue
        yield value


def read_at(path: Path, places: Iterable[int], decode: Callable[[Any], T]) -> dict[int, T]:
    """The lines at these byte offsets, by offset. Raises ValueError, TypeError or KeyError for a damaged one."""
    found: dict[int, T] = {}
    wanted = list(places)
    if not wanted:
        return found
    with path.open("rb") as file:
        for place in wanted:
            file.seek(place)
            found[place] = decode(json.loads(file.readline()))
    return found


def last_lines(path: Path, decode: Callable[[Any], T], most_bytes: int) -> list[T]:
    """Whole lines in a file's last bytes, oldest first; those that cannot be read are left out."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            begin = max(0, size - most_bytes)
            file.seek(begin)
            data = file.read(most_bytes)
    except FileNotFoundError:
        return []
    first = data.find(b"\n") + 1 if begin else 0  # the limit may be inside a line
    return [
        line for raw in data[first : data.rfind(b"\n") + 1].splitlines() if (line := _parsed(raw, decode)) is not None
    ]


def rid_of_line(raw: bytes) -> str:
    """The id at the beginning of a line, without parsing it; "" for other lines."""
    if not raw.startswith(_RID):
        return ""
    return raw[len(_RID) : len(_RID) + 40].partition(b'"')[0].decode("ascii", "replace")


class Tail(Generic[T]):
    """New lines of a growing file: continues where it stopped, or from the beginning if the file was replaced by one
    that is cut back to a checkpoint.

    `renewed` counts such replacements, `broken` the lines that could not be read and were skipped.
    """

    def __init__(self, path: Path, decode: Callable[[Any], T]) -> None:
        self._path, self._decode, self._place, self._inode = path, decode, 0, -1
        self.renewed = self.broken = 0

    def read(self) -> list[T]:
        """New whole lines, about 8 MB at most; an empty list if there are none, or no file."""
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
    except _BROKEN:
        return None


# --- writing ----------------------------------------------------------------------------------------------------------


def append_lines(file: FileIO | None, values: Sequence[Object]) -> None:
    """On disk when this returns."""
    if file is not None and values:
        data = b"".join(_json_line(value) for value in values)
        while data:  # a raw file may accept a part
            data = data[file.write(data) or 0 :]
        os.fsync(file.fileno())


def _json_line(value: Object) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def open_whole_lines(path: Path) -> FileIO:
    """Open for appending after the last whole line: a torn line was never acknowledged."""
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


def open_cut_back(path: Path, keeps: Callable[[Object], bool]) -> IO[str]:
    """Open for appending, without the first line that is not to be kept and all lines after it.

    The file is always a new one, so that a former writer, which has the old one open, cannot write into it.
    """
    draft = path.with_suffix(".tmp")
    with draft.open("wb") as file:
        for number, (_, raw) in enumerate(whole_lines(path), start=1):
            try:
                kept = keeps(an_object(json.loads(raw)))
            except _BROKEN as error:
                raise DamagedLine(path, number, error) from error
            if not kept:
                break
            file.write(raw)
    os.replace(draft, path)
    return path.open("a")
