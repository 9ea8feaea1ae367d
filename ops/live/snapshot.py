"""What `katana top` shows: one look at a running cluster, from Redis, metrics ports and the run's folder. Reads only.

A look costs Redis three round trips at most and a number of commands that does not grow with the run. Whatever of the
three cannot be seen is left out, and noted.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import redis

from common.config import Config
from common.policies import unit_of
from common.runfiles.records import BookLine, Trace
from common.runfiles.run import RunFolder
from common.teachers import in_lane, of
from common.wire.messages import MessageError, Verdict, read_rid
from common.wire.plane import Plane, unix_s
from common.wire.planes import all_like_fullest
from ops.live.growth import Folder, LiveSaving, Rate
from ops.reach.ports import Served, scrape, targets
from ops.reach.run import Away, Outlook, Run
from ops.reading.rollouts import Words, texts_of

LEASED = ("feeder", "arbiter", "learner")
_MOST_WORKERS = 256
_MOST_VERDICTS = 8
_TEXT_TOKENS = 96  # of a verdict's text: the end of the kept part, and as many after the cut


@dataclass(frozen=True, slots=True)
class Role:
    """`lease`: whether a process holds it (None: a role without one); ages in seconds."""

    name: str
    lease: bool | None
    lease_left_s: float | None
    ports: int  # that answered
    silent: int  # ports that did not
    turned_s: float | None  # since the loop's last iteration; of several processes the longest
    workers: int = 0  # that Redis has seen lately

    @property
    def alive(self) -> bool:
        """A role with a lease is alive if a process holds it; another if a process answers, or was seen."""
        return self.lease if self.lease is not None else self.ports + self.workers > 0


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker's facts from its heartbeat of `seen_s` seconds ago."""

    id: str
    role: str
    seen_s: float
    busy: float | None
    slots: int | None
    writing: int | None
    version: int | None
    tokens_per_s: float | None


@dataclass(frozen=True, slots=True)
class Stream:
    """Entries not yet taken off, and the age of the oldest that is being worked on."""

    outstanding: int
    oldest_pending_s: float | None


