"""A rollout as people read it: of every token its text, its divergence, and the part of the rollout that it is in.

From a run's folder (`rollouts.jsonl`, `traces.jsonl`) once it is booked, from Redis's hash while it is there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from common.config import Config, ConfigError
from common.pretrained import ModelError, find_model, load_tokenizer, read_facts, text_of
from common.runfiles.lines import rid_of_line, whole_lines
from common.runfiles.names import MODEL
from common.runfiles.records import BookLine, Trace
from common.runfiles.run import RunFolder
from common.wire.messages import ChunkTokens, MessageError, RolloutHead, ScoreDivergence, Verdict, read_number
from common.wire.record import divergence_field, tokens_field

Decode = Callable[[Sequence[int]], str]
PARTS = ("kept", "detection", "overshoot")
_OPEN = "open"
# A decoder's replacement for bytes that are not a character (yet).
_REPLACEMENT = "\ufffd"
_LONGEST_WAIT = 4  # tokens: a character has four bytes at most


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a rollout. The texts of all tokens, one after the other, are the text of the rollout."""

    text: str  # decoded by itself, special tokens by name; "" where the next ones complete its character
    divergence: float | None  # nats; None: not scored (written after the last score)
    part: str  # kept | detection | overshoot
    id: int = -1
    stop: bool = False  # whether it is STOP, which ends a rollout by itself


@dataclass(frozen=True, slots=True)
class WrittenChunk:
    """Who wrote tokens `start` to `start + length`, with which version.

    `writer` is the nonce under which it owned the rollout; its worker's name is known for the last owner alone.
    """

    seq: int
    start: int
    length: int
    policy_version: int
    writer: str
    worker: str = ""


@dataclass(frozen=True, slots=True)
class Reading:
    """A rollout as people read it.

    `keep` and `trigger` in tokens: kept, and seen when the policy fired; both all tokens where it did not. For a
    control rollout they say where the policy would have cut. `finish_reason` is "open" before the verdict.
    """

    rid: str
    arm: str
    prompt: str
    tokens: list[Token]
    finish_reason: str
    keep: int
    trigger: int
    threshold: float | None
    min_window: float | None
    problem: int = 0
    stopped: bool = False  # whether the policy stopped the writing
    generated: int = 0  # tokens written; beyond those in `tokens`, as far as is known
    chunks: tuple[WrittenChunk, ...] = ()  # where it is on record
    worker: str = ""  # that writes it, or was the last to
    versions: tuple[int, int] | None = None  # first and last policy version
    ending: str = ""  # trained | dropped | dead, once it is booked
    reason: str = ""  # why it was dropped or died
    notes: tuple[str, ...] = ()  # what could not be read

    @property
    def finished(self) -> bool:
        return self.finish_reason != _OPEN


# --- tokens to text ---------------------------------------------------------------------------------------------------


# Errors of transformers for an invalid tokenizer.json.
_DAMAGED = (OSError, ValueError, KeyError, TypeError)


def find_tokenizer(config: Config, folder: Path) -> Any:
    """The tokenizer that a run's rollouts are read with: that of its trained model, else the student's.

    `folder`: of the run. The model in it is the student's, and stays when the student's own folder is gone or changed.
    Raises ModelError if neither is available.
    """
    with contextlib.suppress(ModelError, *_DAMAGED):  # none there yet, or a damaged one
        return load_tokenizer(folder / MODEL)
    try:
        return load_tokenizer(find_model(config.student.model, weights=False))
    except _DAMAGED as error:
        raise ModelError(f"{config.student.model}: its tokenizer cannot be read ({error!r:.200})") from error


