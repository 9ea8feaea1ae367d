"""`katana dead`: lists dead letters; sends the problem of a dead rollout back to the feeder, or removes the rollout.

The record of a dead rollout stays in Redis until an operator decides. Both decisions remove letter and record in one
script (`again.lua`), so the second of two commands finds neither. Sending back adds a request to the stream `again`:
the feeder admits the problem as a new rollout, and the dead one stays dead.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from common.config import Config, ConfigError
from common.pretrained import ModelError
from common.wire.messages import (
    ChunkLogprobs,
    ChunkSupport,
    ChunkTokens,
    Ints,
    MessageError,
    RolloutHead,
    ScoreDivergence,
    ScoreSupport,
    ScoreView,
    Verdict,
    read_number,
    read_rid,
    read_support,
)
from common.wire.plane import Plane
from common.wire.record import DIVERGENCE, LOGPROBS, SCORES, SUPPORT, TOKENS, VIEWED, part_of
from common.wire.scripts import SentBack
from ops.reach.run import opened
from ops.reading.rollouts import find_tokenizer

Decoder = Callable[[list[int]], str]
_AT_A_TIME = 500
# The parts of a chunk: what reads it, and its array with one row per token.
_PARTS: dict[str, tuple[Callable[[bytes], Any], str]] = {
    TOKENS: (ChunkTokens.decode, "tokens"),
    SUPPORT: (read_support, "sampled_logprobs"),
    LOGPROBS: (ChunkLogprobs.decode, "support_logprobs"),
    DIVERGENCE: (ScoreDivergence.decode, "divergence"),
    SCORES: (ScoreSupport.decode, "sampled_logprobs"),
    VIEWED: (ScoreView.decode, "entropy"),
}
_NUMBERS = (b"chunks", b"length", b"scored", b"attempts", b"claims", b"problem")
_TEXTS = (b"entry", b"owner", b"owners", b"worker", b"finish", b"settled", b"threshold", b"report")
_KEPT = {"there": "its record is kept", "open": "it is not in the books yet", "gone": "its record is gone"}
_REFUSED = {
    SentBack.ABSENT: "{entry}: the letter has just been removed, by another command or by this one: it is repeated if "
    "its first answer is lost. Check the list",
    SentBack.OPEN: "{entry}: rollout {rid} is not in the books yet; the feeder books it within seconds",
    SentBack.NONE: "{entry}: the record of rollout {rid} is gone: it was sent back or removed through another letter, "
    "or it did not die. There is nothing to send back",
    SentBack.ENDED: "{entry}: the run admits no more rollouts: its training is over. To continue it: "
    "--resume --set learner.max_steps=N",
}


@dataclass(frozen=True, slots=True)
class Letter:
    """An entry of the stream `dead`. `rid` is empty if it names no rollout."""

    entry: str
    rid: str
    stage: str
    reason: str
    shown: bytes

    @property
    def at(self) -> datetime | None:
        """When it was written, by the clock of Redis; None if the entry id is not a time."""
        try:
            return datetime.fromtimestamp(int(self.entry.partition("-")[0]) / 1000, UTC)
        except (ValueError, OverflowError, OSError):
            return None


def list_letters(config: Config, source: Path, *, as_json: bool) -> None:
    """Print the dead letters, oldest first. Raises ConfigError, see `opened`."""
    with opened(config, source) as run:
        plane = run.plane
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        count = 0
        for letter, facts in _letters(plane):
            if as_json:
                print(json.dumps(_as_dict(letter, facts)))
                continue
            if not count:
                print(_row("entry", "when (UTC)", "stage", "rollout", "attempts", "reason", width))
            count += 1
            when = f"{letter.at:%Y-%m-%d %H:%M:%S}" if letter.at else "?"
            gone = f"{letter.rid} ({facts['record']})" if facts["record"] in ("gone", "open") else letter.rid
            print(_row(letter.entry, when, letter.stage, gone or "–", facts["attempts"] or "–", letter.reason, width))
        waiting = 0 if as_json else plane.requests_waiting()
        if not as_json and not count:
            print(f"no dead letters in run {plane.run_key}")
        if waiting:
            print(f"{waiting} sent back, waiting for the feeder to admit them")


def show(config: Config, source: Path, entry: str) -> None:
    """Print one letter with all its fields, and its rollout's record. Raises ConfigError."""
    with opened(config, source) as run:
        config, plane = run.config, run.plane
        letter = _letter(plane, entry)
        record = plane.rollout(letter.rid) if letter.rid else {}
        [facts] = _facts(plane, [letter])
    lines = [
        ("entry", letter.entry),
        ("when", f"{letter.at:%Y-%m-%d %H:%M:%S} UTC" if letter.at else "?"),
        ("stage", letter.stage),
        ("rollout", f"{letter.rid}, {_KEPT[facts['record']]}" if letter.rid else "none: the letter names no rollout"),
        ("attempts", f"{facts['attempts'] or 0} without progress, {facts['claims'] or 0} claims"),
        ("reason", letter.reason),
        ("shown", repr(letter.shown)),
    ]
    if record:
        lines += _describe(record, _find_decoder(config, config.run_dir))
    for name, text in lines:
        print(f"{name:<11} {text}")


