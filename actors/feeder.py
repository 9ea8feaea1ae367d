"""The feeder: admits rollouts, keeps one open Celery shift in each queue, keeps the books. No torch.

Invariant: every admitted rollout ends exactly once, as trained, dropped (with a reason) or dead.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from actors.books import BookLine, Books, ledger_field, line_of, unjudged_line
from common import metrics
from common.config import Config
from common.messages import Ints, MessageError, RolloutHead, Verdict, read_number, read_rid
from common.streams import GROUPS, Lease, Plane
from common.weights import write_atomically

log = logging.getLogger("katana.feeder")
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
        self._books = Books(config.run_dir, record_traces=config.feeder.record_traces)
        self._open_shifts = open_shifts
        self._rollouts: dict[str, _Open] = {}
        self._running: set[str] = set()
        self._ledger: dict[str, int] = {}
        self._cursor = 0
        self._slots = config.rollout.slots * config.rollout.workers
        self._housekeeping_at = 0.0

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
        came = self._plane.read("books", "feeder", ["finished"], count=512, block_s=block_s)
        for _, (entry, values) in came:
            self._note(entry, values)
        self._book_ready()
        admitted = self._admit()
        if time.monotonic() >= self._housekeeping_at:
            self._housekeeping_at = time.monotonic() + 0.5
            self._housekeep()
        return bool(came) or admitted > 0

    # --- start and end -----------------------------------------------------------------------------------------

    def _load(self) -> None:
        client, key = self._plane.client, self._plane.key
        ledger = self._plane.patiently(lambda: client.hgetall(key("ledger")), "ledger")
        self._ledger = {name.decode(): int(value) for name, value in ledger.items()}
        self._cursor = int(self._plane.patiently(lambda: client.get(key("cursor")), "cursor") or 0)
        if self._cursor < self._books.next_cursor:
            self._restore()
        rids = sorted(rid.decode() for rid in self._plane.patiently(lambda: client.smembers(key("open")), "open"))
        verdicts = self._plane.fields((rid, ["verdict"]) for rid in rids)
        self._running = {rid for rid, (verdict,) in zip(rids, verdicts, strict=True) if verdict is None}
        for entry, values in self._plane.read_pending("books", "feeder", "finished"):
            self._note(entry, values)

    def _restore(self) -> None:
        """Redis knows less than the books: it lost the run. Go on behind what was admitted; what was open is lost."""
        cursor = max(self._books.next_cursor, _admitted_on_disk(self._config.run_dir))
        rids = [rid_of(index) for index in range(cursor)]
        lost = [rid for rid in rids if rid not in self._books.booked]
        log.warning(
            "Redis lost this run: %d of %d admitted rollouts are booked, %d are lost",
            cursor - len(lost),
            cursor,
            len(lost),
        )
        for rid in lost:
            head = self._head(int(rid[1:]))
            line = unjudged_line(rid, head.arm, head.problem, ending="dropped", reason="lost", generated=0)
            self._books.write(line, None)
        self._cursor = cursor
        self._ledger = {"admitted": cursor, **self._books.endings}
        self._lease.call("restore", cursor, *(part for item in self._ledger.items() for part in item))

    def _finish(self) -> None:
        """The learner is done: free the writers, hear them out for a moment, drop what is in flight."""
        self._lease.advance("state", "ended")
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            self._lease.keep()
            for _, (entry, values) in self._plane.read("books", "feeder", ["finished"], count=512, block_s=0.1):
                self._note(entry, values)
        self._book_ready(wait_s=0.0)
        names = self._plane.patiently(lambda: self._plane.client.smembers(self._plane.key("open")), "open")
        for rid in sorted(name.decode() for name in names):
            rollout = self._rollouts.setdefault(rid, _Open())
            rollout.ending = rollout.ending or ("dropped", "run_end", None)
            self._book(rid, rollout)

    def _write_ledger(self) -> None:
        ledger = json.dumps(self.ledger())
        write_atomically(self._config.run_dir / "ledger.json", lambda path: _write_text(path, ledger))

    def ledger(self) -> dict[str, object]:
        """admitted = trained + dropped + dead + open."""
        dropped = {
            name.removeprefix("dropped:"): value for name, value in self._ledger.items() if name.startswith("dropped:")
        }
        admitted, trained, dead = (self._ledger.get(name, 0) for name in ("admitted", "trained", "dead"))
        return {
            "admitted": admitted,
            "trained": trained,
            "dropped": dropped,
            "dead": dead,
            "open": admitted - trained - dead - sum(dropped.values()),
        }

    # --- books -------------------------------------------------------------------------------------------------

    def _note(self, entry: bytes, values: dict[bytes, bytes]) -> None:
        """Take in one `finished` entry. What cannot be read is given up, with the reason."""
        try:
            rid = read_rid(values.get(b"rid"))
            rollout = self._rollouts.get(rid, _Open())
            self._absorb(rollout, values)
        except MessageError as error:
            self._plane.fail(
                "",
                "finished",
                str(error),
                max_attempts=1,
                shown=repr(values).encode()[:256],
                at=("finished", "books", entry),
            )
            metrics.dead_letters.labels("finished").inc()
            return
        rollout.entries.append(entry)
        if rid in self._books.booked:
            # Late word on a rollout whose line is written; the script books it if a crash came between the two.
            self._settle(rid, ledger_field(*rollout.ending[:2]) if rollout.ending else "", rollout.entries)
            self._rollouts.pop(rid, None)
            return
        self._rollouts[rid] = rollout

    def _absorb(self, rollout: _Open, values: dict[bytes, bytes]) -> None:
        kind = values.get(b"kind")
        if kind == b"verdict":
            verdict = Verdict.decode(values.get(b"body", b""))
            if verdict.rid.encode() != values[b"rid"]:
                raise MessageError(f"finished.body: the verdict of {verdict.rid!r:.40}")
            rollout.verdict = verdict
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
            rollout.ended_at = time.monotonic()
            self._running.discard(values[b"rid"].decode())
        else:
            raise MessageError(f"finished.kind: {kind!r:.40} with ending {values.get(b'ending')!r:.40}")

    def _book_ready(self, wait_s: float = _COUNT_WAIT_S) -> None:
        now = time.monotonic()
        for rid, rollout in list(self._rollouts.items()):
            if rollout.ending is None:
                continue
            late = now - rollout.ended_at >= wait_s
            # A trained or dropped rollout always has a verdict; it may be read a moment after the ending.
            known = rollout.generated is not None or rollout.ending[0] == "dead"
            if late or (known and (rollout.verdict is not None or rollout.ending[0] == "dead")):
                self._book(rid, rollout)

    def _book(self, rid: str, rollout: _Open) -> None:
        assert rollout.ending is not None
        line = self._line(rid, rollout)
        self._books.write(line, rollout.verdict)
        self._settle(rid, line.ledger_field, rollout.entries)
        self._rollouts.pop(rid, None)
        self._running.discard(rid)

    def _settle(self, rid: str, ledger_field: str, entries: list[bytes]) -> None:
        reply = self._lease.call("book", rid, ledger_field, *entries)
        if reply[1] == 1:
            self._ledger[ledger_field] = self._ledger.get(ledger_field, 0) + 1

    def _line(self, rid: str, rollout: _Open) -> BookLine:
        assert rollout.ending is not None
        ending, reason, staleness = rollout.ending
        verdict = rollout.verdict
        generated = rollout.generated
        head_bytes, length = self._plane.fields([(rid, ["head", "length"])])[0]
        if generated is None:  # its writer died or never said: the stored chunks
            generated = int(length or 0)
        if verdict is not None:
            policy = self._config.termination.policy
            return line_of(
                verdict,
                ending=ending,
                reason=reason,
                generated=generated,
                staleness=staleness,
                active=policy == "fixed" or (policy == "kat" and verdict.threshold is not None),
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
        """Admit what there is room for: writers' slots on the one hand, staleness on the other."""
        count = min(self._concurrency() - len(self._running), self._allowance())
        for admitted in range(count):
            head = self._head(self._cursor)
            reply = self._lease.call("admit", head.rid, head.encode(), self._cursor + 1)
            if reply[0] != b"ok":
                return admitted
            self._cursor += 1
            self._running.add(head.rid)
            self._ledger["admitted"] = self._ledger.get("admitted", 0) + 1
        return max(count, 0)

    def _allowance(self) -> int:
        """(max_staleness + 1) · batch - (waiting + running), and no more than the run can still train.

        What was trained since the last checkpoint is not booked yet: of the open rollouts it is neither waiting nor
        running. Counted so, and not from the sum of all ever trained, it stays right when a learner goes back to an
        older checkpoint.
        """
        learner, policy = self._config.learner, self._plane.policy()
        step = int(policy.get("step", "0"))
        unbooked = (step - int(policy.get("covered", "0"))) * learner.batch_size
        usable = min(learner.max_staleness + 1, learner.max_steps - step) * learner.batch_size
        ended = sum(value for name, value in self._ledger.items() if name != "admitted")
        return usable - (self._ledger.get("admitted", 0) - ended - unbooked)

    def _concurrency(self) -> int:
        return self._config.feeder.concurrency or int(1.25 * self._slots)

    def _head(self, cursor: int) -> RolloutHead:
        config = self._config
        problem = cursor // config.data.num_generations
        treated = _fraction(config.seed, "arm", cursor) >= config.termination.control_fraction
        return RolloutHead(
            rid=rid_of(cursor),
            arm="treated" if treated else "control",
            problem=problem,
            seed=_draw(config.seed, "rollout", cursor) >> 1,
            max_new_tokens=config.rollout.max_completion_length,
            prompt=self._source.prompt(problem),
        )

    # --- shifts and gauges -------------------------------------------------------------------------------------

    def _housekeep(self) -> None:
        self._open_shifts()
        live = self._plane.live(within_s=3 * self._config.liveness.heartbeat_s + 1)
        slots = sum(int(facts.get("slots", 0)) for facts in live.values() if facts.get("role") == "rollout")
        self._slots = slots or self._config.rollout.slots * self._config.rollout.workers
        self._write_ledger()
        self._measure_streams()

    def _measure_streams(self) -> None:
        """Entries outstanding and the age of the oldest pending one, by stream; all shards of chunks together."""
        groups = GROUPS | {f"chunks:{shard}": "teacher" for shard in range(self._plane.shards)}

        def ask() -> list[Any]:
            pipe = self._plane.client.pipeline(transaction=False)
            pipe.time()
            for name, group in groups.items():
                pipe.xlen(self._plane.key(name))
                pipe.xpending(self._plane.key(name), group)
            return list(pipe.execute(raise_on_error=False))

        (seconds, _), *answers = self._plane.patiently(ask, "streams")
        length: Counter[str] = Counter()
        oldest: dict[str, float] = {}
        for name, size, pending in zip(groups, answers[::2], answers[1::2], strict=True):
            if isinstance(size, Exception) or isinstance(pending, Exception):
                continue  # a group that was lost: whoever reads it makes it again
            stream = name.partition(":")[0]
            length[stream] += size
            first = int(pending["min"].split(b"-")[0]) / 1000 if pending["pending"] else float(seconds)
            oldest[stream] = max(oldest.get(stream, 0.0), seconds - first)
        for stream in oldest:
            metrics.stream_outstanding.labels(stream).set(length[stream])
            metrics.stream_oldest_pending.labels(stream).set(oldest[stream])


def rid_of(index: int) -> str:
    """The id of the rollout that was admitted as number `index`, from 0."""
    return f"r{index:09d}"


def _admitted_on_disk(folder: Path) -> int:
    path = folder / "ledger.json"
    return int(json.loads(path.read_text())["admitted"]) if path.exists() else 0


def _draw(seed: int, what: str, index: int) -> int:
    """64 bits that depend on nothing but their arguments."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{what}:{index}".encode(), digest_size=8).digest(), "big")


def _fraction(seed: int, what: str, index: int) -> float:
    return _draw(seed, what, index) / 2**64


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