class Words:
    """The run's tokenizer and its stop ids; if the tokenizer is not available here, token ids in ⟨⟩.

    `folder`: of the run, if it is not where the config says.
    """

    def __init__(self, config: Config, folder: Path | None = None) -> None:
        self.missing = ""  # why there is no tokenizer
        self._tokenizer: Any = None
        try:
            self._tokenizer = find_tokenizer(config, folder or config.run_dir)
        except ModelError as error:
            self.missing = str(error)
        stops: list[int] = []
        models = [config.student.model]
        if config.rollout.stop_set == "union":  # else the writer continues after the teachers'
            models += [teacher.model for teacher in config.all_teachers.values()]
        for model in models:
            with contextlib.suppress(ModelError, OSError):  # without it the teacher's stop is an ordinary token
                stops += read_facts(find_model(model, weights=False)).stop_ids
        self.stop_ids = frozenset(stops)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; unknown ids are shown as ids."""
        known = len(self._tokenizer) if self._tokenizer is not None else 0
        runs = groupby(ids, key=lambda token: 0 <= token < known)
        return "".join(
            text_of(self._tokenizer, list(run)) if is_known else "".join(f"⟨{token}⟩" for token in run)
            for is_known, run in runs
        )


def texts_of(ids: Sequence[int], decode: Decode) -> list[str]:
    """The text of each token, so that all of them together are the text of the whole.

    A token decoded alone may be a part of a character, or lose the space it begins with. So what a token adds to the
    text before it is taken, and an unfinished character belongs to the token that completes it.
    """
    texts: list[str] = []
    # Decoded together: ids[anchor:begin], already emitted and kept as context for the decoder, and the ids after them.
    # `emitted`: characters of this text that were assigned to tokens.
    anchor = begin = emitted = 0
    for place in range(len(ids)):
        whole = decode(ids[anchor : place + 1])
        # Bytes that wait for more are shown as replacement characters at the end.
        sure = whole if place == len(ids) - 1 else whole.rstrip(_REPLACEMENT)
        stuck = sure != whole and place - begin >= _LONGEST_WAIT
        if stuck:  # no character is that long: all but the last are what was written
            sure = whole[:-1]
        texts.append(sure[emitted:])
        emitted = max(emitted, len(sure))
        if sure == whole:
            anchor, begin = begin, place + 1
            emitted = len(decode(ids[anchor:begin]))
        elif stuck and (cut := _settled(ids, anchor, place, sure, decode)):
            anchor = begin = cut
            emitted = 0
    return texts


def _settled(ids: Sequence[int], anchor: int, place: int, sure: str, decode: Decode) -> int | None:
    """Where the tokens end whose text is `sure`; None if a token crosses its end."""
    ends = range(place, place - _LONGEST_WAIT, -1)
    return next((end for end in ends if decode(ids[anchor:end]) == sure), None)


def tokens_of(
    ids: Sequence[int],
    divergence: Sequence[float | None],
    decode: Decode,
    *,
    keep: int,
    trigger: int,
    stop_ids: Collection[int] = (),
) -> list[Token]:
    """Every token with its text, its divergence in nats and its part.

    Tokens 0 … keep-1 are kept, those up to `trigger` are detection, all after it overshoot. `divergence` may be shorter
    than `ids`: the rest is not scored.
    """
    texts = texts_of(ids, decode)
    tokens = []
    for place, (token, text) in enumerate(zip(ids, texts, strict=True)):
        part = PARTS[0 if place < keep else 1 if place < trigger else 2]
        scored = divergence[place] if place < len(divergence) else None
        nats = None if scored is None else float(scored)
        tokens.append(Token(text, nats, part, int(token), int(token) in stop_ids))
    return tokens


# --- from a run's folder ----------------------------------------------------------------------------------------------


def readings_from_folder(
    folder: Path, config: Config, rids: Collection[str] | None = None, *, words: Words | None = None
) -> Iterator[Reading]:
    """Booked rollouts with a trace, in the order of the books; of `rids` alone where they are given.

    Both files are read line by line. What is in `traces.jsonl` and not in the books yet is left out, as is a torn last
    line. Raises ConfigError for a line that cannot be read.
    """
    words = words or Words(config, folder)
    prompts = _Prompts(config, folder)
    booked = RunFolder(folder).rollouts(rids)
    for trace in RunFolder(folder).traces(rids):
        # The same order in both; those without a verdict have no trace.
        line = next((line for line in booked if line.rid == trace.rid), None)
        if line is None:
            return
        yield _reading_of(line, trace, words, prompts)


def booked_line(folder: Path, rid: str) -> BookLine | None:
    """The line of a rollout in `rollouts.jsonl`; None where it is not booked. Raises ConfigError."""
    return next(RunFolder(folder).rollouts({rid}), None)


def reading_of_line(line: BookLine, config: Config) -> Reading:
    """A booked rollout without a trace: the fields of the books, without a text."""
    reading = _booked(line, _Prompts(config, config.run_dir))
    return replace(reading, notes=("no text: it had no verdict, or feeder.record_traces is off", *reading.notes))


def _booked(line: BookLine, prompts: _Prompts) -> Reading:
    """The rollout of a line of the books."""
    return Reading(
        rid=line.rid,
        arm=line.arm,
        prompt=prompts.of(line.problem),
        tokens=[],
        finish_reason=line.finish_reason,
        keep=line.tokens_kept,
        trigger=line.tokens_kept + line.tokens_detection,
        threshold=line.threshold,
        min_window=line.min_window,
        problem=line.problem,
        generated=line.tokens_generated,
        versions=(line.policy_version_first, line.policy_version_last),
        ending=line.ending,
        reason=line.reason,
        notes=(f"no prompt: {prompts.missing}",) if prompts.missing else (),
    )


def audited_chunks(folder: Path, rid: str) -> tuple[WrittenChunk, ...]:
    """Who wrote which chunk of a booked rollout; nothing without `feeder.record_audit`. Raises ConfigError."""
    for audit in RunFolder(folder).audits({rid}):
        return tuple(
            WrittenChunk(one.seq, one.start, one.n, one.version, one.writer)
            for one in audit.chunks
            if one.broken is None
        )
    return ()


def booked_ends(folder: Path) -> tuple[str, str] | None:
    """The lowest and the highest id in `rollouts.jsonl`, which has them in the order of booking; None without any."""
    ends: tuple[str, str] | None = None
    for _, raw in whole_lines(RunFolder(folder).rollouts.path):
        if rid := rid_of_line(raw):
            low, high = ends or (rid, rid)
            ends = min(low, rid, key=_by_number), max(high, rid, key=_by_number)
    return ends


def _by_number(rid: str) -> tuple[int, str]:
    return len(rid), rid


def _reading_of(line: BookLine, trace: Trace, words: Words, prompts: _Prompts) -> Reading:
    ids, divergence, keep, trigger = trace.tokens.tolist(), trace.divergence.tolist(), trace.keep, trace.trigger
    tokens = tokens_of(ids, divergence, words.decode, keep=keep, trigger=trigger, stop_ids=words.stop_ids)
    return replace(_booked(line, prompts), tokens=tokens, keep=keep, trigger=trigger, stopped=trace.stopped)


class _Prompts:
    """Texts of training prompts, from the task; none if the task cannot be loaded here."""

    def __init__(self, config: Config, folder: Path) -> None:
        """`folder`: of the run."""
        from ops.tasks.source import make_task

        self.missing = ""  # why there are none
        self._seed = config.seed
        # Nothing is judged here: the package of a verifier need not be there.
        data = config.data.model_copy(update={"verifier": "none"})
        try:
            tokenizer = find_tokenizer(config, folder) if data.task == "dataset" else None
            self._task = make_task(config.model_copy(update={"data": data}), tokenizer)
        except (ConfigError, ModelError) as error:
            self.missing = str(error)

    def of(self, problem: int) -> str:
        if self.missing:
            return ""
        return self._task.problem(problem, split="train", seed=self._seed).prompt


# --- from Redis -------------------------------------------------------------------------------------------------------


def reading_from_hash(
    fields: Mapping[bytes, bytes], decode: Decode, *, stop_ids: Collection[int] = (), rid: str = ""
) -> Reading:
    """A rollout from its hash, whatever state it is in: being written, judged, dead.

    Unreadable parts are reported in `notes`, and the text after them is left out. `rid` is for a hash whose head
    cannot be read.
    """
    notes: list[str] = []
    head = _decoded(RolloutHead, fields, b"head", notes)
    verdict = _decoded(Verdict, fields, b"verdict", notes) if fields.get(b"verdict", b"dead") != b"dead" else None
    chunks = list(_chunks(fields, notes))
    ids = [token for chunk in chunks for token in chunk.tokens.tolist()]
    divergence = [nats for chunk in chunks for nats in _divergence(chunk, fields, notes)]
    if verdict is not None and len(verdict.tokens) > len(ids):
        ids, divergence = verdict.tokens.tolist(), verdict.divergence.tolist()
    keep, trigger = (verdict.keep, verdict.trigger) if verdict is not None else (len(ids), len(ids))
    versions = [chunk.policy_version for chunk in chunks]
    reading = Reading(
        rid=head.rid if head is not None else rid,
        arm=head.arm if head is not None else "?",
        prompt="" if head is None else decode(head.prompt.tolist()),
        tokens=tokens_of(ids, divergence, decode, keep=keep, trigger=trigger, stop_ids=stop_ids),
        finish_reason=_OPEN,
        keep=keep,
        trigger=trigger,
        threshold=_threshold(fields),
        min_window=None,
        problem=0 if head is None else head.problem,
        generated=max(len(ids), _count(fields, b"length")),
        chunks=tuple(_chunk(one, fields) for one in chunks),
        worker=fields.get(b"worker", b"").decode("ascii", "replace"),
        versions=(min(versions), max(versions)) if versions else None,
        notes=tuple(notes),
    )
    if fields.get(b"verdict") == b"dead":
        return replace(reading, finish_reason="unfinished", ending="dead")
    return reading if verdict is None else _judged(reading, verdict)


def _chunk(chunk: ChunkTokens, fields: Mapping[bytes, bytes]) -> WrittenChunk:
    owned = fields.get(b"owner") == chunk.writer.encode()
    worker = fields.get(b"worker", b"").decode("ascii", "replace") if owned else ""
    return WrittenChunk(chunk.seq, chunk.start, len(chunk.tokens), chunk.policy_version, chunk.writer, worker)


def _judged(reading: Reading, verdict: Verdict) -> Reading:
    return replace(
        reading,
        finish_reason=verdict.finish_reason,
        threshold=verdict.threshold,
        min_window=verdict.min_window,
        stopped=verdict.stopped,
        generated=max(reading.generated, verdict.generated or 0),
        versions=(verdict.first_version, verdict.last_version),
    )


def _decoded(record: Any, fields: Mapping[bytes, bytes], name: bytes, notes: list[str]) -> Any:
    try:
        return record.decode(fields.get(name, b""))
    except MessageError as error:
        notes.append(f"{name.decode()}: {error}")
        return None


def _chunks(fields: Mapping[bytes, bytes], notes: list[str]) -> Iterator[ChunkTokens]:
    """Stored chunks in order, up to the first that cannot be read."""
    for seq in range(_count(fields, b"chunks")):
        chunk = _decoded(ChunkTokens, fields, tokens_field(seq).encode(), notes)
        if chunk is None:
            return
        yield chunk


def _divergence(chunk: ChunkTokens, fields: Mapping[bytes, bytes], notes: list[str]) -> Iterable[float | None]:
    """Of every token of a chunk; None for one that is not scored, or whose score does not fit."""
    unscored: list[float | None] = [None] * len(chunk.tokens)
    name = divergence_field(chunk.seq).encode()
    if name not in fields:
        return unscored
    score = _decoded(ScoreDivergence, fields, name, notes)
    if score is None:
        return unscored
    if len(score.divergence) != len(chunk.tokens):
        notes.append(f"{name.decode()}: {len(score.divergence)} divergences of {len(chunk.tokens)} tokens")
        return unscored
    divergence: list[float | None] = score.divergence.tolist()
    return divergence


def _count(fields: Mapping[bytes, bytes], name: bytes) -> int:
    try:
        return read_number(fields.get(name, b"0"), name.decode(), high=1 << 24)
    except MessageError:
        return 0


def _threshold(fields: Mapping[bytes, bytes]) -> float | None:
    """What it is judged by, fixed by its first score; None before that, and while the rule is inactive."""
    try:
        return float(fields.get(b"threshold", b"inactive"))
    except ValueError:
        return None
