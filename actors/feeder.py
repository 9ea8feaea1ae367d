"""The feeder: admits rollouts, keeps a worker task waiting in each Celery queue, keeps the books. No torch.

Invariant: every admitted rollout ends exactly once, as trained, dropped (with a reason) or dead.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any, Protocol

from actors import admission, stream_metrics
from actors.books import Booking, Books, Tally, audit_of, unjudged_line
from actors.cursors import Cursors, least_counts
from actors.rewards import Rewards
from actors.unbooked import FACTS, Unbooked
from common import metrics, policies, tracing
from common.config import Config
from common.draws import rollout_seed, uniform_bits
from common.episode import Episode
from common.footprint import free_bytes, growth_bytes, maxmemory_mb, most_bytes, rollout_bytes
from common.rids import number_of, rid_of
from common.runfiles.names import BOOKS_LOCK
from common.runfiles.records import Audit, BookLine
from common.runfiles.run import RunFolder
from common.wire import scripts
from common.wire.lease import Lease
from common.wire.messages import Ints, MessageError, RolloutHead, read_number, read_rid
from common.wire.plane import Plane, RunGone, shown
from common.wire.scripts import Admitted, Entry

log = logging.getLogger("katana.feeder")
ROOM_S = 0.25  # between two checks of a Redis that was short of memory
HOUSEKEEPING_S = 0.5
_LENGTHS, _LONG = 512, 0.98  # how many lengths are kept, and the quantile that counts as a long one
COUNT_WAIT_S = 5.0  # how long a booking waits for the writer's token count of a stopped rollout
_SWEEP_S = 60.0  # interval for removing the names of killed workers, and how long these must have been silent


class Source(Protocol):
    """Gives prompts and judges completions."""

    def prompt(self, problem: int) -> Ints:
        """Token ids of a training prompt. Raises ValueError if it is longer than data.max_prompt_length."""

    def teacher(self, problem: int) -> str:
        """Of several teachers the name of the problem's; asked only then."""

    def judge(self, problem: int, tokens: Ints) -> bool | None:
        """Whether a completion is right; None if this is unknown."""


