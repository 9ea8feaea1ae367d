"""Every panel, declared once: grafana.py writes Grafana's dashboards from it, panels.py the picture.

Expressions hold two of Grafana's variables: `$run`, the run that is looked at, and `$__rate_interval`, a time that
covers at least four scrapes. A metric without labels is served by every role, by most of them as 0: one that is no
counter is asked of its own role (`job`) alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RATE_INTERVAL = "$__rate_interval"
LATELY = "5m"  # of means and quantiles of what comes in bursts: rollouts are booked when a checkpoint is written


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL expression and what its series are called; `{{label}}` in the legend stands for the series' own label.

    A `reference` is what the others are held against, a limit or a threshold: its line is dashed.
    """

    expr: str
    legend: str
    reference: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One question and what answers it.

    `unit` is Grafana's id of a unit. `alarm` is where the reading turns bad: from there up, or with `alarm_below` down.
    """

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: Literal["timeseries", "stat"] = "timeseries"
    alarm: float | None = None
    alarm_below: bool = False
    log: bool = False
    stacked: bool = False
    signed: bool = False
    top: float | None = None


@dataclass(frozen=True, slots=True)
class PanelRow:
    """Panels under one heading, three curves to a line: a row of no multiple of three has room for one more."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One page of Grafana; its file is `NAME.json`, its uid `katana-NAME`."""

    name: str
    title: str
    description: str
    rows: tuple[PanelRow, ...]


# --- the language of the expressions -------------------------------------------------------------------------------


def of(metric: str, **labels: str) -> str:
    """A metric of the run that is looked at: `of("claims_total")` is `katana_claims_total{run="$run"}`."""
    filters = ",".join(f'{name}="{value}"' for name, value in {"run": "$run", **labels}.items())
    return f"katana_{metric}{{{filters}}}"


def rate(metric: str, by: str = "", window: str = RATE_INTERVAL, **labels: str) -> str:
    """What a counter grows by in a second, all processes together, apart by a label."""
    return f"{_sum(by)}(rate({of(metric, **labels)}[{window}]))"


def quantile(share: float, histogram: str, by: str = "", window: str = RATE_INTERVAL, **labels: str) -> str:
    """A quantile of what a histogram has seen in the window, all processes together."""
    apart = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, {rate(f'{histogram}_bucket', apart, window, **labels)})"


def mean(histogram: str, by: str = "", window: str = RATE_INTERVAL, **labels: str) -> str:
    """The mean of what a histogram has seen in the window, all processes together."""
    return f"{rate(f'{histogram}_sum', by, window, **labels)} / {rate(f'{histogram}_count', by, window, **labels)}"


def lifetime_mean(histogram: str, by: str) -> str:
    """The mean of all that a histogram has seen, apart by a label."""
    return f"{_sum(by)}({of(f'{histogram}_sum')}) / {_sum(by)}({of(f'{histogram}_count')})"


def total(metric: str, **labels: str) -> str:
    """A counter since the run began; 0, not nothing, for one whose label has not been counted yet."""
    return f"(sum({of(metric, **labels)}) or {_zero()})"


def growth(metric: str) -> str:
    """`rate` of all of a counter; 0, not nothing, for one whose label has not been counted yet."""
    return f"{rate(metric)} or {_zero()}"


def _counted(title: str, text: str, counter: str, label: str) -> Panel:
    """How fast a counter of mishaps grows, by label and in all."""
    queries = (Query(rate(counter, label), f"{{{{{label}}}}}"), Query(growth(counter), "all"))
    return Panel(title, text, "suffix: /s", queries)


def configured(kind: str) -> str:
    """A setting of the run, as its feeder serves it."""
    return f"max({of('config_value', job='feeder', kind=kind)})"


def _zero() -> str:
    """Of a run whose feeder is seen; nothing of one that is not."""
    return f"0 * max({of('rollouts_open', job='feeder')})"


def _sum(by: str) -> str:
    return f"sum by ({by}) " if by else "sum"


def _spread(histogram: str, by: str = "", window: str = RATE_INTERVAL, **labels: str) -> tuple[Query, Query]:
    named = f"{{{{{by}}}}} " if by else ""
    return (
        Query(quantile(0.5, histogram, by, window, **labels), f"{named}median"),
        Query(quantile(0.95, histogram, by, window, **labels), f"{named}p95"),
    )


