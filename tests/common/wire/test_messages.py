"""Records come back as they were sent; whatever else is decoded, MessageError is all that is raised."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from samples import (
    make_divergence,
    make_former_support,
    make_head,
    make_logprobs,
    make_own_support,
    make_score_support,
    make_support,
    make_tokens,
    make_verdict,
    make_view,
    make_wide_support,
)

from common.wire.messages import (
    ARMS,
    MAX_RECORD_BYTES,
    ChunkLogprobs,
    ChunkSupport,
    ChunkTokens,
    MessageError,
    RolloutHead,
    ScoreDivergence,
    ScoreSupport,
    ScoreView,
    Verdict,
    read_logprobs,
    read_number,
    read_rid,
    read_support,
    support_digest,
)

SAMPLES: dict[str, Any] = {
    "head": make_head(),
    "tokens": make_tokens(finish="eos"),
    "support": make_support(),
    "wide": make_wide_support(3, 2),
    "student": make_logprobs(),
    "former": make_former_support(),
    "divergence": make_divergence(),
    "teacher": make_score_support(),
    "own": make_own_support(),
    "view": make_view(),
    "verdict": make_verdict(),
}
KINDS = sorted(SAMPLES)

ids = st.integers(0, 2**31 - 1)
counts = st.integers(0, 2**53)
texts = st.text(st.characters(codec="ascii"), min_size=1, max_size=40)
nats = st.floats(0, 2.0**100, width=32)
logprobs = st.floats(-(2.0**100), 0, width=32)


def int_array(shape: Any) -> Any:
    return arrays(np.int32, shape, elements=ids)


def float_array(shape: Any, elements: Any = logprobs) -> Any:
    return arrays(np.float32, shape, elements=elements)


def maybe(strategy: Any) -> Any:
    return st.none() | strategy


@st.composite
def heads(draw: Any) -> RolloutHead:
    return RolloutHead(
        rid=draw(texts),
        arm=draw(st.sampled_from(ARMS)),
        problem=draw(counts),
        seed=draw(st.integers(0, 2**63 - 1)),
        max_new_tokens=draw(st.integers(1, 2**31)),
        step=draw(maybe(counts)),
        prompt=draw(int_array(st.integers(1, 20))),
        teacher=draw(maybe(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}", fullmatch=True))),
    )


@st.composite
def tokens(draw: Any) -> ChunkTokens:
    return ChunkTokens(
        seq=draw(counts),
        start=draw(counts),
        policy_version=draw(counts),
        finish=draw(st.sampled_from([None, "eos", "length"])),
        writer=draw(st.from_regex(r"[a-z0-9]{1,40}", fullmatch=True)),
        digest=draw(st.binary(min_size=16, max_size=16)),
        tokens=draw(int_array(st.integers(1, 20))),
    )


@st.composite
def supports(draw: Any) -> ChunkSupport:
    n, k = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    narrow = arrays(np.int32, (n, k), elements=st.integers(0, 2**16))
    return ChunkSupport(
        support_ids=draw(int_array((n, k)) | narrow),
        rollout_logprobs=draw(float_array(n)),
        sampled_logprobs=draw(float_array(n)),
    )


@st.composite
def logprobs_of_chunks(draw: Any) -> ChunkLogprobs:
    n, k = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    return ChunkLogprobs(
        support_logprobs=draw(float_array((n, k + 1))),
        tail_logprobs=draw(maybe(float_array(n))),
    )


@st.composite
def scores(draw: Any) -> ScoreDivergence:
    return ScoreDivergence(seq=draw(counts), divergence=draw(float_array(st.integers(0, 20), nats)))


def views(n: int) -> Any:
    entropy, both = float_array((1, n), nats), float_array((2, n))
    return st.tuples(entropy, both).map(np.concatenate)


@st.composite
def score_views(draw: Any) -> ScoreView:
    return ScoreView(seq=draw(counts), view=draw(views(draw(st.integers(0, 20)))))


@st.composite
def score_supports(draw: Any) -> ScoreSupport:
    n, k, own = draw(st.integers(0, 5)), draw(st.integers(0, 5)), draw(st.integers(0, 3))
    return ScoreSupport(
        teacher_logprobs=draw(float_array((n, k + 1))),
        tail_logprobs=draw(maybe(float_array(n))),
        sampled_logprobs=draw(float_array(n)),
        own_ids=draw(int_array((n, own))) if own else None,
        own_logprobs=draw(float_array((n, own))) if own else None,
    )


@st.composite
def verdicts(draw: Any) -> Verdict:
    n = draw(st.integers(0, 10))
    keep, trigger = sorted(draw(st.lists(st.integers(0, n), min_size=2, max_size=2)))
    first, last = sorted(draw(st.lists(counts, min_size=2, max_size=2)))
    numbers = maybe(st.floats(allow_nan=False, allow_infinity=False))
    return Verdict(
        rid=draw(texts),
        arm=draw(st.sampled_from(ARMS)),
        problem=draw(counts),
        finish_reason=draw(texts),
        trigger=trigger,
        keep=keep,
        train=draw(st.integers(0, n)),
        cut=draw(st.booleans()),
        generated=draw(maybe(st.integers(n, n + 100))),
        threshold=draw(numbers),
        min_window=draw(numbers),
        first_version=first,
        last_version=last,
        tokens=draw(int_array(n)),
        divergence=draw(float_array(n, nats)),
        view=draw(maybe(views(n))),
    )


records = st.one_of(
    heads(), tokens(), supports(), logprobs_of_chunks(), scores(), score_supports(), score_views(), verdicts()
)


@given(records)
@settings(max_examples=150, deadline=None)
def test_what_is_decoded_equals_what_was_sent(record: Any) -> None:
    back = type(record).decode(record.encode())
    for field in fields(record):
        sent, found = getattr(record, field.name), getattr(back, field.name)
        if isinstance(sent, np.ndarray):
            assert found.dtype == sent.dtype
            np.testing.assert_array_equal(found, sent, strict=True)
        else:
            assert type(found) is type(sent)
            assert found == sent
    assert back.encode() == record.encode()


def test_the_bytes_on_the_wire_are_msgpack_with_little_endian_arrays() -> None:
    assert msgpack.unpackb(make_divergence([0.5, 1.0], seq=3).encode()) == [
        "divergence",
        3,
        ["f", [2], b"\x00\x00\x00\x3f\x00\x00\x80\x3f"],
    ]
    assert msgpack.unpackb(make_head().encode())[-1] == ["i", [3], b"\x05\0\0\0\x06\0\0\0\x07\0\0\0"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_is_refused(kind: str) -> None:
    record = SAMPLES[kind]
    data = record.encode()
    for length in range(len(data)):
        with pytest.raises(MessageError):
            type(record).decode(data[:length])
    with pytest.raises(MessageError):
        type(record).decode(data + b"\0")


def test_a_head_without_a_teacher_is_the_record_of_before_there_could_be_several() -> None:
    values = msgpack.unpackb(make_head().encode())
    assert len(values) == 8 and RolloutHead.decode(msgpack.packb(values)).scored_by == ""
    named = msgpack.unpackb(make_head(teacher="math").encode())
    assert named == [*values, "math"] and RolloutHead.decode(msgpack.packb(named)).scored_by == "math"
    for teacher, words in ((None, "fields instead of"), ("", "head.teacher: ''"), ("a b", "head.teacher: 'a b'")):
        with pytest.raises(MessageError, match=words):
            RolloutHead.decode(msgpack.packb([*values, teacher]))
    with pytest.raises(MessageError, match=r"head\.teacher"):
        make_head(teacher="a:b").encode()


@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_or_number_of_fields_is_refused(kind: str) -> None:
    record = SAMPLES[kind]
    values = msgpack.unpackb(record.encode())
    for other in [*(set(KINDS) - {record.KIND}), "", None, 1, [kind], kind.encode()]:
        with pytest.raises(MessageError, match="another kind"):
            type(record).decode(msgpack.packb([other, *values[1:]]))
    for changed in (values[:-1], [*values, None]):
        with pytest.raises(MessageError, match="fields instead of"):
            type(record).decode(msgpack.packb(changed))
    for other in (b"", msgpack.packb(None), msgpack.packb({}), msgpack.packb([]), msgpack.packb(5)):
        with pytest.raises(MessageError):
            type(record).decode(other)


ODD = [None, True, -1, 1.5, 2**63, 2**64 - 1, "x", b"x", [], [[]], ["i", [1], b"1234"], ["f", [1], b"\0\0\x80?"],
       ["i", [3], b"\0" * 12], ["f", [3], b"\0" * 12], ["f", [3], b"\0" * 8], ["i", [-3], b"\0" * 12],
       ["d", [3], b"\0" * 24], ["i", [True, 3], b"\0" * 12], ["i", [1, 1, 3], b"\0" * 12], ["i", [], b"\0" * 4],
       ["f", [2**28, 2**28], b""], ["f", [3], b"\0\0\xc0\x7f" * 3], ["f", [3], b"\0\0\x80\x7f" * 3],
       ["i", [3], b"\xff" * 12], ["i", "3", b"\0" * 12], ["i", [3], "\0" * 12], [["i"], [3], b"\0" * 12],
       float("nan"), float("inf"), "x" * 5000, "é", msgpack.Timestamp(1), msgpack.ExtType(5, b"")]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_any_odd_value_in_any_field_is_refused_or_encoded_back_the_same(kind: str) -> None:
    record = SAMPLES[kind]
    values = msgpack.unpackb(record.encode())
    refused = 0
    for place in range(1, len(values)):
        for odd in ODD:
            data = msgpack.packb([*values[:place], odd, *values[place + 1 :]])
            try:
                back = type(record).decode(data)
            except MessageError:
                refused += 1
            else:
                assert back.encode() == data
    assert refused > 0.8 * len(ODD) * (len(values) - 1)


def array(values: Any, dtype: Any = np.float32) -> Any:
    return np.array(values, dtype)


BROKEN: list[tuple[str, dict[str, Any]]] = [
    ("head", {"arm": "other"}),
    ("head", {"problem": -1}),
    ("head", {"problem": 1 << 70}),
    ("head", {"seed": -1}),
    ("head", {"seed": 1 << 63}),
    ("head", {"max_new_tokens": 0}),
    ("head", {"prompt": array([], np.int32)}),
    ("head", {"prompt": array([1, -1], np.int32)}),
    ("head", {"prompt": array([[1]], np.int32)}),
    ("head", {"prompt": array([1.0])}),
    ("head", {"prompt": array([1 << 40], np.int64)}),
    ("head", {"prompt": [1, 2]}),
    ("head", {"rid": b"r1"}),
    ("head", {"rid": "\ud800"}),
    ("head", {"rid": "x" * 5000}),
    ("tokens", {"seq": -1}),
    ("tokens", {"seq": np.int64(3)}),
    ("tokens", {"start": -1}),
    ("tokens", {"policy_version": -1}),
    ("tokens", {"finish": "kl_trap"}),
    ("tokens", {"digest": b"short"}),
    ("tokens", {"tokens": array([], np.int32)}),
    ("support", {"support_ids": array([1, 2, 3], np.int32)}),
    ("support", {"support_ids": array(np.full((3, 2), -1), np.int32)}),
    ("support", {"support_ids": array(np.zeros((2, 2)), np.int32)}),
    ("support", {"support_ids": array(np.zeros((3, 2)), np.uint16)}),
    ("student", {"support_logprobs": array([-1, -1, -1])}),
    ("student", {"support_logprobs": array(np.full((3, 3), np.nan))}),
    ("student", {"support_logprobs": array(np.full((3, 3), -np.inf))}),
    ("student", {"support_logprobs": array(np.full((3, 3), 0.01))}),
    ("student", {"support_logprobs": np.full((3, 3), -1e300)}),
    ("student", {"tail_logprobs": array([-1, -1])}),
    ("student", {"tail_logprobs": array([-1, -1, 0.5])}),
    ("former", {"support_ids": array(np.zeros((3, 3)), np.int32)}),
    ("former", {"support_logprobs": array(np.full((3, 3), np.nan))}),
    ("former", {"tail_logprobs": array([-1, -1])}),
    ("former", {"rollout_logprobs": array([-1, -1])}),
    ("support", {"rollout_logprobs": array([-1, -1, np.nan])}),
    ("support", {"sampled_logprobs": array([-1, -1])}),
    ("divergence", {"seq": -1}),
    ("divergence", {"divergence": array([0.5, -1e-6])}),
    ("divergence", {"divergence": array([0.5, np.inf])}),
    ("divergence", {"divergence": array([[0.5]])}),
    ("teacher", {"teacher_logprobs": array([0.0])}),
    ("teacher", {"teacher_logprobs": array(np.zeros((2, 3)))}),
    ("teacher", {"tail_logprobs": array([-1, -1])}),
    ("teacher", {"sampled_logprobs": array([[-1]])}),
    ("teacher", {"sampled_logprobs": array([-1, -1, 1])}),
    ("own", {"own_ids": None}),
    ("own", {"own_logprobs": None}),
    ("own", {"own_ids": array(np.zeros((2, 2)), np.int32)}),
    ("own", {"own_ids": array(np.full((3, 2), -1), np.int32)}),
    ("own", {"own_ids": array(np.zeros((3, 0)), np.int32), "own_logprobs": array(np.zeros((3, 0)))}),
    ("own", {"own_logprobs": array(np.full((3, 1), -1))}),
    ("own", {"own_logprobs": array(np.full((3, 2), 0.5))}),
    ("verdict", {"arm": "x"}),
    ("verdict", {"problem": -1}),
    ("verdict", {"keep": -1}),
    ("verdict", {"keep": 4, "trigger": 3}),
    ("verdict", {"trigger": 4}),
    ("verdict", {"train": 4}),
    ("verdict", {"train": -1}),
    ("verdict", {"generated": 2}),
    ("verdict", {"first_version": 2, "last_version": 1}),
    ("verdict", {"first_version": -1}),
    ("verdict", {"threshold": float("nan")}),
    ("verdict", {"min_window": float("inf")}),
    ("verdict", {"threshold": np.float32(0.5)}),
    ("verdict", {"cut": 1}),
    ("verdict", {"tokens": array([1, 2], np.int32)}),
    ("verdict", {"divergence": array([1, 2])}),
    ("verdict", {"view": make_view([0.5, 0.5]).view}),
    ("verdict", {"view": -make_view().view}),
    ("view", {"seq": -1}),
    ("view", {"view": array([0.5, 0.5, 0.5])}),
    ("view", {"view": array([[0.5], [-1.0]])}),
    ("view", {"view": array([[-0.5], [-1.0], [-1.0]])}),
    ("view", {"view": array([[0.5], [0.5], [-1.0]])}),
    ("view", {"view": array([[0.5], [-1.0], [0.5]])}),
    ("view", {"view": array([[np.nan], [-1.0], [-1.0]])}),
]


@pytest.mark.parametrize(("kind", "changes"), BROKEN)
def test_what_is_broken_is_not_sent(kind: str, changes: dict[str, Any]) -> None:
    with pytest.raises(MessageError):
        replace(SAMPLES[kind], **changes).encode()


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_random_bytes_raise_message_error_only(data: bytes) -> None:
    for record in SAMPLES.values():
        with pytest.raises(MessageError):
            type(record).decode(data)


@given(st.sampled_from(KINDS), st.data())
@settings(max_examples=300, deadline=None)
def test_changed_bytes_are_refused_or_are_a_valid_record(kind: str, data: st.DataObject) -> None:
    record = SAMPLES[kind]
    raw = bytearray(record.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place] = data.draw(st.integers(0, 255))
    try:
        back = type(record).decode(bytes(raw))
    except MessageError:
        return
    type(record).decode(back.encode())


nested = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=20,
)


@given(st.sampled_from(KINDS), st.lists(nested, max_size=16))
@settings(max_examples=200, deadline=None)
def test_any_msgpack_raises_message_error_only(kind: str, values: list[Any]) -> None:
    count = len(fields(SAMPLES[kind]))
    data = msgpack.packb([SAMPLES[kind].KIND, *(values * count)[:count]])
    with pytest.raises(MessageError):
        type(SAMPLES[kind]).decode(data)


@pytest.mark.parametrize("depth", [100, 1_000, 100_000])
def test_deep_nesting_is_refused(depth: int) -> None:
    for record in SAMPLES.values():
        with pytest.raises(MessageError):
            type(record).decode(b"\x91" * depth + b"\xc0")


def test_sizes_that_a_few_bytes_announce_are_not_believed() -> None:
    for head in (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"):
        with pytest.raises(MessageError):
            Verdict.decode(b"\x92\xa7verdict" + head)


def test_a_record_above_the_limit_is_refused_unread() -> None:
    with pytest.raises(MessageError, match="more than"):
        Verdict.decode(bytes(MAX_RECORD_BYTES + 1))
    for odd in (None, "text", bytearray(b"\x90"), 5):
        with pytest.raises(MessageError):
            Verdict.decode(odd)  # type: ignore[arg-type]


def test_the_digest_of_a_support_and_its_log_probabilities_is_16_bytes_of_blake2b() -> None:
    support, student = make_support().encode(), make_logprobs().encode()
    assert support_digest(support, student) == hashlib.blake2b(support + student, digest_size=16).digest()
    assert make_tokens().digest == support_digest(support, student)


@pytest.mark.parametrize(("highest", "bytes_an_id"), [(0, 2), (2**16 - 1, 2), (2**16, 4), (2**31 - 1, 4)])
def test_ids_take_16_bits_where_all_of_them_fit(highest: int, bytes_an_id: int) -> None:
    ids_ = np.array([[0, 1, highest], [2, 3, 4]], np.int32)
    support = replace(make_support(2), support_ids=ids_)
    data = support.encode()
    stored = msgpack.unpackb(data)[1]
    assert (stored[1], len(stored[2])) == ([2, 3], bytes_an_id * 6)
    back = ChunkSupport.decode(data)
    assert back.support_ids.dtype == np.int32
    assert np.array_equal(back.support_ids, ids_)


def test_ids_are_not_read_from_32_bits_where_16_hold_them() -> None:
    """One record has one encoding: a digest names it."""
    values = msgpack.unpackb(make_support(3, 2).encode())
    values[1] = ["i", [3, 2], np.arange(6, dtype="<i4").tobytes()]
    with pytest.raises(MessageError, match="16 hold them"):
        ChunkSupport.decode(msgpack.packb(values))


def test_fields_that_were_added_later_are_in_the_record_only_where_they_hold_something() -> None:
    plain, own = make_score_support(), make_own_support()
    values = msgpack.unpackb(plain.encode())
    assert len(values) == 4, "as former versions wrote it and read it"
    assert ScoreSupport.decode(plain.encode()).own_ids is None
    assert len(msgpack.unpackb(own.encode())) == 6
    with pytest.raises(MessageError, match="5 fields instead of 5"):
        ScoreSupport.decode(msgpack.packb([*values, None, None]))


def test_what_a_former_version_stored_is_read_as_what_this_one_stores() -> None:
    former = make_former_support().encode()
    assert read_support(former).encode() == make_support().encode()
    assert read_logprobs(b"", former).encode() == make_logprobs().encode()
    new = make_support().encode(), make_logprobs().encode()
    assert read_support(new[0]).encode() == new[0]
    assert read_logprobs(new[1], new[0]).encode() == new[1]
    for broken in (b"", former[:-1], new[0][:-1], b"\x96"):
        with pytest.raises(MessageError):
            read_support(broken)
        with pytest.raises(MessageError):
            read_logprobs(b"", broken)


def test_a_verdict_without_a_view_is_that_of_the_versions_before_views() -> None:
    """A run goes on through an upgrade: what a former version stored is read, also from here by a former version."""
    plain = make_verdict()
    values = msgpack.unpackb(plain.encode())
    assert len(values) == len(fields(Verdict))  # the kind, and every field but the view
    assert Verdict.decode(plain.encode()).view is None
    viewed = replace(plain, view=make_view().view)
    found = Verdict.decode(viewed.encode()).view
    assert found is not None
    np.testing.assert_array_equal(found, make_view().view, strict=True)
    assert msgpack.unpackb(viewed.encode())[:-1] == values
    for broken in (1, b"x", [], ["f", [3], b"\0" * 12], ["i", [3, 3], b"\0" * 36]):
        with pytest.raises(MessageError, match=r"verdict\.view"):
            Verdict.decode(msgpack.packb([*values, broken]))


@pytest.mark.parametrize("value", [b"0", b"7", b"9007199254740991", b"007"])
def test_numbers_are_read_from_digits(value: bytes) -> None:
    assert read_number(value, "n") == int(value)


@pytest.mark.parametrize(
    "value",
    [None, 7, "7", b"", b"-1", b"+1", b" 1", b"1 ", b"1.0", b"0x1", b"1_0", b"9" * 21, b"9007199254740992"],
)
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(MessageError, match="n:"):
        read_number(value, "n")


def test_numbers_have_limits() -> None:
    assert read_number(b"5", "n", low=5, high=5) == 5
    for value in (b"4", b"6"):
        with pytest.raises(MessageError, match="outside 5 … 5"):
            read_number(value, "n", low=5, high=5)


def test_rollout_ids_are_letters_and_digits() -> None:
    assert read_rid(b"r000000001") == "r000000001"
    for value in (None, "r1", b"", b"a b", b"a:b", b"{a}", b"\xff", "é".encode(), b"x" * 41):
        with pytest.raises(MessageError):
            read_rid(value)