def send_back(config: Config, source: Path, entry: str) -> None:
    """Have the feeder admit the problem of a dead rollout again, exactly once. Raises ConfigError."""
    with opened(config, source) as run:
        config, plane = run.config, run.plane
        letter = _letter(plane, entry)
        if not letter.rid:
            raise ConfigError(f"{entry}: the letter names no rollout, so nothing can be sent back; --drop removes it")
        record = plane.rollout(letter.rid)
        problem = _problem(letter.rid, record, config) if record else 0
        _decide(plane, letter, problem)
    print(f"{letter.rid}: problem {problem} is sent back; the feeder admits it as a new rollout when there is room")


def drop(config: Config, source: Path, entry: str) -> None:
    """Remove a letter and the record of its dead rollout permanently. Raises ConfigError."""
    with opened(config, source) as run:
        plane = run.plane
        letter = _letter(plane, entry)
        _decide(plane, letter, None)
    print(f"removed {entry}" + (f" and the record of rollout {letter.rid}" if letter.rid else ""))


def _decide(plane: Plane, letter: Letter, problem: int | None) -> None:
    answer = plane.send_back(letter.entry, letter.rid, problem)
    if answer is not SentBack.OK:
        raise ConfigError(_REFUSED[answer].format(entry=letter.entry, rid=letter.rid))


def _problem(rid: str, record: dict[bytes, bytes], config: Config) -> int:
    """The problem of a dead rollout: from its head, or if that is broken, from the field `problem` or its number."""
    with contextlib.suppress(MessageError):
        return RolloutHead.decode(record.get(b"head", b"")).problem
    try:
        if b"problem" in record:
            return read_number(record[b"problem"], "problem")
        return read_number(rid[1:].encode(), "number") // config.data.num_generations
    except MessageError as error:
        raise ConfigError(f"{rid}: its head cannot be read, nor its problem derived otherwise ({error})") from error


# --- letters ----------------------------------------------------------------------------------------------------------


def _letters(plane: Plane) -> Iterator[tuple[Letter, dict[str, str]]]:
    """All letters with the facts about their rollouts (`_facts`); reads a page of the stream at a time."""
    begin = "-"
    while True:
        found = plane.dead_letters(begin, "+", _AT_A_TIME)
        letters = [_read(entry, values) for entry, values in found]
        yield from zip(letters, _facts(plane, letters), strict=True)
        if len(found) < _AT_A_TIME:
            return
        begin = "(" + found[-1][0].decode()


def _letter(plane: Plane, entry: str) -> Letter:
    """Raises ConfigError when there is no such letter."""
    if not re.fullmatch("[0-9]{1,19}-[0-9]{1,19}(@[0-9]{1,2})?", entry):
        raise ConfigError(f"{entry!r}: not an entry id, such as 1763841234567-0; see the list")
    found = plane.dead_letters(entry, entry, 1)
    if not found:
        raise ConfigError(f"{entry}: no such letter in run {plane.run_key}; was it sent back or removed already?")
    return _read(*found[0])


def _read(entry: bytes, values: dict[bytes, bytes]) -> Letter:
    rid, reason = values.get(b"rid", b""), values.get(b"reason", b"")
    try:
        named = read_rid(rid)
    except MessageError:
        named = ""
    return Letter(entry.decode(), named, _plain(values.get(b"stage", b"")), _plain(reason), values.get(b"shown", b""))


def _facts(plane: Plane, letters: list[Letter]) -> list[dict[str, str]]:
    """For each letter, of its rollout: `record` is 'there', 'open' (not booked yet), 'gone', or '' if the letter names
    no rollout; attempts and claims are '' if the record has none."""
    return [
        {
            "record": ("open" if one.open else "there" if one.there else "gone") if letter.rid else "",
            "attempts": _plain(one.attempts),
            "claims": _plain(one.claims),
        }
        for letter, one in zip(letters, plane.record_states([letter.rid for letter in letters]), strict=True)
    ]


def _as_dict(letter: Letter, facts: dict[str, str]) -> dict[str, Any]:
    return {
        "entry": letter.entry,
        "at": letter.at.isoformat() if letter.at else None,
        "stage": letter.stage,
        "rid": letter.rid,
        **facts,
        "reason": letter.reason,
        "shown": repr(letter.shown),
    }


def _row(entry: str, when: str, stage: str, rollout: str, attempts: str, reason: str, width: int | None) -> str:
    row = f"{entry:<15}  {when:<19}  {stage:<12}  {rollout:<17}  {attempts:<8}  {reason}"
    return row if width is None or len(row) <= width else row[: max(0, width - 1)] + "…"


def _plain(value: bytes) -> str:
    """Untrusted bytes as text; characters that could control a terminal are escaped."""
    text = value.decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


# --- a rollout's record -----------------------------------------------------------------------------------------------


def _find_decoder(config: Config, folder: Path) -> Decoder | None:
    """Turns token ids into text; None if the run's tokenizer is not available here."""
    try:
        tokenizer = find_tokenizer(config, folder)
    except ModelError:
        return None
    return lambda ids: str(tokenizer.decode(ids))