# --- the panels ----------------------------------------------------------------------------------------------------

_MEASURED = f"and {of('eval_mean_length_tokens', job='evaluator')} > 0"  # not the zeros before the first evaluation

_SAVINGS = PanelRow(
    "Savings and quality",
    (
        Panel(
            "Length saving",
            "1 - mean tokens written (treated) / mean tokens written (control), over the whole run: what cutting "
            "saves. The same number as length_saving.ratio in summary.json.",
            "percentunit",
            (Query('katana:length_saving:ratio{run="$run"}', "saving"),),
            kind="stat",
            signed=True,
        ),
        Panel(
            "Accuracy, avg@k",
            "Mean share of right answers on the held-out problems, of the newest version that was evaluated.",
            "percentunit",
            (Query(f"max({of('eval_avg_at_k', job='evaluator')} {_MEASURED})", "avg@k"),),
            kind="stat",
        ),
        Panel(
            "Policy version",
            "Version of the weights that the learner published last: how far the run is.",
            "short",
            (Query(f"max({of('policy_version', role='learner')})", "version"),),
            kind="stat",
        ),
        Panel(
            "Share of tokens trained on",
            "Tokens trained on, of all that booked rollouts wrote. The rest was cut, or dropped.",
            "percentunit",
            (Query(f"{total('rollout_tokens_trained_total')} / sum({of('rollout_tokens_generated_total')})", "share"),),
            kind="stat",
        ),
        Panel(
            "Length saving so far",
            "The saving over all compared rollouts up to then. It settles as both arms fill; below 0, cut rollouts "
            "are the longer ones.",
            "percentunit",
            (Query('katana:length_saving:ratio{run="$run"}', "saving"),),
            signed=True,
        ),
        Panel(
            "Length by arm",
            "Mean tokens written in a compared rollout, lately. Treated rollouts may be cut, control rollouts never "
            "are: the gap between the two is the saving.",
            "suffix: tokens",
            (Query(mean("rollout_length_tokens", "arm", LATELY), "{{arm}}"),),
        ),
        Panel(
            "Accuracy",
            "avg@k and pass@k on the held-out problems, of the newest evaluated version. This must not pay for the "
            "saving.",
            "percentunit",
            (
                Query(f"max({of('eval_avg_at_k', job='evaluator')} {_MEASURED})", "avg@k"),
                Query(f"max({of('eval_pass_at_k', job='evaluator')} {_MEASURED})", "pass@k"),
            ),
            top=1.0,
        ),
        Panel(
            "Held-out length",
            "Mean tokens of a held-out completion, never cut: it shows whether the student itself rambles less.",
            "suffix: tokens",
            (Query(f"max({of('eval_mean_length_tokens', job='evaluator')} > 0)", "mean length"),),
        ),
        Panel(
            "Where the tokens go",
            "Of all tokens written up to then: trained on; between the cut and its detection; after the detection "
            "(overshoot). The rest was kept and not trained on.",
            "percentunit",
            tuple(
                Query(
                    f"sum({of(f'rollout_tokens_{part}_total')}) / sum({of('rollout_tokens_generated_total')})", legend
                )
                for part, legend in (("trained", "trained"), ("detection", "detection"), ("overshoot", "overshoot"))
            ),
            stacked=True,
            top=1.0,
        ),
        Panel(
            "How rollouts end",
            "Rollouts booked a second, by their finish reason: eos is the student's own end, length the limit, "
            "kl_trap that the writing was stopped where the teacher's signal goes dead (never under mask and shadow).",
            "suffix: /s",
            (Query(rate("rollouts_finished_total", "reason"), "{{reason}}"),),
            stacked=True,
        ),
    ),
)

