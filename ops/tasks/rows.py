"""Rows of a data set on disk, in their order: JSONL, Parquet, and what `datasets.Dataset.save_to_disk` writes.

They are read as a stream, so that memory does not grow with the file. Parquet and Arrow need pyarrow, which is imported
only here; the package `datasets` is not needed: it saves Arrow streams, and a JSON file that names them.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.config import ConfigError

_JSONL, _PARQUET = (".jsonl", ".ndjson"), (".parquet",)
_FORMATS = "*.jsonl, *.parquet, a folder of either, or a folder written by Dataset.save_to_disk"
_ROWS_AT_A_TIME = 256
MAX_LINE_BYTES = 16 << 20
_SPLITS = {"train": "train", "training": "train", "test": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev", "eval"), "validation"
)
# Errors of pyarrow for a damaged file, and of Python for a value that fits none of its types: text that is not UTF-8
# (UnicodeDecodeError, a ValueError), a time after the year 9999 (OverflowError).
_UNREADABLE = (OSError, ValueError, OverflowError, ArithmeticError, LookupError, TypeError)


class DataMissing(ConfigError):
    """There is no such file or folder."""


Row = tuple[str, dict[str, Any]]
"""The place of a row, for messages ("train.jsonl, line 3"), and its columns."""


def require(package: str, extra: str, *, wanted_by: str) -> None:
    """Raises ConfigError with the command that installs it, if a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{wanted_by} needs the package {package}: pip install 'katana-distill[{extra}]'")


def read_rows(
    path: str | Path, columns: frozenset[str] | None = None, optional: frozenset[str] = frozenset()
) -> Iterator[Row]:
    """Every row of a file or folder; from Parquet and Arrow only `columns` are read (None: all), and those of
    `optional` that exist.

    Raises:
        DataMissing: there is no such file or folder.
        ConfigError: unknown format, a row or a file that cannot be read, a missing column, pyarrow missing.
    """
    for file in _found(path):
        if file.suffix in _JSONL:
            yield from _read_jsonl(file)
        else:
            require("pyarrow", "data", wanted_by=str(file))
            yield from _read_batches(file, columns, optional)


def _found(path: str | Path) -> list[Path]:
    """The files to read, all regular ones: reading a pipe would wait for ever."""
    try:
        found = Path(path).expanduser()
        if not found.exists():
            raise DataMissing(f"{path}: there is no such file or folder; allowed: {_FORMATS}")
        files = _files(found)
        odd = next((file for file in files if not file.is_file()), None)
    except (OSError, RuntimeError) as error:  # no permission, a name that is too long; ~ of an unknown user
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    if odd is not None:
        raise ConfigError(f"{odd}: is not a file; allowed: {_FORMATS}")
    return files


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        if path.suffix not in _JSONL + _PARQUET:
            raise ConfigError(f"{path}: the format {path.suffix!r} is not known; allowed: {_FORMATS}")
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = _read_json(path / "dataset_dict.json").get("splits")
        raise ConfigError(f"{path}: holds several splits: name one of them, {path}/SPLIT with SPLIT of {splits}")
    if (path / "state.json").is_file():
        return _saved_files(path)
    files = sorted(file for file in path.iterdir() if file.suffix in _JSONL + _PARQUET)
    if not files:
        raise ConfigError(f"{path}: contains nothing that can be read; allowed: {_FORMATS}")
    _check_folder(path, files)
    return files


def _check_folder(path: Path, files: list[Path]) -> None:
    """Refuse an ambiguous folder: files of two formats, or of several splits."""
    endings = sorted({file.suffix for file in files})
    if len({ending in _JSONL for ending in endings}) > 1:
        raise ConfigError(f"{path}: holds files of several formats ({', '.join(endings)}): name the one to read")
    named = {file.name: splits for file in files if (splits := _splits_of(file.stem))}
    if named and not set.intersection(*named.values()):
        raise ConfigError(
            f"{path}: looks like several splits ({', '.join(named)}): name the file to read, or put it by itself"
        )


def _splits_of(stem: str) -> set[str]:
    """The splits in a file's name: `train` for train-00000-of-00002."""
    return {_SPLITS[word] for word in re.split("[^a-z]+", stem.lower()) if word in _SPLITS}


