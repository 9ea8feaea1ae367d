"""`katana watch`: one rollout, its text with the divergence of each token, the cut, and its writers.

From Redis while its record is there, that is from its first chunk until it is booked; then from the run's folder.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import redis
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from actors.cursors import Cursors
from common.config import Config, ConfigError
from common.rids import number_of, rid_of
from common.wire.messages import MessageError, read_rid
from ops.live.coloured import has_colours, legend, plain, text_of
from ops.reach.run import Away, Outlook
from ops.reading.rollouts import (
    Reading,
    Words,
    audited_chunks,
    booked_ends,
    booked_line,
    reading_from_hash,
    reading_of_line,
    readings_from_folder,
)

_REFRESH_S = 0.5


def watch(config: Config, source: Path, rid: str, *, as_json: bool, follow: bool) -> int:
    """Show a rollout, by its id or its number; with `follow` again and again until it has its verdict.

    `source` is the file that the config was read from. Raises ConfigError: no such rollout, or no place to read it
    from.
    """
    watcher = Watcher(config, source, _rid(rid))
    try:
        if not follow:
            _print(watcher.read(), as_json)
        elif as_json:
            _follow(watcher, lambda reading: print(json.dumps(as_dict(reading)), flush=True))
        else:
            _follow_in_terminal(watcher)
    finally:
        watcher.close()
    return 0


def _rid(text: str) -> str:
    if text.isascii() and text.isdigit() and len(text) <= 12:
        return rid_of(int(text))
    try:
        return read_rid(text.encode())
    except MessageError as error:
        raise ConfigError(f"{text!r:.60}: not a rollout's id, which is like r000000012, or 12 for short") from error


class Watcher:
    """Reads one rollout wherever it is now."""

    def __init__(self, config: Config, source: Path, rid: str) -> None:
        self._config, self._folder, self.rid = config, config.run_dir, rid
        self._outlook = Outlook(config, source)
        self._words = Words(config)
        self.away = ""  # why Redis could not be seen at the last reading

    def read(self) -> Reading:
        """Raises ConfigError when it is in neither place.

        Redis first: a record is deleted when its line is on disk, so a rollout that is gone from Redis is in the books.
        """
        self.away, admitted = "", Cursors([0], lambda number: 0)
        try:
            run = self._outlook.look()
            plane, parts = run.plane, run.plane.parts
            fields = parts[plane.place_of(self.rid)].client.hgetall(run.key(f"rollout:{self.rid}"))
            if fields:
                return self._live(fields)
            counts = [int(part.client.get(run.key("cursor")) or 0) for part in parts]
            admitted = Cursors(counts, lambda number: plane.place_of(rid_of(number)))
        except Away as error:
            self.away = str(error)
        except (redis.exceptions.RedisError, OSError) as error:
            self.away = f"Redis does not answer ({error})"
        booked = self._booked()
        if booked is None:
            raise ConfigError(self._unknown(admitted))
        return booked

    def close(self) -> None:
        self._outlook.close()

    def _live(self, fields: dict[bytes, bytes]) -> Reading:
        words = self._words
        reading = reading_from_hash(fields, words.decode, stop_ids=words.stop_ids, rid=self.rid)
        line = booked_line(self._folder, self.rid) if reading.ending == "dead" else None
        return reading if line is None else replace(reading, reason=line.reason)

    def _booked(self) -> Reading | None:
        line = booked_line(self._folder, self.rid)
        if line is None:
            return None
        found = next(readings_from_folder(self._folder, self._config, {self.rid}, words=self._words), None)
        reading = reading_of_line(line, self._config) if found is None else found
        return replace(reading, chunks=audited_chunks(self._folder, self.rid))

    def _unknown(self, admitted: Cursors) -> str:
        """The message for a rollout that was not found."""
        parts = [f"no rollout {self.rid} in run {self._config.name!r}"]
        if number_of(self.rid) in admitted:
            parts.append(f"it was admitted and has ended, but is not in the books in {self._folder}")
        elif admitted.end:
            parts.append(f"admitted are {rid_of(0)} … {rid_of(admitted.end - 1)}")
        else:
            ends = booked_ends(self._folder)
            parts.append(
                f"booked are, lowest to highest, {ends[0]} … {ends[1]}"
                if ends
                else f"and none is booked in {self._folder}"
            )
        if self.away:
            parts.append(f"those that are not booked cannot be seen: {self.away}")
        return "; ".join(parts)


def _follow(watcher: Watcher, show: Callable[[Reading], object]) -> Reading:
    """Show the rollout whenever more of it is known, until it has its verdict; a Redis that goes away is waited for."""
    shown: Reading | None = None
    waiting_for = ""
    while True:
        try:
            reading = watcher.read()
        except ConfigError:
            if shown is None or not watcher.away:
                raise
            if watcher.away != waiting_for:
                print(f"waiting: {watcher.away}", file=sys.stderr)
            waiting_for = watcher.away
            time.sleep(_REFRESH_S)
            continue
        waiting_for = ""
        if reading != shown:
            show(reading)
            shown = reading
        if reading.finished:
            return reading
        time.sleep(_REFRESH_S)


def _follow_in_terminal(watcher: Watcher) -> None:
    console = Console()
    if not console.is_terminal:  # a file gets the whole text, once
        _print(_follow(watcher, lambda reading: None), as_json=False)
        return
    with Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop") as live:
        reading = _follow(watcher, lambda one: live.update(picture(one, has_colours(console)), refresh=True))
    console.print(picture(reading, has_colours(console)))


# --- showing ----------------------------------------------------------------------------------------------------------


def _print(reading: Reading, as_json: bool) -> None:
    if as_json:
        print(json.dumps(as_dict(reading)))
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(picture(reading, has_colours(console)))


def as_dict(reading: Reading) -> dict[str, Any]:
    """For JSON: what the picture shows, and of every token its position, id, text, divergence and part."""
    value = asdict(reading)
    value["tokens"] = [
        {
            "position": place,
            "id": token.id,
            "text": token.text,
            "divergence": token.divergence,
            "kept": token.part == "kept",
            "part": token.part,
            "stop": token.stop,
        }
        for place, token in enumerate(reading.tokens)
    ]
    return value


def picture(reading: Reading, colours: bool) -> Group:
    """A rollout for a terminal."""
    facts = Table.grid(padding=(0, 2))
    for name, text in _facts(reading):
        facts.add_row(Text(name, "bold" if colours else ""), Text(text))
    parts: list[Any] = [facts, Text()]
    if reading.prompt:
        parts += [Text(f"prompt  {plain(reading.prompt)}", "dim" if colours else ""), Text()]
    parts += [text_of(reading, colours), Text(), legend(colours)]
    parts += [Text(f"note: {plain(note)}") for note in reading.notes]
    return Group(*parts)


def _facts(reading: Reading) -> list[tuple[str, str]]:
    scored = sum(token.divergence is not None for token in reading.tokens)
    facts = [
        ("rollout", f"{plain(reading.rid)}, {plain(reading.arm)} arm, problem {reading.problem}"),
        ("written", f"{reading.generated} tokens, {scored} scored"),
        ("verdict", _verdict(reading)),
        ("threshold", "inactive" if reading.threshold is None else f"{reading.threshold:.3g} nats"),
    ]
    if reading.min_window is not None:
        facts.append(("min window", f"{reading.min_window:.3g} nats"))
    if reading.versions is not None:
        first, last = reading.versions
        facts.append(("version", str(first) if first == last else f"{first} … {last}"))
    if reading.worker:
        facts.append(("held by", plain(reading.worker)))
    return [*facts, *_chunk_facts(reading)]


def _verdict(reading: Reading) -> str:
    if not reading.finished:
        return "none yet: being written"
    text = f"{plain(reading.finish_reason)}: {reading.keep} kept"
    if reading.trigger > reading.keep:
        text += f", fired when {reading.trigger} were seen"
    if reading.ending:
        text += f"; {plain(reading.ending)}" + (f" ({plain(reading.reason)})" if reading.reason else "")
    return text


def _chunk_facts(reading: Reading) -> list[tuple[str, str]]:
    """Neighbouring chunks of one writer and one version in one line."""
    facts = []
    for (version, writer, worker), group in groupby(
        reading.chunks, key=lambda chunk: (chunk.policy_version, chunk.writer, chunk.worker)
    ):
        chunks = list(group)
        first, last = chunks[0], chunks[-1]
        name = f"chunks {first.seq}–{last.seq}" if last is not first else f"chunk {first.seq}"
        by = f"{plain(worker)} (as owner {plain(writer)})" if worker else f"owner {plain(writer)}"
        place = f"tokens {first.start} … {last.start + last.length - 1}"
        facts.append((name, f"{place}, policy version {version}, by {by}"))
    return facts
