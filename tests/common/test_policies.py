"""Every policy by hand, any chunking alike; the registry, and what it says of names that lead nowhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import make_view

from common import policies, policy_names
from common.config import ConfigError, Termination, check_resume, load, parse
from common.draws import fraction, rollout_seed
from common.policies import (
    POLICIES,
    Policy,
    Progress,
    ScoredTokens,
    Situation,
    ViewMissing,
    drawn_position,
    extremes,
    find,
    unit_of,
    unwatched,
    written,
)
from common.policy_names import PolicyError
from common.termination import Cut, CutAt, Kat, MinimaBuffer
from common.wire.messages import VIEW

OWN = "own_policy:Halved"
CASES = json.loads((Path(__file__).parents[1] / "vectors" / "kat_rule.json").read_text())["cases"]
LEAST = "student: {model: s}\nteacher: {model: t}\n"


def rule(policy: str = "kat", **changes: Any) -> Termination:
    values = {"window": 2, "patience": 2, "min_calibration": 2, "buffer_size": 8, "warmup_steps": 3}
    return Termination(
        **values | {"policy": policy, "hazard": {2: 0.5, 4: 0.25}, "options": {"head": 2, "nats": 0.5}} | changes
    )


def make(name: str, number: float | None = None, seed: int = 7, max_tokens: int = 40, **changes: Any) -> Policy:
    return find(name)(rule(name, **changes), Situation(number, seed, max_tokens))


def fed(policy: Policy, values: list[float], sizes: list[int]) -> list[Cut]:
    """Divergences, in parts; the ids of the tokens are eighths of them, their view is that of `make_view`."""
    array, place, cuts = np.array(values, np.float32), 0, []
    ids, view = (8 * array).astype(np.int32), make_view(values).view if policy.reads else None
    for size in [*sizes, len(values)]:
        part = slice(place, place + size)
        cut = policy.feed_tokens(ScoredTokens(ids[part], array[part], None if view is None else view[:, part]))
        place += size
        if cut is not None:
            cuts.append(cut)
            break  # what follows is the arbiter's to leave out
    return cuts


def progress(version: int = 9, step: int = 9, values: tuple[float, ...] = (0.25, 0.5, 1.0)) -> Progress:
    return Progress(version, step, MinimaBuffer(8, values))


@pytest.mark.parametrize("name", [*POLICIES, OWN, "own_policy:Sure", "own_policy:SureOfWindows"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_chunking_changes_no_verdict(name: str, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 8).map(lambda eighths: eighths / 8), max_size=40))
    sizes = data.draw(st.lists(st.integers(0, 9), max_size=20))
    numbers = {"scheduled": [None, 1.0, 3.0], "adaptive": [None, 0.5, 0.9]}.get(name, [None, 0.25, 0.5, 1.0])
    number = data.draw(st.sampled_from(numbers))
    seed = data.draw(st.integers(0, 2**63 - 1))
    changes = {"fixed_tokens": 3, "patience": 2, "ngram": 2, "margin_drift": 0.25}
    changes |= {"adaptive_block": 2, "adaptive_range": 0.5}
    whole = fed(make(name, number, seed, **changes), values, [])
    assert fed(make(name, number, seed, **changes), values, sizes) == whole
    for cut in whole:
        assert 0 <= cut.keep <= cut.trigger <= len(values)


@pytest.mark.parametrize("name", [*POLICIES])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_no_policy_fires_before_its_earliest_token(name: str, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 2).map(lambda halves: halves / 2), max_size=40))
    number = data.draw(st.sampled_from({"scheduled": [None, 3.0, 5.0], "random_matched": [None, 1.0]}.get(name, [0.6])))
    seed = data.draw(st.integers(0, 2**63 - 1))
    changes = {"fixed_tokens": 3, "scheduled_tokens": 5, "patience": 2, "grace_tokens": 3, "ngram": 2}
    changes |= {"margin_drift": 0, "adaptive_block": 2, "adaptive_range": 0.25}
    earliest = unwatched(rule(name, **changes), arm="treated", seed=seed, max_tokens=40)
    assert 1 <= earliest <= 40
    assert not fed(make(name, number, seed, **changes), values[: earliest - 1], [])


def test_the_earliest_token_by_hand() -> None:
    def of(name: str, arm: str = "treated", **changes: Any) -> int:
        return unwatched(rule(name, **changes), arm=arm, seed=7, max_tokens=40)

    assert of("kat", grace_tokens=5, window=4, patience=3, stride=2) == 5 + 4 + 2 * 2
    assert fed(make("kat", 1.0, grace_tokens=5, window=4, patience=3, stride=2), 13 * [0.0], [])[0].trigger == 13
    assert of("fixed", fixed_tokens=9) == of("scheduled", fixed_tokens=9) == 10
    assert of("repetition", ngram=3) == 4 and of("fixed", fixed_tokens=90) == 40
    assert of("random") == 2 + int(fraction(7, "cut") * 40)
    assert of("none") == of("kat", "control") == of("kat", apply="mask") == of("kat", shadow=True) == 40
    assert of(OWN) == 1


@pytest.mark.parametrize("number", range(0, 200, 5))
def test_kat_and_kat_absolute_are_the_published_rule(number: int) -> None:
    case = CASES[number]
    changes = {name: case[name] for name in ("window", "patience", "stride", "grace_tokens")}
    for name in ("kat", "kat_absolute"):
        judge = make(name, case["threshold"], **changes)
        cut = judge.feed(np.array(case["divergence"]))
        assert (cut and cut.keep, cut and cut.trigger) == (case["keep"], case["trigger"])


@pytest.mark.parametrize("number", range(0, 200, 5))
def test_kat_inverse_is_the_published_rule_mirrored(number: int) -> None:
    case = CASES[number]
    changes = {name: case[name] for name in ("window", "patience", "stride", "grace_tokens")}
    mirrored = -np.array(case["divergence"])
    threshold = None if case["threshold"] is None else -case["threshold"]
    judge = make("kat_inverse", threshold, **changes)
    cut = judge.feed(mirrored)
    assert (cut and cut.keep, cut and cut.trigger) == (case["keep"], case["trigger"])
    assert isinstance(judge, Kat)
    lowest = case["min_window"]
    assert judge.min_window == (None if lowest is None else pytest.approx(-lowest, rel=1e-9, abs=1e-15))


def test_kat_inverse_by_hand() -> None:
    # W 2, C 2, s 0.5: means of windows ending at 2, 3, …: 0, .5, 1, 1: above .5 at 4 and 5, begun behind 2 tokens.
    judge = make("kat_inverse", 0.5)
    assert fed(judge, [0, 0, 1, 1, 1, 0], []) == [Cut(5, 2, "kl_high")]
    whole = extremes(rule("kat_inverse"))
    whole.feed(np.array([0.0, 0.0, 1.0, 1.0, 3.0]))
    assert whole.min_window == 2.0
    assert extremes(rule("kat_inverse")).min_window is None


@pytest.mark.parametrize("number", range(0, 200, 5))
def test_entropy_is_the_published_rule_on_the_entropy(number: int) -> None:
    case = CASES[number]
    judge = make(
        "entropy", case["threshold"], **{name: case[name] for name in ("window", "patience", "stride", "grace_tokens")}
    )
    entropy = np.array(case["divergence"])
    view = np.stack((entropy, -entropy, -entropy))
    cut = judge.feed_tokens(ScoredTokens(np.arange(len(entropy), dtype=np.int32), 1 + entropy, view))
    assert (cut and cut.keep, cut and cut.trigger) == (case["keep"], case["trigger"])
    assert cut is None or cut.reason == "low_entropy"
    policy = find("entropy")
    assert (policy.number(rule("entropy", eta=0.3), progress()), policy.active(None)) == (pytest.approx(0.7), False)


def test_fixed_and_scheduled_by_hand() -> None:
    assert fed(make("fixed", fixed_tokens=3), [1] * 4, []) == [Cut(3, 3, "fixed")]
    growing = {"fixed_tokens": 3, "scheduled_tokens": 13, "scheduled_steps": 20}
    policy, settings_ = find("scheduled"), rule("scheduled", **growing)
    numbers = [policy.number(settings_, progress(step=step)) for step in (0, 1, 2, 10, 20, 99)]
    assert numbers == [3.0, 3.0, 4.0, 8.0, 13.0, 13.0]
    assert fed(make("scheduled", 8.0, **growing), [1] * 9, []) == [Cut(8, 8, "scheduled")]
    assert fed(make("scheduled", 8.0, **growing), [1] * 8, []) == []
    assert fed(make("scheduled", None, **growing), [1] * 9, []) == [Cut(3, 3, "scheduled")]
    possible = [policy.possible(settings_, number) for number in (None, 3.0, 13.0, 2.0, 14.0, 3.5)]
    assert possible == [True, True, True, False, False, False]


def test_repetition_by_hand() -> None:
    # Ids 8, 4, 2, 8, 4: the pair 8 4 is complete once more at the fifth token, and began behind three.
    values = [1, 0.5, 0.25, 1, 0.5, 0.5]
    assert fed(make("repetition", ngram=2), values, []) == [Cut(5, 3, "repetition")]
    assert fed(make("repetition", ngram=3), values, []) == []
    assert fed(make("repetition"), [1.0] * 9, []) == [Cut(9, 1, "repetition")]  # n is 8
    policy = find("repetition")
    assert (policy.number(rule("repetition"), progress()), policy.active(None), policy.unit) == (None, True, "")


def test_a_resumed_run_keeps_its_n_gram() -> None:
    before, after = (parse(LEAST + f"termination: {{policy: repetition, ngram: {n}}}\n") for n in (8, 9))
    with pytest.raises(ConfigError, match=r"termination\.ngram: 8 cannot become 9 on --resume"):
        check_resume(before, after)


def test_random_positions_are_uniform_and_the_seeds_own() -> None:
    found = []
    for number in range(4000):
        [cut] = fed(make("random", seed=rollout_seed(3, number), max_tokens=10), [1] * 11, [])
        assert (cut.keep, cut.reason) == (cut.trigger, "random")
        found.append(cut.trigger)
    counts = np.bincount(found, minlength=11)
    assert counts[0] == 0
    assert len(counts) == 11
    # Chi square with 9 degrees of freedom: above 27.9 once in a thousand; the draws are fixed by the seed.
    assert float(((counts[1:] - 400.0) ** 2 / 400).sum()) < 27.9
    again = fed(make("random", seed=rollout_seed(3, 5), max_tokens=10), [9] * 11, [1] * 11)
    assert again[0].trigger == found[5]


def test_random_matched_has_the_hazard_that_it_is_given() -> None:
    seeds = [rollout_seed(1, number) for number in range(4000)]
    triggers = [fed(make("random_matched", 1.0, seed, detection_tokens=3), [1] * 6, []) for seed in seeds]
    at = [cuts[0].trigger if cuts else None for cuts in triggers]
    # Half are cut at 2; a quarter of the other half at 4. Five standard errors of a share of 4,000 are 0.04.
    assert at.count(2) / 4000 == pytest.approx(0.5, abs=0.04)
    assert at.count(4) / 4000 == pytest.approx(0.125, abs=0.03)
    assert set(at) == {2, 4, None}
    assert {(cuts[0].trigger, cuts[0].keep) for cuts in triggers if cuts} == {(2, 0), (4, 1)}


def test_random_matched_does_not_peek() -> None:
    """What it would do at a position depends neither on what is read nor on whether the rollout gets there."""
    hazard, seeds = {2: 0.5, 4: 0.25}, [rollout_seed(1, number) for number in range(99)]
    seed = next(one for one in seeds if drawn_position(hazard, 1.0, fraction(one, "cut")) == 4)
    assert fed(make("random_matched", 1.0, seed), [1] * 3, []) == []
    assert fed(make("random_matched", 1.0, seed), [0] * 9, []) == fed(make("random_matched", 1.0, seed), [5] * 4, [])
    assert fed(make("random_matched", None, seed), [1] * 9, []) == []


def test_drawn_positions_by_hand() -> None:
    hazard = {4: 0.5, 2: 0.5}  # cut by 2: a half, by 4: three quarters
    assert [drawn_position(hazard, 1.0, share) for share in (0.0, 0.49, 0.5, 0.74, 0.75)] == [2, 2, 4, 4, None]
    assert drawn_position(hazard, 2.0, 0.999) == 2
    assert drawn_position({}, 1.0, 0.0) is None


def test_numbers_wait_for_minima_and_warm_up() -> None:
    for name in ("kat", "kat_inverse"):
        policy, settings_ = find(name), rule(name, eta=0.3)
        assert policy.number(settings_, progress(version=2)) is None
        assert policy.number(settings_, progress(values=(1.0,))) is None
        # Of .25, .5, 1: the 0.7 quantile is at 1.4, the 0.3 quantile at 0.6.
        wanted = {"kat": 0.7, "kat_inverse": 0.4}[name]
        assert policy.number(settings_, progress()) == pytest.approx(wanted)
        assert (policy.active(None), policy.active(0.5)) == (False, True)
    absolute, floor = find("kat_absolute"), rule("kat_absolute", floor_nats=0.125)
    assert (absolute.number(floor, progress(2)), absolute.number(floor, progress(3, values=()))) == (None, 0.125)
    assert [absolute.possible(floor, number) for number in (None, 0.125, 0.25)] == [True, True, False]
    matched, scaled = find("random_matched"), rule("random_matched", hazard_scale=1.5)
    assert (matched.number(scaled, progress(2)), matched.number(scaled, progress(3))) == (None, 1.5)
    assert [find(name).active(None) for name in ("none", "fixed", "scheduled", "random")] == [False, True, True, True]


def test_cut_at_fires_once_at_its_token() -> None:
    judge = CutAt(3, 1, "random")
    assert [judge.feed(np.ones(size)) for size in (2, 0, 1, 4)] == [None, None, Cut(3, 1, "random"), None]
    assert CutAt(None, 0, "random").feed(np.ones(99)) is None


def test_the_docs_say_of_every_policy_what_it_reads() -> None:
    text = (Path(__file__).parents[2] / "docs" / "policies.md").read_text()
    table = text[text.index("| policy | cuts | reads |") :].partition("\n\n")[0]
    rows = [[cell.replace("`", "").strip() for cell in line.split("|")[1:4]] for line in table.splitlines()]
    said = {name: set(reads.split(", ")) - {"", "ids", "divergence"} for name, _, reads in rows}
    for name, policy in POLICIES.items():
        assert said[name] == policy.reads, name


# --- one of your own ---


def test_a_policy_of_ones_own_by_hand() -> None:
    # The first two have mean 1; below a half from the fourth token on, twice in a row at the fifth.
    assert fed(make(OWN), [1, 1, 1, 0.25, 0.25, 9], []) == [Cut(5, 3, "halved")]


def test_a_policy_that_reads_the_view_by_hand() -> None:
    # Entropies 0, .75, .25, 0, 0: below a half twice in a row at the fourth token.
    assert fed(make("own_policy:Sure"), [1, 0.25, 0.75, 1, 1], []) == [Cut(4, 2, "sure")]
    with pytest.raises(ViewMissing, match=r"entropy of these tokens is not known: a policy names what it reads"):
        fed(make("own_policy:Undeclared"), [1.0], [])


def test_the_rows_of_a_view_by_name() -> None:
    view = make_view([0.25, 0.5]).view
    tokens = ScoredTokens(np.array([1, 2], np.int32), np.array([0.25, 0.5], np.float32), view)
    assert tokens.row("divergence") is tokens.divergence
    assert [tokens.row(name).tolist() for name in VIEW] == view.tolist()
    rows = (tokens.entropy, tokens.student_logprobs, tokens.teacher_logprobs)
    assert [row.tolist() for row in rows] == [[0.75, 0.5], [-2.0, -2.0], [-2.75, -3.5]]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_policy:Misread", "reads is .*entropie.*; allowed: a set of entropy, student_logprobs, teacher_logprobs"),
        ("own_policy:MisreadWindows", "windows_of is 'teacher_logprobs'; allowed: divergence, or one of its reads"),
        ("no_such_module:Halved", "the module cannot be imported"),
        ("own_policy:Nothing", "has no such class"),
        ("own_policy:NotAClass", "holds something else"),
        ("own_policy:Cut", "a subclass of common.policies.Policy"),
        ("own_policy:Unfinished", "lacks __init__, feed"),
        ("kta", "the nearest is 'kat'"),
        ("os.path", "no such policy"),
        ("../x:Y", "no such policy"),
        ("own_policy:Halved:x", "no such policy"),
    ],
)
def test_what_is_no_policy_is_refused_in_words(name: str, said: str) -> None:
    with pytest.raises(PolicyError, match=said.replace(".", r"\.").replace(r"\.*", ".*")):
        find(name)


def test_a_policy_with_a_mistake_in_its_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_policy.py").write_text("x = 1\ndef f(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PolicyError, match="line 2 of the module is not valid Python"):
        find("broken_policy:Any")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"x = 1\ny = 1 / 0\n", r"fails when it is imported \(ZeroDivisionError: division by zero, \w+\.py line 2\)"),
        (b"raise SystemExit('bye')\n", r"fails when it is imported \(SystemExit: bye"),
        (b"class P(Nobody): ...\n", "NameError"),
        (b"x = \x00\n", r"the module is not valid Python|line 1 of the module is not valid Python"),
        (b"x = '\xff'\n", "is not valid Python"),
    ],
    ids=["division", "exit", "name", "zero-byte", "encoding"],
)
def test_a_module_that_fails_is_refused_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, text: bytes, said: str
) -> None:
    name = f"failing_{request.node.callspec.id.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_bytes(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PolicyError, match=said) as caught:
        find(f"{name}:Any")
    assert "None" not in str(caught.value)


@pytest.mark.parametrize(("mistake", "said"), [(1, "AttributeError"), (2, "ZeroDivisionError: division by zero")])
def test_a_policy_that_fails_when_it_is_made_is_refused(mistake: int, said: str) -> None:
    with pytest.raises(PolicyError, match=rf"refuses these settings \({said}.*, own_policy\.py line [0-9]+\)"):
        policies.check(rule("own_policy:Unwilling", options={"mistake": mistake}), 64)


def test_reading_a_config_imports_no_policy(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(LEAST + "termination: {policy: 'own_policy:Halved', options: {head: 4, share: 0.5}}\n")
    policies.check_policy(load(path), source="c.yaml")
    assert load(path).termination.options == {"head": 4.0, "share": 0.5}
    path.write_text(LEAST + "termination: {policy: 'gone.for_good:Halved'}\n")
    config = load(path)
    assert config.termination.policy == "gone.for_good:Halved"
    told = r"^c\.yaml: termination\.policy: 'gone\.for_good:Halved': the module cannot be"
    with pytest.raises(ConfigError, match=told):
        policies.check_policy(config, source="c.yaml")


def test_settings_that_a_policy_refuses_are_an_error_where_it_is_imported() -> None:
    config = parse(LEAST + "termination: {policy: 'own_policy:Halved'}\n")
    with pytest.raises(ConfigError, match=r"refuses these settings \(KeyError: 'head'"):
        policies.check_policy(config, source="c.yaml")


def test_the_names_that_a_config_knows_are_those_of_the_classes() -> None:
    assert tuple(POLICIES) == policy_names.BUILT_IN
    assert tuple(name for name, policy in POLICIES.items() if policy.reads) == policy_names.READS_VIEW
    assert [policy_names.may_read_view(name) for name in ("kat", "entropy", OWN)] == [False, True, True]
    families = {policy_names.OF_WINDOWS: Kat, policy_names.CALIBRATED: policies.Calibrated}
    for names, base in families.items():
        assert names == tuple(name for name, policy in POLICIES.items() if issubclass(policy, base))


def test_what_is_calibrated_on_the_control_arm_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(policies.Calibrated):
        def __init__(self, settings: Termination, situation: Situation) -> None: ...

        def feed(self, divergence: Any) -> None: ...

    monkeypatch.setattr("own_policy.Mine", Mine, raising=False)
    mine = "own_policy:Mine"
    with pytest.raises(PolicyError, match="control_fraction is 0"):
        policies.check(rule(mine, control_fraction=0), 64)
    policies.check(rule(mine, control_fraction=0, calibrate_on="all"), 64)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{policy: random_matched}", "needs hazard"),
        ("{policy: random_matched, hazard: {0: 0.5}}", "positions from 1"),
        ("{policy: random_matched, hazard: {3: 1.5}}", "chances from 0 to 1"),
        ("{policy: scheduled, fixed_tokens: 64, scheduled_tokens: 63}", "a schedule must grow"),
        ("{policy: scheduled, fixed_tokens: 193, scheduled_tokens: 300}", "nothing would be cut"),
        ("{policy: kat_inverse, control_fraction: 0}", "needs a control arm"),
        ("{policy: kat_absolute, window: 193}", "no window would ever be evaluated"),
        ("{policy: entropy, window: 190, grace_tokens: 3}", "no window would ever be evaluated"),
        ("{policy: margin_change, window: 190, grace_tokens: 1}", r"window \+ 2 = 193 is above .*nothing would be cut"),
        ("{policy: adaptive, grace_tokens: 177}", r"grace_tokens \+ 2 × block = 193 is above .*nothing would be cut"),
        ("{policy: repetition, ngram: 1}", "greater than or equal to 2|at least 2"),
        ("{policy: repetition, ngram: 192}", "none could come twice"),
        ("{apply: drop}", "'stop' or 'mask'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(LEAST + f"termination: {text}\n")


def test_hazards_come_back_from_yaml_as_they_were() -> None:
    config = parse(LEAST + "termination: {policy: random_matched, hazard: {3: 0.1, 70: 1.0e-3, 9: 1}}\n")
    assert parse(config.to_yaml()).termination.hazard == {3: 0.1, 70: 0.001, 9: 1.0}


@pytest.mark.parametrize(
    ("hazard", "fits"),
    [({3: 0.0, 9: 0.0}, False), ({65: 0.5}, False), ({3: 0.0, 64: 1e-9}, True), ({64: 0.5, 65: 0.5}, True)],
)
def test_hazards_that_would_cut_nothing_are_refused(hazard: dict[int, float], fits: bool) -> None:
    settings_ = rule("random_matched", hazard=hazard)
    if fits:
        policies.check(settings_, 64)
    else:
        with pytest.raises(PolicyError, match=r"would cut nothing: no chance .* up to max_completion_length, 64"):
            policies.check(settings_, 64)


def test_a_number_has_the_unit_that_its_policy_says() -> None:
    find("own_policy:Summed")
    assert [unit_of(name) for name in ("own_policy:Summed", "own_policy:Halved", "kat", "none")] == [
        "tokens",
        "",
        "nats",
        "",
    ]
    assert (written(12.0, "own_policy:Summed"), written(0.5, "own_policy:Halved")) == ("12 tokens", "0.5")


def test_the_unit_of_a_policy_that_is_not_imported_is_not_made_up() -> None:
    assert unit_of("gone.for_good:Halved") == ""
    assert written(0.5, "gone.for_good:Halved") == "0.5"
    assert unit_of("own_policy:NotAClass") == ""


# --- by file ---

MINE = """
from common.policies import NonePolicy
from common.termination import Cut

