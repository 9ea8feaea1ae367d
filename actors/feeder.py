"""The feeder: admits rollouts, keeps one worker task open in each Celery queue, keeps the books. No torch.

Invariant: every admitted rollout ends exactly once, as trained, dropped (with a reason) or dead.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from actors import admission, stream_metrics
from actors.books import Booking, Books, Tally, audit_of, number_of, rid_of, unjudged_line
from actors.unbooked import FACTS, Unbooked
from common import metrics, policies
from common.config import Config
from common.draws import rollout_seed, uniform_bits
from common.episode import Episode
from common.footprint import free_bytes, growth_bytes, maxmemory_mb, most_bytes, rollout_bytes
from common.runfiles.lines import read_lines
from common.runfiles.records import LEDGER, ROLLOUTS, TRAINED, Audit, BookLine, Trained
from common.wire import scripts
from common.wire.lease import Lease
from common.wire.messages import Ints, MessageError, RolloutHead, read_number, read_rid
from common.wire.plane import Plane, RunGone, shown
from common.wire.scripts import Admitted

log = logging.getLogger("katana.feeder")
ROOM_S = 0.25  # between two looks at a Redis that was short of memory
HOUSEKEEPING_S = 0.5
COUNT_WAIT_S = 5.0  # how long a booking waits for the writer's own count of a stopped rollout
_SWEEP_S = 60.0  # between two looks at the names of workers that were killed, and how long those have been silent


class Source(Protocol):
    """Where prompts come from, and who judges completions."""

    def prompt(self, problem: int) -> Ints:
        """Token ids of a training prompt. Raises ValueError if it is longer than data.max_prompt_length."""

    def judge(self, problem: int, tokens: Ints) -> bool | None:
        """Whether a completion is right; None where nothing can tell."""


class Feeder:
    """One at a time acts on a run: it holds the lease `feeder`. `clock`: seconds, never going back."""

    books: Books  # from `open` on: before the lease is ours a former feeder may still write
    ledger: Tally

    def __init__(
        self,
        config: Config,
        plane: Plane,
        source: Source,
        stop: threading.Event,
        *,
        open_shifts: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._plane, self._source, self._stop = config, plane, source, stop
        self._open_shifts, self._clock = open_shifts, clock
        self._lease = Lease(plane, "feeder", config.liveness.lease_s)
        self._policy = policies.find(config.termination.policy)
        self._lock = config.run_dir / ".books.lock"
        self._rollouts: dict[str, Unbooked] = {}
        self._running: set[str] = set()
        self._cursor = 0
        self._slots = config.rollout.slots * config.rollout.workers
        self._housekeeping_at = 0.0
        self._sweep_at = clock() + _SWEEP_S
        self._short = Episode(log)
        self._room_at = 0.0  # when to look again for room in Redis

    def run(self, *, until_idle: bool = False) -> None:
        """Serve until told to stop or the run is over and booked.

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
        """Take the lease, read the books, and go on where they and Redis say that the run stands."""
        self._lease.acquire(self._stop)
        stream_metrics.show_limits(self._config)
        settings = self._config.feeder
        with self._lease.exclusively(self._lock):
            self.books = Books(
                self._config.run_dir, record_traces=settings.record_traces, record_audit=settings.record_audit
            )
        self.ledger = Tally(self._plane.ledger())
        self._cursor = self._plane.cursor()
        known = _admitted_on_disk(self._config.run_dir, self.books)
        if self._cursor < known:
            self._restore(known)
        rids = self._plane.open_rollouts()
        verdicts = self._plane.fields((rid, ["verdict"]) for rid in rids)
        self._running = {rid for rid, (verdict,) in zip(rids, verdicts, strict=True) if verdict is None}
        self._adopt()

    def step(self, block_s: float) -> bool:
        """Book what ended, admit what there is room for. True if there was anything to do."""
        self._lease.keep()
        came = self._read(block_s)
        if self._lease.adoption_due:
            self._adopt()
        self._book_ready()
        admitted = self._admit()
        if self._clock() >= self._housekeeping_at:
            self._housekeeping_at = self._clock() + HOUSEKEEPING_S
            self._housekeep()
        return came or admitted > 0

    def finish(self) -> None:
        """The learner is done: free the writers, hear them out for a moment, drop what is in flight."""
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
        self._lease.call(scripts.close(self._plane.groups))

    def close(self) -> None:
        """Leave the ledger on disk and let go of lease and books. Needs no Redis."""
        self.ledger.write(self._config.run_dir / LEDGER, self._lock)
        self._lease.drop()
        self.books.close()

    def _restore(self, cursor: int) -> None:
        """Redis knows less than the books: it lost the run. Go on after what was admitted; what was open is lost."""
        alive = set(self._plane.open_rollouts())
        rids = [rid_of(index) for index in range(cursor)]
        lost = [rid for rid in rids if rid not in self.books.booked and rid not in alive]
        log.warning(
            "Redis lost this run: %d of %d admitted rollouts are booked, %d are lost",
            cursor - len(lost) - len(alive),
            cursor,
            len(lost),
        )
        # By its number; the problem of one that had been sent back is lost with its record, and another stands here.
        heads = (head_of(self._config, self._source, number_of(rid)) for rid in lost)
        self._write(
            [
                Booking(unjudged_line(head.rid, head.arm, head.problem, ending="dropped", reason="lost", generated=0))
                for head in heads
            ]
        )
        self._cursor = cursor
        self.ledger = Tally({"admitted": cursor, **self.books.endings})
        lines = read_lines(self._config.run_dir / ROLLOUTS, BookLine.from_json)
        generated = sum(line.tokens_generated for line in lines)
        # These have a count of their own in their records, to which their writers may be adding.
        unbooked = [rid for rid in alive if rid not in self.books.booked]
        self._lease.call(scripts.restore(cursor, generated, unbooked, self.ledger.fields))

    # --- books -------------------------------------------------------------------------------------------------

    def _read(self, block_s: float) -> bool:
        """Take in what came in `finished`; whether anything did."""
        came = self._plane.read("books", self._lease.token, ["finished"], count=512, block_s=block_s)
        for _, (entry, values) in came:
            self._note(entry, values)
        return bool(came)

    def _adopt(self) -> None:
        for entry, values in self._lease.adopt("finished", "books"):
            self._note(entry, values)

    def _note(self, entry: bytes, values: dict[bytes, bytes]) -> None:
        """Take in one `finished` entry. What cannot be read is given up, with the reason."""
        try:
            rid = read_rid(values.get(b"rid"))
            if not 0 <= number_of(rid) < self._cursor:
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
            # A late notice of a rollout whose line is written; the script books it if a crash came between the two.
            self._book([(rid, rollout.ledger_field, rollout.entries)])
            self._rollouts.pop(rid, None)
        else:
            self._rollouts[rid] = rollout

    def _book_ready(self, wait_s: float = COUNT_WAIT_S) -> None:
        now = self._clock()
        self._write_and_book({rid: one for rid, one in self._rollouts.items() if one.ready(now, wait_s)})

    def _write_and_book(self, ready: dict[str, Unbooked]) -> None:
        """On disk first, all with one fsync; then, one by one, in Redis, which takes the rollouts' hashes off."""
        if not ready:
            return
        records = self._plane.fields((rid, FACTS) for rid in ready)
        audits = self._audits(list(ready))
        bookings = []
        for (rid, rollout), facts, audit in zip(ready.items(), records, audits, strict=True):
            self._lease.keep()  # to judge a completion may take seconds
            line = rollout.line(rid, facts, active=self._policy.active, judge=self._source.judge)
            bookings.append(Booking(line, rollout.verdict, audit))
        self._write(bookings)
        self._book([(rid, one.ledger_field, one.entries) for rid, one in ready.items()])
        for rid in ready:
            self._rollouts.pop(rid, None)
            self._running.discard(rid)

    def _write(self, bookings: list[Booking]) -> None:
        with self._lease.exclusively(self._lock):
            self.books.write(bookings)

    def _audits(self, rids: list[str]) -> list[Audit | None]:
        if not self._config.feeder.record_audit:
            return [None] * len(rids)
        records = self._plane.rollouts(rids)
        return [audit_of(rid, record) if record else None for rid, record in zip(rids, records, strict=True)]

    def _book(self, endings: list[tuple[str, str, list[bytes]]]) -> None:
        """Rollouts by their ledger field, with what is pending of each."""
        failed = self._plane.failed_calls
        booked = self._lease.call_all([scripts.book(*ending) for ending in endings])
        if self._plane.failed_calls != failed:
            # A call that came through and whose answer was lost says "before" the second time.
            self.ledger = Tally(self._plane.ledger())
            return
        self.ledger.fields.update(name for (_, name, _), fresh in zip(endings, booked, strict=True) if fresh)

    # --- admission ---------------------------------------------------------------------------------------------

    def _admit(self) -> int:
        """Admit what there is room for: writers' slots on the one hand, staleness on the other, memory on the third."""
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
        """Deterministic: admit what the batch of this step lacks, at a moment when every verdict has been given.

        The step, and the threshold of that moment, go with each rollout: so it does not matter who writes, scores or
        judges which of them first.
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
        if count <= 0 or self._fitting(count) < count:  # whole, or its parts would be judged by other thresholds
            return 0
        return self._admit_next(count, step, self._plane.threshold())

    def _admit_next(self, count: int, step: int | None = None, threshold: bytes = b"") -> int:
        """What operators sent back comes first; each takes the number, and the place in the data, that is next."""
        if count <= 0:
            return 0
        sent_back = self._sent_back(count)
        heads, calls = [], []
        for place in range(count):
            request = sent_back[place] if place < len(sent_back) else None
            head = head_of(self._config, self._source, self._cursor + place, step, request and request[1])
            heads.append(head)
            calls.append(scripts.admit(head.rid, head.encode(), self._cursor + place + 1, threshold, request))
        for admitted, (head, word) in enumerate(zip(heads, self._lease.call_all(calls), strict=True)):
            # After one that was refused, all are: each follows the one before.
            if word is Admitted.BEHIND and admitted == 0:
                raise RunGone("Redis has forgotten the newest admissions: the feeder must begin anew from its books")
            if word is Admitted.FULL:  # others fill it: of this run's own there was room
                self._say_short(self._plane.memory())
            if word is not Admitted.OK:
                return admitted
            self._cursor += 1
            self._running.add(head.rid)
            self.ledger.fields["admitted"] += 1
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
                continue
            found.append((entry, problem))
        return found

    def _fitting(self, count: int) -> int:
        """How many of `count` more Redis has room for."""
        if count <= 0 or self._clock() < self._room_at:
            return 0
        config, running, memory = self._config, self._running, self._plane.memory()
        each, free = rollout_bytes(config), free_bytes(memory)
        growing = len(running) * each
        if free < growing + count * each:  # then it counts how far they have come
            lengths = self._plane.fields((rid, ["length"]) for rid in sorted(running))
            growing = sum(growth_bytes(config, _stored(length)) for (length,) in lengths)
        fitting = admission.fitting(count, running=len(running), free=free, growing=growing, each=each)
        if fitting < count:
            self._say_short(memory)
        else:
            self._short.not_seen("Redis has room again for all that may be admitted")
        return fitting

    def _say_short(self, memory: dict[str, Any]) -> None:
        """Once an episode; and look again only after a moment."""
        self._room_at = self._clock() + ROOM_S
        used, limit = (memory[name] / (1 << 20) for name in ("used_memory", "maxmemory"))
        dead = self.ledger.fields["dead"]
        kept = f"; {dead} dead rollouts are kept for you (katana dead)" if dead else ""
        self._short.seen(
            f"Redis is short of memory ({used:.1f} of {limit:.1f} MB used, and what is being written will need more): "
            f"fewer rollouts are admitted, and the run is slower; with a maxmemory of "
            f"{maxmemory_mb(most_bytes(self._config))} MB it would not wait{kept}"
        )

    @property
    def _concurrency(self) -> int:
        return self._config.feeder.concurrency or int(1.25 * self._slots)

    # --- housekeeping ------------------------------------------------------------------------------------------

    def _housekeep(self) -> None:
        """Open worker tasks, take killed workers' names off, write the ledger, set the gauges."""
        self._open_shifts()
        live = self._plane.live(within_s=3 * self._config.liveness.heartbeat_s + 1)
        slots = sum(int(facts.get("slots", 0)) for facts in live.values() if facts.get("role") == "rollout")
        self._slots = slots or self._config.rollout.slots * self._config.rollout.workers
        if self._clock() >= self._sweep_at:
            self._sweep_at = self._clock() + _SWEEP_S
            self._plane.sweep(silent_s=_SWEEP_S)
        self.ledger.write(self._config.run_dir / LEDGER, self._lock)
        metrics.config_value.labels("concurrency").set(self._concurrency)
        metrics.rollouts_open.set(self.ledger.open)
        stream_metrics.show_workers(live)
        stream_metrics.show_backlog(self._plane.backlog())


def head_of(
    config: Config, source: Source, number: int, step: int | None = None, problem: int | None = None
) -> RolloutHead:
    """The rollout that is admitted as number `number`; by itself it takes the problem that is next in the data."""
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
    )


def _admitted_on_disk(folder: Path, books: Books) -> int:
    """How many rollouts books, ledger and the learner's record know of: no id may ever be given twice."""
    path = folder / LEDGER
    admitted = int(json.loads(path.read_text())["admitted"]) if path.exists() else 0
    lines = read_lines(folder / TRAINED, Trained.from_json)
    trained = max((number_of(rid) + 1 for line in lines for rid in line.rids), default=0)
    return max(books.booked.next_number, admitted, trained)


def _stored(length: bytes | None) -> int:
    """Tokens that are stored of a rollout; 0 where its record does not say: it may yet grow to all of its length."""
    try:
        return read_number(length or b"0", "rollout.length")
    except MessageError:
        return 0
