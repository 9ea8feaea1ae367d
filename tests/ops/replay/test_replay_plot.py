"""The picture of a sweep: a line joins settings between which there are others."""

from __future__ import annotations

import pytest

from ops.replay.plot import SettingPoint, draw
from ops.replay.results import HitShare, Outcome
from ops.stats.intervals import wilson


def point(name: str, saving: float, hits: int) -> SettingPoint:
    share = HitShare(hits, 100, wilson(hits, 100))
    outcome = Outcome(
        rollouts=100,
        active=100,
        cut=share,
        generated=50.0,
        whole=100.0,
        kept=40.0,
        saving=saving,
        saving_interval=(saving - 0.05, saving + 0.05),
        signal=None,
        signal_interval=None,
        number=None,
        early=share,
        unwritten=share,
        late=share,
        wrong=share,
    )
    return SettingPoint(name, "", outcome)


@pytest.mark.parametrize(("names", "joined"), [(("0.3", "0.6"), True), (("kat", "repetition"), False)])
def test_numbers_are_joined_and_policies_are_not(names: tuple[str, str], joined: bool) -> None:
    points = [point(name, saving, hits) for name, saving, hits in zip(names, (0.3, 0.6), (5, 90), strict=True)]
    [axes] = draw(points, [], "a sweep", "values").axes
    lines = [line for line in axes.lines if list(line.get_xdata()) == [30.0, 60.0]]
    assert [line.get_linestyle() == "-" for line in lines] == [joined]
