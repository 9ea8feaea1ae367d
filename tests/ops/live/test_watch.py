"""`katana watch` on a real Redis: a rollout live, judged, booked, dead or unknown; in colour, in numbers, as JSON."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from samples import Run, fenced, make_verdict

from actors.books import Booking, Books, line_of, unjudged_line
from common.config import Config, ConfigError
from common.pretrained import find_model, load_tokenizer
from common.runfiles import records
from ops.live.coloured import HIGH_NATS, LOW_NATS, colour, excerpt, has_colours, legend, level, plain, text_of
from ops.live.watch import watch
from ops.reach.embedded import EmbeddedRedis
from ops.reading.rollouts import Reading, Token

SHIPPED = {"student": {"model": "ops/models/student"}, "teacher": {"model": "ops/models/teacher"}}
RID = "r000000000"
SOURCE = Path("some.yaml")


def ids_of(text: str) -> list[int]:
    return list(load_tokenizer(find_model("ops/models/student"))(text, add_special_tokens=False)["input_ids"])


def reading(tokens: list[Token], **changes: Any) -> Reading:
    values: dict[str, Any] = {"keep": len(tokens), "trigger": len(tokens), "finish_reason": "eos", "threshold": 0.25}
    return Reading(rid=RID, arm="treated", prompt="1+1?", tokens=tokens, min_window=None, **values | changes)


# --- colours ---


def test_the_scale_runs_over_log10_nats() -> None:
    assert (level(LOW_NATS), level(HIGH_NATS)) == (0.0, 1.0)
    assert level(1e-2) == pytest.approx(0.5)
    assert (level(0.0), level(1e9)) == (0.0, 1.0)


def test_colours_grow_brighter_in_even_steps() -> None:
    """By the lightness that sRGB's standard luminance gives (CIE L*), worked out apart from how they were made."""

    def lightness(rgb: tuple[int, int, int]) -> float:
        linear = [((c / 255 + 0.055) / 1.055) ** 2.4 if c > 10 else c / 255 / 12.92 for c in rgb]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        return float(116 * luminance ** (1 / 3) - 16)

    found = [lightness(colour(place / 10)) for place in range(11)]
    steps = np.diff(found)
    assert found[0] < 25
    assert found[-1] > 85
    assert steps.min() > 4
    assert steps.max() < 10


@pytest.mark.parametrize("place", [0.0, 0.3, 0.5, 0.51, 0.8, 1.0])
def test_letters_can_be_read_on_their_colour(place: float) -> None:
    """Contrast of at least 3 : 1 (WCAG, large text) on every colour."""
    token = Token("x", 10 ** (-5 + 6 * place), "kept")
    [span] = text_of(reading([token]), colours=True).spans
    style = span.style
    assert not isinstance(style, str)
    assert style.color is not None
    assert style.bgcolor is not None

    def luminance(triplet: Any) -> float:
        parts = [c / 255 for c in triplet]
        linear = [((c + 0.055) / 1.055) ** 2.4 if c > 0.04 else c / 12.92 for c in parts]
        return float(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])

    low, high = sorted((luminance(style.color.get_truecolor()), luminance(style.bgcolor.get_truecolor())))
    assert (high + 0.05) / (low + 0.05) >= 3


def test_numbers_where_there_are_no_colours() -> None:
    tokens = [Token("a", 0.5, "kept"), Token(" b", 2e-5, "detection"), Token("c", None, "overshoot")]
    text = text_of(reading(tokens, keep=1, trigger=2, stopped=True, finish_reason="kl_trap"), colours=False)
    assert text.plain == "a[0.5] <<✂ cut: 1 kept>>  b[2e-05] <<fired: 2 seen>> c[-]"
    assert text.spans == []
    assert "not scored" in legend(False).plain


def test_in_colours_the_text_is_the_text() -> None:
    tokens = [Token("a", 0.5, "kept"), Token("\n", 1.0, "kept"), Token("<end>", 0.1, "kept", stop=True)]
    assert text_of(reading(tokens), colours=True).plain == "a↵\n⏹<end>"
    assert "0.01" in legend(True).plain


