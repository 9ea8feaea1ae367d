"""random_matched from a run of KAT: hazards and means by hand, against the real policy, corrected, and refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from samples import make_config, make_verdict

from actors.books import line_of
from common.config import Config, ConfigError, parse
from common.draws import rollout_seed
from common.policies import Situation, find
from common.rids import rid_of
from common.runfiles.records import Ledger
from ops.cli.main import main
from ops.compare.match import compare, corrected_config, matched_config
from ops.compare.match_means import (
    LengthShares,
    Means,
    Rule,
    agree,
    all_alike,
    expected_means,
    hazard_of,
    match,
    outcomes,
    uncut_lengths,
)
from ops.run.summary import write_summary

LONGEST = 192
KAT = {"window": 8, "patience": 3, "control_fraction": 0.25}


def test_hazards_by_hand() -> None:
    # Cut at 4 and 4 of five that came so far, at 6 one of the three that came so far (one of them ends there uncut).
    found = hazard_of([4, 4, 6, 6, 9, 2], [True, True, True, False, False, False])
    assert found == {4: 2 / 5, 6: 1 / 3}


def test_expected_means_by_hand() -> None:
    # Length 3: never. Length 4: half cut at 4. Length 10: half at 4, a quarter at 8, a quarter whole.
    rule, lengths = Rule({4: 0.5, 8: 0.5}, 1.0, 5), all_alike([3, 4, 10])
    found = expected_means(rule, lengths)
    assert found.generated == pytest.approx((3 + 4 + (2 + 2 + 2.5)) / 3)
    assert found.kept == pytest.approx((3 + (0 + 2) + (0 + 0.75 + 2.5)) / 3)
    assert found.cut == pytest.approx((0 + 0.5 + 0.75) / 3)
    # Three tokens are written behind a trigger: of length 10 half have 7, a quarter ends at 10 and not at 11.
    late = expected_means(rule, lengths, overshoot=3)
    assert late.generated == pytest.approx((3 + 4 + (3.5 + 2.5 + 2.5)) / 3)
    assert (late.kept, late.cut) == (found.kept, found.cut)


def test_lengths_behind_cuts_by_hand() -> None:
    # Two of six end at 2; of the four others one is cut at 3; of three one ends at 4; one is cut at 4, before its end:
    # of two that come to 4 uncut one ends there. What is left ends at 7.
    found = uncut_lengths(np.array([2.0, 2, 3, 4, 4, 7]), np.array([False, False, True, True, False, False]))
    assert found.tokens.tolist() == [2, 3, 4, 7]
    assert found.shares == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])
    # The longest was cut: it counts as that long.
    assert uncut_lengths(np.array([2.0, 5]), np.array([False, True])).shares == pytest.approx([0.5, 0.5])


def test_lengths_come_back_from_rollouts_that_chance_cut() -> None:
    """Where chance cuts half of them, the mean length is known as well as from so many control rollouts."""
    rng = np.random.default_rng(4)
    lengths = np.minimum(LONGEST, rng.gamma(2, 40, size=20_000)).astype(int)
    cut_at = rng.geometric(0.01, size=len(lengths))
    found = uncut_lengths(np.minimum(lengths, cut_at).astype(float), cut_at <= lengths)
    assert np.mean(cut_at <= lengths) > 0.4
    assert found.shares.sum() == pytest.approx(1)
    assert found.mean == pytest.approx(float(lengths.mean()), rel=0.02)


# --- runs, played with the policies themselves ---------------------------------------------------------------------


def drawn_rollout(number: int, run: int, seed: int) -> npt.NDArray[np.float64]:
    """Divergences of rollout `number`: long ones are those that fall into traps, which cutting by chance cannot see.

    The prompt decides whether it does; the run, how long it is.
    """
    prompt, own = np.random.default_rng([seed, number]), np.random.default_rng([seed, number, run])
    trapped = prompt.random() < 0.4
    length = int(own.integers(90, 180) if trapped else own.integers(20, 110))
    values = own.gamma(2.0, 0.3, size=length)
    if trapped:
        values[int(own.integers(20, 60)) :] *= 0.05
    return values


def played_rollout(config: Config, number: int, run: int) -> dict[str, Any]:
    """Its line in the books: judged by the config's policy, and written on for 3 to 10 tokens before it stops."""
    rule, values = config.termination, drawn_rollout(number, run, config.seed)
    # The control arm comes first: tests that look at small ones play the beginning of others.
    arm = "control" if number < rule.control_fraction * 1200 else "treated"
    number_on_record = rule.hazard_scale if rule.policy == "random_matched" else 0.1
    situation = Situation(number_on_record, rollout_seed(config.seed, number), LONGEST)
    fired = find(rule.policy)(rule, situation).feed(values) if arm == "treated" else None
    trigger, keep = (fired.trigger, fired.keep) if fired else (len(values), len(values))
    verdict = make_verdict(
        rid_of(number),
        arm=arm,
        problem=number,
        trigger=trigger,
        keep=keep,
        cut=fired is not None,
        finish_reason=fired.reason if fired else "eos",
        last_version=4 + number % 3,
    )
    generated = min(len(values), trigger + 3 + number % 8)
    line = line_of(verdict, ending="trained", reason="", generated=generated, staleness=0, active=True, correct=None)
    return asdict(line)


