"""Every record on the wire, with its producer and consumer. msgpack; arrays as raw little-endian bytes.

A decoder accepts exactly what its encoder writes: known fields, sizes that fit each other, finite floats, token ids
from 0 to 2^31 - 1 (those of a support in 16 bits if all of them fit). Fields that were added later, with a default of
None, are left out where all of them are None. Anything else raises `MessageError`; no other exception is ever raised.
Reading stops at the first list that no field needs, so decoding costs little more memory than the size of the record.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar, Self

import msgpack
import numpy as np
import numpy.typing as npt

from common.teachers import is_name

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Ids = Ints  # packed in 16 bits if all of them fit: K a token are half of what a scored chunk holds

MAX_RECORD_BYTES = 64 << 20
_MAX_FIELDS = 64
_MAX_TEXT = 4096
_CODES = {"Ints": "i", "Floats": "f", "Ids": "ih"}  # by annotation: how an array of it may be packed
_DTYPES: dict[str, np.dtype[Any]] = {"i": np.dtype("<i4"), "f": np.dtype("<f4"), "h": np.dtype("<u2")}
_BELOW = 1 << 16
ARMS = ("treated", "control")
VIEW = ("entropy", "student_logprobs", "teacher_logprobs")
"""The rows of a view, nats: the student's entropy on the support (STOP, the support and the tail as one distribution),
and the log-probabilities of the sampled outcome under the student (temperature 1, before top-p) and the teacher."""
_FORMER_HEAD = b"\x96"  # a list of six: the kind, and the fields of FormerSupport


class MessageError(ValueError):
    """A record that does not hold what its type promises."""


def _pack_array(array: Any, annotation: str, name: str) -> list[Any]:
    code = _CODES[annotation][0]
    if not isinstance(array, np.ndarray) or array.dtype != _DTYPES[code] or not 1 <= array.ndim <= 2:
        raise MessageError(f"{name}: expected {_DTYPES[code].name} of one or two dimensions")
    if annotation == "Ids" and _fit(array):
        return ["h", list(array.shape), array.astype(_DTYPES["h"]).tobytes()]
    return [code, list(array.shape), array.tobytes()]


def _fit(ids: Ids) -> bool:
    """Whether 16 bits hold them all. One below 0 is refused elsewhere."""
    return bool(np.maximum.reduce(ids, None, initial=0) < _BELOW)


def _unpack_array(value: Any, annotation: str, name: str) -> npt.NDArray[Any]:
    if not isinstance(value, list) or len(value) != 3:
        raise MessageError(f"{name}: not an array")
    code, shape, data = value
    if not isinstance(code, str) or not isinstance(data, bytes) or not isinstance(shape, list):
        raise MessageError(f"{name}: not an array")
    if not 1 <= len(shape) <= 2:
        raise MessageError(f"{name}: bad shape")
    for size in shape:
        if type(size) is not int or not 0 <= size <= 1 << 28:
            raise MessageError(f"{name}: bad shape")
    if len(code) != 1 or code not in _CODES[annotation]:
        raise MessageError(f"{name}: wrong dtype")
    dtype = _DTYPES[code]
    count = shape[0] * (shape[1] if len(shape) == 2 else 1)
    if count * dtype.itemsize != len(data):
        raise MessageError(f"{name}: {len(data)} bytes do not fit shape {shape!r:.60}")
    array = np.frombuffer(data, dtype=dtype)
    if code == "h":
        array = array.astype(np.int32)
    elif annotation == "Ids" and _fit(array):
        raise MessageError(f"{name}: 32 bits an id, 16 hold them")
    return array if len(shape) == 1 else array.reshape(shape)


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    label: str  # for messages
    annotation: str
    optional: bool
    late: bool  # added later, at the end of the record


class _Record:
    """Base of the records: packs the dataclass's fields in order, checks on the way in and on the way out."""

    __slots__ = ()
    KIND: ClassVar[str]

    def encode(self) -> bytes:
        """Raises MessageError if the record is not valid: a broken record is not sent."""
        packed = [_pack(getattr(self, field.name), field) for field in self._fields()]
        first = _first_late(self._fields())
        if all(value is None for value in packed[first:]):
            packed = packed[:first]
        self._check()
        data: bytes = msgpack.packb([self.KIND, *packed], use_bin_type=True)
        return data

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Raises MessageError, and nothing else, for anything that `encode` would not have written."""
        values = _unpack(data, cls.KIND, cls._fields())
        record = cls(*[read(value) for read, value in zip(cls._readers(), values, strict=True)])
        record._check()
        return record

    def _check(self) -> None:
        """Raises MessageError when fields do not fit each other."""

    @classmethod
    @cache
    def _fields(cls) -> tuple[_Field, ...]:
        return tuple(
            _Field(
                name=field.name,
                label=f"{cls.KIND}.{field.name}",
                annotation=str(field.type).removesuffix(" | None"),
                optional=str(field.type).endswith(" | None"),
                late=field.default is None,
            )
            for field in fields(cls)  # type: ignore[arg-type]
        )

    @classmethod
    @cache
    def _readers(cls) -> tuple[Callable[[Any], Any], ...]:
        """A function for each field, made once: a record is decoded for every chunk, by three roles."""
        return tuple(map(_reader, cls._fields()))


def _unpack(data: bytes, kind: str, wanted: tuple[_Field, ...]) -> list[Any]:
    if not isinstance(data, bytes) or len(data) > MAX_RECORD_BYTES:
        raise MessageError(f"{kind}: not bytes, or more than {MAX_RECORD_BYTES}")
    try:
        value = msgpack.unpackb(
            data,
            raw=False,
            use_list=True,
            list_hook=_at_most(2 + 2 * len(wanted), kind),
            max_str_len=_MAX_TEXT,
            max_bin_len=len(data),
            max_array_len=_MAX_FIELDS,
            max_map_len=0,
            max_ext_len=0,
        )
    except MessageError:
        raise
    except (ValueError, TypeError, RecursionError, OverflowError, msgpack.exceptions.UnpackException) as error:
        raise MessageError(f"{kind}: not msgpack ({type(error).__name__})") from error
    if not isinstance(value, list) or not value or value[0] != kind:
        raise MessageError(f"{kind}: another kind of record")
    values, first = value[1:], _first_late(wanted)
    if len(values) == first:
        return values + [None] * (len(wanted) - first)
    if len(values) != len(wanted) or all(one is None for one in values[first:]):
        raise MessageError(f"{kind}: {len(values)} fields instead of {len(wanted)}")
    return values


def _first_late(wanted: tuple[_Field, ...]) -> int:
    """How many fields a record has at least."""
    return sum(not field.late for field in wanted)


def _at_most(lists: int, kind: str) -> Callable[[list[Any]], list[Any]]:
    """For msgpack's list_hook. An empty list is one byte in a record and 64 in memory: without a limit a record full of
    them would unpack to eighty times its size."""
    left = lists

    def count(values: list[Any]) -> list[Any]:
        nonlocal left
        left -= 1
        if left < 0:
            raise MessageError(f"{kind}: more lists than its fields have")
        return values

    return count


def _pack(value: Any, field: _Field) -> Any:
    if field.optional and value is None:
        return None
    pack = _pack_array if field.annotation in _CODES else _scalar
    return pack(value, field.annotation, field.label)


def _reader(field: _Field) -> Callable[[Any], Any]:
    """What turns an unpacked value into the field's; the ordinary value at once, any other with its error."""
    annotation, label, optional = field.annotation, field.label, field.optional
    if annotation in ("Ints", "Floats"):
        code = _CODES[annotation]
        dtype = _DTYPES[code]

        def read_array(value: Any) -> Any:
            if optional and value is None:
                return None
            if type(value) is list and len(value) == 3 and value[0] == code and type(value[2]) is bytes and value[2]:
                shape, data = value[1], value[2]
                if type(shape) is list and len(shape) == 1 and type(shape[0]) is int and shape[0] * 4 == len(data):
                    return np.frombuffer(data, dtype)
            return _unpack_array(value, annotation, label)

        return read_array
    if annotation == "Ids":
        return lambda value: None if optional and value is None else _unpack_array(value, annotation, label)

    def read_scalar(value: Any) -> Any:
        if (optional and value is None) or (annotation == "bytes" and type(value) is bytes):
            return value
        if annotation == "int" and type(value) is int and 0 <= value < 1 << 63:
            return value
        return _scalar(value, annotation, label)

    return read_scalar