class Feeder:
    """Only one acts on a run at a time: the holder of the lease `feeder`. `clock`: monotonic seconds."""

    books: Books  # set by `open`: before we have the lease, a former feeder may still write
    ledger: Tally
    _cursors: Cursors
    _rewards: Rewards | None = None

    def __init__(
        self,
        config: Config,
        plane: Plane,
        source: Source,
        stop: threading.Event,
        *,
        send_tasks: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._plane, self._source, self._stop = config, plane, source, stop
        self._send_tasks, self._clock = send_tasks, clock
        self._lease = Lease(plane, "feeder", config.liveness.lease_s)
        self._policy = policies.find(config.termination.policy)
        self._folder = RunFolder(config.run_dir)
        self._lock = config.run_dir / BOOKS_LOCK
        self._rollouts: dict[str, Unbooked] = {}
        self._running: set[str] = set()
        self._slots = config.most_slots * config.rollout.workers
        self._lengths: deque[int] = deque(maxlen=_LENGTHS)  # of the last rollouts, in tokens written
        self._housekeeping_at = 0.0
        self._sweep_at = clock() + _SWEEP_S
        self._short = Episode(log)
        self._room_at = 0.0  # when to check the memory of Redis again

    def run(self, *, until_idle: bool = False) -> None:
        """Serve until stopped, or until the run has ended and is booked.

        Raises LeaseLost, RunGone, RedisUnavailable, Stopping; ValueError for a prompt that is too long.
        """
        self.open()
        try:
            while not self._stop.is_set():
                busy = self.step(block_s=0.01 if until_idle else 0.05)
                if self._plane.state() in ("trained", "ended"):
                    self.finish()
                    return
                if until_idle and not busy:
                    return
        finally:
            self.close()

    def open(self) -> None:
        """Acquire the lease and continue from the state in the books and in Redis."""
        self._lease.acquire(self._stop)
        stream_metrics.show_limits(self._config)
        settings = self._config.feeder
        with self._lease.exclusively(self._lock):
            self.books = Books(
                self._config.run_dir, record_traces=settings.record_traces, record_audit=settings.record_audit
            )
        self.ledger = Tally(self._plane.ledger())
        self._cursors = Cursors(self._plane.cursors(), self._place_of)
        known = self._admitted_on_disk()
        if any(cursor < count for cursor, count in zip(self._cursors.counts, known, strict=True)):
            self._restore(known)
        rids = self._plane.open_rollouts()
        if self._config.reward.mode != "none":
            self._rewards = Rewards(self._config, self._plane, self._lease, self._source.judge, self.books.booked)
            self._rewards.go_on(self._folder.rollouts(), rids, self._cursors.next, self._cursors.end)
        verdicts = self._plane.fields((rid, ["verdict"]) for rid in rids)
        self._running = {rid for rid, (verdict,) in zip(rids, verdicts, strict=True) if verdict is None}
        self._adopt()

    def step(self, block_s: float) -> bool:
        """Book ended rollouts, admit new ones if there is room. True if there was anything to do."""
        self._lease.keep()
        came = self._read(block_s)
        if self._lease.adoption_due:
            self._adopt()
        if self._rewards is not None:
            self._rewards.record(self._rollouts)
        self._book_ready()
        with tracing.span("admitting"):
            admitted = self._admit()
        if self._clock() >= self._housekeeping_at:
            self._housekeeping_at = self._clock() + HOUSEKEEPING_S
            self._housekeep()
        return came or admitted > 0

    def finish(self) -> None:
        """The learner is done: free the writers, wait briefly for their notices, drop what is in flight."""
        self._lease.advance("state", "ended")
        deadline = self._clock() + 1.5
        came = False
        while came or self._clock() < deadline:
            self._lease.keep()
            came = self._read(block_s=0.1)
        self._adopt()
        self._book_ready(wait_s=0.0)
        left = {rid: self._rollouts.get(rid, Unbooked()) for rid in self._plane.open_rollouts()}
        for rollout in left.values():
            rollout.ending = rollout.ending or ("dropped", "run_end", None)
        self._write_and_book(left)
        self._lease.call_all([scripts.close(self._plane.groups, place) for place in self._plane.places])

    def close(self) -> None:
        """Write the ledger to disk, release the lease and close the books. Does not need Redis."""
        self._write_ledger()
        self._lease.drop()
        self.books.close()

    def _restore(self, known: list[int]) -> None:
        """Redis lost the run, or of several servers some did: continue after the admitted rollouts in the books; open
        rollouts of those servers are booked as lost. `known`: how many each is known to have admitted."""
        before = self._cursors.counts
        places = [place for place in self._plane.places if before[place] < known[place]]
        self._cursors = Cursors([max(counts) for counts in zip(before, known, strict=True)], self._place_of)
        alive = set(self._plane.open_rollouts())
        admitted = (number for number in range(self._cursors.end) if number in self._cursors)
        rids = [rid_of(number) for number in admitted if self._place_of(number) in places]
        lost = [rid for rid in rids if rid not in self.books.booked and rid not in alive]
        servers = len(self._plane.parts)
        where = "" if servers == 1 else f" on server {', '.join(str(place + 1) for place in places)} of {servers}"
        log.warning(
            "Redis lost this run%s: %d of %d admitted rollouts are booked, %d are lost",
            where,
            sum(rid in self.books.booked for rid in rids),
            len(rids),
            len(lost),
        )
        # The head by its number. For a rollout that had been sent back, the problem is not the original one.
        heads = (head_of(self._config, self._source, number_of(rid)) for rid in lost)
        lines = (
            unjudged_line(head.rid, head.arm, head.problem, ending="dropped", reason="lost", generated=0)
            for head in heads
        )
        self._write([Booking(self._with_teacher(line)) for line in lines])
        for place in places:
            self._restore_at(place, [rid for rid in alive if rid not in self.books.booked])
        self.ledger = Tally(self._plane.ledger())

    def _restore_at(self, place: int, unbooked: list[str]) -> None:
        """Give one server back what it counted. `unbooked`: open rollouts whose records are there; they have their own
        counts of tokens, which their writers may still increase."""
        cursor, generated = self._cursors.counts[place], 0
        ledger: Counter[str] = Counter(admitted=cursor)
        for line in self._folder.rollouts():
            if self._plane.place_of(line.rid) == place:
                ledger[line.ledger_field] += 1
                generated += line.tokens_generated
        own = [rid for rid in unbooked if self._plane.place_of(rid) == place]
        self._lease.call(scripts.restore(cursor, generated, own, ledger, place))

    def _place_of(self, number: int) -> int:
        return self._plane.place_of(rid_of(number))

    def _admitted_on_disk(self) -> list[int]:
        """How many rollouts each server admitted, by books, ledger and the learner's record: no id is used twice."""
        ledger, servers = self._folder.ledger, len(self._plane.parts)
        trained = (number_of(rid) for line in self._folder.trained() for rid in line.rids)
        by_record = least_counts(chain(self._booked_numbers(), trained), servers, self._place_of)
        if ledger is None:
            return by_record
        by_ledger = [ledger.admitted] if servers == 1 else ledger.by_server or by_record
        return [max(counts) for counts in zip(by_record, by_ledger, strict=True)]

    def _booked_numbers(self) -> Iterator[int]:
        """Numbers of booked rollouts, the highest of each server among them."""
        if len(self._plane.parts) == 1:
            yield self.books.booked.next_number - 1
        else:
            yield from (number_of(line.rid) for line in self._folder.rollouts())

    # --- books -------------------------------------------------------------------------------------------------

    def _read(self, block_s: float) -> bool:
        """Read new entries of `finished`. True if there were any."""
        came = self._plane.read("books", self._lease.token, ["finished"], count=512, block_s=block_s)
        for _, (entry, values) in came:
            self._note(entry, values)
        return bool(came)

    def _adopt(self) -> None:
        for entry, values in self._lease.adopt("finished", "books"):
            self._note(entry, values)

    def _note(self, entry: bytes, values: dict[bytes, bytes]) -> None:
        """Process one entry of `finished`. An unreadable one becomes a dead letter, with the reason."""
        try:
            rid = read_rid(values.get(b"rid"))
            if number_of(rid) not in self._cursors:
                raise MessageError(f"finished.rid: {rid!r:.40} was never admitted")
            rollout = self._rollouts.get(rid, Unbooked())
            rollout.absorb(entry, values, self._clock())
        except MessageError as error:
            at = ("finished", "books", entry)
            self._plane.fail("", "finished", str(error), max_attempts=1, shown=shown(values), at=at)
            return
        if rollout.judged:
            self._running.discard(rid)
        if rid in self.books.booked:
            # A late notice of a booked rollout. The script books it if a crash came after the line was written.
            self._book([(rid, rollout.ledger_field, rollout.entries)])
            self._rollouts.pop(rid, None)
        else:
            self._rollouts[rid] = rollout

    def _book_ready(self, wait_s: float = COUNT_WAIT_S) -> None:
        now = self._clock()
        self._write_and_book({rid: one for rid, one in self._rollouts.items() if one.ready(now, wait_s)})

    def _write_and_book(self, ready: dict[str, Unbooked]) -> None:
        """Book on disk first, all with one fsync, then one by one in Redis, which removes the rollouts' hashes."""
        if not ready:
            return
        with tracing.span("booking", rollouts=len(ready)):
            self._book_all(ready)

    def _book_all(self, ready: dict[str, Unbooked]) -> None:
        if self._rewards is not None:
            self._rewards.record(ready, last=True)
        records = self._plane.fields((rid, FACTS) for rid in ready)
        audits = self._audits(list(ready))
        bookings = []
        for (rid, rollout), facts, audit in zip(ready.items(), records, audits, strict=True):
            self._lease.keep()  # judging a completion may take seconds
            line = rollout.line(rid, facts, active=self._policy.active, judge=self._source.judge)
            bookings.append(Booking(self._with_teacher(line), rollout.verdict, audit))
            self._lengths.append(line.tokens_generated)
        self._write(bookings)
        self._book([(rid, one.ledger_field, one.entries) for rid, one in ready.items()])
        if self._rewards is not None:
            self._rewards.forget(ready)
        for rid in ready:
            self._rollouts.pop(rid, None)
            self._running.discard(rid)
            tracing.stage(rid, "booked")

    def _with_teacher(self, line: BookLine) -> BookLine:
        return replace(line, teacher=self._source.teacher(line.problem)) if self._config.teachers else line

    def _write_ledger(self) -> None:
        by_server = self._cursors.counts if len(self._plane.parts) > 1 else ()
        self.ledger.write(self._folder, self._lock, by_server)

    def _write(self, bookings: list[Booking]) -> None:
        with self._lease.exclusively(self._lock):
            self.books.write(bookings)

    def _audits(self, rids: list[str]) -> list[Audit | None]:
        if not self._config.feeder.record_audit:
            return [None] * len(rids)
        records = self._plane.rollouts(rids)
        return [audit_of(rid, record) if record else None for rid, record in zip(rids, records, strict=True)]

    def _book(self, endings: list[tuple[str, str, list[bytes]]]) -> None:
        """Book rollouts in Redis: for each its id, its ledger field and its pending entries."""
        failed = self._plane.failed_calls
        booked = self._lease.call_all([scripts.book(*ending) for ending in endings])
        if self._plane.failed_calls != failed:
            # If the answer of a successful call was lost, the repeated call reports that it was booked before.
            self.ledger = Tally(self._plane.ledger())
            return
        self.ledger.fields.update(name for (_, name, _), fresh in zip(endings, booked, strict=True) if fresh)

    # --- admission ---------------------------------------------------------------------------------------------

    def _admit(self) -> int:
        """Admit as many rollouts as slots of the writers, staleness and memory allow."""
        if self._config.deterministic:
            return self._admit_batch()
        step, covered = self._plane.steps()
        count = admission.places(
            self._config.learner,
            concurrency=self._concurrency,
            running=len(self._running),
            open_rollouts=self.ledger.open,
            step=step,
            covered=covered,
        )
        return self._admit_next(self._fitting(count))

    def _admit_batch(self) -> int:
        """Deterministic: admit what the batch of this step lacks, at a moment when all verdicts are given.

        Each rollout gets the step and the threshold of that moment, so the order in which they are written, scored and
        judged does not matter.
        """
        step, covered = self._plane.steps()
        judged = [one for one in self._rollouts.values() if one.judged]
        useful = [one for one in judged if one.useful]
        count = admission.rest_of_batch(
            self._config.learner,
            open_rollouts=self.ledger.open,
            judged=len(judged),
            useful=len(useful),
            useful_ended=sum(one.ending is not None for one in useful),
            trained=self.ledger.fields["trained"],
            step=step,
            covered=covered,
        )
        if count <= 0 or self._fitting(count) < count:  # all at once, or its parts would have different thresholds
            return 0
        return self._admit_next(count, step, {name: self._plane.threshold(name) for name in self._plane.teachers})

    def _admit_next(self, count: int, step: int | None = None, thresholds: Mapping[str, bytes] | None = None) -> int:
        """Admit `count` rollouts with the next numbers: first what operators sent back, then the next in the data.
        `thresholds`: those that they are judged by, by teacher; None: those of their first scores."""
        if count <= 0:
            return 0
        sent_back = [self._readable(entries) for entries in self._plane.requests_by_server(count)]
        heads, calls = [], []
        for number, cursor in self._cursors.upcoming(count):
            # A request is admitted where it is: the script that admits the rollout removes the request.
            request = next(sent_back[self._place_of(number)], None)
            head = head_of(self._config, self._source, number, step, request and request[1])
            heads.append(head)
            threshold = thresholds[head.scored_by] if thresholds is not None else b""
            calls.append(scripts.admit(head.rid, head.encode(), cursor, threshold, request))
        asked_ns = time.perf_counter_ns()
        admitted, asked = 0, set()
        for head, word in zip(heads, self._lease.call_all(calls), strict=True):
            place = self._plane.place_of(head.rid)
            if word is Admitted.OK:
                admitted += 1
                self._cursors.admitted(number_of(head.rid))
                self._running.add(head.rid)
                tracing.stage(head.rid, "admitted", at_ns=asked_ns)
                self.ledger.fields["admitted"] += 1
                asked.add(place)
                continue
            # If one is refused, so are all after it on its server, because each follows the one before.
            if word is Admitted.BEHIND and place not in asked:
                raise RunGone("Redis has lost the newest admissions: the feeder must restart from its books")
            if word is Admitted.FULL:  # other data fills it: there was room for this run's
                self._log_shortage(self._plane.memory())
            asked.add(place)
        return admitted

    def _readable(self, requests: list[Entry]) -> Iterator[tuple[bytes, int]]:
        """Entry and problem of requests in `again`, oldest first; one that cannot be admitted becomes a dead letter."""
        for entry, values in requests:
            try:
                problem = read_number(values.get(b"problem"), "again.problem")
                self._source.prompt(problem)
            except ValueError as error:
                at = ("again", "", entry)
                self._plane.fail("", "again", str(error), max_attempts=1, shown=shown(values), at=at)
                continue
            yield entry, problem

    def _fitting(self, count: int) -> int:
        """How many of `count` more rollouts fit into Redis."""
        if count <= 0 or self._clock() < self._room_at:
            return 0
        config, running, memory = self._config, self._running, self._plane.memory()
        each, free = rollout_bytes(config), free_bytes(memory)
        growing = len(running) * each
        if free < growing + count * each:  # then their actual lengths are read
            lengths = self._plane.fields((rid, ["length"]) for rid in sorted(running))
            growing = sum(growth_bytes(config, _stored(length)) for (length,) in lengths)
        fitting = admission.fitting(count, running=len(running), free=free, growing=growing, each=each)
        if fitting < count:
            self._log_shortage(memory)
        else:
            self._short.not_seen("Redis has room again for all admissions")
        return fitting

    def _log_shortage(self, memory: dict[str, Any]) -> None:
        """Log it, once per episode, and wait for a moment before the next check."""
        self._room_at = self._clock() + ROOM_S
        used, limit = (memory[name] / (1 << 20) for name in ("used_memory", "maxmemory"))
        dead = self.ledger.fields["dead"]
        kept = f"; {dead} dead rollouts are kept (katana dead)" if dead else ""
        self._short.seen(
            f"Redis is short of memory ({used:.1f} of {limit:.1f} MB used, and open rollouts will need more): "
            f"fewer rollouts are admitted, and the run is slower; a maxmemory of "
            f"{maxmemory_mb(most_bytes(self._config))} MB is enough{kept}"
        )

    @property
    def _concurrency(self) -> int:
        """`feeder.concurrency`; by default what the writers have room for, if it can be trained in time."""
        if self._config.feeder.concurrency:
            return self._config.feeder.concurrency
        mean, long = 1.0, 2.0  # before lengths are known
        if lengths := sorted(self._lengths):
            mean, long = sum(lengths) / len(lengths), lengths[int(_LONG * len(lengths))]
        return min(int(1.25 * self._slots), admission.in_time(self._config.learner, mean, long))

    # --- housekeeping ------------------------------------------------------------------------------------------

    def _housekeep(self) -> None:
        """Send worker tasks, remove the names of killed workers, write the ledger, set the gauges."""
        self._send_tasks()
        live = self._plane.live(within_s=3 * self._config.liveness.heartbeat_s + 1)
        slots = sum(int(facts.get("slots", 0)) for facts in live.values() if facts.get("role") == "rollout")
        self._slots = slots or self._config.most_slots * self._config.rollout.workers
        if self._clock() >= self._sweep_at:
            self._sweep_at = self._clock() + _SWEEP_S
            self._plane.sweep(silent_s=_SWEEP_S)
        self._write_ledger()
        metrics.config_value.labels("concurrency").set(self._concurrency)
        metrics.rollouts_open.set(self.ledger.open)
        stream_metrics.show_workers(live, self._plane.teachers)
        stream_metrics.show_backlog(self._plane.backlog())


def head_of(
    config: Config, source: Source, number: int, step: int | None = None, problem: int | None = None
) -> RolloutHead:
    """The head of the rollout with admission number `number`. `problem`: by default the next one in the data."""
    problem = number // config.data.num_generations if problem is None else problem
    treated = uniform_bits(config.seed, "arm", number) / 2**64 >= config.termination.control_fraction
    return RolloutHead(
        rid=rid_of(number),
        arm="treated" if treated else "control",
        problem=problem,
        seed=rollout_seed(config.seed, number),
        max_new_tokens=config.rollout.max_completion_length,
        step=step,
        prompt=source.prompt(problem),
        teacher=source.teacher(problem) if config.teachers else None,
    )


def _stored(length: bytes | None) -> int:
    """Stored tokens of a rollout; 0 if its record is broken: then its full length may still come."""
    try:
        return read_number(length or b"0", "rollout.length")
    except MessageError:
        return 0