@dataclass(frozen=True, slots=True)
class RecentVerdict:
    """A recent verdict. `text`: the end of the kept part; `behind`: the beginning of the text after the cut."""

    rid: str
    arm: str
    reason: str
    kept: int
    generated: int
    cut: bool  # whether the writing was stopped
    at_unix_s: float | None
    text: str
    behind: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One look. None for values that were not available; `notes` name what could not be seen."""

    at_unix_s: float
    name: str
    folder: str
    redis: str  # "" when it answers, else what is wrong; also for a run that is over, which needs none
    metrics: str  # "" when ports answer, else what is wrong
    run_key: str = ""
    state: str = "?"
    step: int | None = None
    max_steps: int | None = None
    policy_version: int | None = None
    roles: list[Role] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)
    streams: dict[str, Stream] = field(default_factory=dict)
    ledger: dict[str, int] = field(default_factory=dict)
    open_rollouts: int | None = None
    dead_letters: int | None = None
    saving: LiveSaving = field(default_factory=LiveSaving)
    threshold_nats: float | None = None
    threshold_of: dict[str, float | None] = field(default_factory=dict)  # of several teachers each one's, in nats
    minima: int | None = None  # of several teachers of all of them
    cut_rate: float | None = None  # share of treated rollouts in which the policy fired, applied or not
    lag_versions: float | None = None
    tokens_per_s: dict[str, float | None] = field(default_factory=dict)
    redis_used_bytes: int | None = None
    redis_max_bytes: int | None = None
    verdicts: list[RecentVerdict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


# --- looking ----------------------------------------------------------------------------------------------------------


class Observer:
    """Looks again and again. `look` raises ConfigError for what will not change by waiting."""

    def __init__(self, config: Config, source: Path) -> None:
        self._given = config
        self._outlook = Outlook(config, source)
        self._folder = Folder(config.run_dir)
        self._words = Words(config)
        self._run_key = ""
        self._judged: dict[str, RecentVerdict] = {}
        self._by_port = {name: Rate() for name in ("written", "scored", "trained")}
        self._by_worker = Rate()

    def look(self) -> Snapshot:
        """One snapshot of what can be seen now."""
        blank = Snapshot(time.time(), self._given.name, str(self._given.run_dir), "", "")
        self._folder.read()
        try:
            snapshot = self._ask_redis(self._outlook.look(), blank)
        except Away as away:
            snapshot = replace(blank, redis=str(away), max_steps=self._given.learner.max_steps)
        except (redis.exceptions.RedisError, OSError) as error:
            snapshot = replace(blank, redis=f"Redis does not answer ({error})", max_steps=None)
        snapshot = self._add_folder(snapshot)
        if snapshot.redis:
            snapshot = self._add_end(snapshot)
        return self._add_metrics(snapshot, scrape(targets(self._given.run_dir)))

    @property
    def nothing(self) -> bool:
        """Whether there is no folder of this run."""
        return not RunFolder(self._given.run_dir).begun

    def close(self) -> None:
        self._outlook.close()

    # --- Redis ---

    def _ask_redis(self, run: Run, blank: Snapshot) -> Snapshot:
        if run.run_key != self._run_key:  # begun anew under this name: the same ids, other rollouts
            self._run_key, self._judged = run.run_key, {}
        facts = _read_facts(run)
        now = facts["now"]
        workers = self._workers(run, facts["workers"], now)
        self._note_verdicts(run, facts["trajectories"])
        policy = facts["policy"]
        thresholds = facts["thresholds"] if unit_of(run.config.termination.policy) == "nats" else {}
        return replace(
            blank,
            run_key=run.run_key,
            state=facts["state"],
            step=_whole(policy.get(b"step")),
            max_steps=run.config.learner.max_steps,
            policy_version=_whole(policy.get(b"version")),
            roles=[Role(role, held, left, 0, 0, None) for role, (held, left) in facts["leases"].items()],
            workers=workers,
            streams=facts["streams"],
            ledger=facts["ledger"],
            open_rollouts=facts["open"],
            dead_letters=facts["dead"],
            threshold_nats=thresholds.get(""),
            threshold_of={name: value for name, value in thresholds.items() if name},
            minima=facts["minima"],
            redis_used_bytes=facts["memory"].get("used_memory"),
            redis_max_bytes=facts["memory"].get("maxmemory"),
        )

    def _workers(self, run: Run, named: Sequence[tuple[bytes, float]], now: float) -> list[Worker]:
        """Those that were seen within three heartbeats, as the feeder counts them."""
        within_s = 3 * run.config.liveness.heartbeat_s + 1
        live = [(name.decode("ascii", "replace"), at) for name, at in named if now - at <= within_s]
        pipe = run.client.pipeline(transaction=False)
        for name, _ in live:
            pipe.hgetall(run.key(f"worker:{name}"))
        self._by_worker.keep(name for name, _ in live)
        found = [
            self._worker(name, at, now, facts)
            for (name, at), facts in zip(live, pipe.execute(raise_on_error=False) if live else [], strict=True)
            if isinstance(facts, dict)
        ]
        return sorted(found, key=lambda worker: (worker.role, worker.id))

    def _worker(self, name: str, at: float, now: float, facts: Mapping[bytes, bytes]) -> Worker:
        role = facts.get(b"role", b"?").decode("ascii", "replace")
        tokens = _whole(facts.get(b"tokens"))
        if tokens is not None:
            self._by_worker.note(name, at, tokens)
        return Worker(
            id=name,
            role=role,
            seen_s=max(0.0, now - at),
            busy=_real(facts.get(b"busy")),
            slots=_whole(facts.get(b"slots")),
            writing=_whole(facts.get(b"writing")),
            version=_whole(facts.get(b"version")),
            tokens_per_s=self._by_worker.of(name),
        )

    def _note_verdicts(self, run: Run, entries: Sequence[tuple[bytes, Mapping[bytes, bytes]]]) -> None:
        """Newest trajectories name rollouts that have their verdict and are not trained yet."""
        moments: dict[str, float] = {}
        for entry, values in entries:
            try:
                moments.setdefault(read_rid((values or {}).get(b"rid")), unix_s(entry))
            except (MessageError, ValueError):
                continue  # damaged: the learner reports it
        fresh = [rid for rid in moments if rid not in self._judged]
        if not fresh:
            return
        for rids in run.plane.by_server(fresh, lambda rid: rid):
            pipe = run.plane.parts[run.plane.place_of(rids[0])].client.pipeline(transaction=False)
            for rid in rids:
                pipe.hmget(run.key(f"rollout:{rid}"), ["verdict", "length"])
            for rid, answer in zip(rids, pipe.execute(raise_on_error=False), strict=True):
                if isinstance(answer, list) and answer[0] is not None:
                    self._note_verdict(rid, moments[rid], answer[0], _whole(answer[1]) or 0)

    def _note_verdict(self, rid: str, at_unix_s: float, encoded: bytes, length: int) -> None:
        try:
            verdict = Verdict.decode(encoded)
        except MessageError:
            return
        text, rest = self._excerpt(verdict.tokens.tolist(), verdict.keep)
        generated = max(verdict.generated or 0, length, len(verdict.tokens))
        self._judged[rid] = RecentVerdict(
            rid, verdict.arm, verdict.finish_reason, verdict.keep, generated, verdict.stopped, at_unix_s, text, rest
        )

    def _excerpt(self, ids: list[int], keep: int) -> tuple[str, str]:
        begin = max(0, keep - _TEXT_TOKENS)
        texts = texts_of(ids[begin : keep + _TEXT_TOKENS], self._words.decode)
        return "".join(texts[: keep - begin]), "".join(texts[keep - begin :])

    # --- the folder ---

    def _add_folder(self, snapshot: Snapshot) -> Snapshot:
        folder = self._folder
        for trace in folder.traces(_MOST_VERDICTS):
            self._note_trace(trace)
        judged = [_booked(one, folder.newest.get(one.rid)) for one in self._judged.values()]
        newest = sorted(judged, key=lambda one: (one.at_unix_s or 0.0, one.rid), reverse=True)
        self._judged = {one.rid: one for one in newest[: 8 * _MOST_VERDICTS]}
        last, policy_version = folder.last_step, snapshot.policy_version
        if last is not None:
            # The policy in Redis is of the newest published weights; a line is written at every step.
            snapshot = replace(snapshot, step=max(snapshot.step or 0, last.step), lag_versions=last.staleness_mean)
            policy_version = last.policy_version if policy_version is None else policy_version
        return replace(
            snapshot,
            policy_version=policy_version,
            saving=folder.saving(),
            cut_rate=folder.cut_rate(),
            verdicts=newest[:_MOST_VERDICTS],
            notes=[*snapshot.notes, *folder.notes(), *([self._words.missing] if self._words.missing else [])],
        )

    def _add_end(self, snapshot: Snapshot) -> Snapshot:
        """A local run's Redis goes with it; whether the run is over, its folder knows."""
        counts, last = self._folder.closed_ledger(), self._folder.last_step
        if counts is None or last is None:
            return snapshot
        return replace(snapshot, state="ended", max_steps=last.step, ledger=counts, open_rollouts=0)

    def _note_trace(self, trace: Trace) -> None:
        if trace.rid in self._judged:
            return
        text, rest = self._excerpt(trace.tokens.tolist(), trace.keep)
        self._judged[trace.rid] = RecentVerdict(
            trace.rid, trace.arm, trace.finish_reason, trace.keep, trace.written, trace.stopped, None, text, rest
        )

    # --- metrics ports ---

    def _add_metrics(self, snapshot: Snapshot, served: Sequence[Served]) -> Snapshot:
        answered = [one for one in served if not one.trouble]
        self._note_rates(answered)
        by_role: dict[str, list[Served]] = {}
        for one in answered:
            by_role.setdefault(one.target.role, []).append(one)
        return replace(
            snapshot,
            metrics=_metrics_trouble(served, answered),
            roles=_roles(snapshot, served),
            tokens_per_s={
                "written": _or(self._by_port["written"].total(), _by_role(snapshot, "rollout")),
                "scored": _or(self._by_port["scored"].total(), _by_role(snapshot, "teacher")),
                # By steps, which come one at a time, and not by what came within seconds.
                "trained": _or(self._folder.trained_per_s(), self._by_port["trained"].total()),
            },
            saving=snapshot.saving if snapshot.saving.source else _served_saving(by_role.get("feeder", [])),
            threshold_nats=_or(
                snapshot.threshold_nats, _first(by_role.get("arbiter"), "katana_kat_threshold_nats", teacher="")
            ),
            cut_rate=_or(_first(by_role.get("arbiter"), "katana_kat_cut_rate"), snapshot.cut_rate),
            lag_versions=_or(snapshot.lag_versions, _mean(by_role.get("learner"), "katana_policy_lag_versions")),
        )

    def _note_rates(self, answered: Sequence[Served]) -> None:
        now = time.monotonic()
        counters = {
            "written": ("rollout", "katana_decode_tokens_total", {"role": "rollout"}),
            "scored": ("teacher", "katana_decode_tokens_total", {"role": "teacher"}),
            "trained": ("learner", "katana_learner_tokens_total", {}),
        }
        for name, (role, series, labels) in counters.items():
            mine = [one for one in answered if one.target.role == role]
            self._by_port[name].keep(one.target.process for one in mine)
            for one in mine:
                value = one.value(series, **labels)
                if value is not None:
                    self._by_port[name].note(one.target.process, now, value)


