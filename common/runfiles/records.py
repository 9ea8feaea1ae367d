"""The records in a run's folder: the contents of each file, and their meaning.

rollouts.jsonl  BookLine     feeder → all readers: a rollout that ended
traces.jsonl    Trace        feeder → report, replay, audit, checker: tokens, divergences and view of a verdict
audit.jsonl     Audit        feeder → checker: the writer of each chunk
ledger.json     Ledger       feeder → itself, top, report, checker: number of rollouts by ending
metrics.jsonl   Step         learner → all readers: figures of an optimizer step
trained.jsonl   Trained      learner → checker, feeder: the rollouts of a step, and digests of their tokens
eval/v….json    ToEvaluate   learner → evaluator: weights to evaluate
eval.jsonl      Evaluation   evaluator → report, compare, trackers, summary: scores of a policy version
summary.json    Summary      `katana run`, feeder, evaluator → compare, match, bench: the results of the run
wall.json       Wall         `katana run` → summary, report: duration of the run
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from common.runfiles.fields import Object, Record, an_object, decoded, encoded, stored
from common.wire.messages import ARMS, VIEW, Floats, Ints, Verdict, fired

UNFINISHED = frozenset({"run_end", "lost"})
"""Reasons of rollouts that the run dropped before they ended by themselves or by their policy."""
ENDS_BY_ITSELF = ("eos", "length")
"""Finish reasons of rollouts that no policy stopped."""
UNJUDGED = "unfinished"
"""The finish reason of a rollout that ended before its verdict."""


# --- rollouts.jsonl ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BookLine(Record):
    """A finished rollout. `ending`: trained | dropped | dead; `reason`: why it was dropped or died."""

    rid: str
    arm: str
    problem: int
    finish_reason: str
    ending: str
    reason: str
    active: bool  # whether the policy could have cut it
    tokens_generated: int
    tokens_kept: int
    tokens_trained: int
    tokens_detection: int
    tokens_overshoot: int
    threshold: float | None
    min_window: float | None
    policy_version_first: int
    policy_version_last: int
    staleness: int | None
    correct: bool | None
    # By the clock of Redis; None if a record was broken or lost.
    admitted_unix_s: float | None = None
    verdict_unix_s: float | None = None
    ended_unix_s: float | None = None
    # None without a verdict, and in books that are older than this field.
    tokens_trainable: int | None = None
    # Its standing in its group, see `common.groups`; None without `reward.mode`.
    reward: str | None = field(default=None, metadata=stored(sparse=True))
    teacher: str = field(default="", metadata=stored(sparse=True))  # whose of several teachers it is

    @property
    def judged(self) -> bool:
        """Whether it had a verdict."""
        return self.finish_reason != UNJUDGED

    @property
    def stopped(self) -> bool:
        """Whether the policy stopped the writing."""
        return self.judged and self.finish_reason not in ENDS_BY_ITSELF

    @property
    def fired(self) -> bool:
        """Whether the policy fired, applied or not."""
        return fired(stopped=self.stopped, kept=self.tokens_kept, written=self.tokens_generated)

    @property
    def ended_by_run(self) -> bool:
        return self.ending == "dropped" and self.reason in UNFINISHED

    @property
    def compared(self) -> bool:
        """Whether it counts in the comparison of arms: the policy could have cut it, and the run did not end it."""
        return self.active and self.ending != "dead" and not self.ended_by_run

    @property
    def fate(self) -> str:
        """Its ending in one word: trained, dead, or why it was dropped."""
        return self.reason if self.ending == "dropped" else self.ending

    @property
    def ledger_field(self) -> str:
        return ledger_field(self.ending, self.reason)


def ledger_field(ending: str, reason: str) -> str:
    """The ledger's name of an ending: trained | dead | dropped:REASON."""
    return f"dropped:{reason}" if ending == "dropped" else ending