def test_a_control_rollout_says_where_it_would_have_been_cut() -> None:
    tokens = [Token("a", 0.5, "kept"), Token("b", 0.0, "detection")]
    assert "would be cut: 1 kept" in text_of(reading(tokens, keep=1, trigger=2), colours=False).plain
    fixed = [Token("a", 0.5, "kept"), Token("b", 0.5, "overshoot")]
    text = text_of(reading(fixed, keep=1, trigger=1, stopped=True), colours=False).plain
    assert text == "a[0.5] <<✂ cut: 1 kept, fired: 1 seen>> b[0.5]"


@pytest.mark.parametrize("fields", [{"finish_reason": "open"}, {"finish_reason": "unfinished", "ending": "dead"}, {}])
def test_nothing_is_marked_where_nothing_was_cut(fields: dict[str, Any]) -> None:
    assert "<<" not in text_of(reading([Token("a", 0.5, "kept")], **fields), colours=False).plain


def test_text_that_a_terminal_would_act_on_is_shown() -> None:
    tokens = [Token("\x1b[2J", 0.5, "kept"), Token("\t\r\u202e", 0.5, "kept")]
    text = text_of(reading(tokens), colours=True).plain
    assert text == "\\x1b[2J→\t\\r\\u202e"
    assert plain("a\nb\x00ü漢") == "a\\nb\\x00ü漢"


def test_an_excerpt_keeps_the_end_and_what_follows() -> None:
    assert excerpt("abc", "", 20).plain == "abc"
    assert excerpt("abc", "def", 20).plain == "abc ✂ def"
    line = excerpt("a" * 100, "b" * 100, 40).plain
    assert line.startswith("…a")
    assert " ✂ b" in line
    assert line.endswith("…")
    assert len(line) <= 40


def test_colours_only_where_there_are_enough_and_nobody_minds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_colours(Console(color_system="truecolor", force_terminal=True))
    assert has_colours(Console(color_system="256", force_terminal=True))
    assert not has_colours(Console(color_system="standard", force_terminal=True))
    assert not has_colours(Console(color_system=None))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_colours(Console(color_system="truecolor", force_terminal=True))


# --- the command ---