def as_dict(snapshot: Snapshot) -> dict[str, Any]:
    """For JSON, with the property `alive` of each role."""
    value = asdict(snapshot)
    for role, written in zip(snapshot.roles, value["roles"], strict=True):
        written["alive"] = role.alive
    return value


def _booked(judged: RecentVerdict, line: BookLine | None) -> RecentVerdict:
    """With what the books know better: how much was written in the end."""
    if line is None:
        return judged
    return replace(judged, generated=line.tokens_generated, at_unix_s=line.verdict_unix_s)


def _by_role(snapshot: Snapshot, role: str) -> float | None:
    rates = [one.tokens_per_s for one in snapshot.workers if one.role == role and one.tokens_per_s is not None]
    return sum(rates) if rates else None


def _read_facts(run: Run) -> dict[str, Any]:
    """All that does not depend on what is found, in one round trip to each data server. Of several the home has the
    state and the workers; counts are sums, and the memory is as the feeder counts it."""
    home, *others = [_read_part(part) for part in run.plane.parts]
    for other in others:
        for name in ("open", "dead"):
            home[name] = None if None in (home[name], other[name]) else home[name] + other[name]
        home["ledger"] = dict(Counter(home["ledger"]) + Counter(other["ledger"]))
        home["trajectories"] += other["trajectories"]
        home["streams"] = {name: _joined(home["streams"].get(name), one) for name, one in other["streams"].items()}
        # A role whose lease is missing on one of them has lost it.
        home["leases"] = {
            role: min(lease, other["leases"][role], key=lambda one: (one[0], one[1] or 0.0))
            for role, lease in home["leases"].items()
        }
    if others and all(one["memory"] for one in (home, *others)):
        home["memory"] = all_like_fullest([one["memory"] for one in (home, *others)])
    return home


