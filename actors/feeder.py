"""The feeder: admits rollouts, keeps one open Celery shift in each queue, keeps the books. No torch.

Invariant: every admitted rollout ends exactly once, as trained, dropped (with a reason) or dead.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from actors.books import (
    Booking,
    Books,
    audit_of,
    line_of,
    number_of,
    rid_of,
    unjudged_line,
)
from common import metrics, policies
from common.config import Config
from common.draws import draw, rollout_seed
from common.episode import Episode
from common.files import locked, write_text
from common.footprint import free_bytes, growth_bytes, maxmemory_mb, most_bytes, rollout_bytes
from common.runfiles.names import BOOKS_LOCK, LEDGER
from common.runfiles.records import Audit, BookLine, Ledger, ledger_field
from common.runfiles.run import RunFolder
from common.wire import scripts
from common.wire.lease import Lease
from common.wire.messages import Ints, MessageError, RolloutHead, Verdict, read_number, read_rid
from common.wire.plane import Plane, RunGone, shown, unix_s
from common.wire.scripts import Admitted

log = logging.getLogger("katana.feeder")
_ROOM_S = 0.25  # between two looks at a Redis that was short of memory
_SWEEP_S = 60.0  # between two looks at the names of workers that were killed, and how long those have been silent
_COUNT_WAIT_S = 5.0  # how long a booking waits for the writer's own count of a stopped rollout


class Source(Protocol):
    """Where prompts come from, and who judges completions."""

    def prompt(self, problem: int) -> Ints:
        """Token ids of a training prompt. Raises ValueError if it is longer than data.max_prompt_length."""

    def judge(self, problem: int, tokens: Ints) -> bool | None:
        """Whether a completion is right; None where nothing can tell."""


@dataclass(slots=True)
class _Open:
    """A rollout whose `finished` entries have begun to come; they stay pending until it is booked."""

    entries: list[bytes] = field(default_factory=list)
    verdict: Verdict | None = None
    counted: int | None = None
    ending: tuple[str, str, int | None] | None = None  # ending, reason, staleness
    ended_at: float = 0.0
    # By Redis's clock: when the two notices came into the stream.
    verdict_unix_s: float | None = None
    ended_unix_s: float | None = None

    @property
    def useful(self) -> bool:
        """Whether it has been, or will be, trained. By the verdict: an ending is booked when a writer's count comes."""
        if self.ending is not None:
            return self.ending[0] == "trained"
        return self.verdict is not None and self.verdict.train > 0

    @property
    def generated(self) -> int | None:
        return self.verdict.generated if self.verdict and self.verdict.generated is not None else self.counted