# --- traces.jsonl -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trace(Record):
    """A verdict. `stopped`: whether the policy stopped the writing (`cut` in the file).

    If the policy fired without stopping (control arm, mask, shadow), `keep` and `trigger` show where it would have cut;
    if it did not fire, both are the number of all tokens.
    """

    rid: str
    arm: str
    problem: int
    trigger: int
    keep: int
    train: int
    finish_reason: str
    stopped: bool = field(metadata=stored("cut"))
    threshold: float | None
    version: int  # policy version that wrote its first token
    token_bytes: bytes = field(metadata=stored("tokens"))  # int32, little-endian, [n]; bytes compare
    divergence_bytes: bytes = field(metadata=stored("divergence"))  # float32, little-endian, [n], nats
    view_bytes: bytes = field(metadata=stored("view", sparse=True), default=b"")  # float32, little-endian, [3, n], nats

    @property
    def tokens(self) -> Ints:
        return np.frombuffer(self.token_bytes, dtype="<i4")

    @property
    def divergence(self) -> Floats:
        return np.frombuffer(self.divergence_bytes, dtype="<f4")

    @property
    def view(self) -> Floats | None:
        """Rows as in VIEW; None: not recorded."""
        return np.frombuffer(self.view_bytes, dtype="<f4").reshape(len(VIEW), -1) if self.view_bytes else None

    @property
    def written(self) -> int:
        """Number of recorded tokens."""
        return len(self.token_bytes) // 4

    @property
    def fired(self) -> bool:
        """Whether the policy fired, applied or not."""
        return fired(stopped=self.stopped, kept=self.keep, written=self.written)

    @classmethod
    def of(cls, verdict: Verdict) -> Trace:
        return cls(
            rid=verdict.rid,
            arm=verdict.arm,
            problem=verdict.problem,
            trigger=verdict.trigger,
            keep=verdict.keep,
            train=verdict.train,
            finish_reason=verdict.finish_reason,
            stopped=verdict.stopped,
            threshold=verdict.threshold,
            version=verdict.first_version,
            token_bytes=verdict.tokens.astype("<i4").tobytes(),
            divergence_bytes=verdict.divergence.astype("<f4").tobytes(),
            view_bytes=b"" if verdict.view is None else verdict.view.astype("<f4").tobytes(),
        )

    @classmethod
    def from_json(cls, tree: Any) -> Trace:
        trace = decoded(cls, tree)
        if trace.arm not in ARMS:
            raise ValueError(f"arm is {trace.arm!r:.40}")
        tokens, divergence = len(trace.token_bytes), len(trace.divergence_bytes)
        if tokens != divergence or tokens % 4 or not tokens:
            raise ValueError(f"{tokens / 4:g} tokens with {divergence / 4:g} divergences")
        if len(trace.view_bytes) not in (0, len(VIEW) * tokens):
            raise ValueError(f"{tokens / 4:g} tokens with a view of {len(trace.view_bytes)} bytes")
        if not trace.keep <= trace.trigger <= trace.written:
            raise ValueError(f"rollout {trace.rid}: keep {trace.keep}, trigger {trace.trigger}, {trace.written} tokens")
        if not (trace.divergence >= 0).all() or np.isinf(trace.divergence).any():
            raise ValueError(f"rollout {trace.rid}: a divergence is not finite, or below 0")
        if trace.view is not None and not np.isfinite(trace.view).all():
            raise ValueError(f"rollout {trace.rid}: a number of its view is not finite")
        return trace


# --- audit.jsonl ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chunk(Record):
    """A chunk as stored when its rollout was booked. `divergence`: digest, None if it was not scored."""

    seq: int
    broken: str | None = None
    start: int = 0
    n: int = 0
    version: int = 0
    writer: str = ""
    finish: str | None = None
    tokens: str = ""
    divergence: str | None = None

    @classmethod
    def from_json(cls, tree: Any) -> Chunk:
        if "broken" not in an_object(tree) and (lacking := [name for name in _CHUNK if name not in tree]):
            raise ValueError(f"{lacking[0]} is missing")
        return decoded(cls, tree)

    def to_json(self) -> Object:
        tree, broken = encoded(self), self.broken is not None
        return {name: value for name, value in tree.items() if name == "seq" or (name == "broken") == broken}


_CHUNK = tuple(one.name for one in fields(Chunk) if one.name != "broken")


@dataclass(frozen=True, slots=True)
class Audit(Record):
    """A rollout's hash at the time of booking."""

    rid: str
    owners: list[tuple[str, int]]  # nonce and first chunk of every owner, in order
    chunks: list[Chunk]
    threshold: str | None
    verdict: bool