def _joined(one: Stream | None, other: Stream) -> Stream:
    if one is None:
        return other
    ages = [age for age in (one.oldest_pending_s, other.oldest_pending_s) if age is not None]
    return Stream(one.outstanding + other.outstanding, max(ages, default=None))


def _read_part(part: Plane) -> dict[str, Any]:
    """What the operator may not read is left out."""
    streams = part.groups
    (seconds, micros), strings, policy, ledger, opened, dead, memory, workers, newest, *rest = _ask(part, streams)
    minima, rest = rest[: len(part.teachers)], rest[len(part.teachers) :]
    now, leases = seconds + micros / 1e6, rest[: 2 * len(LEASED)]
    state, *thresholds = _or_empty(strings, [None] * (1 + len(part.teachers)))
    readable = [count for count in minima if not isinstance(count, Exception)]
    counts = _or_empty(ledger, {})
    return {
        "now": now,
        "state": "gone" if state is None else state.decode("ascii", "replace"),
        "thresholds": dict(zip(part.teachers, map(_real, thresholds), strict=True)),
        "policy": _or_empty(policy, {}),
        "ledger": {name.decode("ascii", "replace"): _whole(count) or 0 for name, count in counts.items()},
        "open": _or_empty(opened, None),
        "minima": sum(readable) if readable else None,
        "dead": _or_empty(dead, None),
        "memory": _or_empty(memory, {}),
        "workers": _or_empty(workers, []),
        "trajectories": _or_empty(newest, []),
        "leases": {
            role: (held == 1, left / 1000 if isinstance(left, int) and left >= 0 else None)
            for role, held, left in zip(LEASED, leases[::2], leases[1::2], strict=True)
        },
        "streams": _streams([name for name, _ in streams], rest[2 * len(LEASED) :], now),
    }