class Feeder:
    """One at a time acts on a run: it holds the lease `feeder`."""

    def __init__(
        self,
        config: Config,
        plane: Plane,
        source: Source,
        stop: threading.Event,
        *,
        open_shifts: Callable[[], None] = lambda: None,
    ) -> None:
        self._config, self._plane, self._source, self._stop = config, plane, source, stop
        self._lease = Lease(plane, "feeder", config.liveness.lease_s)
        self._books: Books  # opened when the lease is ours: a former feeder may still write
        self._open_shifts = open_shifts
        self._policy = policies.find(config.termination.policy)
        self._folder = RunFolder(config.run_dir)
        self._lock = config.run_dir / BOOKS_LOCK
        self._rollouts: dict[str, _Open] = {}
        self._running: set[str] = set()
        self._ledger: dict[str, int] = {}
        self._cursor = 0
        self._slots = config.rollout.slots * config.rollout.workers
        self._housekeeping_at = 0.0
        self._sweep_at = time.monotonic() + _SWEEP_S
        self._short = Episode(log)
        self._room_at = 0.0  # when to look again for room in Redis

    def run(self, *, until_idle: bool = False) -> None:
        """Serve until told to stop or the run is over and booked.

        Raises LeaseLost, RunGone, RedisUnavailable, Stopping; ValueError for a prompt that is too long.
        """
        self._lease.take(self._stop)
        self._load()
        try:
            while not self._stop.is_set():
                busy = self.step(block_s=0.01 if until_idle else 0.05)
                state = self._plane.state()
                if state in ("trained", "ended"):
                    self._finish()
                    return
                if until_idle and not busy:
                    return
        finally:
            self._write_ledger()
            self._lease.drop()
            self._books.close()

    def step(self, block_s: float) -> bool:
        """Book what ended, admit what there is room for. True if there was anything to do."""
        self._lease.keep()
        came = self._plane.read("books", self._lease.token, ["finished"], count=512, block_s=block_s)
        for _, (entry, values) in came:
            self._note(entry, values)
        if self._lease.adoption_due:
            self._adopt()
        self._book_ready()
        admitted = self._admit()
        if time.monotonic() >= self._housekeeping_at:
            self._housekeeping_at = time.monotonic() + 0.5
            self._housekeep()
        return bool(came) or admitted > 0

    # --- start and end -----------------------------------------------------------------------------------------

    def _load(self) -> None:
        _show(self._config)
        feeder = self._config.feeder
        with self._lease.exclusively(self._lock):
            self._books = Books(
                self._config.run_dir, record_traces=feeder.record_traces, record_audit=feeder.record_audit
            )
        self._ledger = self._plane.ledger()
        self._cursor = self._plane.cursor()
        known = _admitted_on_disk(self._folder, self._books)
        if self._cursor < known:
            self._restore(known)
        rids = self._plane.open_rollouts()
        verdicts = self._plane.fields((rid, ["verdict"]) for rid in rids)
        self._running = {rid for rid, (verdict,) in zip(rids, verdicts, strict=True) if verdict is None}
        self._adopt()

    def _adopt(self) -> None:
        for entry, values in self._lease.adopt("finished", "books"):
            self._note(entry, values)

    def _restore(self, cursor: int) -> None:
        """Redis knows less than the books: it lost the run. Go on behind what was admitted; what was open is lost."""
        alive = set(self._plane.open_rollouts())
        rids = [rid_of(index) for index in range(cursor)]
        lost = [rid for rid in rids if rid not in self._books.booked and rid not in alive]
        log.warning(
            "Redis lost this run: %d of %d admitted rollouts are booked, %d are lost",
            cursor - len(lost) - len(alive),
            cursor,
            len(lost),
        )
        # By its number; the problem of one that had been sent back is lost with its record, and told wrong here.
        heads = (self._head(number_of(rid)) for rid in lost)
        self._write(
            [
                Booking(unjudged_line(head.rid, head.arm, head.problem, ending="dropped", reason="lost", generated=0))
                for head in heads
            ]
        )
        self._cursor = cursor
        self._ledger = {"admitted": cursor, **self._books.endings}
        generated = sum(line.tokens_generated for line in self._folder.rollouts())
        # These have a count of their own in their records, to which their writers may be adding.
        unbooked = [rid for rid in alive if rid not in self._books.booked]
        self._lease.call(scripts.restore(cursor, generated, unbooked, self._ledger))

    def _finish(self) -> None:
        """The learner is done: free the writers, hear them out for a moment, drop what is in flight."""
        self._lease.advance("state", "ended")
        deadline = time.monotonic() + 1.5
        came: Sequence[object] = ()
        while came or time.monotonic() < deadline:
            self._lease.keep()
            came = self._plane.read("books", self._lease.token, ["finished"], count=512, block_s=0.1)
            for _, (entry, values) in came:
                self._note(entry, values)
        self._adopt()
        self._book_ready(wait_s=0.0)
        left = {rid: self._rollouts.get(rid, _Open()) for rid in self._plane.open_rollouts()}
        for rollout in left.values():
            rollout.ending = rollout.ending or ("dropped", "run_end", None)
        self._book(left)
        self._lease.call(scripts.close(self._plane.groups))

    def _write_ledger(self) -> None:
        """Unless another feeder, which took over from this one, has written a later one. Needs no Redis."""
        ledger = self.ledger()
        with locked(self._lock):
            there = self._folder.ledger
            # Both numbers never fall.
            if there is None or (there.admitted, there.ended) <= (ledger.admitted, ledger.ended):
                write_text(self._folder.path / LEDGER, json.dumps(ledger.to_json()))

    def ledger(self) -> Ledger:
        return Ledger.of(self._ledger)

    # --- books -------------------------------------------------------------------------------------------------

    def _note(self, entry: bytes, values: dict[bytes, bytes]) -> None:
        """Take in one `finished` entry. What cannot be read is given up, with the reason."""
        try:
            rid = read_rid(values.get(b"rid"))
            if not 0 <= number_of(rid) < self._cursor:
                raise MessageError(f"finished.rid: {rid!r:.40} was never admitted")
            rollout = self._rollouts.get(rid, _Open())
            self._absorb(rollout, entry, values)
        except MessageError as error:
            self._plane.fail(
                "",
                "finished",
                str(error),
                max_attempts=1,
                shown=shown(values),
                at=("finished", "books", entry),
            )
            metrics.dead_letters.labels("finished").inc()
            return
        rollout.entries.append(entry)
        if rid in self._books.booked:
            # Late word on a rollout whose line is written; the script books it if a crash came between the two.
            self._settle([(rid, ledger_field(*rollout.ending[:2]) if rollout.ending else "", rollout.entries)])
            self._rollouts.pop(rid, None)
            return
        self._rollouts[rid] = rollout

    def _absorb(self, rollout: _Open, entry: bytes, values: dict[bytes, bytes]) -> None:
        kind = values.get(b"kind")
        if kind == b"verdict":
            verdict = Verdict.decode(values.get(b"body", b""))
            if verdict.rid.encode() != values[b"rid"]:
                raise MessageError(f"finished.body: the verdict of {verdict.rid!r:.40}")
            rollout.verdict, rollout.verdict_unix_s = verdict, unix_s(entry)
            self._running.discard(verdict.rid)
        elif kind == b"count":
            rollout.counted = read_number(values.get(b"generated"), "finished.generated")
        elif kind == b"ending" and values.get(b"ending") in (b"trained", b"dropped", b"dead"):
            staleness = values.get(b"staleness")
            rollout.ending = (
                values[b"ending"].decode(),
                values.get(b"reason", b"").decode("ascii", "replace")[:40],
                read_number(staleness, "finished.staleness") if staleness else None,
            )
            rollout.ended_at, rollout.ended_unix_s = time.monotonic(), unix_s(entry)
            self._running.discard(values[b"rid"].decode())
        else:
            raise MessageError(f"finished.kind: {kind!r:.40} with ending {values.get(b'ending')!r:.40}")

    def _book_ready(self, wait_s: float = _COUNT_WAIT_S) -> None:
        now = time.monotonic()
        ready: dict[str, _Open] = {}
        for rid, rollout in self._rollouts.items():
            if rollout.ending is None:
                continue
            late = now - rollout.ended_at >= wait_s
            # A trained or dropped rollout always has a verdict; it may be read a moment after the ending.
            known = rollout.generated is not None or rollout.ending[0] == "dead"
            if late or (known and (rollout.verdict is not None or rollout.ending[0] == "dead")):
                ready[rid] = rollout
        self._book(ready)

    def _book(self, ready: dict[str, _Open]) -> None:
        """On disk first, all with one fsync; then, one by one, in Redis, which takes the rollouts' hashes off."""
        if not ready:
            return
        facts = self._plane.fields((rid, ["head", "length", "entry"]) for rid in ready)
        audits = self._audits(list(ready))
        bookings = []
        for (rid, rollout), found, audit in zip(ready.items(), facts, audits, strict=True):
            self._lease.keep()  # to judge a completion may take seconds
            bookings.append(Booking(self._line(rid, rollout, found), rollout.verdict, audit))
        self._write(bookings)
        self._settle(
            [
                (rid, booking.line.ledger_field, rollout.entries)
                for booking, (rid, rollout) in zip(bookings, ready.items(), strict=True)
            ]
        )
        for rid in ready:
            self._rollouts.pop(rid, None)
            self._running.discard(rid)

    def _write(self, bookings: list[Booking]) -> None:
        with self._lease.exclusively(self._lock):
            self._books.write(bookings)

    def _audits(self, rids: list[str]) -> list[Audit | None]:
        if not self._config.feeder.record_audit:
            return [None] * len(rids)
        records = self._plane.rollouts(rids)
        return [audit_of(rid, record) if record else None for rid, record in zip(rids, records, strict=True)]

    def _settle(self, endings: list[tuple[str, str, list[bytes]]]) -> None:
        """Rollouts by their ledger field, with what is pending of each."""
        failed = self._plane.failed_calls
        booked = self._lease.call_all([scripts.book(*ending) for ending in endings])
        if self._plane.failed_calls != failed:
            self._ledger = (
                self._plane.ledger()
            )  # a call that came through and whose answer was lost says "before" the second time
            return
        for (_, name, _), fresh in zip(endings, booked, strict=True):
            if fresh:
                self._ledger[name] = self._ledger.get(name, 0) + 1

    def _line(self, rid: str, rollout: _Open, facts: list[bytes | None]) -> BookLine:
        head, length, entry = facts
        return replace(
            self._ended_line(rid, rollout, head, length),
            admitted_unix_s=_moment(entry),
            verdict_unix_s=rollout.verdict_unix_s,
            ended_unix_s=rollout.ended_unix_s,
        )

    def _ended_line(self, rid: str, rollout: _Open, head_bytes: bytes | None, length: bytes | None) -> BookLine:
        assert rollout.ending is not None
        ending, reason, staleness = rollout.ending
        verdict = rollout.verdict
        generated = rollout.generated
        if generated is None:  # its writer died or never said: the stored chunks
            generated = 0
            try:
                generated = read_number(length or b"0", "rollout.length")
            except MessageError as error:
                log.warning("rollout %s is booked with no tokens beyond its verdict: %s", rid, error)
        if verdict is not None:
            return line_of(
                verdict,
                ending=ending,
                reason=reason,
                generated=generated,
                staleness=staleness,
                active=self._policy.active(verdict.threshold),
                correct=self._source.judge(verdict.problem, verdict.tokens),
            )
        arm, problem = "treated", 0
        if head_bytes is not None:
            try:
                head = RolloutHead.decode(head_bytes)
                arm, problem = head.arm, head.problem
            except MessageError:
                log.warning("rollout %s: its head cannot be read; booked as treated", rid)
        return unjudged_line(rid, arm, problem, ending=ending, reason=reason, generated=generated)

    # --- admission ---------------------------------------------------------------------------------------------

    def _admit(self) -> int:
        """Admit what there is room for: writers' slots on the one hand, staleness on the other, memory on the third."""
        if self._config.deterministic:
            return self._admit_batch()
        return self._admit_next(self._fitting(min(self._concurrency() - len(self._running), self._allowance())))

    def _admit_batch(self) -> int:
        """Deterministic: admit what the batch of this step lacks, at a moment when every verdict has been given.

        The step, and the threshold of that moment, go with each rollout: so it does not matter who writes, scores or
        judges which of them first.
        """
        step, covered = self._plane.steps()
        count = self._lacking(step, covered)
        if count <= 0 or self._fitting(count) < count:  # whole, or its parts would be judged by other thresholds
            return 0
        return self._admit_next(count, step, self._plane.threshold())

    def _lacking(self, step: int, covered: int) -> int:
        """(step + 1) · batch - (trained + waiting); 0 while there is a rollout whose verdict has not been read."""
        learner = self._config.learner
        judged = [one for one in self._rollouts.values() if one.verdict is not None or one.ending is not None]
        ended = sum(value for name, value in self._ledger.items() if name != "admitted")
        if len(judged) < self._ledger.get("admitted", 0) - ended or step >= learner.max_steps:
            return 0
        useful = [one for one in judged if one.useful]
        booked = self._ledger.get("trained", 0)
        taken_off = booked + sum(one.ending is not None for one in useful)
        # Trained behind a checkpoint that the learner has fallen back from: anew. None where no checkpoint was torn.
        lost = max(0, taken_off - covered * learner.batch_size)
        return (step + 1) * learner.batch_size - (booked + len(useful) - lost)

    def _admit_next(self, count: int, step: int | None = None, threshold: bytes = b"") -> int:
        """What operators sent back comes first; each takes the number, and the place in the data, that is next."""
        if count <= 0:
            return 0
        sent_back = self._sent_back(count)
        heads, calls = [], []
        for place in range(count):
            request = sent_back[place] if place < len(sent_back) else None
            head = self._head(self._cursor + place, step, request and request[1])
            heads.append(head)
            calls.append(scripts.admit(head.rid, head.encode(), self._cursor + place + 1, threshold, request))
        for admitted, (head, word) in enumerate(zip(heads, self._lease.call_all(calls), strict=True)):
            # Behind one that was refused, all are: each follows the one before.
            if word is Admitted.BEHIND and admitted == 0:
                raise RunGone("Redis has forgotten the newest admissions: the feeder must begin anew from its books")
            if word is Admitted.FULL:  # others fill it: of this run's own there was room
                self._say_short(self._plane.memory())
            if word is not Admitted.OK:
                return admitted
            self._cursor += 1
            self._running.add(head.rid)
            self._ledger["admitted"] = self._ledger.get("admitted", 0) + 1
        return count

    def _sent_back(self, count: int) -> list[tuple[bytes, int]]:
        """Entry and problem of the oldest requests in `again`; one that cannot be admitted is given up."""
        found = []
        for entry, values in self._plane.requests(count):
            try:
                problem = read_number(values.get(b"problem"), "again.problem")
                self._source.prompt(problem)
            except ValueError as error:
                at = ("again", "", entry)
                self._plane.fail("", "again", str(error), max_attempts=1, shown=shown(values), at=at)
                metrics.dead_letters.labels("again").inc()
                continue
            found.append((entry, problem))
        return found

    def _allowance(self) -> int:
        """(max_staleness + 1) · batch - (waiting + running), and no more than the run can still train.

        What was trained since the last checkpoint is not booked yet: of the open rollouts it is neither waiting nor
        running. Counted so, and not from the sum of all ever trained, it stays right when a learner goes back to an
        older checkpoint.
        """
        learner, (step, covered) = self._config.learner, self._plane.steps()
        unbooked = (step - covered) * learner.batch_size
        usable = min(learner.max_staleness + 1, learner.max_steps - step) * learner.batch_size
        ended = sum(value for name, value in self._ledger.items() if name != "admitted")
        return usable - (self._ledger.get("admitted", 0) - ended - unbooked)

    def _fitting(self, count: int) -> int:
        """How many of `count` more Redis has room for, so that they and all that are being written can be finished.

        Where nothing is being written one may always come: what waits can then be no more than too few for a batch,
        and whatever else fills Redis is none of ours.
        """
        if count <= 0 or time.monotonic() < self._room_at:
            return 0
        memory = self._plane.memory()
        each, free, fitting = rollout_bytes(self._config), free_bytes(memory), count
        if free < (len(self._running) + count) * each:
            names = ((rid, ["length"]) for rid in sorted(self._running))
            lengths = [_stored(length) for (length,) in self._plane.fields(names)]
            free -= sum(growth_bytes(self._config, length) for length in lengths)
            fitting = max(0 if self._running else 1, min(count, int(free // each)))
        if fitting < count:
            self._say_short(memory)
        else:
            self._short.not_seen("Redis has room again for all that may be admitted")
        return fitting

    def _say_short(self, memory: dict[str, Any]) -> None:
        """Once an episode; and look again only after a moment."""
        self._room_at = time.monotonic() + _ROOM_S
        used, limit = (memory[name] / (1 << 20) for name in ("used_memory", "maxmemory"))
        dead = self._ledger.get("dead", 0)
        kept = f"; {dead} dead rollouts are kept for you (katana dead)" if dead else ""
        self._short.seen(
            f"Redis is short of memory ({used:.1f} of {limit:.1f} MB used, and what is being written will need more): "
            f"fewer rollouts are admitted, and the run is slower; with a maxmemory of "
            f"{maxmemory_mb(most_bytes(self._config))} MB it would not wait{kept}"
        )

    def _concurrency(self) -> int:
        return self._config.feeder.concurrency or int(1.25 * self._slots)

    def _head(self, cursor: int, step: int | None = None, problem: int | None = None) -> RolloutHead:
        config = self._config
        problem = cursor // config.data.num_generations if problem is None else problem
        treated = draw(config.seed, "arm", cursor) / 2**64 >= config.termination.control_fraction
        return RolloutHead(
            rid=rid_of(cursor),
            arm="treated" if treated else "control",
            problem=problem,
            seed=rollout_seed(config.seed, cursor),
            max_new_tokens=config.rollout.max_completion_length,
            step=step,
            prompt=self._source.prompt(problem),
        )

    # --- shifts and gauges -------------------------------------------------------------------------------------

    def _housekeep(self) -> None:
        self._open_shifts()
        live = self._plane.live(within_s=3 * self._config.liveness.heartbeat_s + 1)
        slots = sum(int(facts.get("slots", 0)) for facts in live.values() if facts.get("role") == "rollout")
        self._slots = slots or self._config.rollout.slots * self._config.rollout.workers
        if time.monotonic() >= self._sweep_at:
            self._sweep_at = time.monotonic() + _SWEEP_S
            self._plane.sweep(silent_s=_SWEEP_S)
        self._write_ledger()
        for role in ("rollout", "teacher"):
            metrics.workers_live.labels(role).set(sum(facts.get("role") == role for facts in live.values()))
        metrics.config_value.labels("concurrency").set(self._concurrency())
        metrics.rollouts_open.set(self.ledger().open)
        self._measure_streams()

    def _measure_streams(self) -> None:
        """Entries outstanding and the age of the oldest pending one, by stream; all shards of chunks together.

        Redis's memory and the dead letters with them.
        """
        backlog = self._plane.backlog()
        if backlog.memory is not None:
            limit = backlog.memory.get("maxmemory") or float("inf")
            metrics.redis_memory.set(backlog.memory["used_memory"] / limit)
            metrics.config_value.labels("redis_maxmemory_bytes").set(limit)
        if backlog.dead is not None:
            metrics.stream_outstanding.labels("dead").set(backlog.dead)
        length: Counter[str] = Counter()
        oldest: dict[str, float] = {}
        for name, (size, oldest_s) in backlog.streams.items():
            stream = name.partition(":")[0]
            length[stream] += size
            oldest[stream] = max(oldest.get(stream, 0.0), oldest_s)
        for stream in oldest:
            metrics.stream_outstanding.labels(stream).set(length[stream])
            metrics.stream_oldest_pending.labels(stream).set(oldest[stream])


def _show(config: Config) -> None:
    """What alerts compare with."""
    values = {
        "max_staleness": config.learner.max_staleness,
        "max_steps": config.learner.max_steps,
        "batch_size": config.learner.batch_size,
        "checkpoint_steps": config.checkpoints.every_steps,
        "chunk_tokens": config.rollout.chunk_tokens,
        "max_completion_length": config.rollout.max_completion_length,
        "control_fraction": config.termination.control_fraction,
    }
    for kind, value in values.items():
        metrics.config_value.labels(kind).set(value)


def _admitted_on_disk(folder: RunFolder, books: Books) -> int:
    """How many rollouts books, ledger and the learner's record know of: no id may ever be given twice."""
    ledger = folder.ledger
    trained = max((number_of(rid) + 1 for line in folder.trained() for rid in line.rids), default=0)
    return max(books.booked.next_number, ledger.admitted if ledger else 0, trained)


def _stored(length: bytes | None) -> int:
    """Tokens that are stored of a rollout; 0 where its record does not say: it may yet grow to all of its length."""
    try:
        return read_number(length or b"0", "rollout.length")
    except MessageError:
        return 0


def _moment(entry: bytes | None) -> float | None:
    """When a rollout was admitted; None where its record is gone or broken."""
    try:
        return None if entry is None else unix_s(entry)
    except ValueError:
        return None