# --- trained.jsonl ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trained(Record):
    """The rollouts of an optimizer step: for each its id, number of tokens, and digest of the tokens; with
    `reward.mode` its advantage, and why it was trained without reward ('' if it was not)."""

    step: int
    policy_version: int
    rids: list[str]
    tokens: list[int]
    digests: list[str]
    advantages: list[float] = field(default_factory=list, metadata=stored(sparse=True))
    without_reward: list[str] = field(default_factory=list, metadata=stored(sparse=True))

    def __post_init__(self) -> None:
        if self.advantages and not len(self.rids) == len(self.advantages) == len(self.without_reward):
            raise ValueError(
                f"{len(self.rids)} rids, {len(self.advantages)} advantages, {len(self.without_reward)} without_reward"
            )
        if not len(self.rids) == len(self.tokens) == len(self.digests):
            raise ValueError(f"{len(self.rids)} rids, {len(self.tokens)} tokens, {len(self.digests)} digests")


# --- ledger.json ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ledger(Record):
    """Number of rollouts admitted, and by ending: admitted = trained + dropped + dead + open."""

    admitted: int
    trained: int
    dropped: dict[str, int]  # by reason
    dead: int
    open: int
    # Admitted on each server of a run with several data servers; empty for a single one.
    by_server: list[int] = field(default_factory=list, metadata=stored(sparse=True))

    @classmethod
    def of(cls, counts: Mapping[str, int]) -> Ledger:
        """From counts by `ledger_field`, with `admitted`, as in Redis."""
        begin = ledger_field("dropped", "")
        dropped = {name.removeprefix(begin): count for name, count in counts.items() if name.startswith(begin)}
        admitted, trained, dead = (counts.get(name, 0) for name in ("admitted", "trained", "dead"))
        return cls(admitted, trained, dropped, dead, admitted - trained - sum(dropped.values()) - dead)

    @property
    def counts(self) -> dict[str, int]:
        """By `ledger_field`, with `admitted`."""
        dropped = {ledger_field("dropped", reason): count for reason, count in self.dropped.items()}
        return {"admitted": self.admitted, "trained": self.trained, "dead": self.dead} | dropped

    @property
    def ended(self) -> int:
        return self.trained + sum(self.dropped.values()) + self.dead


# --- metrics.jsonl ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StepRewards(Record):
    """Of a batch. mean: of the rollouts that have a reward, compared or not; signal: of the groups in which rewards are
    compared, the share in which they differ; None if there are none. without: groups in which nobody is rewarded, by
    reason; a rollout that is in no group counts as one."""

    mean: float | None
    signal: float | None
    without: dict[str, int]


@dataclass(frozen=True, slots=True)
class StepReuse(Record):
    """With several updates on a batch. iterations: updates that were made. Of the last one, before it changed the
    weights: loss, mean reverse KL, and p_θ / p_rollout of the sampled tokens; None if there was one update alone."""

    iterations: int
    loss: float | None
    kl: float | None
    ratio_mean: float | None
    ratio_max: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step(Record):
    """Figures of a step, of its batch before the first update unless stated otherwise. None: no trajectory in the batch
    has the figure, or the file is older than the field."""

    step: int
    policy_version: int  # of the weights after it
    loss: float
    kl: float  # mean reverse KL to the teacher, nats a token
    entropy: float  # the student's, nats a token
    support_mass: float  # the student's probability on the learner's support
    support_mass_teacher: float | None = None
    topk_overlap: float | None = None  # share of the student's top K that is in the support
    repetition: float | None = None
    truncation_rate: float | None = None
    cut_rate_treated: float | None = None
    cut_rate_control: float | None = None
    threshold: float | None = None  # mean, in the policy's unit
    rewards: StepRewards | None = field(default=None, metadata=stored(sparse=True))  # with `reward.mode`
    reuse: StepReuse | None = field(default=None, metadata=stored(sparse=True))  # with `learner.num_iterations`
    ratio_mean: float  # p_θ / p_rollout of the sampled tokens
    ratio_max: float
    grad_norm: float  # before clipping
    learning_rate: float
    trajectories: int
    tokens_trained: int
    tokens_trained_total: int  # in the run so far
    tokens_generated: int | None = None  # in the run so far
    mean_kept: float
    staleness_mean: float  # versions
    staleness_max: int
    stale_dropped: dict[str, int]  # in the run so far, by arm
    step_s: float
    idle_ratio: float
    unix_s: float