def _ask(part: Plane, streams: Sequence[tuple[str, str]]) -> list[Any]:
    """Answers in the order in which `_read_part` takes them apart; an error is the answer of its own command alone."""
    pipe, key = part.client.pipeline(transaction=False), part.key
    pipe.time()
    pipe.mget([key(name) for name in ("run", *(of(teacher, "threshold") for teacher in part.teachers))])
    pipe.hgetall(key("policy"))
    pipe.hgetall(key("ledger"))
    pipe.scard(key("open"))
    pipe.xlen(key("dead"))
    pipe.info("memory")
    pipe.zrevrange(key("workers"), 0, _MOST_WORKERS - 1, withscores=True)
    pipe.xrevrange(key("trajectories"), count=_MOST_VERDICTS)
    for teacher in part.teachers:
        pipe.llen(key(of(teacher, "minima")))
    for role in LEASED:
        pipe.exists(key(f"lease:{role}"))
        pipe.pttl(key(f"lease:{role}"))
    for stream, group in streams:
        pipe.xlen(key(stream))
        pipe.xpending(key(stream), group)
    answers: list[Any] = pipe.execute(raise_on_error=False)
    if isinstance(answers[0], Exception):
        raise answers[0]  # it answers nothing now, for example because it loads its data
    return answers


def _streams(names: Sequence[str], answers: Sequence[Any], now: float) -> dict[str, Stream]:
    """All shards of a teacher's chunks together, as the feeder's metrics have them."""
    found: dict[str, Stream] = {}
    for name, size, pending in zip(names, answers[::2], answers[1::2], strict=True):
        if isinstance(size, Exception):
            continue
        teacher = in_lane(name)[1]
        stream = f"chunks of {teacher}" if teacher else name.partition(":")[0]
        before = found.get(stream, Stream(0, None))
        ages = [before.oldest_pending_s]
        if isinstance(pending, dict) and pending["pending"]:
            ages.append(max(0.0, now - unix_s(pending["min"])))
        oldest = max((age for age in ages if age is not None), default=None)
        found[stream] = Stream(before.outstanding + size, oldest)
    return found


def _roles(snapshot: Snapshot, served: Sequence[Served]) -> list[Role]:
    """Leases from Redis and ports from the folder, put together."""
    leased = {role.name: role for role in snapshot.roles}
    found = []
    for name in (*LEASED, "rollout", "teacher", "evaluator"):
        mine = [one for one in served if one.target.role == name]
        turned = [one.value("katana_loop_timestamp_seconds", role=name) for one in mine if not one.trouble]
        ages = [max(0.0, time.time() - moment) for moment in turned if moment]  # 0: between two worker tasks
        base = leased.get(name, Role(name, None, None, 0, 0, None))
        answered = sum(not one.trouble for one in mine)
        found.append(
            replace(
                base,
                ports=answered,
                silent=len(mine) - answered,
                turned_s=max(ages, default=None),
                workers=sum(worker.role == name for worker in snapshot.workers),
            )
        )
    return found


def _metrics_trouble(served: Sequence[Served], answered: Sequence[Served]) -> str:
    if answered:
        return ""
    if not served:
        return "not reachable: no process of this run has announced its address"
    return f"not reachable: {served[0].target.address} {served[0].trouble}"


def _served_saving(feeders: Sequence[Served]) -> LiveSaving:
    """From the feeder's sums, where the books are not to be seen: the same ratio, without an interval."""
    for feeder in feeders:
        sums = {
            arm: (feeder.value("katana_rollout_length_tokens_sum", arm=arm), _count_of(feeder, arm))
            for arm in ("treated", "control")
        }
        (treated, many), (control, others) = sums["treated"], sums["control"]
        if treated and control and many and others:
            return LiveSaving(1 - (treated / many) / (control / others), None, None, round(many + others), "metrics")
    return LiveSaving()


def _count_of(feeder: Served, arm: str) -> float | None:
    return feeder.value("katana_rollout_length_tokens_count", arm=arm)


def _first(served: Sequence[Served] | None, name: str, **labels: str) -> float | None:
    return next((value for one in served or () if (value := one.value(name, **labels)) is not None), None)


def _mean(served: Sequence[Served] | None, name: str) -> float | None:
    total, count = _first(served, f"{name}_sum"), _first(served, f"{name}_count")
    return total / count if total is not None and count else None


def _or(value: float | None, otherwise: float | None) -> float | None:
    return otherwise if value is None else value


def _or_empty(answer: Any, empty: Any) -> Any:
    return empty if isinstance(answer, Exception) else answer


def _whole(value: bytes | None) -> int | None:
    return int(value) if value is not None and value.isdigit() and len(value) < 19 else None


def _real(value: bytes | None) -> float | None:
    """A finite number; None for what is none, as `inactive`."""
    try:
        number = float(value or b"")
    except ValueError:
        return None
    return number if math.isfinite(number) else None
