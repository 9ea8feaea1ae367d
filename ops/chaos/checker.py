"""Checks a finished run, with or without faults: was anything lost, trained twice, or trained past its verdict?

It reads only the run's folder and its Redis. Each violation names its statement:

    ended_once           every admitted rollout has exactly one line in rollouts.jsonl, and ledger.json counts the same
    trained_once         no rollout is trained twice; steps are 1 … n, and those of metrics.jsonl; versions never fall
    booked_as_trained    what is booked as trained is what the surviving lineage trained
    within_verdict       the tokens trained are the verdict's, and generated = kept + detection + overshoot
    verdict_replayed     each verdict is the rule, replayed offline on the stored divergences and threshold
    rewards_agree        standings and advantages are those of the verdicts, and a group's members agree
    tokens_as_generated  tokens and divergences judged and trained are those of the stored chunks
    owners_only          each chunk was written by the rollout's owner at that time
    dropped_with_cause   drops are stale, empty, run_end, or lost with Redis; only poisoned rollouts are dead
    drained              nothing is left in Redis: entries, pending ones, open rollouts, hashes of rollouts not dead
    redis_ledger         the ledger in Redis counts what the books hold
    dead_letters         the dead stream holds only what was broken on purpose
    record               a file, or a line of one, is missing or cannot be read

    written_by_its_version   (`written.py`, where vLLM servers write) chunks are of the weights that they name

The first nine come from the folder (`check_folder`), the next three from Redis (`check_redis`), `record` from both.
Without audit.jsonl, `owners_only` and `tokens_as_generated` are not checked.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice, pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import redis

from actors.cursors import Cursors
from common import policies
from common.config import Config, Termination
from common.draws import rollout_seed
from common.policy_names import OF_WINDOWS
from common.rids import number_of, rid_of
from common.runfiles.names import CONFIG, LEDGER, ROLLOUTS, TRACES, TRAINED
from common.runfiles.records import ENDS_BY_ITSELF, BookLine, Chunk, Trace
from common.termination import Kat, kat_verdict
from common.wire.messages import Floats, row_digest
from common.wire.plane import Plane
from common.wire.planes import open_planes, place_among
from ops.chaos.records import Records, Violation, read_records
from ops.chaos.rewards import reward_faults

_MOST_NAMED = 1000  # rollouts named one by one where a whole range is missing


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the faults injected into a run excuse; by default nothing."""

    poisoned: frozenset[str] = frozenset()  # rollouts whose record was corrupted on purpose
    lost: frozenset[str] = frozenset()  # rollouts that were open when Redis lost its data
    rolled_back: frozenset[str] = frozenset()  # rollouts of steps whose checkpoint was torn on purpose
    calm_cursor: int | None = None  # rollouts admitted before this number must have ended
    broken_notices: int = 0  # unreadable entries put into streams on purpose


@dataclass(frozen=True, slots=True)
class Counts:
    """The result of a run, for a table."""

    rollouts: int
    trained: int
    dropped: dict[str, int]
    dead: int
    cut: int
    steps: int


def check_folder(folder: Path, allowed: Allowed | None = None) -> list[Violation]:
    """Every violation that a finished run's folder shows."""
    allowed, records = allowed or Allowed(), read_records(folder)
    found = list(records.broken)
    for statement in (
        _ended_once,
        _trained_once,
        _booked_as_trained,
        _within_verdict,
        _verdict_replayed,
        _rewards_agree,
        _tokens_as_generated,
        _owners_only,
        _dropped_with_cause,
    ):
        found += statement(records, allowed)
    return found


def check_redis(
    clients: Sequence[redis.Redis], run_key: str, folder: Path, allowed: Allowed | None = None
) -> list[Violation]:
    """Every violation that a finished run's keys on its data servers show. `folder` is the run's, for its config and
    books.

    Raises redis.exceptions.RedisError when Redis does not answer.
    """
    allowed, records = allowed or Allowed(), read_records(folder, CONFIG, ROLLOUTS)
    if records.config is None:
        return records.broken
    plane = open_planes(records.config, clients, run_key)
    return [
        *records.broken,
        *chain.from_iterable(_drained(part, records, allowed) for part in plane.parts),
        *_redis_ledger(plane, records),
        *_dead_letters(plane, allowed),
    ]


