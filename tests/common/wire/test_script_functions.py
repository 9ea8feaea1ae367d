"""Each script of `common/wire/lua` has one function, whose arguments and words are those of the script's header."""

from __future__ import annotations

import inspect
import re
from enum import Enum
from pathlib import Path
from typing import Any

import msgpack
import pytest

from common.wire import record, scripts
from common.wire.scripts import Call, Ending, Fenced, Standing, Written

LUA = Path(__file__).parents[3] / "common" / "wire" / "lua"
RELEASED = [Written("rid", b"entry", "nonce")]
STREAMS = [("stream", "group")]
SCRIPTS = {path.stem for path in LUA.glob("*.lua")} - {"prelude"}

# Each function is called with the words of its script's header; of what is no text a number, named in the third column.
CASES: dict[str, tuple[Any, type[Enum] | None, dict[Any, str]]] = {
    "forgo": (scripts.forgo("first rollout of a group", "why it is trained without reward"), None, {}),
    "reward": (scripts.reward("rid", "its standing in its group"), None, {}),
    "unreward": (scripts.unreward(["rollouts of groups whose members are all booked"]), None, {}),
    "admit": (
        scripts.admit(
            "rid",
            b"encoded head",
            1,
            "threshold that it is judged by",
            (b"its entry in `again`", 2),
        ),
        scripts.Admitted,
        {1: "cursor after this rollout", 2: "its problem"},
    ),
    "adopt": (scripts.adopt("stream", "group", 1), None, {1: "most entries"}),
    "advance": (scripts.advance("step", "value"), None, {"step": "'step' | 'covered' | 'learning' | 'state'"}),
    "again": (
        scripts.again("entry in `dead`", "its rollout", 1),
        scripts.SentBack,
        {1: "that one's problem"},
    ),
    "attempt": (scripts.attempt("rid", "role", "begin"), None, {"begin": "begin | over"}),
    "beat": (
        scripts.beat("consumer", b"last signal that it has read", [b"those"], RELEASED),
        None,
        {1: "how many signals it is done with"},
    ),
    "book": (scripts.book("rid", "ledger field", [b"rollout's pending entries"]), None, {}),
    "calibrate": (
        scripts.calibrate(1, 2, 0.25, [0.5], place=0, teacher="the teacher whose these are"),
        None,
        {
            1: "number of this call",
            2: "buffer size",
            "0.25": "threshold from now on",
            "0.5": "window minima for the buffer",
        },
    ),
    "chunk": (
        scripts.chunk(
            "rid", "nonce", 1, b"encoded tokens", b"encoded support", b"encoded log-probabilities", "lane", 3, "finish"
        ),
        scripts.ChunkAnswer,
        {1: "seq", 3: "tokens in all"},
    ),
    "claim": (scripts.claim("stream", "consumer", 1, 2), None, {1: "idle ms", 2: "most entries"}),
    "close": (scripts.close([("stream", "group of each")]), None, {}),
    "count": (scripts.count("rid", "nonce", 1), scripts.Counted, {1: "tokens generated in all"}),
    "fail": (
        scripts.fail(
            "rid", "stage", "reason", 1, b"shown bytes", "stream", "group", b"entry", "a token of this report"
        ),
        scripts.Failed,
        {1: "most attempts"},
    ),
    "gone": (scripts.gone("name", "role", ["streams that it read as one of the role's group"]), None, {}),
    "lease": (scripts.lease("role", "token", 1, "take"), scripts.Leased, {1: "ms", "take": "mode"}),
    "exclusive": (scripts.exclusive("what", "token", 1, "take"), scripts.Leased, {1: "ms", "take": "mode"}),
    "look": (scripts.look(2, [("rid", 1)]), None, {2: "most chunks of each", 0: "views", 1: "first chunk"}),
    "publish": (scripts.publish(1, 2, "file", "sha256"), scripts.Published, {1: "version", 2: "step"}),
    "refused": (scripts.refused(1), None, {1: "version of the weights that it could not take"}),
    "release": (scripts.release("consumer", RELEASED), None, {}),
    "reopen": (scripts.reopen("resolved config"), None, {}),
    "restore": (
        scripts.restore(2, 3, ["those"], {"ledger fields": 4}),
        None,
        {2: "cursor", 3: "tokens generated in booked rollouts", 1: "how many rollouts are alive", 4: "counts"},
    ),
    "score": (
        scripts.score(
            "lane", b"entry", "rid", 2, b"encoded divergence", b"encoded teacher log-probabilities", b"encoded view"
        ),
        scripts.ScoreAnswer,
        {2: "seq"},
    ),
    "seen": (
        scripts.seen("name", "role", 1, b"revision of the roster that is known", [("field", "value")]),
        None,
        {1: "ms after which a silent worker is off the roster of the role"},
    ),
    "settle": (scripts.settle([Ending(b"entry", "rid", "ending", "reason", 1)]), None, {1: "detail"}),
    "sweep": (scripts.sweep(1, STREAMS), None, {1: "ms of silence"}),
    "take": (
        scripts.take("consumer", "nonce", 1, 2, b"where to claim from"),
        None,
        {1: "count", 2: "idle ms"},
    ),
    "verdict": (
        scripts.verdict(
            "rid",
            b"encoded verdict",
            3,
            True,
            0.5,
            4,
            0.25,
            [b"rollout's pending score entries"],
            "the teacher whose these are",
        ),
        scripts.Judged,
        {
            3: "tokens to train",
            1: "stop",
            "0.5": "window minimum for the buffer",
            4: "buffer size",
            "0.25": "threshold from now on",
        },
    ),
}