def _describe(record: dict[bytes, bytes], decode: Decoder | None) -> list[tuple[str, str]]:
    """A record as lines of name and text: the prompt, the progress, and each field, readable or not."""
    read, fields = _read_record(record)
    lines = []
    head, verdict = read.get(b"head"), record.get(b"verdict")
    if isinstance(head, RolloutHead):
        lines += [("arm", head.arm), ("problem", str(head.problem)), ("prompt", _text(head.prompt, decode))]
        lines += [("teacher", head.teacher)] if head.teacher else []
    chunks = sorted((one for one in read.values() if isinstance(one, ChunkTokens)), key=lambda one: one.seq)
    scored = sum(isinstance(one, ScoreDivergence) for one in read.values())
    stored = {name: _plain(record.get(name.encode(), b"?")) for name in ("chunks", "length", "scored")}
    lines += [
        ("chunks", f"{stored['chunks']} stored, {len(chunks)} readable; {stored['scored']} scored, {scored} readable"),
        ("tokens", f"{stored['length']} stored, {sum(len(one.tokens) for one in chunks)} readable"),
        ("verdict", "none" if verdict is None else "dead" if verdict == b"dead" else "given, see its field"),
    ]
    if chunks:
        lines.append(("written", _text(np.concatenate([one.tokens for one in chunks]), decode)))
    lines += [("field", f"{_plain(name):<10} {text}") for name, text in fields]
    return lines + [("mismatch", text) for text in _mismatches(read)]


def _read_record(record: dict[bytes, bytes]) -> tuple[dict[bytes, Any], list[tuple[bytes, str]]]:
    """The readable fields by name; and a line for every field, in order: what it holds, or why it cannot be read."""
    read: dict[bytes, Any] = {}
    lines = []
    for name in sorted(record, key=_order):
        try:
            read[name] = _read_field(name, record[name])
            lines.append((name, f"ok      {_summary(read[name])}"))
        except MessageError as error:
            lines.append((name, f"BROKEN  {error} ({len(record[name])} bytes)"))
    return read, lines


def _order(name: bytes) -> tuple[int, bytes]:
    """Numbers and texts first, then chunk by chunk."""
    part = part_of(name)
    return (part[1], name) if part else (-1, name)


def _read_field(name: bytes, value: bytes) -> Any:
    """Raises MessageError."""
    if name == b"head":
        return RolloutHead.decode(value)
    if name == b"verdict":
        return "dead" if value == b"dead" else Verdict.decode(value)
    if name in _NUMBERS:
        return read_number(value, name.decode())
    if name in _TEXTS:
        return _plain(value)
    part = part_of(name)
    if part is None:
        raise MessageError("not a field of a rollout")
    kind, seq = part
    record = _PARTS[kind][0](value)
    if getattr(record, "seq", seq) != seq:
        raise MessageError(f"belongs to chunk {record.seq}")
    return record


def _summary(value: Any) -> str:
    if isinstance(value, ChunkTokens):
        last = value.start + len(value.tokens)
        finish = f", finish {value.finish}" if value.finish else ""
        return f"tokens {value.start} … {last - 1}, policy version {value.policy_version}, by {value.writer}{finish}"
    if isinstance(value, Verdict):
        return f"{value.finish_reason}: trigger {value.trigger}, keep {value.keep}, train {value.train}"
    if isinstance(value, RolloutHead):
        return f"{value.arm}, problem {value.problem}, prompt of {len(value.prompt)} tokens"
    if isinstance(value, ScoreDivergence):
        return f"{len(value.divergence)} divergences, mean {value.divergence.mean():.3g} nats"
    if isinstance(value, ChunkSupport):
        return f"supports of {len(value.support_ids)} tokens"
    if isinstance(value, ChunkLogprobs):
        return f"log-probabilities of {len(value.support_logprobs)} tokens"
    if isinstance(value, ScoreView):
        return f"view of {len(value.entropy)} tokens, mean entropy {value.entropy.mean():.3g} nats"
    if isinstance(value, ScoreSupport):
        return f"log-probabilities of {len(value.sampled_logprobs)} tokens"
    return str(value)


def _mismatches(read: dict[bytes, Any]) -> Iterator[str]:
    """Chunks whose readable parts differ in their number of tokens."""
    sizes: dict[int, dict[str, int]] = {}
    for name, value in read.items():
        if part := part_of(name):
            kind, seq = part
            sizes.setdefault(seq, {})[_plain(name)] = len(getattr(value, _PARTS[kind][1]))
    for parts in sizes.values():
        if len(set(parts.values())) > 1:
            yield "tokens: " + ", ".join(f"{name} {size}" for name, size in parts.items())


def _text(tokens: Ints, decode: Decoder | None) -> str:
    """The text in quotes, or the ids if they cannot be decoded."""
    ids = [int(token) for token in tokens]
    if decode is not None:
        with contextlib.suppress(OverflowError, ValueError, IndexError):
            return repr(decode(ids))
    return f"token ids {' '.join(map(str, ids))}"
