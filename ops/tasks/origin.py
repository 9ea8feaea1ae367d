"""Records the origin of the rows in use, and describes how two such records differ.

A run keeps one: in run.json by file, in data.rows by row. It does not decide whether the data are the same (the digest
of all prompts and answers does); it only shows where they differ.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

_NAMED = 3  # of the files and keys that differ, this many are named


@dataclass(slots=True)
class _File:
    path: str
    rows: int = 0
    hash: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))


@dataclass(slots=True, weakref_slot=True)
class Origin:
    """Records the rows as they are read: place and 4 bytes of digest of each, in a temporary file."""

    _files: list[_File] = field(default_factory=list)
    _listing: Any = field(default_factory=tempfile.TemporaryFile)

    def __post_init__(self) -> None:
        weakref.finalize(self, self._listing.close)

    def add(self, place: str, record: bytes) -> None:
        """A row in use: `place` as in `ops.tasks.rows`, "train.jsonl, line 3"."""
        path, _, number = place.rpartition(", ")
        if not self._files or self._files[-1].path != path:
            self._files.append(_File(path))
            self._listing.write(f"# {Path(path).name}\n".encode())
        file = self._files[-1]
        file.rows += 1
        file.hash.update(b"%d:%b" % (len(record), record))
        self._listing.write(f"{number} {hashlib.blake2b(record, digest_size=4).hexdigest()}\n".encode())

    @property
    def files(self) -> list[dict[str, Any]]:
        """Name, size, rows in use and their digest, for each file with rows in use."""
        return [
            {
                "name": Path(file.path).name,
                "bytes": _size(file.path),
                "rows": file.rows,
                "digest": file.hash.hexdigest(),
            }
            for file in self._files
        ]

    def write(self, path: Path) -> None:
        """The listing, row by row."""
        self._listing.seek(0)
        with path.open("wb") as file:
            shutil.copyfileobj(self._listing, file)

    def first_difference(self, path: Path) -> str:
        """The first row that differs from an earlier listing; empty if that is unknown."""
        self._listing.seek(0)
        try:
            with path.open("rb") as file:
                return _first_difference(file, self._listing)
        except (OSError, ValueError):  # missing or damaged: the message has less detail
            return ""


def _size(path: str) -> int | None:
    try:
        return Path(path).expanduser().stat().st_size
    except OSError:
        return None


def _first_difference(before: Iterator[bytes], after: Iterator[bytes]) -> str:
    """Raises ValueError for a file that is not a listing."""
    for number, (old, new) in enumerate(zip_longest(_rows(before), _rows(after)), start=1):
        if old is None and new is not None:
            return f"the {number - 1:,} former rows are unchanged, and more follow, from {new[0]} on"
        if new is None and old is not None:
            return f"all {number - 1:,} rows are unchanged, and those that followed, from {old[0]} on, are gone"
        if old is not None and new is not None and old[1] != new[1]:
            where = f"{new[0]}" if old[0] == new[0] else f"{new[0]}, formerly {old[0]}"
            return f"the first row that differs is {where}"
    return ""


def _rows(lines: Iterator[bytes]) -> Iterator[tuple[str, str]]:
    """Place and digest of each row of a listing."""
    name = ""
    for raw in lines:
        line = raw.decode().rstrip("\n")
        if line.startswith("# "):
            name = line[2:]
            continue
        number, gap, digest = line.rpartition(" ")
        if not gap:
            raise ValueError(f"not a line of a listing: {line!r:.60}")
        yield f"{name}, {number}", digest


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Differences of two records of data, for fields that the former has: a run's folder may be of an older version."""
    found = _keys(before.get("keys"), after["keys"])
    if before.get("template", after["template"]) != after["template"]:
        found.append("the student's chat template has changed")
    found += _files(before.get("files"), after["files"])
    for why, rows in after["left_out"].items():
        was = _mapping(before.get("left_out")).get(why, rows)
        if was != rows:
            found.append(f"{was} rows were left out by {why}, now {rows}")
    return found


def _keys(before: Any, after: dict[str, Any]) -> list[str]:
    old = _mapping(before)
    changed = [key for key in after if key in old and old[key] != after[key]]
    return _some([f"{key} was {old[key]!r:.80}, now {after[key]!r:.80}" for key in changed], "keys")


def _files(before: Any, after: list[dict[str, Any]]) -> list[str]:
    old = {str(one.get("name")): one for one in before if isinstance(one, dict)} if isinstance(before, list) else None
    if old is None:
        return []
    new = {one["name"]: one for one in after}
    changes = [f"{name} is gone ({old[name].get('rows')} rows)" for name in old if name not in new]
    changes += [f"{name} is new ({one['rows']} rows)" for name, one in new.items() if name not in old]
    if not changes and list(old) != list(new):
        changes.append(f"the files' order was {', '.join(old)}, now {', '.join(new)}")
    for name, one in new.items():
        was = old.get(name, one)
        if was.get("digest") == one["digest"]:
            continue
        sizes = (
            f"{was.get('bytes')} bytes, now {one['bytes']}"
            if was.get("bytes") != one["bytes"]
            else f"{one['bytes']} bytes as before"
        )
        changes.append(f"{name} had {was.get('rows')} rows in use, now {one['rows']} ({sizes})")
    return _some(changes, "files")


def _some(changes: list[str], what: str) -> list[str]:
    more = len(changes) - _NAMED
    return changes if more <= 0 else [*changes[:_NAMED], f"and {more} more {what}"]


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