# --- eval.jsonl -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ToEvaluate(Record):
    """Weights to evaluate: their version, their step, and the tokens trained on up to that step."""

    version: int
    step: int
    tokens_trained: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Scores(Record):
    """n problems, k samples each: avg@k, pass@k, mean length in tokens, share of samples that ended by STOP.

    A problem with a sample that could not be judged is left out of avg@k, pass@k and n; `unjudged` counts such
    samples. For several benchmarks n and `unjudged` are sums, k is that of the config, all other numbers are means.
    """

    k: int
    n: int
    avg_at_k: float = field(metadata=stored("avg@k"))
    pass_at_k: float = field(metadata=stored("pass@k"))
    mean_length: float
    eos_rate: float
    unjudged: int = field(metadata=stored(sparse=True), default=0)
    benchmarks: dict[str, Scores] = field(metadata=stored(sparse=True), default_factory=dict)


@dataclass(frozen=True, slots=True)
class Evaluation(Record):
    """The scores of a policy version, which was published at `step`. `tokens_trained`: up to that step."""

    policy_version: int
    step: int
    tokens_trained: int
    scores: Scores  # in the file its fields are on the top level
    wall_s: float

    @classmethod
    def from_json(cls, tree: Any) -> Evaluation:
        return decoded(cls, an_object(tree) | {"scores": tree})

    def to_json(self) -> Object:
        tree = encoded(self)
        wall_s, scores = tree.pop("wall_s"), tree.pop("scores")
        return {**tree, **scores, "wall_s": wall_s}


# --- summary.json, wall.json ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wall(Record):
    """Duration of a run in seconds, summed over resumes."""

    wall_s: float


@dataclass(frozen=True, slots=True)
class ArmTotals(Record):
    """Sums over an arm's booked rollouts."""

    rollouts: int
    tokens_generated: int
    tokens_kept: int
    tokens_trained: int
    tokens_detection: int
    tokens_overshoot: int
    mean_generated: float | None
    dropped: dict[str, int]  # by reason


@dataclass(frozen=True, slots=True)
class TeacherTotals(Record):
    """Figures of the booked rollouts of one of several teachers.

    accuracy: share of right answers, of those that were judged. cut_rate: share in which the policy fired, applied or
    not, of treated rollouts that it could have cut. None: there is no such rollout.
    """

    rollouts: int
    trained: int
    tokens_generated: int
    tokens_trained: int
    mean_generated: float
    accuracy: float | None
    cut_rate: float | None


@dataclass(frozen=True, slots=True)
class Saving(Record):
    """1 - mean generated (treated) / mean generated (control), with a 95 % interval; None if an arm is empty."""

    ratio: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Lengths(Record):
    """Lengths of rollouts in tokens: how many are known, their mean and population standard deviation."""

    known: int
    mean: float
    sd: float


@dataclass(frozen=True, slots=True)
class Ended(Record):
    """Rollouts with the same ending. `share`: of these and the trained ones, 1 for the trained ones; `at_limit`: how
    many reached the length limit."""

    fate: str
    rollouts: int
    share: float
    trainable: Lengths | None
    generated: Lengths | None
    at_limit: int


@dataclass(frozen=True, slots=True)
class RewardTotals(Record):
    """With `reward.mode`. mean: reward of all rollouts that have one. groups: in which rewards were compared;
    with_signal: of those, in which they differ; without: groups trained without reward, by reason; sent_back: rollouts
    trained that are in no group."""

    mean: float | None
    groups: int
    with_signal: int
    without: dict[str, int]
    sent_back: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary(Record):
    """The results of a run."""

    steps: int
    policy_version: int
    wall_s: float | None
    arms: dict[str, ArmTotals]
    length_saving: Saving
    endings: dict[str, Ended] = field(default_factory=dict)  # by fate
    teachers: dict[str, TeacherTotals] = field(default_factory=dict, metadata=stored(sparse=True))  # of several
    finish_reasons: dict[str, int]
    rewards: RewardTotals | None = field(default=None, metadata=stored(sparse=True))
    evaluations: list[Evaluation] = field(metadata=stored("eval"))
    ledger: Ledger | None

    @classmethod
    def from_json(cls, tree: Any) -> Summary:
        return decoded(cls, an_object(tree) | {"ledger": tree.get("ledger") or None})

    def to_json(self) -> Object:
        return encoded(self) | {"ledger": self.ledger.to_json() if self.ledger else {}}
