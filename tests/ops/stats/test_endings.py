"""What became of rollouts, how long they were, and what is called no fair sample: by hand and by draws."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import CONFIG, booked, fill, write_html, write_lines
from samples import make_config

from common.runfiles.records import BookLine, Ended, Lengths
from ops.run.progress import describe
from ops.run.summary import write_summary
from ops.stats.endings import UntrainedEnding, by_ending, gap, left_out, to_json, words


def of(tokens: int, written: int | None = None, **changes: Any) -> BookLine:
    """A rollout with so many tokens to train on, trained unless something else is said."""
    trained = changes.get("ending", "trained") == "trained"
    lengths = {"tokens_trained": tokens if trained else 0, "tokens_trainable": tokens, "tokens_kept": tokens}
    return booked(**{**lengths, "tokens_generated": tokens if written is None else written, **changes})


def dropped(reason: str, tokens: int, written: int | None = None, **changes: Any) -> BookLine:
    return of(tokens, written, **{"ending": "dropped", "reason": reason, **changes})


def one(lines: list[dict[str, Any]], fate: str = "stale") -> UntrainedEnding:
    return next(found for found in left_out(by_ending(lines)) if found.ended.fate == fate)


LIMIT = {"finish_reason": "length"}
# The run of the issue: trained on 128 tokens in the mean; the seven that were dropped as stale had run to the limit.
TRAINED = [of(96), of(160)] * 90 + [of(128, **LIMIT)] * 20
BIASED = [*TRAINED, *[dropped("stale", 192, **LIMIT)] * 7]


def test_endings_by_hand() -> None:
    found = by_ending([of(4), of(8, 10), dropped("stale", 6, 9, **LIMIT), dropped("empty", 0, 5)])
    assert list(found) == ["trained", "empty", "stale"]
    trained, stale, empty = found["trained"], found["stale"], found["empty"]
    assert (trained.rollouts, trained.share, trained.at_limit) == (2, 1.0, 0)
    assert (trained.trainable, trained.generated) == (Lengths(2, 6.0, 2.0), Lengths(2, 7.0, 3.0))
    assert (stale.rollouts, stale.share, stale.at_limit) == (1, 1 / 3, 1)
    assert (stale.trainable, stale.generated) == (Lengths(1, 6.0, 0.0), Lengths(1, 9.0, 0.0))
    assert (empty.trainable, empty.generated) == (Lengths(1, 0.0, 0.0), Lengths(1, 5.0, 0.0))


def test_a_share_is_of_what_could_have_been_trained_on() -> None:
    """However many are open when the run ends."""
    lines = [of(4)] * 3 + [dropped("stale", 6)] + [dropped("run_end", 9)] * 50
    assert by_ending(lines)["stale"].share == 0.25


def test_dead_ones_are_one_ending_whatever_they_died_of() -> None:
    lines = [of(4), of(7, ending="dead", reason="rollout"), of(9, ending="dead", reason="learner")]
    assert by_ending(lines)["dead"].rollouts == 2


def test_lengths_that_are_not_on_record_are_not_made_up() -> None:
    """A lost rollout's record has 0 tokens; one without a verdict, or in old books, has none to train on."""
    old = dropped("stale", 6, tokens_trainable=None)
    unjudged = dropped("run_end", 0, 5, tokens_trainable=None)
    trained = of(8, tokens_trainable=None)
    found = by_ending([trained, old, unjudged, dropped("lost", 0, tokens_trainable=None)])
    assert found["trained"].trainable == Lengths(1, 8.0, 0.0)
    assert (found["stale"].trainable, found["stale"].generated) == (None, Lengths(1, 6.0, 0.0))
    assert (found["run_end"].trainable, found["run_end"].generated) == (None, Lengths(1, 5.0, 0.0))
    assert (found["lost"].trainable, found["lost"].generated) == (None, None)


def test_nothing_is_left_out_of_what_has_not_been_trained_yet() -> None:
    assert left_out(by_ending([dropped("stale", 4)])) == []
    assert left_out(by_ending([])) == []


# --- fair or not ---------------------------------------------------------------------------------------------------


def test_the_gap_by_hand() -> None:
    """One of 6 beside 0 and 0: of all three the mean is 2, s² 8, and that of a draw of one 8 · 2 / 2."""
    found = gap(Lengths(1, 6.0, 0.0), Lengths(2, 0.0, 0.0))
    assert found is not None
    assert (found.left_out, found.trained) == (6.0, 0.0)
    assert (found.low, found.high) == pytest.approx((2 - 2.576 * math.sqrt(8), 2 + 2.576 * math.sqrt(8)))
    assert gap(None, Lengths(2, 0.0, 0.0)) is None