_DIVERGENCE = PanelRow(
    "Divergence and threshold",
    (
        Panel(
            "Divergence of judged tokens",
            "Reverse KL to the teacher, per token of the rollouts judged lately, and the threshold that window means "
            "are held against. No threshold: the rule is not active yet.",
            "suffix: nats",
            (
                Query(quantile(0.5, "token_divergence_nats"), "median"),
                Query(mean("token_divergence_nats"), "mean"),
                Query(quantile(0.9, "token_divergence_nats"), "p90"),
                Query(f"max({of('kat_threshold_nats', job='arbiter')})", "threshold", reference=True),
            ),
            log=True,
        ),
        Panel(
            "Threshold",
            "The divergence under which a window counts as dead, for rollouts admitted now.",
            "suffix: nats",
            (Query(f"max({of('kat_threshold_nats', job='arbiter')})", "threshold"),),
        ),
        Panel(
            "Cut rate (policy fired)",
            "Share of the last 256 treated rollouts that could be cut in which the policy fired, applied or not: under "
            "mask and shadow too, where nothing is stopped. 0 or 1 for long: the rule does nothing, or cuts all.",
            "percentunit",
            (Query(f"max({of('kat_cut_rate', job='arbiter')})", "fired"),),
            top=1.0,
        ),
        Panel(
            "Minima in the buffer",
            "Smallest window means of control rollouts that the threshold is the quantile of.",
            "short",
            (Query(f"max({of('kat_buffer_size', job='arbiter')})", "minima"),),
        ),
        Panel(
            "Stop signals",
            "Verdicts a second that stop a rollout while it is written.",
            "suffix: /s",
            (Query(rate("stop_signals_total", "reason"), "{{reason}}"),),
        ),
        Panel(
            "Control share",
            "Share of the compared rollouts that are never cut, over the whole run, and the share that was asked for. "
            "Without a control arm there is no threshold, and no saving to state.",
            "percentunit",
            (
                Query(
                    f"sum({of('rollout_length_tokens_count', arm='control')})"
                    f" / sum({of('rollout_length_tokens_count')})",
                    "control",
                ),
                Query(configured("control_fraction"), "asked for", reference=True),
            ),
            top=1.0,
        ),
    ),
)

_FLOW = PanelRow(
    "Flow by stage",
    (
        Panel(
            "Rollouts open",
            "Rollouts admitted and not booked yet: being written, judged, or on their way into a batch that "
            "a checkpoint covers. Dashed: how many may be written at once.",
            "short",
            (
                Query(f"max({of('rollouts_open', job='feeder')})", "open"),
                Query(configured("concurrency"), "written at once", reference=True),
            ),
        ),
        Panel(
            "Entries outstanding",
            "Entries of each stream not yet taken off. The stage behind the longest one is the bottleneck.",
            "short",
            (Query(f"max by (stream) ({of('stream_outstanding', job='feeder')})", "{{stream}}"),),
        ),
        Panel(
            "Rollouts booked",
            "Rollouts that ended and were written into the books, a second.",
            "suffix: /s",
            (Query(rate("rollouts_finished_total", "arm"), "{{arm}}"),),
            stacked=True,
        ),
        Panel(
            "Chunks",
            "Chunks that rollout workers stored and that teacher workers scored, a second. They part while the "
            "teacher falls behind.",
            "suffix: /s",
            (
                Query(rate("chunks_sent_total"), "sent"),
                Query(rate("chunks_scored_total"), "scored"),
            ),
        ),
        Panel(
            "Tokens through the engines",
            "Tokens a second: written by rollout workers, read by teacher workers.",
            "suffix: /s",
            (Query(rate("decode_tokens_total", "role"), "{{role}}"),),
        ),
        Panel(
            "Tokens that teachers read twice",
            "Share of the tokens scored that were forwarded again, as the cache no longer held them: more rollouts in "
            "flight than the teachers have slots. Raise teacher.max_slots, or start another teacher.",
            "percentunit",
            (
                Query(
                    f"{rate('rebuilt_tokens_total')} / {rate('decode_tokens_total', role='teacher')}", "forwarded again"
                ),
            ),
        ),
        Panel(
            "Slots in use",
            "Share of an engine's slots that hold a rollout.",
            "percentunit",
            (Query(f"sum by (role) ({of('slots_busy')}) / sum by (role) ({of('slots_total')})", "{{role}}"),),
            top=1.0,
        ),
        Panel(
            "Time at work",
            "Share of its time that a worker computes. The busiest role sets the pace.",
            "percentunit",
            (Query(f"avg by (role) ({of('busy_ratio')})", "{{role}}"),),
            top=1.0,
        ),
        Panel(
            "Workers",
            "Workers that the run has seen lately.",
            "short",
            (Query(f"max by (role) ({of('workers_live', job='feeder')})", "{{role}}"),),
            alarm=1.0,
            alarm_below=True,
        ),
    ),
)

