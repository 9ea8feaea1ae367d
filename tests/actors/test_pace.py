"""How long a teacher waits for a fuller batch."""

from __future__ import annotations

from actors.pace import Pace


def pace_of(rollouts: int, *, max_unscored: int = 2, interval_s: float = 0.2) -> Pace:
    """After two chunks of each rollout, `interval_s` apart."""
    pace = Pace(max_unscored)
    for seq in range(2):
        pace.saw([(f"r{number}", seq) for number in range(rollouts)], 10.0 + seq * interval_s)
    return pace


def test_it_waits_for_others_of_the_rollouts_in_progress() -> None:
    pace = pace_of(8)
    assert 0 < pace.patience_s(1) <= 0.2  # a writer may be one chunk ahead: less than the time of one
    assert pace.patience_s(4) == pace.patience_s(8) == 0.0


def test_where_a_writer_waits_for_every_chunk_it_does_not_wait() -> None:
    assert pace_of(8, max_unscored=1).patience_s(1) == 0.0


def test_more_chunks_ahead_allow_more_patience_up_to_a_limit() -> None:
    assert pace_of(8, max_unscored=4).patience_s(1) == 3 * pace_of(8).patience_s(1)
    assert pace_of(8, max_unscored=4, interval_s=60.0).patience_s(1) == 0.25


def test_before_a_pace_is_known_it_does_not_wait() -> None:
    pace = Pace(2)
    pace.saw([("r1", 0), ("r2", 0), ("r3", 0)], 1.0)
    assert pace.patience_s(1) == 0.0


def test_rollouts_that_are_over_or_silent_are_not_waited_for() -> None:
    pace = pace_of(4)
    for number in (0, 1):
        pace.over(f"r{number}")
    pace.over("unknown")
    assert pace.patience_s(1) == 0.0  # one of two is half
    late = pace_of(4)
    late.saw([("r0", 2)], 20.0)  # the other three have been silent for long
    assert late.patience_s(1) == 0.0


def test_a_chunk_that_comes_again_is_no_progress() -> None:
    pace = pace_of(4)
    patience = pace.patience_s(1)
    pace.saw([("r0", 1), ("r0", 0)], 10.2)
    assert pace.patience_s(1) == patience
