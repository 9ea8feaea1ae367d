"""A rollout that is not booked yet: what its notices in `finished` contain, and its line in the books."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from actors.books import line_of, unjudged_line
from common.runfiles.records import BookLine, ledger_field
from common.wire.messages import Ints, MessageError, RolloutHead, Verdict, read_number
from common.wire.plane import unix_s

log = logging.getLogger("katana.feeder")
FACTS = ["head", "length", "entry"]  # the fields of a rollout's record that a line needs


@dataclass(slots=True)
class Unbooked:
    """State of an unbooked rollout. `entries`: its notices, pending until it is booked. `ended_s`: feeder's clock."""

    entries: list[bytes] = field(default_factory=list)
    verdict: Verdict | None = None
    counted: int | None = None
    ending: tuple[str, str, int | None] | None = None  # ending, reason, staleness
    ended_s: float = 0.0
    # When the two notices were added to the stream, by the clock of Redis.
    verdict_unix_s: float | None = None
    ended_unix_s: float | None = None
    reward: str | None = None  # its standing in its group, once that is stored
    correct: tuple[bool | None] | None = None  # what the verifier said of all its tokens, if it was asked before

    @property
    def judged(self) -> bool:
        """Whether it has a verdict or has ended: no worker writes it any more."""
        return self.verdict is not None or self.ending is not None

    @property
    def useful(self) -> bool:
        """Whether it was or will be trained; by its verdict until its ending is known."""
        if self.ending is not None:
            return self.ending[0] == "trained"
        return self.verdict is not None and self.verdict.train > 0

    @property
    def generated(self) -> int | None:
        return self.verdict.generated if self.verdict and self.verdict.generated is not None else self.counted

    @property
    def ledger_field(self) -> str:
        """The field of the ledger that counts it; '' while its ending is unknown."""
        return ledger_field(*self.ending[:2]) if self.ending else ""

    def ready(self, now_s: float, wait_s: float) -> bool:
        """Whether it can be booked: it is complete, or its writer's count is missing for `wait_s` seconds."""
        if self.ending is None or self.ending[0] == "dead":
            return self.ending is not None
        # A trained or dropped rollout always has a verdict, but it may be read shortly after the ending.
        return now_s - self.ended_s >= wait_s or (self.generated is not None and self.verdict is not None)

    def absorb(self, entry: bytes, values: dict[bytes, bytes], now_s: float) -> None:
        """Add one notice. Raises MessageError if it cannot be read."""
        kind = values.get(b"kind")
        if kind == b"verdict":
            verdict = Verdict.decode(values.get(b"body", b""))
            if verdict.rid.encode() != values[b"rid"]:
                raise MessageError(f"finished.body: it is the verdict of {verdict.rid!r:.40}")
            self.verdict, self.verdict_unix_s = verdict, unix_s(entry)
        elif kind == b"count":
            self.counted = read_number(values.get(b"generated"), "finished.generated")
        elif kind == b"ending" and values.get(b"ending") in (b"trained", b"dropped", b"dead"):
            staleness = values.get(b"staleness")
            self.ending = (
                values[b"ending"].decode(),
                values.get(b"reason", b"").decode("ascii", "replace")[:40],
                read_number(staleness, "finished.staleness") if staleness else None,
            )
            self.ended_s, self.ended_unix_s = now_s, unix_s(entry)
        else:
            raise MessageError(f"finished.kind: {kind!r:.40} with ending {values.get(b'ending')!r:.40}")
        self.entries.append(entry)

    def line(
        self,
        rid: str,
        facts: list[bytes | None],
        *,
        active: Callable[[float | None], bool],
        judge: Callable[[int, Ints], bool | None],
    ) -> BookLine:
        """Its line in the books. `facts`: the FACTS of its record. `active`: whether the policy can cut with a given
        threshold; `judge`: whether a completion of a problem is right."""
        assert self.ending is not None
        ending, reason, staleness = self.ending
        head_bytes, length, entry = facts
        generated = self.generated
        if generated is None:  # its writer died or did not report: count the stored chunks
            generated = 0
            try:
                generated = read_number(length or b"0", "rollout.length")
            except MessageError as error:
                log.warning("rollout %s is booked without tokens after its verdict: %s", rid, error)
        if (verdict := self.verdict) is not None:
            line = line_of(
                verdict,
                ending=ending,
                reason=reason,
                generated=generated,
                staleness=staleness,
                active=active(verdict.threshold),
                correct=self.correct[0] if self.correct else judge(verdict.problem, verdict.tokens),
            )
        else:
            arm, problem = "treated", 0
            try:
                if head_bytes is not None:
                    head = RolloutHead.decode(head_bytes)
                    arm, problem = head.arm, head.problem
            except MessageError:
                log.warning("rollout %s: its head cannot be read; booked as treated", rid)
            line = unjudged_line(rid, arm, problem, ending=ending, reason=reason, generated=generated)
        verdict_s, ended_s = self.verdict_unix_s, self.ended_unix_s
        return replace(
            line,
            admitted_unix_s=_moment(entry),
            verdict_unix_s=verdict_s,
            ended_unix_s=ended_s,
            reward=self.reward,
        )


def _moment(entry: bytes | None) -> float | None:
    """When a rollout was admitted; None if its record is gone or broken."""
    try:
        return None if entry is None else unix_s(entry)
    except ValueError:
        return None