def play(config: Config, run: int, count: int = 1200) -> Path:
    """The folder of a finished run of this config."""
    return put_run(config, [played_rollout(config, number, run) for number in range(count)])


def put_run(config: Config, lines: Sequence[dict[str, Any]]) -> Path:
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    (config.run_dir / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_summary(config.run_dir)
    return config.run_dir


def kat_config(folder: Path, name: str = "first", **termination: Any) -> Config:
    return make_config(folder, name=name, rollout={"max_completion_length": LONGEST}, termination=KAT | termination)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of kat with a control arm of 60 of 1,200, and the run that was matched to it."""
    config = kat_config(tmp_path_factory.mktemp("runs"), control_fraction=0.05)
    source = play(config, run=0)
    return source, play(matched_config(source)[0], run=1)


def test_the_match_agrees_within_two_percent_and_needed_its_scale(tmp_path: Path) -> None:
    lines = [played_rollout(kat_config(tmp_path), number, 0) for number in range(1200)]
    treated, control = ([line for line in lines if line["arm"] == arm] for arm in ("treated", "control"))
    seen = [line["tokens_kept"] + line["tokens_detection"] for line in treated]
    cut = [line["finish_reason"] == "kl_trap" for line in treated]
    generated, kept = (float(np.mean([line[f"tokens_{name}"] for line in treated])) for name in ("generated", "kept"))
    lengths = all_alike([line["tokens_generated"] for line in control])
    found = match(hazard_of(seen, cut), Means(generated, kept, float(np.mean(cut))), lengths, overshoot=6.0)
    assert agree(found.wanted, found.expected)
    assert found.expected == expected_means(found.rule, lengths, overshoot=6.0)
    assert not agree(found.wanted, expected_means(Rule(found.rule.hazard, 1.0, 10), lengths, overshoot=6.0))


def test_the_policy_itself_has_the_means_that_are_expected(tmp_path: Path) -> None:
    rule, count, lengths = Rule({20: 0.2, 35: 0.1, 60: 0.4, 61: 0.05}, 1.3, 9), 6000, [15, 30, 60, 64, 90, 150]
    termination = {"policy": "random_matched", "hazard": rule.hazard, "hazard_scale": 1.3, "detection_tokens": 9}
    settings = make_config(tmp_path, termination=termination).termination
    got = []
    for number in range(count):
        length = lengths[number % len(lengths)]
        fired = find("random_matched")(settings, Situation(1.3, rollout_seed(0, number), LONGEST)).feed(
            np.zeros(length)
        )
        got.append((min(length, fired.trigger + 5), fired.keep, 1) if fired else (length, length, 0))
    expected = outcomes(rule, np.array(lengths, float), overshoot=5.0).mean(axis=0)
    error = np.std(got, axis=0) / np.sqrt(count)
    assert (np.abs(np.mean(got, axis=0) - expected) < 4 * error).all()


def test_a_match_that_missed_is_corrected_and_the_next_run_agrees(runs: tuple[Path, Path]) -> None:
    """60 control rollouts are not enough to match by; those of the matched run, cut by chance, are."""
    source, made = runs
    first, agrees = compare(source, made)
    assert not agrees, first
    config, text = corrected_config(source, made)
    before = matched_config(source)[0]
    assert (config.name, config.seed) == ("first-matched-2", before.seed)
    was, now = before.termination.model_dump(), config.termination.model_dump()
    changed = {key for key in now if now[key] != was[key]}
    assert changed <= {"hazard_scale", "detection_tokens"}
    assert f"scale {before.termination.hazard_scale:.4g} → {config.termination.hazard_scale:.4g}" in text
    again = play(config, run=2)
    second, agrees = compare(source, again)
    assert agrees, second


def test_a_run_of_another_policy_is_matched_too(tmp_path: Path) -> None:
    source = play(kat_config(tmp_path, policy="entropy", control_fraction=0.5), run=0)
    config, said = matched_config(source)
    assert config.termination.policy == "random_matched" and config.termination.hazard
    second, agrees = compare(source, play(config, run=1))
    assert agrees, (said, second)


def test_what_was_made_from_another_run_is_not_corrected(runs: tuple[Path, Path], tmp_path: Path) -> None:
    source, made = runs
    other = play(kat_config(tmp_path, "other"), run=3, count=400)
    with pytest.raises(ConfigError, match="not made from"):
        corrected_config(other, made)
    with pytest.raises(ConfigError, match="not made from"):
        corrected_config(source, source)
    with pytest.raises(ConfigError, match="expected a run of kat, or of another policy, that stops"):
        corrected_config(made, made)


@pytest.mark.parametrize(("name", "following"), [("kat-s0", "kat-s0-2"), ("kat-2", "kat-3")])
def test_corrections_are_numbered(runs: tuple[Path, Path], tmp_path: Path, name: str, following: str) -> None:
    source, made = runs
    lines = [json.loads(line) for line in (made / "rollouts.jsonl").read_text().splitlines()]
    config = parse((made / "config.yaml").read_text(), [f"name={name}", f"runs_dir={tmp_path}"])
    assert corrected_config(source, put_run(config, lines))[0].name == following


# --- what is said --------------------------------------------------------------------------------------------------


def test_the_command_prints_a_config_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = play(kat_config(tmp_path), run=0, count=700)
    assert main(["match", str(folder)]) == 0
    printed = capsys.readouterr()
    config = parse(printed.out)
    rule = config.termination
    assert (config.name, rule.policy, rule.warmup_steps) == ("first-matched", "random_matched", 4)
    assert config == matched_config(folder)[0]
    assert "400 treated and 300 control rollouts, active from policy version 4" in printed.err
    assert "mean generated" in printed.err


def flat_run(folder: Path, control_lengths: Sequence[int], name: str = "flat") -> Path:
    """Of 400 treated rollouts of 40 tokens half are cut at 24; the control rollouts are of these lengths."""
    books = [("treated", 24, 20, 26) if number % 2 else ("treated", 40, 40, 40) for number in range(400)]
    books += [("control", length, length, length) for length in control_lengths]
    lines = []
    for number, (arm, trigger, keep, generated) in enumerate(books):
        cut = trigger != generated
        reason = "kl_trap" if cut else "eos"
        verdict = make_verdict(
            rid_of(number), arm=arm, problem=number, trigger=trigger, keep=keep, cut=cut, finish_reason=reason
        )
        how: dict[str, Any] = {"ending": "trained", "reason": "", "staleness": 0, "active": True, "correct": None}
        lines.append(asdict(line_of(verdict, generated=generated, **how)))
    return put_run(kat_config(folder, name), lines)


def test_it_is_said_how_sure_a_match_is(tmp_path: Path) -> None:
    _, sure = matched_config(flat_run(tmp_path, [40] * 100))
    assert "mean length of control rollouts 40.00 tokens (95 % interval 40.00 to 40.00)" in sure
    # Half are cut at 24 and written on to 26: 33 tokens on the mean, overshoot included; 20 and 40 are kept.
    assert "mean generated 33.00 and 33.00 tokens (+0.0%; 95 % interval +0.0% to +0.0%)" in sure
    assert "mean kept 30.00 and 30.00 tokens" in sure
    assert "too small" not in sure
    _, unsure = matched_config(flat_run(tmp_path, [30, 50] * 8))
    assert "The control arm is too small to promise 2%" in unsure
    # Of 16 rollouts of 30 or 50 tokens the mean has a standard error of 2.5.
    low, high = (float(part) for part in unsure.split("95 % interval ")[1].split(")")[0].split(" to "))
    assert 33 < low < 37 < 43 < high < 47


def test_realised_means_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = flat_run(tmp_path, [40], "one"), flat_run(tmp_path, [40], "two")
    assert main(["match", str(one), "--against", str(two)]) == 0
    # The same rollouts of the same prompts: whichever prompts are drawn, the means are the same.
    assert "(+0.0%; 95 % interval +0.0% to +0.0%)" in capsys.readouterr().out
    lines = [json.loads(line) for line in (two / "rollouts.jsonl").read_text().splitlines()]
    for line in lines:
        line["tokens_kept"] = round(line["tokens_kept"] * 1.05)
    put_run(kat_config(tmp_path, "two"), lines)
    text, agrees = compare(one, two)
    assert (agrees, "mean kept 30.00 and 31.50 tokens (+5.0%" in text) == (False, True)
    assert main(["match", str(one), "--against", str(two)]) == 1


def test_agreement_by_luck_is_told_from_agreement(runs: tuple[Path, Path]) -> None:
    text, _ = compare(*runs)
    assert text.endswith("too few rollouts to be sure of 2%")
    assert "too few" not in compare(runs[0], runs[0])[0]


# --- what is refused -----------------------------------------------------------------------------------------------


def test_what_cannot_be_matched_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no shorter"):
        match({5: 0.5}, Means(9, 2, 0.5), LengthShares(np.array([5.0]), np.array([1.0])))
    with pytest.raises(ConfigError, match="no control rollout"):
        matched_config(flat_run(tmp_path, []))
    with pytest.raises(ConfigError, match="cannot be matched within 2%"):  # two cuts, late: chance has none before
        matched_config(play(kat_config(tmp_path, window=150), run=0, count=320))
    with pytest.raises(ConfigError, match="no treated rollout was cut"):
        matched_config(play(kat_config(tmp_path, window=181), run=0, count=320))


def test_folders_that_are_no_run_of_kat_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["match", str(tmp_path)]) == 2
    assert "not a run's folder" in capsys.readouterr().err
    for setting, told in (({"shadow": True}, "termination.shadow: true"), ({"apply": "mask"}, "apply: mask")):
        whole = play(kat_config(tmp_path, **setting), run=0, count=320)
        assert main(["match", str(whole)]) == 2
        said = capsys.readouterr().err
        assert told in said and "which stops nothing; expected a run of kat, or of another policy, that stops" in said
    assert main(["match", str(put_run(kat_config(tmp_path, "empty"), []))]) == 2
    assert "no treated rollout" in capsys.readouterr().err


def test_a_run_of_another_policy_is_refused_for_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not for what it lacks: of a run of `none` nothing could have been cut."""
    none = str(put_run(kat_config(tmp_path, "whole", policy="none"), []))
    assert main(["match", none]) == 2
    assert "its policy is 'none'; expected a run of kat, or of another policy, that stops" in capsys.readouterr().err
    kat = str(flat_run(tmp_path, [40] * 100))
    assert main(["match", kat, "--against", none, "--correct"]) == 2
    assert f"{none}: not made from {kat}" in capsys.readouterr().err


@pytest.mark.parametrize("open_rollouts", [None, 7])
def test_a_run_that_is_not_finished_is_refused(tmp_path: Path, open_rollouts: int | None) -> None:
    """What is still being written is longer than what has ended: a match would be of the short ones."""
    folder, other = flat_run(tmp_path, [40] * 100), flat_run(tmp_path, [40] * 100, "other")
    if open_rollouts is None:
        (folder / "summary.json").unlink()
        said = "no summary.json"
    else:
        (folder / "ledger.json").write_text(
            json.dumps(Ledger(100 + open_rollouts, 100, {}, 0, open_rollouts).to_json())
        )
        write_summary(folder)
        said = "7 rollouts are open"
    with pytest.raises(ConfigError, match=f"not finished, {said}"):
        matched_config(folder)
    with pytest.raises(ConfigError, match="not finished"):
        compare(other, folder)


def test_agreement_is_two_percent_of_the_first() -> None:
    assert agree(Means(100, 50, 0), Means(102, 49, 0.5))
    assert not agree(Means(100, 50, 0), Means(102.1, 50, 0))
    assert not agree(Means(100, 50, 0), Means(100, 51.1, 0))


def test_the_command_corrects(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    source, made = map(str, runs)
    assert main(["match", source, "--against", made]) == 1
    assert "--correct > again.yaml" in capsys.readouterr().err
    assert main(["match", source, "--against", made, "--correct"]) == 0
    assert parse(capsys.readouterr().out) == corrected_config(*runs)[0]
    assert main(["match", source, "--correct"]) == 2