class Desk:
    """A run with the shipped models, and `katana watch` on it."""

    def __init__(self, run: Run, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.run, self._capsys = run, capsys
        redis = run.config.redis.model_copy(update={"url": url})
        self.config: Config = run.config.model_copy(update={"redis": redis})

    def watch(self, rid: str = RID, **options: bool) -> str:
        assert watch(self.config, SOURCE, rid, **{"as_json": False, "follow": False} | options) == 0
        return self._capsys.readouterr().out

    def json(self, rid: str = RID) -> Any:
        return json.loads(self.watch(rid, as_json=True))

    def refused(self, rid: str) -> str:
        with pytest.raises(ConfigError) as refusal:
            watch(self.config, SOURCE, rid, as_json=False, follow=False)
        return str(refusal.value)

    def write(self, text: str = "12+7=19", rid: str = RID) -> list[int]:
        """A rollout with one scored chunk and one that is not."""
        ids = ids_of(text)
        self.run.admit(rid, prompt=np.array(ids_of("12+7?"), np.int32))
        self.run.take("w7")
        self.run.chunk(rid, tokens=ids[:3])
        self.run.chunk(rid, seq=1, start=3, tokens=ids[3:])
        self.run.score(rid)
        return ids

    def judge(self, rid: str = RID, **changes: Any) -> None:
        ids = ids_of("12+7=19")[:3]
        body = make_verdict(rid, **{"tokens": np.array(ids, np.int32)} | changes).encode()
        answer = self.run.lease("arbiter").call(
            fenced("verdict", rid, body, 2, 1, "", 4, "0.25", "", *self.run.score_entries())
        )
        assert answer == [b"ok"]


@pytest.fixture
def desk(any_redis: EmbeddedRedis, start: Callable[..., Run], capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(start(any_redis, **SHIPPED), any_redis.url, capsys)


def test_one_that_is_being_written(desk: Desk) -> None:
    desk.write()
    text = desk.watch()
    assert "none yet: being written" in text
    assert "1[0.5]2[0.2]+7[0]=[-]1[-]9[-]" in text
    assert "prompt  12+7?" in text
    assert re.search(r"chunks 0–1 +tokens 0 … 5, policy version 0, by w7 \(as owner n1\)", text)
    assert "<<" not in text
    assert "\x1b" not in text
    assert desk.watch("0") == text


def test_one_that_was_cut(desk: Desk) -> None:
    desk.write()
    desk.judge()
    text = desk.watch()
    assert "1[0.5]2[0.2] <<✂ cut: 2 kept>> +7[0] <<fired: 3 seen>> =[-]1[-]9[-]" in text
    assert "kl_trap: 2 kept, fired when 3 were seen" in text
    assert "0.25 nats" in text


def test_json_has_a_row_for_every_token(desk: Desk) -> None:
    ids = desk.write()
    desk.judge()
    value = desk.json()
    assert (value["rid"], value["keep"], value["trigger"], value["threshold"]) == (RID, 2, 3, 0.25)
    assert [token["id"] for token in value["tokens"]] == ids
    assert [token["position"] for token in value["tokens"]] == [0, 1, 2, 3, 4, 5]
    assert [token["divergence"] for token in value["tokens"]] == [0.5, 0.25, 0.0, None, None, None]
    assert [token["kept"] for token in value["tokens"]] == [True, True, False, False, False, False]
    assert [token["text"] for token in value["tokens"]] == ["1", "2", "+7", "=", "1", "9"]
    assert value["chunks"][0]["worker"] == "w7"


def test_one_that_is_booked_comes_from_the_folder(desk: Desk) -> None:
    desk.write()
    desk.judge()
    live = desk.json()
    verdict = make_verdict(RID, tokens=np.array(ids_of("12+7=19")[:3], np.int32))
    line = line_of(verdict, ending="trained", reason="", generated=5, staleness=0, active=True, correct=None)
    audit = records.Audit(RID, [("n1", 0)], [records.Chunk(0, None, 0, 3, 0, "n1")], None, True)
    books = Books(desk.config.run_dir, record_traces=True, record_audit=True)
    books.write([Booking(line, verdict, audit)])
    books.close()
    desk.run.book(RID, "trained")
    booked = desk.json()
    assert booked["tokens"] == live["tokens"][:3]
    assert (booked["ending"], booked["generated"], booked["chunks"][0]["writer"]) == ("trained", 5, "n1")
    assert "kl_trap: 2 kept, fired when 3 were seen; trained" in desk.watch()


def test_one_that_died_keeps_its_record_and_has_its_reason(desk: Desk) -> None:
    desk.write()
    for _ in range(3):
        desk.run.plane.fail(RID, "teacher", "broken", max_attempts=3)
    books = Books(desk.config.run_dir, record_traces=True)
    books.write([Booking(unjudged_line(RID, "treated", 0, ending="dead", reason="teacher", generated=5))])
    books.close()
    text = desk.watch()
    assert "unfinished: 6 kept; dead (teacher)" in text
    assert "1[0.5]" in text


def test_one_that_the_run_ended_has_no_text(desk: Desk) -> None:
    books = Books(desk.config.run_dir, record_traces=True)
    books.write([Booking(unjudged_line(RID, "treated", 0, ending="dropped", reason="run_end", generated=5))])
    books.close()
    text = desk.watch()
    assert "dropped (run_end)" in text
    assert "note: no text" in text


def test_a_broken_record_is_shown_as_far_as_it_goes(desk: Desk) -> None:
    desk.write()
    desk.run.client.hset(desk.run.key(f"rollout:{RID}"), mapping={"t:1": b"\xff", "head": b"\x1b[2J"})
    text = desk.watch()
    assert "1[0.5]2[0.2]+7[0]" in text
    assert text.count("note: ") == 2
    assert "\x1b" not in text


# --- what is not there ---


def test_an_unknown_one_says_which_there_are(desk: Desk) -> None:
    desk.write()
    said = desk.refused("7")
    assert "no rollout r000000007 in run 'test'" in said
    assert "admitted are r000000000 … r000000000" in said
    desk.run.client.delete(desk.run.key(f"rollout:{RID}"))
    assert "it was admitted and has ended, but is not in the books" in desk.refused(RID)


def test_without_redis_the_books_say_which_there_are(desk: Desk, tmp_path: Path) -> None:
    away = desk.config.redis.model_copy(update={"url": f"unix://{tmp_path}/nobody.sock"})
    desk.config = desk.config.model_copy(update={"redis": away})
    assert "and none is booked" in desk.refused("7")
    books = Books(desk.config.run_dir, record_traces=True)
    for number in (3, 0, 2):
        line = unjudged_line(f"r{number:09d}", "treated", 0, ending="dropped", reason="lost", generated=0)
        books.write([Booking(line)])
    books.close()
    said = desk.refused("7")
    assert "booked are, lowest to highest, r000000000 … r000000003" in said
    assert "Redis does not answer" in said
    assert "dropped (lost)" in desk.watch("3")


@pytest.mark.parametrize("rid", ["", "r 1", "../x", "é", "r" * 41, "-1", "1" * 13 + "-"])
def test_what_is_no_id_is_refused(desk: Desk, rid: str) -> None:
    assert "not a rollout's id, which is like r000000012" in desk.refused(rid)


# --- following ---


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`meanwhile(*actions)`: what happens in the pauses between two looks, one action a pause."""

    def plan(*actions: Callable[[], object]) -> None:
        left = list(actions)
        monkeypatch.setattr("ops.live.watch.time", SimpleNamespace(sleep=lambda _: left.pop(0)()))

    return plan


def test_following_shows_more_and_ends_with_the_verdict(desk: Desk, meanwhile: Callable[..., None]) -> None:
    desk.run.admit(RID)
    desk.run.take("w7")
    desk.run.chunk(RID, tokens=ids_of("12+7=19")[:3])
    meanwhile(lambda: None, lambda: desk.run.score(RID), desk.judge)
    states = [json.loads(line) for line in desk.watch(as_json=True, follow=True).splitlines()]
    assert [state["finish_reason"] for state in states] == ["open", "open", "kl_trap"]
    assert [state["tokens"][0]["divergence"] for state in states] == [None, 0.5, 0.5]


def test_following_into_a_file_prints_the_end_alone(desk: Desk, meanwhile: Callable[..., None]) -> None:
    desk.write()
    meanwhile(desk.judge)
    assert desk.watch(follow=True).count("rollout ") == 1


def test_following_waits_for_a_redis_that_is_away(
    own_redis: EmbeddedRedis,
    start: Callable[..., Run],
    capsys: pytest.CaptureFixture[str],
    meanwhile: Callable[..., None],
) -> None:
    desk = Desk(start(own_redis, **SHIPPED), own_redis.url, capsys)
    desk.write()

    def come_back() -> None:
        own_redis.start()
        desk.judge()

    meanwhile(own_redis.stop, lambda: None, come_back)
    assert watch(desk.config, SOURCE, RID, as_json=True, follow=True) == 0
    captured = capsys.readouterr()
    assert [json.loads(line)["finish_reason"] for line in captured.out.splitlines()] == ["open", "kl_trap"]
    assert captured.err.count("waiting: ") == 1


def test_following_what_is_not_there_does_not_wait(desk: Desk) -> None:
    with pytest.raises(ConfigError, match="no rollout"):
        watch(desk.config, SOURCE, "5", as_json=False, follow=True)


def test_ctrl_c_ends_following(desk: Desk, meanwhile: Callable[..., None]) -> None:
    desk.write()
    meanwhile(lambda: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            watch(desk.config, SOURCE, RID, as_json=True, follow=True)
    finally:
        signal.signal(signal.SIGINT, before)
