"""random_matched from a run of KAT: hazards and means by hand, against the real policy, and refusals."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import make_config, make_verdict

from actors.books import line_of, rid_of
from common.config import ConfigError, parse
from common.draws import rollout_seed
from common.policies import Situation, find
from common.termination import Kat
from ops.cli import main
from ops.matching import Match, Means, agree, compare, expected_means, hazard_of, match, matched_config


def test_hazards_by_hand() -> None:
    # Cut at 4 and 4 of five that came so far, at 6 one of the three that came so far (one of them ends there uncut).
    found = hazard_of([4, 4, 6, 6, 9, 2], [True, True, True, False, False, False])
    assert found == {4: 2 / 5, 6: 1 / 3}


def test_expected_means_by_hand() -> None:
    # Length 3: never. Length 4: half cut at 4. Length 10: half at 4, a quarter at 8, a quarter whole.
    found = expected_means({4: 0.5, 8: 0.5}, 1.0, 5, [3, 4, 10])
    assert found.seen == pytest.approx((3 + 4 + (2 + 2 + 2.5)) / 3)
    assert found.kept == pytest.approx((3 + (0 + 2) + (0 + 0.75 + 2.5)) / 3)
    assert found.cut == pytest.approx((0 + 0.5 + 0.75) / 3)


def kat_run(seed: int = 2, count: int = 1500) -> tuple[list[int], list[int], list[bool], list[int]]:
    """Long rollouts are those that fall into traps: what cutting by chance, independent of length, cannot see."""
    rng = np.random.default_rng(seed)
    seen, kept, cut, lengths = [], [], [], []
    for number in range(count):
        trapped = rng.random() < 0.4
        length = int(rng.integers(90, 180) if trapped else rng.integers(20, 110))
        values = rng.gamma(2.0, 0.3, size=length)
        if trapped:
            values[int(rng.integers(20, 60)) :] *= 0.05
        if number % 4 == 0:
            lengths.append(length)
            continue
        fired = Kat(window=8, patience=3, stride=1, grace_tokens=0, threshold=0.1).feed(values)
        seen.append(fired.trigger if fired else length)
        kept.append(fired.keep if fired else length)
        cut.append(fired is not None)
    return seen, kept, cut, lengths


@pytest.fixture(scope="module")
def found() -> Match:
    return match(*kat_run())


def test_the_match_agrees_within_two_percent_and_needed_its_scale(found: Match) -> None:
    assert agree(found.wanted, found.expected)
    *_, lengths = kat_run()
    unscaled = expected_means(found.hazard, 1.0, 10, lengths)
    assert not agree(found.wanted, unscaled)


def test_the_policy_itself_has_the_means_that_are_expected(found: Match) -> None:
    *_, lengths = kat_run()
    rule = make_config(
        Path("."),
        termination={
            "policy": "random_matched",
            "hazard": found.hazard,
            "hazard_scale": found.scale,
            "detection_tokens": found.detection_tokens,
        },
    ).termination
    seen, kept = [], []
    for number in range(6000):
        length = lengths[number % len(lengths)]
        judge = find("random_matched")(rule, Situation(found.scale, rollout_seed(0, number), 192))
        fired = judge.feed(np.zeros(length))
        seen.append(fired.trigger if fired else length)
        kept.append(fired.keep if fired else length)
    for values, expected in ((seen, found.expected.seen), (kept, found.expected.kept)):
        error = float(np.std(values)) / np.sqrt(len(values))
        assert abs(float(np.mean(values)) - expected) < 4 * error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([5], [5], [False], [9]), "nothing to match"),
        (([5], [2], [True], []), "nothing to match"),
        (([9], [2], [True], [5]), "no shorter"),
    ],
)
def test_what_cannot_be_matched_is_said(arguments: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        match(*arguments)


def write_run(folder: Path, name: str = "first", **termination: Any) -> Path:
    """A run's folder with the books of `kat_run`."""
    config = make_config(folder, name=name, rollout={"max_completion_length": 192}, termination=termination)
    seen, kept, cut, lengths = kat_run(count=400)
    rows = [("treated", *row) for row in zip(seen, kept, cut, strict=True)]
    rows += [("control", length, length, False) for length in lengths]
    lines = []
    for number, (arm, trigger, keep, was_cut) in enumerate(rows):
        one = make_verdict(
            rid_of(number),
            arm=arm,
            trigger=trigger,
            keep=keep,
            cut=was_cut,
            finish_reason="kl_trap" if was_cut else "eos",
            last_version=4 + number % 3,
        )
        over = 2 if was_cut else 0
        lines.append(
            line_of(one, ending="trained", reason="", generated=trigger + over, staleness=0, active=True, correct=None)
        )
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    (config.run_dir / "rollouts.jsonl").write_text("".join(json.dumps(asdict(line)) + "\n" for line in lines))
    return config.run_dir


def test_the_command_prints_a_config_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path)
    assert main(["match", str(folder)]) == 0
    printed = capsys.readouterr()
    config = parse(printed.out)
    rule = config.termination
    assert (config.name, rule.policy, rule.warmup_steps) == ("first-matched", "random_matched", 4)
    assert config == matched_config(folder)[0]
    assert "300 treated and 100 control rollouts, active from policy version 4" in printed.err
    assert "mean generated" in printed.err


def test_realised_means_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = write_run(tmp_path, "one"), write_run(tmp_path, "two")
    assert main(["match", str(one), "--against", str(two)]) == 0
    assert "(+0.0%)" in capsys.readouterr().out
    lines = [json.loads(line) for line in (two / "rollouts.jsonl").read_text().splitlines()]
    for line in lines:
        line["tokens_kept"] = round(line["tokens_kept"] * 1.05)
    (two / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert compare(one, two)[1] is False
    assert main(["match", str(one), "--against", str(two)]) == 1


def test_folders_that_are_no_run_of_kat_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["match", str(tmp_path)]) == 2
    assert "no run's folder" in capsys.readouterr().err
    shadow = write_run(tmp_path, shadow=True)
    assert main(["match", str(shadow)]) == 2
    assert "expected a run of kat that stops" in capsys.readouterr().err
    (write_run(tmp_path, "empty") / "rollouts.jsonl").write_text("")
    assert main(["match", str(tmp_path / "empty")]) == 2
    assert "no treated rollout" in capsys.readouterr().err


def test_agreement_is_two_percent_of_the_first() -> None:
    assert agree(Means(100, 50, 0), Means(102, 49, 0.5))
    assert not agree(Means(100, 50, 0), Means(102.1, 50, 0))
    assert not agree(Means(100, 50, 0), Means(100, 51.1, 0))