def test_it_is_called_as_often_as_is_said() -> None:
    """Of fair samples about one in a hundred, of samples of the longer half every one."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.geometric(1 / 60, 400), 192)

    def fair(chosen: np.ndarray) -> bool:
        rest = np.delete(lengths, chosen)
        some, others = (Lengths(len(of), float(of.mean()), float(of.std())) for of in (lengths[chosen], rest))
        found = gap(some, others)
        assert found is not None
        return found.fair

    called = sum(not fair(rng.choice(400, 20, replace=False)) for _ in range(4000))
    assert 0.004 < called / 4000 < 0.02
    longer = np.argsort(lengths)[200:]
    assert not any(fair(rng.choice(longer, 60, replace=False)) for _ in range(50))


def test_seven_that_ran_to_the_limit_are_no_fair_sample() -> None:
    found = one(BIASED)
    assert found.fair is False and found.warns
    said = words(found)
    assert said.startswith("stale (older than learner.max_staleness when the learner took it): 7, 3.4% of them and the")
    assert "192.0 ± 0.0 against 128.0 ± 30.4 to train on; 192.0 ± 0.0 against 128.0 ± 30.4 written" in said
    assert "At the length limit: 7 of 7, of the trained 20 of 200" in said
    assert "NOT A FAIR SAMPLE: as many drawn at random have " in said


def test_what_is_as_long_as_the_trained_is_fair() -> None:
    found = one([*TRAINED, *[dropped("stale", 96), dropped("stale", 160)] * 4])
    assert found.fair is True and not found.warns
    assert "NOT A FAIR SAMPLE" not in words(found)


def test_rollouts_that_are_all_of_one_length_are_fair() -> None:
    assert one([of(10)] * 7 + [dropped("stale", 10)] * 3).fair is True


def test_long_ones_of_which_little_is_kept_are_told_by_what_was_written() -> None:
    """A cut leaves as much to train on; what is missing are the texts that were cut late."""
    lines = [of(96), of(160)] * 90 + [dropped("stale", 128, 192)] * 7
    found = one(lines)
    assert found.trainable is not None and found.trainable.fair
    assert found.generated is not None and not found.generated.fair
    assert found.warns
    assert words(found).count(" to train on") == 1 and words(found).endswith(" written")


@pytest.mark.parametrize(("trained", "warned"), [(690, True), (700, False)])
def test_one_in_a_hundred_is_negligible(trained: int, warned: bool) -> None:
    """7 of 697, then of 707."""
    lines = [of(96), of(160)] * (trained // 2) + [dropped("stale", 192)] * 7
    assert one(lines).fair is False
    assert one(lines).warns == warned


@pytest.mark.parametrize("fate", ["empty", "run_end"])
def test_what_was_left_out_by_design_is_shown_and_not_judged(fate: str) -> None:
    found = one([*TRAINED, *[dropped(fate, 0, 192)] * 50], fate)
    assert found.fair is None and not found.warns
    assert "192.0 ± 0.0 against 128.0 ± 30.4 written" in words(found) and "FAIR" not in words(found)


def test_the_dead_are_judged_and_the_lost_cannot_be() -> None:
    dead = one([*TRAINED, *[of(192, ending="dead", reason="learner")] * 7], "dead")
    assert dead.fair is False and dead.warns
    lost = one([*TRAINED, *[dropped("lost", 0, tokens_trainable=None)] * 7], "lost")
    assert lost.fair is None and lost.warns  # nobody knows, and they are many
    assert words(lost).endswith("Lengths not recorded")
    assert not one([*TRAINED, dropped("lost", 0, tokens_trainable=None)], "lost").warns


# --- where it is shown ---------------------------------------------------------------------------------------------


def test_the_summary_holds_it_and_reads_it_back() -> None:
    endings = by_ending([*BIASED, *[dropped("run_end", 0, 9, tokens_trainable=None)] * 4])
    tree = json.loads(json.dumps(to_json(endings), allow_nan=False))
    assert tree["stale"]["fair_sample"] is False and tree["run_end"]["fair_sample"] is None
    assert "fair_sample" not in tree["trained"]
    assert tree["stale"]["trainable"] == {"known": 7, "mean": 192.0, "sd": 0.0}
    assert {fate: Ended.from_json(one) for fate, one in tree.items()} == endings


def test_the_closing_lines_say_what_was_left_out_when_there_was_any(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    write_lines(tmp_path / "rollouts.jsonl", [*BIASED, *[dropped("empty", 0, 5)] * 2])
    said = [text for text in describe(write_summary(tmp_path), config).splitlines() if text.startswith("left out: ")]
    assert len(said) == 2
    assert said[0].startswith("left out: stale (") and "192.0 ± 0.0 against 128.0 ± 30.4 to train on" in said[0]
    assert said[1].startswith("left out: empty (nothing kept): 2, 1.0% of them and the trained")
    write_lines(tmp_path / "rollouts.jsonl", TRAINED)
    assert "left out" not in describe(write_summary(tmp_path), config)


def test_the_page_says_it_in_words_and_numbers(tmp_path: Path) -> None:
    fill(tmp_path, config=CONFIG)
    write_lines(tmp_path / "rollouts.jsonl", BIASED)
    (tmp_path / "traces.jsonl").unlink()
    page = write_html(tmp_path).read_text()
    assert "<th scope=row>left out</th><td>stale (" in page and "NOT A FAIR SAMPLE" in page
    row = page.partition("<th scope=row>stale</th>")[2].partition("</tr>")[0]
    cells = [cell.partition("<")[0] for cell in row.split("<td class=number>")[1:]]
    assert cells == ["7", "0.034", "7", "192.0", "0.000", "192.0", "0.000"]
    # The plot of the staleness too: in its legend, as text.
    assert "trained: mean 128 tokens" in page and "dropped: mean 192 tokens" in page


def test_the_page_of_a_run_with_older_books_says_what_they_have(tmp_path: Path) -> None:
    """Of what was dropped they have what was written, and no more."""
    fill(tmp_path, config=CONFIG)
    old = [{name: value for name, value in one.to_json().items() if name != "tokens_trainable"} for one in BIASED]
    write_lines(tmp_path / "rollouts.jsonl", old)
    (tmp_path / "traces.jsonl").unlink()
    page = write_html(tmp_path).read_text()
    row = page.partition("<th scope=row>stale</th>")[2].partition("</tr>")[0]
    cells = [cell.partition("<")[0] for cell in row.split("<td class=number>")[1:]]
    assert cells == ["7", "0.034", "7", "–", "–", "192.0", "0.000"]
    assert "against 128.0 ± 30.4 written" in page and "to train on;" not in page
    assert "dropped: mean 192 tokens written" in page