def count_folder(folder: Path) -> Counts:
    """Counts over the lines that can be read."""
    records = read_records(folder, ROLLOUTS, TRAINED, TRACES)
    lines = records.books.values()
    endings = Counter(line.ending for line in lines)
    return Counts(
        rollouts=len(lines),
        trained=endings["trained"],
        dropped=dict(sorted(Counter(line.reason for line in lines if line.ending == "dropped").items())),
        dead=endings["dead"],
        cut=sum(trace.stopped for trace in records.traces.values()),
        steps=len(records.trained),
    )


# --- statements about the folder ----------------------------------------------------------------------------------


def _ended_once(records: Records, allowed: Allowed) -> Iterator[Violation]:
    for rid, times in records.booked.items():
        if times > 1:
            yield Violation("ended_once", rid, f"booked {times} times")
    ledger = records.ledger
    if ledger is None:
        return
    # Of several servers each admitted its own in their order; the numbers of all need not be without a gap.
    servers = ledger.by_server or [ledger.admitted]
    admitted = Cursors(servers, lambda number: place_among(len(servers), rid_of(number)))
    missing = (rid_of(number) for number in range(admitted.end) if number in admitted)
    for rid in islice((rid for rid in missing if rid not in records.books), _MOST_NAMED):
        yield Violation("ended_once", rid, "admitted, and never booked")
    for rid in records.books:
        if number_of(rid) not in admitted:
            yield Violation("ended_once", rid, f"booked, and not among the {ledger.admitted} admitted")
    if ledger.open:
        yield Violation("ended_once", "", f"ledger.json: {ledger.open} rollouts are open")
    yield from _same_counts("ended_once", f"{LEDGER}: ", ledger.counts, records)


def _same_counts(statement: str, where: str, ledger: Mapping[str, int], records: Records) -> Iterator[Violation]:
    """A ledger against the books, by ledger field."""
    counts = Counter(line.ledger_field for line in records.books.values())
    counts["admitted"] = sum(counts.values())
    for name in sorted(set(ledger) | set(counts)):
        if ledger.get(name, 0) != counts[name]:
            yield Violation(statement, "", f"{where}{name} {ledger.get(name, 0)}, the books: {counts[name]}")


def _trained_once(records: Records, allowed: Allowed) -> Iterator[Violation]:
    trained_in: dict[str, int] = {}
    for step in records.trained:
        for rid in step.rids:
            if rid in trained_in:
                yield Violation("trained_once", rid, f"trained in step {trained_in[rid]} and in step {step.step}")
            trained_in[rid] = step.step
    for place, step in enumerate(records.trained, 1):
        if step.step != place:
            yield Violation("trained_once", "", f"trained.jsonl: line {place} is step {step.step}")
            break
    for before, after in pairwise(records.trained):
        if after.policy_version < before.policy_version:
            versions = f"{before.policy_version} to {after.policy_version}"
            yield Violation("trained_once", "", f"step {after.step}: the policy version falls from {versions}")
    told = [(one.step, one.policy_version, len(one.rids), sum(one.tokens)) for one in records.trained]
    found = [(one.step, one.policy_version, one.trajectories, one.tokens_trained) for one in records.steps]
    if told != found:
        differing = {step for step, *_ in set(told) ^ set(found)}
        yield Violation("trained_once", "", f"trained.jsonl and metrics.jsonl differ in steps {sorted(differing)[:10]}")


def _booked_as_trained(records: Records, allowed: Allowed) -> Iterator[Violation]:
    booked = {rid for rid, line in records.books.items() if line.ending == "trained"}
    trained = {rid for step in records.trained for rid in step.rids}
    for rid in sorted(booked - trained - allowed.rolled_back):
        yield Violation("booked_as_trained", rid, "booked as trained, and not in the lineage: its work is lost")
    for rid in sorted(trained - booked):
        line = records.books.get(rid)
        # A checkpoint may have been written at the moment when Redis lost the run.
        if not (line is not None and line.reason == "lost" and rid in allowed.lost):
            ending = f"booked as {line.ledger_field}" if line else "not booked"
            yield Violation("booked_as_trained", rid, f"trained, and {ending}")