_LATENCY = PanelRow(
    "Latency",
    (
        Panel(
            "Oldest pending entry",
            "Age of the oldest entry of each stream that somebody took and has not acknowledged.",
            "s",
            (Query(f"max by (stream) ({of('stream_oldest_pending_seconds', job='feeder')})", "{{stream}}"),),
            alarm=120.0,
        ),
        Panel(
            "Score to verdict",
            "From the notice of a score to the verdict that it led to.",
            "s",
            _spread("stop_latency_seconds"),
        ),
        Panel(
            "Overshoot",
            "Tokens written after the detection, of rollouts that were stopped: what a slow stop costs. The limit is "
            "two chunks.",
            "suffix: tokens",
            (
                *_spread("stop_overshoot_tokens", window=LATELY),
                Query(f"2 * {configured('chunk_tokens')}", "limit", reference=True),
            ),
        ),
        Panel(
            "Where the policy fired",
            "Tokens that a rollout had when the policy fired, lately, by arm; applied or not, as in the cut rate. "
            "Of `repetition`, where the first repeated n-gram was complete. Falling medians: it fires ever earlier.",
            "suffix: tokens",
            _spread("fired_position_tokens", "arm", LATELY),
        ),
        Panel(
            "Scoring a batch of chunks",
            "Time that a teacher worker takes for the chunks it scores together.",
            "s",
            _spread("chunk_score_seconds"),
        ),
        Panel(
            "Engine step",
            "Time of one engine step: a token for every busy slot of a rollout worker, a batch of chunks of a teacher.",
            "s",
            _spread("engine_step_seconds", "role"),
        ),
    ),
)

_STEPPED = f"{of('learner_steps_total', job='learner')} > 0"  # not the zeros before the first step


def _drift(kind: str, legend: str) -> Query:
    return Query(f"max({of('learner_drift_ratio', job='learner', kind=kind)})", legend)


_LEARNING = PanelRow(
    "Learning",
    (
        Panel(
            "Loss",
            "Loss of the last optimizer step.",
            "suffix: nats",
            (Query(f"max({of('learner_loss_nats', job='learner')} and {_STEPPED})", "loss"),),
        ),
        Panel(
            "Steps",
            "Optimizer steps a minute.",
            "suffix: /min",
            (Query(f"60 * {rate('learner_steps_total')}", "steps"),),
        ),
        Panel(
            "Step time",
            "Time of one optimizer step.",
            "s",
            _spread("learner_step_seconds", window=LATELY),
        ),
        Panel(
            "Tokens trained on",
            "Tokens a second that the learner trains on.",
            "suffix: /s",
            (Query(rate("learner_tokens_total"), "tokens"),),
        ),
        Panel(
            "Learner idle",
            "Share of its time that the learner waits for trajectories. Near 1 it is starved: add rollout or teacher "
            "workers. Near 0 it holds the others up.",
            "percentunit",
            (Query(f"max({of('learner_idle_ratio', job='learner')})", "idle"),),
            top=1.0,
        ),
        Panel(
            "Policy version",
            "Version that each role works with, and the last one of the run. The oldest worker's counts.",
            "short",
            (
                Query(f"min by (role) ({of('policy_version')})", "{{role}}"),
                Query(configured("max_steps"), "last step", reference=True),
            ),
        ),
    ),
)

