"""What lasts is said when it begins and when it is over."""

from __future__ import annotations

import logging

import pytest

import common.episode
from common.episode import Episode


def test_an_episode_is_said_once_and_its_end_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    episode = Episode(logging.getLogger("katana.test"))
    episode.not_seen("over")
    for _ in range(1000):
        episode.seen("it holds")
        episode.not_seen("over")  # comes and goes: still the same one
    assert caplog.messages == ["it holds"]
    monkeypatch.setattr(common.episode, "_QUIET_S", 0.0)
    for _ in range(3):
        episode.not_seen("over")
    assert caplog.messages[1:] == ["over: it lasted 0 s (1000 times)"]
    episode.seen("it holds again")
    assert caplog.messages[2:] == ["it holds again"]