def _within_verdict(records: Records, allowed: Allowed) -> Iterator[Violation]:
    for step in records.trained:
        for rid, tokens, digest in zip(step.rids, step.tokens, step.digests, strict=True):
            trace = records.traces.get(rid)
            if trace is not None and tokens != trace.train:
                yield Violation("within_verdict", rid, f"{tokens} tokens trained, {trace.train} by its verdict")
            elif trace is not None and digest != row_digest(trace.tokens[:tokens]):
                yield Violation("within_verdict", rid, "the tokens trained are not those of its verdict")
    settings = records.config.termination if records.config is not None else None
    for rid, trace in records.traces.items():
        limit = len(trace.tokens) if settings is not None and settings.trains_whole(trace.arm) else trace.keep
        if settings is not None and trace.train != limit:
            yield Violation("within_verdict", rid, f"its verdict trains {trace.train} tokens instead of {limit}")
    for line in records.books.values():
        yield from _line_fits(line, records.traces.get(line.rid))


def _line_fits(line: BookLine, trace: Trace | None) -> Iterator[Violation]:
    """The counts of a line, by themselves and as its verdict has them."""
    parts = line.tokens_kept + line.tokens_detection + line.tokens_overshoot
    if line.tokens_generated != parts:
        detail = f"{line.tokens_generated} tokens generated, kept, detection and overshoot are {parts}"
        yield Violation("within_verdict", line.rid, detail)
    if line.ending != "trained" and line.tokens_trained:
        yield Violation("within_verdict", line.rid, f"{line.ending} with {line.tokens_trained} tokens trained")
    if trace is None or not line.judged:
        return
    wanted = {
        "tokens_kept": trace.keep,
        "tokens_detection": trace.trigger - trace.keep,
        "tokens_trained": trace.train if line.ending == "trained" else 0,
        "tokens_trainable": trace.train,
    }
    for name, number in wanted.items():
        found = getattr(line, name)
        if found is not None and found != number:  # None: not in books older than the field
            detail = f"{name} {found} on record, {number} by its verdict"
            yield Violation("within_verdict", line.rid, detail)


def _verdict_replayed(records: Records, allowed: Allowed) -> Iterator[Violation]:
    for trace in records.judged_again:
        yield Violation("verdict_replayed", trace.rid, "two verdicts on record, and they differ")
    if records.config is None:
        return
    for line in records.books.values():
        judged = line.judged or line.ending == "trained"
        if judged and line.rid not in records.traces and records.config.feeder.record_traces:
            yield Violation("verdict_replayed", line.rid, f"booked as {line.ledger_field}, without a trace")
    for rid, trace in records.traces.items():
        yield from _rule_holds(trace, records.books.get(rid), records.config)
    for audit in records.audits:
        verdict = records.traces.get(audit.rid)
        if verdict is None or audit.rid in allowed.poisoned or audit.rid not in records.books:
            continue
        if _threshold(audit.threshold) != verdict.threshold:
            detail = f"judged by threshold {verdict.threshold}, its record says {audit.threshold!r:.40}"
            yield Violation("verdict_replayed", audit.rid, detail)
        if not audit.verdict and records.books[audit.rid].judged:
            yield Violation("verdict_replayed", audit.rid, "judged, and its record holds no verdict")


def _rule_holds(trace: Trace, line: BookLine | None, config: Config) -> Iterator[Violation]:
    settings = config.termination
    if policies.find(settings.policy).reads and trace.view is None:
        yield Violation("verdict_replayed", trace.rid, f"its trace lacks what policy {settings.policy} reads")
        return
    rule = _replay(trace, config)
    total = len(trace.tokens)
    stopped = settings.stops(trace.arm) and rule.trigger is not None
    if not policies.find(settings.policy).possible(settings, trace.threshold):
        yield Violation("verdict_replayed", trace.rid, f"policy {settings.policy} never gives {trace.threshold}")
    trigger, keep = (total, total) if rule.trigger is None or rule.keep is None else (rule.trigger, rule.keep)
    wanted = {"trigger": trigger, "keep": keep, "stopped": stopped}
    for name, number in wanted.items():
        if getattr(trace, name) != number:
            yield Violation("verdict_replayed", trace.rid, f"{name} {getattr(trace, name)}, by the rule {number}")
    reasons = (rule.reason,) if stopped else ENDS_BY_ITSELF
    if trace.finish_reason not in reasons:
        detail = f"finish_reason {trace.finish_reason!r:.40}, by the rule {' or '.join(reasons)}"
        yield Violation("verdict_replayed", trace.rid, detail)
    if line is None or not line.judged:
        return
    same = {
        "arm": trace.arm,
        "problem": trace.problem,
        "finish_reason": trace.finish_reason,
        "threshold": trace.threshold,
        "policy_version_first": trace.version,
    }
    for name, value in same.items():
        if getattr(line, name) != value:
            detail = f"{name} {getattr(line, name)!r:.40} on record, {value!r:.40} by its verdict"
            yield Violation("verdict_replayed", trace.rid, detail)
    if not rule.has_minimum(line.min_window):
        detail = f"min_window {line.min_window} on record, {rule.min_window} by the rule"
        yield Violation("verdict_replayed", trace.rid, detail)
    if not stopped and line.tokens_generated != total:
        detail = f"not stopped, and judged on {total} of {line.tokens_generated} tokens"
        yield Violation("verdict_replayed", trace.rid, detail)