def header(name: str) -> tuple[list[str], set[str]]:
    """Arguments of a script and the words that it answers with, as its first comment has them."""
    lines = []
    for line in (LUA / f"{name}.lua").read_text().splitlines():
        if not line.startswith("-- ") or ("->" in " ".join(lines) and line[3].isupper()):
            break
        lines.append(line[3:])
    _, _, text = " ".join(lines).partition(". ")  # behind whose script it is
    text = re.sub(r"\([^)]*\)", "", text)
    arguments, _, reply = text.partition("->")
    arguments = re.sub(r"then [a-z ]+\{(\w+, \w+) \.\.\.\}", r"\1", arguments.removeprefix("At its end: "))
    arguments = re.sub(r"then per \w+ |then the |then |for one that is sent back,", "", arguments)
    phrases = [part.strip() for part in re.split(r"[,;]| and ", arguments)]
    words = {part.strip().split()[0].strip(",") for part in re.sub(r"\{.*\}", "", reply).split("|")}
    return [phrase for phrase in phrases if phrase], words


def phrased(call: Call[Any] | Fenced[Any], names: dict[Any, str]) -> list[str]:
    """The arguments of a call as its script gets them, in the words of the header."""
    fence = () if isinstance(call, Call) else ("lease role", "lease token") if call.names_role else ("lease token",)
    args = (part.decode() if isinstance(part, bytes) else part for part in (*fence, *call.args))
    return [names.get(part, str(part)) for part in args]


def test_each_script_has_one_function_and_each_function_a_script() -> None:
    assert SCRIPTS == set(scripts.NAMES) == set(CASES)
    functions = dict(inspect.getmembers(scripts, inspect.isfunction))
    own = {name for name, one in functions.items() if one.__module__ == scripts.__name__ and name[0] != "_"}
    assert own - {"answered", "run_is_gone"} == SCRIPTS


@pytest.mark.parametrize("name", sorted(CASES))
def test_arguments_stand_as_in_the_header(name: str) -> None:
    call, _, names = CASES[name]
    assert call.script == name
    assert phrased(call, names) == header(name)[0]


@pytest.mark.parametrize("name", sorted(CASES))
def test_words_are_those_of_the_header(name: str) -> None:
    call, words, _ = CASES[name]
    known = {word.value for word in words or scripts.Done}
    assert known | ({"lost"} if isinstance(call, Fenced) or name == "claim" else set()) == header(name)[1]