def _saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a saved data set, in the order that its state.json gives them."""
    state = _read_json(folder / "state.json")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise ConfigError(f"{folder}: was saved with indices by an old version of datasets; save it again")
    files = state.get("_data_files")
    listed = files if isinstance(files, list) else []
    names = [file.get("filename") if isinstance(file, dict) else None for file in listed]
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ConfigError(f"{folder}/state.json: names no data files; Dataset.save_to_disk writes it")
    paths = [folder / str(name) for name in names]
    for path in paths:
        if not path.exists():
            raise ConfigError(f"{path}: is missing; {folder}/state.json names it")
    return paths


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from error
    return value if isinstance(value, dict) else {}


def _read_jsonl(path: Path) -> Iterator[Row]:
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(raw) > MAX_LINE_BYTES:
                    raise ConfigError(f"{path}, line {number}: more than {MAX_LINE_BYTES} bytes")
                if raw.strip():
                    yield f"{path}, line {number}", _parse(raw, f"{path}, line {number}")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error


def _parse(raw: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(raw, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{place}: a row is an object of columns, found {type(row).__name__}")
    return row


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object with unique names. Raises ValueError for a name that occurs twice: it is ambiguous."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice in one object")
    return found


def _read_batches(path: Path, columns: frozenset[str] | None, optional: frozenset[str]) -> Iterator[Row]:
    pyarrow = importlib.import_module("pyarrow")
    number = 0
    try:
        with pyarrow.memory_map(str(path)) as source:
            for batch in _batches(source, path, columns, optional):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", {name: _unpadded(value) for name, value in row.items()}
    except ConfigError:
        raise
    except (pyarrow.ArrowException, *_UNREADABLE) as error:
        after = f" after row {number}" if number else ""
        raise ConfigError(f"{path}: cannot be read{after} ({error!s:.200})") from error


def _unpadded(value: Any, *, inside: bool = False) -> Any:
    """A list's mappings without their null values. All share one type, so each has every key that any of them has:
    the arguments of one tool in the calls of all others. A mapping outside a list (a column) stays as it is."""
    if isinstance(value, list):
        return [_unpadded(one, inside=True) for one in value]
    if inside and isinstance(value, dict):
        return {name: _unpadded(one, inside=True) for name, one in value.items() if one is not None}
    return value


def _batches(source: Any, path: Path, columns: frozenset[str] | None, optional: frozenset[str]) -> Iterator[Any]:
    """Record batches of at most _ROWS_AT_A_TIME rows, with only the wanted columns."""
    if path.suffix in _PARQUET:
        file = importlib.import_module("pyarrow.parquet").ParquetFile(source)
        wanted = _wanted(columns, optional, file.schema_arrow.names, path)
        yield from file.iter_batches(_ROWS_AT_A_TIME, columns=wanted)
        return
    reader = importlib.import_module("pyarrow.ipc").open_stream(source)
    wanted = _wanted(columns, optional, reader.schema.names, path)
    for batch in reader:
        chosen = batch if wanted is None else batch.select(wanted)
        for first in range(0, chosen.num_rows, _ROWS_AT_A_TIME):
            yield chosen.slice(first, _ROWS_AT_A_TIME)


def _wanted(columns: frozenset[str] | None, optional: frozenset[str], known: list[str], path: Path) -> list[str] | None:
    """Columns to read; None: all. Raises ConfigError if one of `columns` is missing or occurs twice."""
    wanted = None if columns is None else columns | (optional & set(known))
    _check_columns(wanted, known, path)
    return None if wanted is None else sorted(wanted)


def _check_columns(wanted: frozenset[str] | None, known: list[str], path: Path) -> None:
    for name in sorted(wanted or known):
        if name not in known:
            raise ConfigError(f"{path}: {missing(name, known)}")
        if known.count(name) > 1:
            raise ConfigError(f"{path}: has {known.count(name)} columns {name!r}")


def missing(name: str, known: list[str]) -> str:
    """The message for a missing column, with the nearest existing one."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"no column {name!r}" + (f"; the nearest is {near[0]!r}" if near else f"; there are: {', '.join(known)}")


def column(row: Mapping[str, Any], key: str, place: str) -> Any:
    """The value at a dotted key: `reward_model.ground_truth`. A column whose own name contains dots comes first.

    Raises ConfigError, naming the nearest known column.
    """
    if key in row:
        return row[key]
    value: Any = row
    for name in key.split("."):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{place}: {key!r} leads into {type(value).__name__}; dots lead into nested columns")
        if name not in value:
            raise ConfigError(f"{place}: {missing(name, list(value))}")
        value = value[name]
    return value