@dataclass(frozen=True, slots=True)
class _Rule:
    """The policy's verdict on a rollout. `doubt`: the possible error of min_window, in nats."""

    trigger: int | None
    keep: int | None
    reason: str
    min_window: float | None
    doubt: float

    def has_minimum(self, value: float | None) -> bool:
        if value is None or self.min_window is None:
            return value is self.min_window
        return abs(value - self.min_window) <= self.doubt


def _replay(trace: Trace, config: Config) -> _Rule:
    settings = config.termination
    policy = policies.find(settings.policy)
    sign, stopped = -1 if policy.looks_high else 1, settings.stops(trace.arm)
    tokens = policies.ScoredTokens(trace.tokens, trace.divergence, trace.view)
    values = sign * tokens.row(policy.windows_of)
    if settings.policy in OF_WINDOWS and issubclass(policy, policies.OfWindows):
        number = None if trace.threshold is None else sign * trace.threshold
        trigger, keep, minimum, doubt = _kat(values, settings, number)
        if not stopped and trigger is not None:
            # Its minimum is taken over the whole rollout: nothing stopped it.
            _, _, minimum, doubt = _kat(values, settings, None)
        return _Rule(trigger, keep, policy.reason, _signed(minimum, sign), doubt)
    seed = rollout_seed(config.seed, number_of(trace.rid))
    judge = policy(settings, policies.Situation(trace.threshold, seed, config.rollout.max_completion_length))
    fired = judge.feed_tokens(tokens)
    _, _, minimum, doubt = _kat(values, settings, None)
    minimum = judge.min_window if stopped and isinstance(judge, Kat) else _signed(minimum, sign)
    if fired is None:
        return _Rule(None, None, "", minimum, doubt)
    return _Rule(fired.trigger, fired.keep, fired.reason, minimum, doubt)


def _signed(value: float | None, sign: int) -> float | None:
    return None if value is None else sign * value


def _kat(
    values: Floats, settings: Termination, threshold: float | None
) -> tuple[int | None, int | None, float | None, float]:
    """`kat_verdict` and the possible error of its min_window. All values negative: the mirrored rule.

    kat_verdict takes a microsecond a token, ten seconds for ten million: windows are averaged by numpy, and the rule
    itself is asked where one of them lies so near the threshold that rounding could decide.
    """
    window, patience, stride = settings.window, settings.patience, settings.stride
    sums = np.concatenate(([0.0], np.cumsum(values, dtype=np.float64)))
    ends = np.arange(settings.grace_tokens + window, len(sums), stride)
    if not len(ends):
        return None, None, None, 0.0
    means: npt.NDArray[np.float64] = (sums[ends] - sums[ends - window]) / window
    # Rounding of the sums, and the 2^-60 nats per token that the rule cuts off.
    doubt = 4 * len(sums) * 2.0**-53 * abs(float(sums[-1])) / window + 2.0**-58
    if threshold is None:
        return None, None, float(means.min()), doubt
    if float(np.abs(means - threshold).min()) <= doubt:
        trigger, keep, minimum = kat_verdict(
            values,
            window=window,
            patience=patience,
            stride=stride,
            grace_tokens=settings.grace_tokens,
            threshold=threshold,
        )
        return trigger, keep, minimum, doubt
    below = np.concatenate(([0], np.cumsum(means < threshold)))
    full = np.flatnonzero(below[patience:] - below[:-patience] == patience)
    if not len(full):
        return None, None, float(means.min()), doubt
    first = int(full[0])
    last = first + patience - 1
    return int(ends[last]), int(ends[first]) - window, float(means[: last + 1].min()), doubt


def _rewards_agree(records: Records, allowed: Allowed) -> Iterator[Violation]:
    for rid, detail in reward_faults(records, allowed.lost):
        yield Violation("rewards_agree", rid, detail)