@pytest.mark.parametrize(
    ("name", "reply", "read"),
    [
        ("admit", [b"behind"], scripts.Admitted.BEHIND),
        ("adopt", [b"ok", [b"1-1", [b"rid", b"r1"]]], [(b"1-1", {b"rid": b"r1"})]),
        ("advance", [b"ok"], scripts.Done.OK),
        ("again", [b"absent"], scripts.SentBack.ABSENT),
        ("attempt", [b"ok", 2], 2),
        ("book", [b"ok", 1], True),
        ("book", [b"ok", 0], False),
        ("chunk", [b"ok", b"3"], scripts.Stored(scripts.ChunkAnswer.OK, b"3")),
        ("chunk", [b"full"], scripts.Stored(scripts.ChunkAnswer.FULL)),
        ("claim", [b"lost"], scripts.Claimed([], lost=True)),
        ("claim", [b"ok", [b"1-1", [b"rid", b"r1"], 2]], scripts.Claimed([((b"1-1", {b"rid": b"r1"}), 2)])),
        ("count", [b"lost"], scripts.Counted.LOST),
        ("fail", [b"again", 2], scripts.Failure(scripts.Failed.AGAIN, 2)),
        ("fail", [b"dead"], scripts.Failure(scripts.Failed.DEAD)),
        ("lease", [b"held"], scripts.Leased.HELD),
        ("exclusive", [b"held"], scripts.Leased.HELD),
        (
            "look",
            [b"ok", msgpack.packb([[b"h", False, b"0.5", False, b"2", b"9", b"t", b"d"], [False] * 6])],
            [
                scripts.Look(b"h", False, b"0.5", None, b"2", b"9", [b"t", b"d"]),
                scripts.Look(None, False, None, None, None, None, []),
            ],
        ),
        ("forgo", [b"ok", b"late"], "late"),
        ("reward", [b"ok", b"right"], "right"),
        ("unreward", [b"ok"], scripts.Done.OK),
        ("publish", [b"ok"], scripts.Publication(scripts.Published.OK, 1)),
        ("publish", [b"old", 7], scripts.Publication(scripts.Published.OLD, 7)),
        ("score", [b"duplicate"], scripts.ScoreAnswer.DUPLICATE),
        ("seen", [b"ok", b"3", b"t1", b"t2"], scripts.Sight(b"3", ["t1", "t2"])),
        ("settle", [b"ok", 1], 1),
        ("sweep", [b"ok", 4], 4),
        ("take", [b"ended"], scripts.Given([], ended=True)),
        (
            "take",
            [b"ok", b"-", [b"r1", b"1-1", b"0", b"0", 0], [None, b"1-2", 0, 0, None]],
            scripts.Given([scripts.Offer(b"r1", b"1-1", b"0", b"0", 0), scripts.Offer(None, b"1-2", 0, 0, None)], b"-"),
        ),
        ("verdict", [b"absent"], scripts.Judged.ABSENT),
    ],
)
def test_a_reply_is_read(name: str, reply: list[Any], read: object) -> None:
    call = CASES[name][0]
    assert call.read(reply) == read
    if isinstance(call, Fenced):
        assert call.by("role", "token").read(reply) == read


def test_a_heartbeat_is_read() -> None:
    reply = [b"ok", [[b"5-1", [b"rid", b"r1"]], [b"5-2", None]], [b"version", b"3"], b"2", None, b"ended", b"lost"]
    beat = CASES["beat"][0].read(reply)
    assert beat.signals == [(b"5-1", "r1"), (b"5-2", "")]
    assert beat.policy == {"version": "3"}
    ours, ended, lost = scripts.Ownership.OURS, scripts.Ownership.ENDED, scripts.Ownership.LOST
    assert beat.standings == [Standing(ours, b"2"), Standing(ours, None), Standing(ended), Standing(lost)]


def test_a_holder_that_has_lost_its_lease_is_told_so_whatever_it_called() -> None:
    fenced = [call for call, _, _ in CASES.values() if isinstance(call, Fenced)]
    assert len(fenced) == 13
    assert all(call.by("learner", "x").read([b"lost"]) is None for call in fenced)
    assert scripts.advance("step", 3).by("learner", "x").args == ("learner", "x", "step", 3)
    assert scripts.settle([]).by("learner", "x").args == ("x",)


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_word_that_no_header_names_is_an_error(name: str) -> None:
    with pytest.raises(scripts.UnexpectedReply, match="'nonsense'"):
        CASES[name][0].read([b"nonsense", 1, 2])


def test_what_is_left_out_goes_as_an_empty_argument() -> None:
    assert scripts.chunk("r", "n", 0, b"t", b"p", b"s", 0, 3, None).args[-1] == ""
    assert scripts.again("1-1", "r", None).args == (b"1-1", "r", "")
    assert scripts.admit("r", b"h", 1).args == ("r", b"h", 1, b"")
    assert scripts.score("0", b"1-1", "r", 0, b"d", b"q").args[-1] == b""
    assert scripts.verdict("r", b"", 0, False, None, 4, None, []).args == ("r", b"", 0, 0, "", 4, "inactive", "")


def test_fields_of_a_chunk_are_those_that_the_scripts_write() -> None:
    text = "".join(path.read_text() for path in LUA.glob("*.lua"))
    named = {f"{kind}:" for kind in re.findall(r"'([a-z]):' \.\. seq", text)}
    kinds = (record.TOKENS, record.SUPPORT, record.LOGPROBS, record.DIVERGENCE, record.SCORES, record.VIEWED)
    functions = (
        record.tokens_field,
        record.support_field,
        record.logprobs_field,
        record.divergence_field,
        record.scores_field,
        record.view_field,
    )
    assert {field(7) for field in functions} == {f"{kind}7" for kind in named}
    assert [record.part_of(field(7).encode()) for field in functions] == [(kind, 7) for kind in kinds]
    assert [record.part_of(name) for name in (b"head", b"t:", b"t:x", b"xt:7", b"t:1234567890")] == [None] * 5
    assert [record.holds_tokens(name) for name in (b"t:7", b"t:x", b"d:7", b"threshold")] == [True, True, False, False]