def _scalar(value: Any, annotation: str, name: str) -> Any:
    wanted = {"int": int, "float": float, "str": str, "bytes": bytes, "bool": bool}[annotation]
    if type(value) is not wanted:
        raise MessageError(f"{name}: expected {annotation}, found {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise MessageError(f"{name}: not finite")
    if isinstance(value, int) and not 0 <= value < 1 << 63:
        raise MessageError(f"{name}: out of range")
    if isinstance(value, str) and not (len(value) <= _MAX_TEXT and value.isascii()):
        raise MessageError(f"{name}: not a short ASCII text")
    return value


def _need(condition: bool, text: str) -> None:
    if not condition:
        raise MessageError(text)


# Arrays are checked for every chunk by every reader: by their extremes, without an array of answers, and without making
# messages that nobody reads. A comparison with NaN is false.


def _tokens(array: Ints, name: str) -> None:
    if array.ndim != 1:
        raise MessageError(f"{name}: expected one dimension")
    if array.size and np.minimum.reduce(array, None) < 0:
        raise MessageError(f"{name}: a negative token id")


def _floats(array: Floats, shape: tuple[int, ...], name: str) -> float:
    """Returns the greatest, -inf of none."""
    if array.shape != shape:
        raise MessageError(f"{name}: shape {array.shape} instead of {shape}")
    if not array.size:
        return -math.inf
    least, greatest = np.minimum.reduce(array, None), np.maximum.reduce(array, None)
    if not (least > -math.inf and greatest < math.inf):
        raise MessageError(f"{name}: not finite")
    return float(greatest)


def _logprobs(array: Floats, shape: tuple[int, ...], name: str) -> None:
    # Rounding can put log-probabilities of float32 logits slightly above zero.
    if _floats(array, shape, name) > 1e-3:
        raise MessageError(f"{name}: a log-probability above 0")


def _view(array: Floats, n: int, name: str) -> None:
    _floats(array, (len(VIEW), n), name)
    _need(not (array[0] < 0).any(), f"{name}: an entropy below 0")
    _logprobs(array[1:], (len(VIEW) - 1, n), name)


@dataclass(frozen=True, slots=True, eq=False)
class RolloutHead(_Record):
    """feeder → rollout worker, teacher worker, arbiter, learner. The task of a rollout."""

    KIND: ClassVar[str] = "head"
    rid: str
    arm: str
    problem: int  # index into the task's training split
    seed: int  # of this rollout's draws, 0 … 2^63 - 1
    max_new_tokens: int
    step: int | None  # the step whose weights must write it; None: any
    prompt: Ints  # [m]
    teacher: str | None = None  # the one of several that scores it

    @property
    def scored_by(self) -> str:
        """Its teacher, by name; '' is the one teacher of a run."""
        return self.teacher or ""

    def _check(self) -> None:
        _need(self.arm in ARMS, f"head.arm: {self.arm!r:.40}")
        _need(self.problem >= 0 and 0 <= self.seed < 1 << 63, "head: problem or seed out of range")
        _need(self.max_new_tokens >= 1, "head.max_new_tokens: below 1")
        _need(self.teacher is None or is_name(self.teacher), f"head.teacher: {self.teacher!r:.40}")
        _tokens(self.prompt, "head.prompt")
        _need(len(self.prompt) >= 1, "head.prompt: empty")


@dataclass(frozen=True, slots=True, eq=False)
class ChunkTokens(_Record):
    """rollout worker → teacher worker, arbiter, learner. The part of a chunk that all of them read."""

    KIND: ClassVar[str] = "tokens"
    seq: int
    start: int  # tokens of the rollout before this chunk
    policy_version: int
    finish: str | None  # eos | length on the last chunk
    writer: str  # the nonce of its owner at the time
    digest: bytes  # of the chunk's support and log-probabilities: this small record identifies a repeated chunk
    tokens: Ints  # [n]

    def _check(self) -> None:
        _need(self.seq >= 0 and self.start >= 0 and self.policy_version >= 0, "tokens: negative number")
        if self.finish not in (None, "eos", "length"):
            raise MessageError(f"tokens.finish: {self.finish!r:.40}")
        if not (1 <= len(self.writer) <= 40 and self.writer.isalnum()):
            raise MessageError(f"tokens.writer: {self.writer!r:.40}")
        _need(len(self.digest) == 16, "tokens.digest: not 16 bytes")
        _tokens(self.tokens, "tokens.tokens")
        _need(len(self.tokens) >= 1, "tokens.tokens: empty")


@dataclass(frozen=True, slots=True, eq=False)
class ChunkSupport(_Record):
    """rollout worker → teacher worker, learner. The student's support, and log-probabilities of what was sampled."""

    KIND: ClassVar[str] = "support"
    support_ids: Ids  # [n, K]
    rollout_logprobs: Floats  # [n], of the sampled outcome, full distribution
    sampled_logprobs: Floats  # [n], of the sampled outcome, as sampled (temperature, top-p)

    def _check(self) -> None:
        _need(self.support_ids.ndim == 2, "support.support_ids: expected two dimensions")
        n = len(self.support_ids)
        if self.support_ids.size and np.minimum.reduce(self.support_ids, None) < 0:
            raise MessageError("support.support_ids: a negative token id")
        _logprobs(self.rollout_logprobs, (n,), "support.rollout_logprobs")
        _logprobs(self.sampled_logprobs, (n,), "support.sampled_logprobs")


@dataclass(frozen=True, slots=True, eq=False)
class ChunkLogprobs(_Record):
    """rollout worker → teacher worker. The student's distribution on its own support.

    Only the divergence is computed from it: it is removed when that is stored.
    """

    KIND: ClassVar[str] = "student"
    support_logprobs: Floats  # [n, K + 1], column 0 is STOP; temperature 1, before top-p
    tail_logprobs: Floats | None  # [n]; None: the support holds every outcome

    def _check(self) -> None:
        _need(self.support_logprobs.ndim == 2, "student.support_logprobs: expected two dimensions")
        _logprobs(self.support_logprobs, self.support_logprobs.shape, "student.support_logprobs")
        if self.tail_logprobs is not None:
            _logprobs(self.tail_logprobs, (len(self.support_logprobs),), "student.tail_logprobs")


@dataclass(frozen=True, slots=True, eq=False)
class FormerSupport(_Record):
    """ChunkSupport and ChunkLogprobs in one record, as they once were: only read, since a run goes on through an
    upgrade."""

    KIND: ClassVar[str] = "support"
    support_ids: Ints
    support_logprobs: Floats
    tail_logprobs: Floats | None
    rollout_logprobs: Floats
    sampled_logprobs: Floats

    @property
    def support(self) -> ChunkSupport:
        return ChunkSupport(self.support_ids, self.rollout_logprobs, self.sampled_logprobs)

    @property
    def logprobs(self) -> ChunkLogprobs:
        return ChunkLogprobs(self.support_logprobs, self.tail_logprobs)

    def _check(self) -> None:
        self.support._check()
        self.logprobs._check()
        n, k = self.support_ids.shape
        _need(self.support_logprobs.shape == (n, k + 1), "support.support_logprobs: not one more than the ids")


@dataclass(frozen=True, slots=True, eq=False)
class ScoreDivergence(_Record):
    """teacher worker → arbiter. The payload for detection."""

    KIND: ClassVar[str] = "divergence"
    seq: int
    divergence: Floats  # [n], nats, ≥ 0

    def _check(self) -> None:
        _need(self.seq >= 0, "divergence.seq: negative")
        _floats(self.divergence, (self.divergence.size,), "divergence.divergence")
        _need(not (self.divergence < 0).any(), "divergence.divergence: below 0")


@dataclass(frozen=True, slots=True, eq=False)
class ScoreView(_Record):
    """teacher worker → arbiter, learner. What a policy may read of a token beside its id and divergence, and what a
    weighting reads of it. Stored where something may read it (`Config.stores_view`)."""

    KIND: ClassVar[str] = "view"
    seq: int
    view: Floats  # [3, n], rows as in VIEW

    def _check(self) -> None:
        _need(self.seq >= 0, "view.seq: negative")
        _view(self.view, self.view.shape[-1], "view.view")

    @property
    def entropy(self) -> Floats:
        """The student's, on the support, float32 [n], nats."""
        entropy: Floats = self.view[0]
        return entropy


@dataclass(frozen=True, slots=True, eq=False)
class ScoreSupport(_Record):
    """teacher worker → learner. The payload for the loss."""

    KIND: ClassVar[str] = "teacher"
    teacher_logprobs: Floats  # [n, K + 1] on the student's support, column 0 is STOP
    tail_logprobs: Floats | None  # [n], of all outcomes that are in neither list of ids
    sampled_logprobs: Floats  # [n], of the sampled outcome, which may lie outside the support
    own_ids: Ids | None = None  # [n, K'], the teacher's likeliest outcomes outside the student's support
    own_logprobs: Floats | None = None  # [n, K'], the teacher's of them

    def _check(self) -> None:
        n = len(self.sampled_logprobs) if self.sampled_logprobs.ndim == 1 else -1
        _need(self.teacher_logprobs.ndim == 2, "teacher.teacher_logprobs: expected two dimensions")
        _logprobs(self.teacher_logprobs, (n, self.teacher_logprobs.shape[1]), "teacher.teacher_logprobs")
        if self.tail_logprobs is not None:
            _logprobs(self.tail_logprobs, (n,), "teacher.tail_logprobs")
        _logprobs(self.sampled_logprobs, (n,), "teacher.sampled_logprobs")
        if self.own_ids is None or self.own_logprobs is None:
            both = self.own_ids is None and self.own_logprobs is None
            _need(both, "teacher: own_ids without own_logprobs, or the other way around")
            return
        if self.own_ids.ndim != 2 or len(self.own_ids) != n or not self.own_ids.shape[1]:
            raise MessageError(f"teacher.own_ids: shape {self.own_ids.shape} instead of ({n}, 1 or more)")
        if self.own_ids.size and np.minimum.reduce(self.own_ids, None) < 0:
            raise MessageError("teacher.own_ids: a negative token id")
        _logprobs(self.own_logprobs, self.own_ids.shape, "teacher.own_logprobs")


@dataclass(frozen=True, slots=True, eq=False)
class Verdict(_Record):
    """arbiter → learner (what to train on), feeder (the books). A rollout has exactly one."""

    KIND: ClassVar[str] = "verdict"
    rid: str
    arm: str
    problem: int
    finish_reason: str  # eos | length, or why it was stopped: kl_trap | kl_high | fixed …
    trigger: int  # tokens seen when the policy fired, or all tokens where it did not
    keep: int  # tokens before the cut
    train: int  # tokens handed to the learner
    cut: bool  # whether the writing was stopped: `stopped`
    generated: int | None  # all tokens written, if the last chunk was stored by then; None: its writer will report it
    threshold: float | None  # the policy's number that it was judged by
    min_window: float | None  # up to the trigger if stopped, else over the whole rollout; kat_inverse: the greatest
    first_version: int
    last_version: int
    tokens: Ints  # [n], all scored tokens
    divergence: Floats  # [n]
    view: Floats | None = None  # [3, n]; None: the policy reads none, and none is recorded

    @property
    def stopped(self) -> bool:
        return self.cut

    @property
    def fired(self) -> bool:
        return fired(stopped=self.stopped, kept=self.keep, written=len(self.tokens))

    def _check(self) -> None:
        _need(self.arm in ARMS, f"verdict.arm: {self.arm!r:.40}")
        _need(self.problem >= 0, "verdict.problem: negative")
        _tokens(self.tokens, "verdict.tokens")
        n = len(self.tokens)
        _floats(self.divergence, (n,), "verdict.divergence")
        if self.view is not None:
            _view(self.view, n, "verdict.view")
        _need(0 <= self.keep <= self.trigger <= n, "verdict: keep ≤ trigger ≤ tokens does not hold")
        _need(0 <= self.train <= n, "verdict.train: out of range")
        _need(self.generated is None or self.generated >= n, "verdict.generated: fewer than were scored")
        _need(0 <= self.first_version <= self.last_version, "verdict: versions out of order")


def fired(*, stopped: bool, kept: int, written: int) -> bool:
    """Whether the policy fired in a rollout, applied or not: in the control arm, mask and shadow it stops nothing.

    A rollout that was not stopped is scored whole, and less of it is kept only if the policy fired. A policy that fires
    at the last token and keeps that too changes nothing unless it is applied, and does not count.
    """
    return stopped or kept < written


def read_support(stored: bytes) -> ChunkSupport:
    """The support of a chunk, as any version stored it. Raises MessageError."""
    return FormerSupport.decode(stored).support if _is_former(stored) else ChunkSupport.decode(stored)


def read_logprobs(stored: bytes, support: bytes) -> ChunkLogprobs:
    """The student's log-probabilities of a chunk, which are in its stored support if a former version wrote it. Raises
    MessageError."""
    return FormerSupport.decode(support).logprobs if _is_former(support) else ChunkLogprobs.decode(stored)


def _is_former(support: bytes) -> bool:
    return support[:1] == _FORMER_HEAD


def support_digest(encoded_support: bytes, encoded_logprobs: bytes) -> bytes:
    """16 bytes that name an encoded ChunkSupport with its ChunkLogprobs (b"" after a FormerSupport)."""
    digest = hashlib.blake2b(encoded_support, digest_size=16)
    digest.update(encoded_logprobs)
    return digest.digest()


def row_digest(row: Ints | Floats) -> str:
    """8 bytes, in hex, that identify a row of numbers: used to compare trained tokens with written ones."""
    return hashlib.blake2b(np.ascontiguousarray(row).tobytes(), digest_size=8).hexdigest()


def read_number(value: Any, name: str, *, low: int = 0, high: int = (1 << 53) - 1) -> int:
    """An integer from a stream entry's field. Raises MessageError."""
    if not isinstance(value, bytes) or not 1 <= len(value) <= 20 or not value.isdigit():
        raise MessageError(f"{name}: not a number")
    number = int(value)
    if not low <= number <= high:
        raise MessageError(f"{name}: {number} is outside {low} … {high}")
    return number


def read_rid(value: Any) -> str:
    """A rollout id from a stream entry's field. Raises MessageError."""
    if not isinstance(value, bytes) or not 1 <= len(value) <= 40 or not value.isalnum():
        raise MessageError("rid: not a rollout id")
    return value.decode("ascii")