_DRIFT = PanelRow(
    "Drift",
    (
        Panel(
            "Repetition and truncation",
            "Of the last step's rollouts: the share of their text that deflate saves, near 1 in a loop, and the share "
            "that ended at the length limit. Both rise when the student begins to ramble.",
            "percentunit",
            (_drift("repetition", "repetition"), _drift("truncation", "at the limit")),
            top=1.0,
        ),
        Panel(
            "Cut rate by arm (policy fired)",
            "Share of the last step's rollouts in which the policy fired, applied or not; in the control arm it judges "
            "whole rollouts. If both rise and repetition does not, it is the threshold that climbs.",
            "percentunit",
            (_drift("cut_treated", "treated"), _drift("cut_control", "control")),
            top=1.0,
        ),
        Panel(
            "Threshold of what is trained",
            "Mean threshold that the last step's rollouts were judged by, and the one in force for new rollouts.",
            "suffix: nats",
            (
                Query(f"max({of('learner_threshold_nats', job='learner')})", "trained on"),
                Query(f"max({of('kat_threshold_nats', job='arbiter')})", "in force", reference=True),
            ),
        ),
        Panel(
            "Entropy of the student",
            "Mean over the tokens that the last step kept. Towards 0 the student has stopped to explore.",
            "suffix: nats",
            (Query(f"max({of('learner_entropy_nats', job='learner')} and {_STEPPED})", "entropy"),),
        ),
        Panel(
            "Mass on the support",
            "Mean probability of STOP and the K recorded outcomes, under the student as it is now and under the "
            "teacher. What lies outside is one bucket in the loss.",
            "percentunit",
            (_drift("support_mass", "student"), _drift("support_mass_teacher", "teacher")),
            top=1.0,
        ),
        Panel(
            "Top-K overlap",
            "Share of the K outcomes that were likeliest when a token was written and still are under the student as "
            "it is now: how far the learner has moved from what it trains on.",
            "percentunit",
            (_drift("topk_overlap", "overlap"),),
            top=1.0,
        ),
    ),
)

_STALENESS = PanelRow(
    "Staleness",
    (
        Panel(
            "Staleness",
            "Policy versions between the writing of a trajectory's first token and its training, and the most that is "
            "allowed: an older one is dropped.",
            "suffix: versions",
            (
                *_spread("policy_lag_versions", window=LATELY, role="learner"),
                Query(configured("max_staleness"), "limit", reference=True),
            ),
        ),
        Panel(
            "Mean staleness",
            "Mean over the trajectories trained on lately.",
            "suffix: versions",
            (Query(mean("policy_lag_versions", window=LATELY, role="learner"), "mean"),),
        ),
        Panel(
            "Trajectories dropped",
            "Rollouts that were written and not trained on, since the run began: stale, empty, open at the run's end.",
            "short",
            (
                Query(f"sum by (reason) ({of('trajectories_dropped_total')})", "{{reason}}"),
                Query(total("trajectories_dropped_total"), "all"),
            ),
        ),
        Panel(
            "Length to train on",
            "Mean since the run began, by ending: what was trained on, and what would have been. Where stale is above "
            "trained, long ones are left out, and what is trained on is no fair sample.",
            "suffix: tokens",
            (Query(lifetime_mean("ended_trainable_tokens", "reason"), "{{reason}}"),),
        ),
        Panel(
            "Length written",
            "Mean since the run began, by what became of the rollouts; of those that were never judged, so far.",
            "suffix: tokens",
            (Query(lifetime_mean("ended_length_tokens", "reason"), "{{reason}}"),),
        ),
    ),
)

