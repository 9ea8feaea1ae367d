"""The KAT rule against the published cases, against a slow reference, and by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import termination
from common.termination import Cut, FirstRepeat, FixedLength, Kat, MinimaBuffer, NeverCut, kat_verdict

CASES = json.loads((Path(__file__).parent.parent / "vectors" / "kat_rule.json").read_text())["cases"]
RULE = ("window", "patience", "stride", "grace_tokens", "threshold")


def slow_rule(
    values: list[float], window: int, patience: int, stride: int, grace_tokens: int, threshold: float | None
) -> tuple[int | None, int | None, float | None]:
    """The rule as it is written down: every window summed anew, in full precision."""
    means: list[tuple[int, float]] = []
    for seen in range(grace_tokens + window, len(values) + 1, stride):
        means.append((seen, math.fsum(values[seen - window : seen]) / window))
        streak = means[-patience:]
        if threshold is not None and len(streak) == patience and all(mean < threshold for _, mean in streak):
            return seen, streak[0][0] - window, min(mean for _, mean in means)
    return None, None, min((mean for _, mean in means), default=None)


def in_parts(case: dict[str, Any], sizes: list[int]) -> tuple[Cut | None, float | None, int]:
    """Feed a case in parts; returns the cut, the minimum and how often the rule fired."""
    detector = Kat(**{name: case[name] for name in RULE})
    values = np.array(case["divergence"], np.float64)
    found, place, fired = None, 0, 0
    for size in [*sizes, len(values)]:
        cut = detector.feed(values[place : place + size])
        place += size
        fired += cut is not None
        found = found or cut
    return found, detector.min_window, fired


def test_there_are_200_cases_of_both_outcomes() -> None:
    assert len(CASES) == 200
    fired = sum(case["keep"] is not None for case in CASES)
    assert (fired, len(CASES) - fired) == (160, 40)


@pytest.mark.parametrize("number", range(200))
def test_published_case(number: int) -> None:
    case = CASES[number]
    trigger, keep, lowest = kat_verdict(case["divergence"], **{name: case[name] for name in RULE})
    assert (trigger, keep) == (case["trigger"], case["keep"])
    assert lowest == (None if case["min_window"] is None else pytest.approx(case["min_window"], rel=1e-9, abs=1e-15))


@given(st.sampled_from(CASES), st.lists(st.integers(0, 80), max_size=40))
@settings(max_examples=150, deadline=None)
def test_chunking_changes_neither_cut_nor_minimum(case: dict[str, Any], sizes: list[int]) -> None:
    cut, lowest, fired = in_parts(case, sizes)
    whole_cut, whole_lowest, _ = in_parts(case, [])
    assert (cut, lowest) == (whole_cut, whole_lowest)
    assert fired == (case["keep"] is not None)
    if cut is not None:
        assert (cut.trigger, cut.keep, cut.reason) == (case["trigger"], case["keep"], "kl_trap")


# Multiples of 1/64 nat: sums are exact in any order, so equality is exact and ties with the threshold are common.
exact = st.integers(0, 64).map(lambda number: number / 64)


@given(
    st.lists(exact, max_size=60),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(0, 12),
    st.none() | exact,
)
@settings(max_examples=400, deadline=None)
def test_the_rule_equals_a_slow_reference(
    values: list[float], window: int, patience: int, stride: int, grace_tokens: int, threshold: float | None
) -> None:
    found = kat_verdict(
        values, window=window, patience=patience, stride=stride, grace_tokens=grace_tokens, threshold=threshold
    )
    assert found == slow_rule(values, window, patience, stride, grace_tokens, threshold)


class OneByOne:
    """The rule token by token, in whole units: each mean is compared as a float."""

    def __init__(self, window: int, patience: int, stride: int, grace_tokens: int, threshold: float | None) -> None:
        self.window, self.patience, self.stride, self.threshold = window, patience, stride, threshold
        self.next, self.streak, self.first = grace_tokens + window, 0, 0
        self.units: list[int] = []
        self.cut: tuple[int, int] | None = None
        self.least: float | None = None
        self.least_of_all: float | None = None

    def push(self, value: float) -> None:
        self.units.append(int(math.ldexp(value, 60)))
        if len(self.units) != self.next:
            return
        self.next += self.stride
        mean = sum(self.units[-self.window :]) / (self.window << 60)
        self.least_of_all = mean if self.least_of_all is None else min(self.least_of_all, mean)
        if self.cut is not None:
            return
        self.least = self.least_of_all
        if self.threshold is None or mean >= self.threshold:
            self.streak = 0
            return
        self.first = len(self.units) if self.streak == 0 else self.first
        self.streak += 1
        if self.streak == self.patience:
            self.cut = (len(self.units), self.first - self.window)


@pytest.mark.parametrize("seed", range(300))
def test_chunks_at_a_time_are_judged_as_tokens_one_by_one(seed: int) -> None:
    """Random streams, of any scale; the threshold is often the mean of one of their windows, or a float beside it."""
    rng = np.random.default_rng(seed)
    window, inverse = int(rng.integers(1, 20)), bool(rng.integers(2))
    rule = {
        "window": window,
        "patience": int(rng.integers(1, 5)),
        "stride": int(rng.choice([1, 1, 2, 7, 25])),
        "grace_tokens": int(rng.choice([0, 0, 30])),
    }
    values = (rng.exponential(0.1, int(rng.integers(0, 150))) * 10.0 ** rng.choice([0, 0, -30, 4])).astype(np.float32)
    threshold = [None, 0.0, 0.05, 0.2, math.inf, -math.inf][int(rng.integers(6))]
    if len(values) > window and rng.random() < 0.6:
        begin = int(rng.integers(0, len(values) - window))
        units = sum(int(math.ldexp(float(value), 60)) for value in values[begin : begin + window])
        threshold = math.nextafter(units / (window << 60), rng.choice([-math.inf, math.inf]))
        threshold = threshold if rng.random() < 0.5 else units / (window << 60)
    sign = -1 if inverse else 1
    slow = OneByOne(threshold=None if threshold is None else sign * threshold, **rule)
    quick = Kat(threshold=threshold, inverse=inverse, **rule)
    place, cut = 0, None
    while place < len(values):
        part = values[place : place + int(rng.choice([1, 3, 12, 64, 200]))]
        place += len(part)
        for value in part.tolist():
            slow.push(sign * value)
        cut = quick.feed(part) or cut
        assert (None if cut is None else (cut.trigger, cut.keep)) == slow.cut
        for found, wanted in ((quick.min_window, slow.least), (quick.min_window_of_all, slow.least_of_all)):
            assert found == (None if wanted is None else sign * wanted)


def test_long_rollouts_do_not_drift() -> None:
    """After 200,000 tokens of 10 nats a window of 1e-7 is still 1e-7."""
    values = np.full(200_064, 10.0, np.float32)
    values[-64:] = np.float32(1e-7)
    _, _, lowest = kat_verdict(values, window=64, patience=4, threshold=None)
    assert lowest == pytest.approx(float(np.float32(1e-7)), rel=1e-9)


# Windows of two end at 2, 3, 4 …; two in a row below 0.5 trigger. z is given behind each case.
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 1, 0, 0, 0], (5, 2, 0.0)),  # z 1, .5, 0, 0: below at 4 and 5; the first of them began behind 2 tokens
        ([1, 1, 0, 0, 1, 1], (None, None, 0.0)),  # z 1, .5, 0, .5, 1: one alone
        ([0, 0, 0, 9], (3, 0, 0.0)),  # z 0, 0: nothing is left
        ([0, 0.5, 1, 0, 0.5, 0], (6, 3, 0.25)),  # z .25, .75, .5, .25, .25: .5 is not below, the streak begins anew
        ([0.5, 0.5, 0.5, 0.5], (None, None, 0.5)),  # z = s is not below s
        ([0.25], (None, None, None)),  # no window
        ([], (None, None, None)),
    ],
)
def test_small_cases_by_hand(values: list[float], expected: tuple[Any, ...]) -> None:
    assert kat_verdict(values, window=2, patience=2, threshold=0.5) == expected


def test_grace_and_stride_by_hand() -> None:
    # W 2, grace 3, stride 2: windows end at 5, 7, 9. What lies in the first three tokens is in none of them.
    values = [0, 0, 0, 1, 1, 0, 0, 0, 0]  # z at 5: 1, at 7: 0, at 9: 0
    found = kat_verdict(values, window=2, patience=2, stride=2, grace_tokens=3, threshold=0.5)
    assert found == (9, 5, 0.0)
    assert kat_verdict(values[:4], window=2, patience=1, grace_tokens=3, threshold=9.0) == (None, None, None)


def test_a_stride_longer_than_the_window_skips_tokens() -> None:
    # W 1, stride 3: windows end at 1, 4, 7: only these three are looked at.
    assert kat_verdict([1, 0, 0, 1, 0, 0, 1], window=1, patience=1, stride=3, threshold=0.5) == (None, None, 1.0)


def test_an_inactive_rule_records_minima_and_never_fires() -> None:
    assert kat_verdict([1, 1, 0, 0, 0], window=2, patience=1, threshold=None) == (None, None, 0.0)


def test_a_threshold_of_zero_never_fires() -> None:
    assert kat_verdict([0.0] * 9, window=2, patience=1, threshold=0.0) == (None, None, 0.0)


def test_after_a_cut_only_the_minimum_of_all_windows_is_recorded() -> None:
    detector = Kat(window=1, patience=1, stride=1, grace_tokens=0, threshold=0.5)
    assert detector.feed(np.array([0.25, 0.125])) == Cut(1, 0, "kl_trap")
    assert detector.feed(np.array([0.0])) is None
    assert (detector.min_window, detector.min_window_of_all) == (0.25, 0.0)


@pytest.mark.parametrize("name", ["window", "patience", "stride"])
def test_parameters_below_one_are_refused(name: str) -> None:
    good = {"window": 1, "patience": 1, "stride": 1, "grace_tokens": 0, "threshold": None}
    for changes in ({name: 0}, {name: -1}, {"grace_tokens": -1}):
        with pytest.raises(ValueError, match="at least"):
            Kat(**(good | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [[0.5, math.nan], [math.inf], [[0.5], [0.5]]])
def test_divergences_that_are_no_finite_numbers_are_refused(values: Any) -> None:
    with pytest.raises(ValueError, match="finite"):
        kat_verdict(values, window=1, patience=1, threshold=None)


# --- the other policies ---


def test_never_cut_never_cuts() -> None:
    detector = NeverCut()
    assert detector.feed(np.zeros(1000)) is None


@pytest.mark.parametrize("sizes", [[6], [5, 1], [1, 1, 1, 1, 1, 1], [3, 0, 3], [4, 2]])
def test_fixed_length_fires_once_behind_its_last_token(sizes: list[int]) -> None:
    detector = FixedLength(5)
    cuts = [detector.feed(np.ones(size)) for size in sizes]
    assert [cut for cut in cuts if cut] == [Cut(5, 5, "fixed")]
    assert cuts[-1] is not None
    assert detector.feed(np.ones(3)) is None


@pytest.mark.parametrize("sizes", [[5], [2, 3], [1], [5, 0]])
def test_fixed_length_leaves_alone_what_ends_by_itself(sizes: list[int]) -> None:
    detector = FixedLength(5)
    assert [detector.feed(np.ones(size)) for size in sizes] == [None] * len(sizes)


# --- the first repeated n-gram ---


def repeats(ids: list[int], n: int, sizes: Sequence[int] = ()) -> list[Cut]:
    """All cuts while ids are fed in parts, also behind the first one."""
    rule, place, cuts = FirstRepeat(n), 0, []
    for size in [*sizes, len(ids)]:
        cuts.append(rule.feed_ids(np.array(ids[place : place + size], np.int32)))
        place += size
    return [cut for cut in cuts if cut is not None]


def slow_repeat(ids: list[int], n: int) -> list[Cut]:
    """The rule as it is written down: every n-gram against every earlier one."""
    for end in range(n, len(ids) + 1):
        begin = end - n
        if any(ids[one : one + n] == ids[begin:end] for one in range(begin)):
            return [Cut(end, begin, "repetition")]
    return []


@pytest.mark.parametrize(
    ("ids", "n", "expected"),
    [
        ([1, 2, 3, 9, 1, 2, 3, 4], 3, [Cut(7, 4, "repetition")]),  # 1 2 3 once more, begun behind 4 tokens
        ([1, 2, 3, 9, 1, 2, 4, 3], 3, []),  # 1 2 comes twice, no three tokens do
        ([1, 2, 1, 2, 1, 2], 4, [Cut(6, 2, "repetition")]),  # overlapping: of the loop its first round is kept
        ([5, 5, 5, 5], 3, [Cut(4, 1, "repetition")]),
        ([5, 5, 5], 3, []),  # once
        ([1, 2, 3, 1, 2], 2, [Cut(5, 3, "repetition")]),
        ([1, 2, 2, 1, 1, 2], 2, [Cut(6, 4, "repetition")]),  # the same tokens in another order do not count
        ([0, 0, 7, 0, 0], 2, [Cut(5, 3, "repetition")]),  # id 0 is a token like any other
        ([0, 0, 0], 2, [Cut(3, 1, "repetition")]),
        ([1, 2], 3, []),
        ([], 2, []),
    ],
)
def test_the_first_repeat_by_hand(ids: list[int], n: int, expected: list[Cut]) -> None:
    assert repeats(ids, n) == expected == slow_repeat(ids, n)
    assert repeats(ids, n, [1] * len(ids)) == expected


few_ids = st.integers(1, 4).flatmap(lambda most: st.lists(st.integers(0, most), max_size=60))


@given(few_ids, st.integers(2, 9), st.lists(st.integers(0, 9), max_size=30))
@settings(max_examples=400, deadline=None)
def test_the_first_repeat_equals_a_slow_reference_in_any_chunks(ids: list[int], n: int, sizes: list[int]) -> None:
    assert repeats(ids, n, sizes) == repeats(ids, n) == slow_repeat(ids, n)


@pytest.mark.parametrize("prime", [1, 2, 3, 7])
def test_equal_hashes_of_other_n_grams_are_no_repeat(prime: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(termination, "_PRIME", prime)
    rng = np.random.default_rng(prime)
    for _ in range(200):
        ids, n = rng.integers(0, 3, int(rng.integers(0, 40))).tolist(), int(rng.integers(2, 6))
        assert repeats(ids, n) == slow_repeat(ids, n)


def test_what_a_rule_holds_grows_with_the_tokens_and_goes_with_the_cut() -> None:
    rule, ids = FirstRepeat(64), np.arange(5000, dtype=np.int32)
    assert rule.feed_ids(ids) is None
    assert (len(rule._ids), len(rule._places)) == (5000, 4937)
    assert rule.feed_ids(ids[100:164]) == Cut(5064, 5000, "repetition")
    assert (len(rule._ids), len(rule._places)) == (0, 0)
    assert rule.feed_ids(ids[100:164]) is None


def test_an_n_gram_of_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        FirstRepeat(1)


# --- what a cut may be ---


def test_whole_numbers_of_any_kind_become_ints() -> None:
    cut = Cut(np.int64(5), np.uint8(3), "mine")  # type: ignore[arg-type]
    assert (cut, type(cut.trigger), type(cut.keep)) == (Cut(5, 3, "mine"), int, int)
    for broken in (5.0, "5", np.float32(5), None):
        with pytest.raises(TypeError, match="integer"):
            Cut(broken, 3, "mine")  # type: ignore[arg-type]


@pytest.mark.parametrize("reason", ["", " ", "a b", "a\n", "eos", "length", "open", "unfinished", "ü", 41 * "x"])
def test_reasons_that_mean_something_else_or_are_no_word_are_refused(reason: str) -> None:
    with pytest.raises(ValueError, match=r"Cut\.reason .*: allowed are 1 to 40 ASCII letters"):
        Cut(5, 3, reason)


@pytest.mark.parametrize("reason", ["kl_trap", "x", "2.5-sigma", 40 * "x"])
def test_any_other_word_is_a_reason(reason: str) -> None:
    assert Cut(5, 3, reason).reason == reason


# --- the buffer ---


@given(
    st.integers(1, 12),
    st.lists(st.floats(0, 10) | st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=60),
    st.floats(0, 1),
)
@settings(max_examples=300, deadline=None)
def test_the_buffers_quantile_is_numpys_over_its_last_values(size: int, values: list[float], level: float) -> None:
    buffer = MinimaBuffer(size)
    for count, value in enumerate(values, start=1):
        buffer.push(value)
        inside = values[max(0, count - size) : count]
        assert len(buffer) == len(inside)
        assert buffer.quantile(level) == pytest.approx(float(np.quantile(inside, level)), rel=1e-12, abs=1e-12)


def test_the_buffer_by_hand() -> None:
    buffer = MinimaBuffer(3, [8.0, 1.0, 2.0, 4.0])
    assert len(buffer) == 3
    # 1, 2, 4 are left: place 0.75 · 2 = 1.5 lies halfway between 2 and 4.
    assert [buffer.quantile(level) for level in (0.0, 0.5, 0.75, 1.0)] == [1.0, 2.0, 3.0, 4.0]
    with pytest.raises(ValueError, match="empty"):
        MinimaBuffer(3).quantile(0.5)
