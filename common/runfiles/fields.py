"""Records as dataclasses: each field is checked when a record is read, and written under its name in the file."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, NamedTuple, Self, TypeVar, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")
Object = dict[str, Any]
_PLAIN = frozenset({str, int, float, bool, NoneType})


class Record:
    """Base class of a record, which is a dataclass.

    A field may be str, int, float, bool, None, bytes (base64 in the file), another record, or a list, tuple or dict of
    these. Floats are finite, ints are not negative, and a whole number is accepted as a float. A field with a default
    may be missing, as in files of older versions; unknown fields are ignored.
    """

    __slots__ = ()

    @classmethod
    def from_json(cls, tree: Any) -> Self:
        """The record in a parsed JSON object. Raises ValueError for a field that is missing or invalid."""
        return decoded(cls, tree)

    def to_json(self) -> Object:
        """The JSON object for the file, with the fields in order."""
        return encoded(self)


def stored(name: str = "", *, sparse: bool = False) -> Object:
    """Metadata of a field with another `name` in the file; `sparse`: it is omitted while it is 0 or empty."""
    return {"name": name, "sparse": sparse}


def an_object(value: Any) -> Object:
    """Raises ValueError for anything but a JSON object."""
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {type(value).__name__}")
    return value


def decoded(cls: type[T], tree: Any) -> T:
    """The default of `Record.from_json`, for classes that override it."""
    tree, values = an_object(tree), {}
    for one in _plan(cast(Any, cls)):
        if one.stored in tree:
            values[one.name] = one.read(tree[one.stored], one.stored)
        elif not one.optional:
            raise ValueError(f"{one.stored} is missing")
    return cls(**values)


def encoded(record: Record) -> Object:
    """The default of `Record.to_json`, for classes that override it."""
    plan = ((one, getattr(record, one.name)) for one in _plan(cast(Any, type(record))))
    return {one.stored: _to_json(value) for one, value in plan if value or not one.sparse}


def _to_json(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, dict):
        return {key: _to_json(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(one) for one in value]
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


class _Field(NamedTuple):
    name: str
    stored: str
    optional: bool
    sparse: bool
    read: Callable[[Any, str], Any]


@cache
def _plan(cls: Any) -> tuple[_Field, ...]:
    hints = get_type_hints(cls)
    return tuple(
        _Field(
            name=one.name,
            stored=one.metadata.get("name") or one.name,
            optional=one.default is not MISSING or one.default_factory is not MISSING,
            sparse=one.metadata.get("sparse", False),
            read=_reader(hints[one.name]),
        )
        for one in fields(cls)
    )


def _reader(hint: Any) -> Callable[[Any, str], Any]:
    """A function that checks and converts a value of this type; it raises ValueError with the field's name."""
    kinds = frozenset(get_args(hint)) if isinstance(hint, UnionType) else frozenset({hint})
    if kinds <= _PLAIN:
        return _plain(kinds, getattr(hint, "__name__", str(hint)))
    if NoneType in kinds:
        (kind,) = kinds - {NoneType}
        some = _reader(kind)
        return lambda value, name: None if value is None else some(value, name)
    if hint is bytes:
        return lambda value, name: base64.b64decode(_typed(value, str, name), validate=True)
    if isinstance(hint, type) and issubclass(hint, Record):
        return lambda value, _: hint.from_json(value)
    parts = [_reader(part) for part in get_args(hint)]
    if get_origin(hint) is list:
        return lambda value, name: [parts[0](one, name) for one in _typed(value, list, name)]
    if get_origin(hint) is dict:
        return lambda value, name: {key: parts[1](one, name) for key, one in _typed(value, dict, name).items()}
    return lambda value, name: tuple(
        read(one, name) for read, one in zip(parts, _typed(value, list, name), strict=True)
    )


def _plain(kinds: frozenset[Any], called: str) -> Callable[[Any, str], Any]:
    # JSON has one type of number, so 1 may mean 1.0.
    allowed = kinds | {int} if float in kinds else kinds
    counts = int in kinds

    def read(value: Any, name: str) -> Any:
        kind = type(value)
        if kind not in allowed:
            raise ValueError(f"{name} is {value!r:.60}, expected {called}")
        if kind is float and not math.isfinite(value):
            raise ValueError(f"{name} is not finite")
        if kind is int and counts and value < 0:
            raise ValueError(f"{name} is {value}, below 0")
        return value

    return read


def _typed(value: Any, kind: type[T], name: str) -> T:
    if type(value) is not kind:
        raise ValueError(f"{name} is {value!r:.60}, expected {kind.__name__}")
    return value