_FAULTS = PanelRow(
    "Faults",
    (
        Panel(
            "Dead letters",
            "Records that were given up and wait for `katana dead`. Anything above 0 needs a look.",
            "short",
            (Query(f"max({of('stream_outstanding', job='feeder', stream='dead')})", "dead letters"),),
            kind="stat",
            alarm=1.0,
        ),
        Panel(
            "Failed calls to Redis",
            "Calls that failed and were made again, since the processes began.",
            "short",
            (Query(total("redis_errors_total"), "failed calls"),),
            kind="stat",
            alarm=1.0,
        ),
        Panel(
            "Entries taken over",
            "Entries that a worker took over from one that had gone silent, since the processes began.",
            "short",
            (Query(total("claims_total"), "taken over"),),
            kind="stat",
        ),
        Panel(
            "Alerts firing",
            "Alerts that fire now, of this run and of targets that no run is known of.",
            "short",
            (Query(f"""count(ALERTS{{alertstate="firing",run=~"$run|"}}) or {_zero()}""", "firing"),),
            kind="stat",
            alarm=1.0,
        ),
        Panel(
            "Silence",
            "Time since the last turn of each role's loop; workers between two shifts are left out.",
            "s",
            (Query(f"time() - max by (role) ({of('loop_timestamp_seconds')} > 0)", "{{role}}"),),
            alarm=60.0,
        ),
        _counted(
            "Given up", "Dead letters a second, by where the record was given up.", "dead_letters_total", "reason"
        ),
        _counted("Failed calls", "Failed calls to Redis a second, by kind.", "redis_errors_total", "kind"),
        _counted(
            "Taken over", "Entries a second taken over from a silent worker, by stream.", "claims_total", "stream"
        ),
        Panel(
            "Fenced and refused chunks",
            "Fenced: refused, for its writer no longer owned the rollout, or the rollout had ended. Repeated: scored "
            "a second time, without effect. Both are how faults are survived; many of them are wasted work. Refused: "
            "by a full Redis, each time that it was tried; it waits.",
            "suffix: /s",
            (
                Query(rate("chunks_fenced_total"), "fenced"),
                Query(rate("chunks_duplicate_total"), "repeated"),
                Query(rate("chunks_refused_total"), "refused"),
            ),
        ),
        Panel(
            "Memory of processes",
            "Resident memory by role; of several workers, their sum. It should be flat.",
            "bytes",
            (
                Query(
                    "sum by (job) (process_resident_memory_bytes and on (instance, job) "
                    f"{of('loop_timestamp_seconds')})",
                    "{{job}}",
                ),
            ),
        ),
    ),
)

_REDIS = PanelRow(
    "Redis",
    (
        Panel(
            "Memory by its limit",
            "Memory of the data Redis by its maxmemory, as the feeder sees it; 0 without a limit. At 1, writes fail.",
            "percentunit",
            (Query(f"max({of('redis_memory_ratio', job='feeder')})", "used"),),
            alarm=0.8,
            top=1.0,
        ),
        Panel(
            "Memory",
            "Memory of each Redis and its limit, from redis_exporter.",
            "bytes",
            (
                Query("redis_memory_used_bytes", "{{instance}} used"),
                Query("redis_memory_max_bytes > 0", "{{instance}} limit"),
            ),
        ),
        Panel(
            "Commands",
            "Commands that each Redis served a second, from redis_exporter.",
            "ops",
            (Query(f"rate(redis_commands_processed_total[{RATE_INTERVAL}])", "{{instance}}"),),
        ),
        Panel(
            "Clients",
            "Connected clients, and those that wait in a blocking call, from redis_exporter.",
            "short",
            (
                Query("redis_connected_clients", "{{instance}}"),
                Query("redis_blocked_clients", "{{instance}} blocked"),
            ),
        ),
        Panel(
            "Network",
            "Bytes a second into and out of each Redis, from redis_exporter.",
            "Bps",
            (
                Query(f"rate(redis_net_input_bytes_total[{RATE_INTERVAL}])", "{{instance}} in"),
                Query(f"rate(redis_net_output_bytes_total[{RATE_INTERVAL}])", "{{instance}} out"),
            ),
        ),
        Panel(
            "Keys evicted, clients refused",
            "Both must stay 0: an evicted key is lost data, a refused client a role that cannot work. redis_exporter.",
            "short",
            (
                Query("redis_evicted_keys_total", "{{instance}} evicted"),
                Query("redis_rejected_connections_total", "{{instance}} refused"),
            ),
            alarm=1.0,
        ),
    ),
)

DASHBOARDS = (
    Dashboard(
        "overview",
        "Katana: overview",
        "What cutting saves, what it costs in quality, and where the rule stands.",
        (_SAVINGS, _DIVERGENCE),
    ),
    Dashboard(
        "flow",
        "Katana: flow and latency",
        "Where work piles up, and how long each stage takes.",
        (_FLOW, _LATENCY),
    ),
    Dashboard(
        "learner",
        "Katana: learner",
        "Loss and pace of the training, whether it runs off with itself, and how old what it trains on is.",
        (_LEARNING, _DRIFT, _STALENESS),
    ),
    Dashboard(
        "faults",
        "Katana: faults and Redis",
        "What went wrong and was survived, what was given up, and how Redis fares.",
        (_FAULTS, _REDIS),
    ),
)