class Mine(NonePolicy):
    unit = "tokens"

Other = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder whose policies are forgotten afterwards."""
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "policy.py").write_text(MINE)
    path, known = list(sys.path), set(sys.modules)
    yield tmp_path
    sys.path[:] = path
    for name in [name for name in sys.modules if name not in known]:
        del sys.modules[name]


def test_a_file_is_looked_for_beside_the_config_then_in_the_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "else").mkdir()
    monkeypatch.chdir(folder / "else")
    config = folder / "c.yaml"
    config.write_text(LEAST + "termination: {policy: 'my/policy.py:Mine'}\n")
    beside = f"{folder}/my/policy.py:Mine"
    assert load(config).termination.policy == beside
    (folder / "else" / "my").mkdir()
    (folder / "else" / "my" / "policy.py").write_text("")
    assert load(config).termination.policy == beside
    (folder / "my" / "policy.py").rename(folder / "my" / "moved.py")
    assert load(config).termination.policy == f"{folder}/else/my/policy.py:Mine"
    assert load(config, ["termination.policy=../my/moved.py:Mine"]).termination.policy == f"{folder}/my/moved.py:Mine"
    assert load(config, [f"termination.policy={beside}"]).termination.policy == beside
    stored = load(config).to_yaml()
    monkeypatch.chdir(folder)
    assert parse(stored) == parse(parse(stored).to_yaml())
    assert parse(stored).termination.policy == f"{folder}/else/my/policy.py:Mine"


def test_a_policy_is_found_by_its_file_and_is_one_class_however_often_it_is_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{folder}/my/policy.py:Mine"
    assert unit_of(name) == ""
    found = find(name)
    assert issubclass(found, Policy) and found.__name__ == "Mine"
    monkeypatch.chdir(folder)
    assert find("my/policy.py:Mine") is found
    assert unit_of(name) == unit_of("./my/policy.py:Mine") == "tokens"
    (folder / "policy.py").write_text(MINE)
    assert find("policy.py:Mine") is not found


def test_a_file_may_import_what_lies_beside_it_and_that_hides_nothing(folder: Path) -> None:
    (folder / "my" / "beside_the_policy.py").write_text("from common.policies import NonePolicy as Base")
    (folder / "my" / "json.py").write_text("raise AssertionError")
    (folder / "my" / "common").mkdir()
    (folder / "my" / "common" / "__init__.py").write_text("raise AssertionError")
    (folder / "my" / "policy.py").write_text("import json, beside_the_policy\nclass P(beside_the_policy.Base): ...")
    assert find(f"{folder}/my/policy.py:P").unit == ""


@pytest.mark.parametrize(
    ("text", "class_name", "said"),
    [
        (None, "Mine", r"there is no such file; a path that is not absolute is looked for beside the config"),
        (MINE, "Nothing", "the file has no such class"),
        (MINE, "Other", "the file holds something else under that name"),
        (MINE, "Cut", "a subclass of common.policies.Policy"),
        (MINE + "from common.policies import Policy", "Policy", "lacks __init__, feed"),
        ("x = 1\ny = 1 / 0\n", "P", r"\(ZeroDivisionError: division by zero, policy\.py line 2\)"),
        (
            "import nothing_like_it\n",
            "P",
            r"\(ModuleNotFoundError: No module named 'nothing_like_it', policy\.py line 1",
        ),
        ("class Boom(Exception): ...\nraise Boom('a\\nb')\n", "P", r"\(Boom: a b, policy\.py line 2\)"),
        ("raise SystemExit(3)\n", "P", r"\(SystemExit: 3, policy\.py line 1\)"),
        ("def f(:\n", "P", "line 1 of the file is not valid Python"),
    ],
)
def test_a_file_that_gives_no_policy_is_refused_in_words(
    folder: Path, text: str | None, class_name: str, said: str
) -> None:
    path = folder / "my" / "policy.py"
    path.unlink()
    if text is not None:
        path.write_text(text)
    name = f"{path}:{class_name}"
    with pytest.raises(PolicyError, match=said) as caught:
        find(name)
    assert str(caught.value).startswith(f"{name!r}: ")
    with pytest.raises(PolicyError, match=said):  # nothing of the first attempt is left
        find(name)


@pytest.mark.parametrize("name", ["a.py:B", "a b/ü.py:B", "/x/y.py:_B", "../a:b/c.py:B", "a.b.py:B", "~/a.py:B"])
def test_names_of_files(name: str) -> None:
    policy_names.check(name)
    assert policy_names.in_file(name)


@pytest.mark.parametrize(
    "name", ["a.py", "a.py:", ".py:B", "a/.py:B", "a.txt:B", "a.py:b c", "a.pyc:B/c", "a/b:C", "dir.py/:C"]
)
def test_what_names_no_file(name: str) -> None:
    assert not policy_names.in_file(name)


def test_a_run_whose_policy_moved_can_be_resumed() -> None:
    before, moved, other = (
        parse(LEAST + f"termination: {{policy: '{name}'}}\n") for name in ("/a/p.py:P", "/b/p.py:P", "/a/p.py:Q")
    )
    check_resume(before, moved)
    with pytest.raises(ConfigError, match=r"termination\.policy: '/a/p.py:P' cannot become '/a/p.py:Q'"):
        check_resume(before, other)