def _threshold(text: str | None) -> float | None:
    """A rollout's threshold as its hash has it; NaN, which equals nothing, if it is not a number."""
    if text is None or text == "inactive":
        return None
    try:
        return float(text)
    except ValueError:
        return math.nan


def _tokens_as_generated(records: Records, allowed: Allowed) -> Iterator[Violation]:
    if not records.audited:
        return
    seen = {audit.rid for audit in records.audits}
    for rid, line in records.books.items():
        # A lost Redis takes hashes with it; else a trained rollout has its hash until it is booked.
        if line.ending == "trained" and rid not in seen and rid not in allowed.lost:
            yield Violation("tokens_as_generated", rid, "trained, and its record was not audited")
    for audit in records.audits:
        if audit.rid in allowed.poisoned or audit.rid not in records.books:
            continue
        broken = [chunk for chunk in audit.chunks if chunk.broken is not None]
        for chunk in broken:
            yield Violation("tokens_as_generated", audit.rid, f"chunk {chunk.seq}: {chunk.broken}")
        if not broken:
            for detail in _chunks_fit(audit.chunks, records.books[audit.rid], records.traces.get(audit.rid)):
                yield Violation("tokens_as_generated", audit.rid, detail)


def _chunks_fit(chunks: list[Chunk], line: BookLine, trace: Trace | None) -> Iterator[str]:
    starts = list(accumulate((chunk.n for chunk in chunks), initial=0))
    for seq, (chunk, start) in enumerate(zip(chunks, starts, strict=False)):
        if (chunk.seq, chunk.start) != (seq, start) or chunk.n == 0:
            yield f"chunk {seq}: seq {chunk.seq}, {chunk.n} tokens from {chunk.start}, expected some from {start}"
            return
        if chunk.finish is not None and seq < len(chunks) - 1:
            yield f"chunk {seq}: ends by {chunk.finish!r:.40}, and is not the last"
    if line.tokens_generated < starts[-1]:
        yield f"{starts[-1]} tokens stored, {line.tokens_generated} generated on record"
    if trace is None or not line.judged:
        return
    if len(trace.tokens) not in starts[1:]:
        yield f"judged on {len(trace.tokens)} tokens, its chunks end at {starts[1:]}"
        return
    covered = chunks[: starts.index(len(trace.tokens))]
    for chunk in covered:
        part = slice(chunk.start, chunk.start + chunk.n)
        if chunk.tokens != row_digest(trace.tokens[part]):
            yield f"chunk {chunk.seq}: its tokens are not those that were judged"
        if chunk.divergence != row_digest(trace.divergence[part]):
            yield f"chunk {chunk.seq}: its divergences are not those that were judged"
    versions = [chunk.version for chunk in covered]
    if (min(versions), max(versions)) != (line.policy_version_first, line.policy_version_last):
        on_record = f"{line.policy_version_first} to {line.policy_version_last}"
        yield f"versions {min(versions)} to {max(versions)} wrote its chunks, {on_record} on record"
    by_itself = trace.finish_reason in ENDS_BY_ITSELF
    if by_itself and (len(covered) < len(chunks) or covered[-1].finish != trace.finish_reason):
        ending = f"{chunks[-1].finish!r:.40} after {len(chunks)} chunks"
        yield f"judged as {trace.finish_reason!r:.40} after {len(covered)} chunks; it ended by {ending}"


def _owners_only(records: Records, allowed: Allowed) -> Iterator[Violation]:
    for audit in records.audits:
        if audit.rid in allowed.poisoned or audit.rid not in records.books:
            continue
        if any(after[1] < before[1] for before, after in pairwise(audit.owners)):
            yield Violation("owners_only", audit.rid, "a later owner was given an earlier chunk than the one before it")
            continue
        for chunk in audit.chunks:
            # Chunks only grow in number: the last owner that took the rollout at chunk f or before writes chunk f.
            owner = next((nonce for nonce, first in reversed(audit.owners) if first <= chunk.seq), None)
            if chunk.broken is None and chunk.writer != owner:
                detail = f"chunk {chunk.seq} was written by {chunk.writer!r:.40}, its owner is {owner!r:.40}"
                yield Violation("owners_only", audit.rid, detail)


def _dropped_with_cause(records: Records, allowed: Allowed) -> Iterator[Violation]:
    for line in records.books.values():
        detail = _fault(line, records.traces.get(line.rid), records.config, allowed)
        if detail:
            yield Violation("dropped_with_cause", line.rid, detail)


def _fault(line: BookLine, trace: Trace | None, config: Config | None, allowed: Allowed) -> str:
    """What is wrong with a rollout's ending; '' if nothing."""
    most = _max_staleness(config)
    stale = line.staleness is not None and line.staleness > most
    if line.ending == "trained":
        return f"trained {line.staleness} versions late, at most {most} are allowed" if stale else ""
    if line.ending == "dead":
        return "" if line.rid in allowed.poisoned else f"dead ({line.reason:.40}), and it was not poisoned"
    if line.ending != "dropped" or line.reason not in ("stale", "empty", "run_end", "lost"):
        return f"ended as {line.ending:.40} ({line.reason:.40})"
    if line.reason == "stale" and not stale and config is not None:
        return f"dropped as stale, {line.staleness} versions late"
    if line.reason == "empty" and trace is not None and trace.train:
        return f"dropped as empty, with {trace.train} tokens to train on"
    if line.reason == "lost" and line.rid not in allowed.lost:
        return "lost, and Redis lost no data while it was open"
    early = allowed.calm_cursor is not None and number_of(line.rid) < allowed.calm_cursor
    if line.reason == "run_end" and early:
        return f"open at the end of the run, though admitted before number {allowed.calm_cursor}"
    return ""


def _max_staleness(config: Config | None) -> float:
    """In versions. A deterministic run trains whatever its step asked for, however late it comes."""
    return math.inf if config is None or config.deterministic else config.learner.max_staleness


# --- statements about Redis ---------------------------------------------------------------------------------------


def _drained(plane: Plane, records: Records, allowed: Allowed) -> Iterator[Violation]:
    client = plane.client
    state = client.get(plane.key("run"))
    if state != b"ended":
        yield Violation("drained", "", f"the run is {state.decode() if state else 'gone'}, not ended")
    pipe = client.pipeline(transaction=False)
    for stream, group in plane.groups:
        pipe.xrange(plane.key(stream), count=_MOST_NAMED)
        pipe.xpending(plane.key(stream), group)
    answers = pipe.execute(raise_on_error=False)  # a stream or a group that is not there holds nothing
    for (stream, group), entries, pending in zip(plane.groups, answers[::2], answers[1::2], strict=True):
        for entry, values in [] if isinstance(entries, Exception) else entries:
            rid = values.get(b"rid", b"").decode("ascii", "replace")
            if rid not in allowed.poisoned:
                yield Violation("drained", rid, f"{stream}: entry {entry.decode()} is left")
        if not isinstance(pending, Exception) and pending["pending"]:
            yield Violation("drained", "", f"{stream}: {pending['pending']} entries are pending in group {group}")
    for rid in sorted(name.decode("ascii", "replace") for name in client.hkeys(plane.key("rewards"))):
        yield Violation("drained", rid, "rewards: its standing is left")
    for rid in sorted(member.decode("ascii", "replace") for member in client.smembers(plane.key("open"))):
        yield Violation("drained", rid, "open: not booked")
    begin = plane.key("rollout:")
    for name in client.scan_iter(match=_literal(begin) + "*", count=1000):
        rid = name.decode("ascii", "replace").removeprefix(begin)
        line = records.books.get(rid)
        if line is None or line.ending != "dead":  # a dead one stays for its operator
            yield Violation("drained", rid, "its hash is left")


def _literal(key: str) -> str:
    """A glob pattern that matches this key alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in key)


def _redis_ledger(plane: Plane, records: Records) -> Iterator[Violation]:
    yield from _same_counts("redis_ledger", "", plane.ledger(), records)


def _dead_letters(plane: Plane, allowed: Allowed) -> Iterator[Violation]:
    """A letter is about the rollout that it names: as its rid or, where that one's record is gone, in what is shown."""
    strange = []
    for _, values in chain.from_iterable(part.client.xrange(part.key("dead")) for part in plane.parts):
        letter = {name.decode(): value.decode("utf-8", "replace") for name, value in values.items()}
        if not {letter.get("rid", ""), letter.get("shown", "")} & allowed.poisoned:
            strange.append(letter)
    for letter in strange[allowed.broken_notices :]:
        stage, reason, shown = (letter.get(name, "") for name in ("stage", "reason", "shown"))
        yield Violation("dead_letters", letter.get("rid", ""), f"{stage}: {reason:.80} ({shown:.80})")
