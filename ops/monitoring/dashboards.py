"""Every panel, declared once: grafana.py writes Grafana's dashboards from it, panels.py the picture.

Expressions use two of Grafana's variables: `$run`, the selected run, and `$__rate_interval`, a time that
covers at least four scrapes. A metric without labels is served by every role, by most of them as 0: expressions with a
gauge or histogram therefore name its own role (`job`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RATE_INTERVAL = "$__rate_interval"
LATELY = "5m"  # window for values that come in bursts: rollouts are booked when a checkpoint is written


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL expression and the legend of its series; `{{label}}` in the legend stands for the series' own label.

    A `reference` is a limit or a threshold for the others: its line is dashed.
    """

    expr: str
    legend: str
    reference: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One question and the queries that answer it.

    `unit` is Grafana's id of a unit. Values from `alarm` up are bad; with `alarm_below`, values below it.
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


# --- building expressions ------------------------------------------------------------------------------------------


def of(metric: str, **labels: str) -> str:
    """A metric of the selected run: `of("claims_total")` is `katana_claims_total{run="$run"}`."""
    filters = ",".join(f'{name}="{value}"' for name, value in {"run": "$run", **labels}.items())
    return f"katana_{metric}{{{filters}}}"


def rate(metric: str, by: str = "", window: str = RATE_INTERVAL, **labels: str) -> str:
    """Growth of a counter per second, summed over processes, by a label."""
    return f"{_sum(by)}(rate({of(metric, **labels)}[{window}]))"


def quantile(share: float, histogram: str, by: str = "", window: str = RATE_INTERVAL, **labels: str) -> str:
    """A quantile of a histogram's observations in the window, over all processes."""
    apart = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, {rate(f'{histogram}_bucket', apart, window, **labels)})"


def mean(histogram: str, by: str = "", window: str = RATE_INTERVAL, **labels: str) -> str:
    """The mean of a histogram's observations in the window, over all processes."""
    return f"{rate(f'{histogram}_sum', by, window, **labels)} / {rate(f'{histogram}_count', by, window, **labels)}"


def lifetime_mean(histogram: str, by: str) -> str:
    """The mean of all observations of a histogram, by a label."""
    return f"{_sum(by)}({of(f'{histogram}_sum')}) / {_sum(by)}({of(f'{histogram}_count')})"


def total(metric: str, **labels: str) -> str:
    """A counter since the run began; 0, not nothing, if no label has been counted yet."""
    return f"(sum({of(metric, **labels)}) or {_zero()})"


def growth(metric: str) -> str:
    """`rate` of a counter over all labels; 0, not nothing, if no label has been counted yet."""
    return f"{rate(metric)} or {_zero()}"


def _counted(title: str, text: str, counter: str, label: str) -> Panel:
    """Rate of a counter of failures, by label and in total."""
    queries = (Query(rate(counter, label), f"{{{{{label}}}}}"), Query(growth(counter), "all"))
    return Panel(title, text, "suffix: /s", queries)


def configured(kind: str) -> str:
    """A setting of the run, as its feeder serves it."""
    return f"max({of('config_value', job='feeder', kind=kind)})"


def _of_server(metric: str, also: str = "") -> str:
    """Growth a second of a counter of vLLM's own, by server: it knows no runs, as it may write for several."""
    return f"sum by ({also}instance) (rate(vllm:{metric}[{RATE_INTERVAL}]))"


def _zero() -> str:
    """0 for a run whose feeder is scraped; nothing for others."""
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
            "1 - mean tokens written (treated) / mean tokens written (control), over the whole run: the saving by "
            "cutting. The same number as length_saving.ratio in summary.json.",
            "percentunit",
            (Query('katana:length_saving:ratio{run="$run"}', "saving"),),
            kind="stat",
            signed=True,
        ),
        Panel(
            "Accuracy, avg@k",
            "Mean share of right answers on the held-out problems, for the newest evaluated version.",
            "percentunit",
            (Query(f"max({of('eval_avg_at_k', job='evaluator')} {_MEASURED})", "avg@k"),),
            kind="stat",
        ),
        Panel(
            "Policy version",
            "Version of the weights that the learner published last: the progress of the run.",
            "short",
            (Query(f"max({of('policy_version', role='learner')})", "version"),),
            kind="stat",
        ),
        Panel(
            "Share of tokens trained on",
            "Tokens trained on, as a share of all tokens of booked rollouts. The rest was cut, or dropped.",
            "percentunit",
            (Query(f"{total('rollout_tokens_trained_total')} / sum({of('rollout_tokens_generated_total')})", "share"),),
            kind="stat",
        ),
        Panel(
            "Length saving so far",
            "The saving over all compared rollouts so far. It becomes stable as both arms grow; below 0, treated "
            "rollouts are longer.",
            "percentunit",
            (Query('katana:length_saving:ratio{run="$run"}', "saving"),),
            signed=True,
        ),
        Panel(
            "Length by arm",
            "Mean tokens written in a compared rollout, recently. Treated rollouts may be cut, control rollouts never "
            "are: the gap between the two is the saving.",
            "suffix: tokens",
            (Query(mean("rollout_length_tokens", "arm", LATELY), "{{arm}}"),),
        ),
        Panel(
            "Accuracy",
            "avg@k and pass@k on the held-out problems, for the newest evaluated version. The saving must not reduce "
            "them.",
            "percentunit",
            (
                Query(f"max({of('eval_avg_at_k', job='evaluator')} {_MEASURED})", "avg@k"),
                Query(f"max({of('eval_pass_at_k', job='evaluator')} {_MEASURED})", "pass@k"),
            ),
            top=1.0,
        ),
        Panel(
            "Held-out length",
            "Mean tokens of a held-out completion, never cut: shows whether the student itself writes less.",
            "suffix: tokens",
            (Query(f"max({of('eval_mean_length_tokens', job='evaluator')} > 0)", "mean length"),),
        ),
        Panel(
            "Where the tokens go",
            "Shares of all tokens written so far: trained on; between the cut and its detection; after the detection "
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
            "Rollouts booked a second, by finish reason: eos: the student ended; length: the limit; kl_trap: the "
            "writing was stopped where the teacher's signal is dead (never under mask and shadow).",
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
            "Reverse KL to the teacher, per token of recently judged rollouts, and the threshold that window means "
            "are compared with. No threshold: the rule is not active yet.",
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
            "The divergence under which a window counts as dead, for rollouts admitted now. Several teachers have one "
            "each.",
            "suffix: nats",
            (Query(f"max by (teacher) ({of('kat_threshold_nats', job='arbiter')})", "threshold {{teacher}}"),),
        ),
        Panel(
            "Cut rate (policy fired)",
            "Share of the last 256 treated, active rollouts in which the policy fired, applied or not: also under "
            "mask and shadow, where nothing is stopped. 0 or 1 for long: the rule does nothing, or cuts all.",
            "percentunit",
            (Query(f"max({of('kat_cut_rate', job='arbiter')})", "fired"),),
            top=1.0,
        ),
        Panel(
            "Minima in the buffer",
            "Smallest window means of calibrating rollouts; the threshold is their quantile.",
            "short",
            (Query(f"max by (teacher) ({of('kat_buffer_size', job='arbiter')})", "minima {{teacher}}"),),
        ),
        Panel(
            "Stop signals",
            "Verdicts a second that stop a rollout while it is being written.",
            "suffix: /s",
            (Query(rate("stop_signals_total", "reason"), "{{reason}}"),),
        ),
        Panel(
            "Control share",
            "Share of the compared rollouts that are never cut, over the whole run, and the configured share. "
            "Without a control arm there is no threshold, and the saving cannot be measured.",
            "percentunit",
            (
                Query(
                    f"sum({of('rollout_length_tokens_count', arm='control')})"
                    f" / sum({of('rollout_length_tokens_count')})",
                    "control",
                ),
                Query(configured("control_fraction"), "configured", reference=True),
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
            "Rollouts admitted and not booked yet: being written, judged, or waiting for a batch that "
            "a checkpoint covers. Dashed: how many may be written at once.",
            "short",
            (
                Query(f"max({of('rollouts_open', job='feeder')})", "open"),
                Query(configured("concurrency"), "written at once", reference=True),
            ),
        ),
        Panel(
            "Entries outstanding",
            "Entries of each stream not yet removed. The stage that reads the longest one is the bottleneck.",
            "short",
            (Query(f"max by (stream, teacher) ({of('stream_outstanding', job='feeder')})", "{{stream}} {{teacher}}"),),
        ),
        Panel(
            "Rollouts booked",
            "Rollouts that ended and were booked, a second.",
            "suffix: /s",
            (Query(rate("rollouts_finished_total", "arm"), "{{arm}}"),),
            stacked=True,
        ),
        Panel(
            "Chunks",
            "Chunks that rollout workers stored and that teacher workers scored, a second. They differ while the "
            "teacher cannot keep up.",
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
            "Busy time",
            "Share of its time that a worker computes. The busiest role sets the pace.",
            "percentunit",
            (Query(f"avg by (role) ({of('busy_ratio')})", "{{role}}"),),
            top=1.0,
        ),
        Panel(
            "Workers",
            "Workers with recent heartbeats.",
            "short",
            (Query(f"max by (role, teacher) ({of('workers_live', job='feeder')})", "{{role}} {{teacher}}"),),
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
            "Age of the oldest entry of each stream that a process has taken and not acknowledged.",
            "s",
            (
                Query(
                    f"max by (stream, teacher) ({of('stream_oldest_pending_seconds', job='feeder')})",
                    "{{stream}} {{teacher}}",
                ),
            ),
            alarm=120.0,
        ),
        Panel(
            "Score to verdict",
            "From the notice of a score to the resulting verdict.",
            "s",
            _spread("stop_latency_seconds"),
        ),
        Panel(
            "Overshoot",
            "Tokens written after the detection, in stopped rollouts: the cost of a slow stop. The limit is "
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
            "workers. Near 0 the learner is the bottleneck.",
            "percentunit",
            (Query(f"max({of('learner_idle_ratio', job='learner')})", "idle"),),
            top=1.0,
        ),
        Panel(
            "Policy version",
            "Version that each role uses (of several workers, the oldest), and the last one of the run.",
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
            "For the last step's rollouts: the share of their text that deflate saves, near 1 in a loop, and the share "
            "that ended at the length limit. Both rise when the student begins to repeat itself.",
            "percentunit",
            (_drift("repetition", "repetition"), _drift("truncation", "at the limit")),
            top=1.0,
        ),
        Panel(
            "Cut rate by arm (policy fired)",
            "Share of the last step's rollouts in which the policy fired, applied or not; in the control arm it judges "
            "whole rollouts. If both rise and repetition does not, the threshold is rising.",
            "percentunit",
            (_drift("cut_treated", "treated"), _drift("cut_control", "control")),
            top=1.0,
        ),
        Panel(
            "Threshold of trained rollouts",
            "Mean threshold that the last step's rollouts were judged by, and the one in force for new rollouts.",
            "suffix: nats",
            (
                Query(f"max({of('learner_threshold_nats', job='learner')})", "trained on"),
                Query(f"max({of('kat_threshold_nats', job='arbiter')})", "in force", reference=True),
            ),
        ),
        Panel(
            "Entropy of the student",
            "Mean over the last step's kept tokens. Near 0 the student no longer explores.",
            "suffix: nats",
            (Query(f"max({of('learner_entropy_nats', job='learner')} and {_STEPPED})", "entropy"),),
        ),
        Panel(
            "Mass on the support",
            "Mean probability of STOP and the recorded outcomes, also those that the teacher added, under the current "
            "student and under the teacher. All other outcomes are one bucket in the loss.",
            "percentunit",
            (_drift("support_mass", "student"), _drift("support_mass_teacher", "teacher")),
            top=1.0,
        ),
        Panel(
            "Top-K overlap",
            "Share of the K most probable outcomes at writing time that still are under the current student: how far "
            "the learner has moved from the data it trains on.",
            "percentunit",
            (_drift("topk_overlap", "overlap"),),
            top=1.0,
        ),
    ),
)

_REWARDS = PanelRow(
    "Rewards",
    (
        Panel(
            "Mean reward",
            "Of the last step's rollouts that a verifier judged, right 1, wrong 0. Empty without reward.mode.",
            "percentunit",
            (Query(f"max({of('learner_reward_mean', job='learner')})", "reward"),),
            top=1.0,
        ),
        Panel(
            "Groups whose rewards differ",
            "Share of the last step's compared groups; where all rewards are equal they teach nothing.",
            "percentunit",
            (Query(f"max({of('learner_reward_signal_ratio', job='learner')})", "with signal"),),
            top=1.0,
        ),
        Panel(
            "Groups without reward",
            "Trained by the teacher alone since the learner began, by reason: one of it is dead or lost; too few have "
            "a reward; a batch was due before all were admitted (split), or one would have become stale (late).",
            "short",
            (
                Query(f"sum by (reason) ({of('learner_groups_without_reward_total', job='learner')})", "{{reason}}"),
                Query(total("learner_groups_without_reward_total"), "all"),
            ),
        ),
    ),
)

_STALENESS = PanelRow(
    "Staleness",
    (
        Panel(
            "Staleness",
            "Policy versions between the writing of a trajectory's first token and its training, and the limit: an "
            "older one is dropped.",
            "suffix: versions",
            (
                *_spread("policy_lag_versions", window=LATELY, role="learner"),
                Query(configured("max_staleness"), "limit", reference=True),
            ),
        ),
        Panel(
            "Mean staleness",
            "Mean over recently trained trajectories.",
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
            "Mean since the run began, by ending: tokens trained on, or that would have been. If stale is above "
            "trained, long rollouts are left out, and the trained ones are not a fair sample.",
            "suffix: tokens",
            (Query(lifetime_mean("ended_trainable_tokens", "reason"), "{{reason}}"),),
        ),
        Panel(
            "Length written",
            "Mean since the run began, by ending; for rollouts that were never judged, the tokens stored so far.",
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
            "Records that were given up and wait for `katana dead`. Look at any value above 0.",
            "short",
            (Query(f"max({of('stream_outstanding', job='feeder', stream='dead')})", "dead letters"),),
            kind="stat",
            alarm=1.0,
        ),
        Panel(
            "Failed calls to Redis",
            "Calls that failed and were repeated, since the processes began.",
            "short",
            (Query(total("redis_errors_total"), "failed calls"),),
            kind="stat",
            alarm=1.0,
        ),
        Panel(
            "Entries taken over",
            "Entries that a worker took over from a silent one, since the processes began.",
            "short",
            (Query(total("claims_total"), "taken over"),),
            kind="stat",
        ),
        Panel(
            "Alerts firing",
            "Alerts that fire now, of this run and of targets without a run.",
            "short",
            (Query(f"""count(ALERTS{{alertstate="firing",run=~"$run|"}}) or {_zero()}""", "firing"),),
            kind="stat",
            alarm=1.0,
        ),
        Panel(
            "Silence",
            "Time since the last iteration of each role's loop; workers between two worker tasks are left out.",
            "s",
            (Query(f"time() - max by (role) ({of('loop_timestamp_seconds')} > 0)", "{{role}}"),),
            alarm=60.0,
        ),
        _counted(
            "Given up",
            "Dead letters a second, by the place where the record was given up.",
            "dead_letters_total",
            "reason",
        ),
        _counted("Failed calls", "Failed calls to Redis a second, by kind.", "redis_errors_total", "kind"),
        _counted(
            "Taken over", "Entries a second taken over from a silent worker, by stream.", "claims_total", "stream"
        ),
        Panel(
            "Fenced and refused chunks",
            "Fenced: refused, because its writer no longer owned the rollout, or the rollout had ended. Repeated: "
            "scored a second time, without effect. Both happen when faults are survived; many of them are wasted work. "
            "Refused: by a full Redis, counted at each try; the chunk waits.",
            "suffix: /s",
            (
                Query(rate("chunks_fenced_total"), "fenced"),
                Query(rate("chunks_duplicate_total"), "repeated"),
                Query(rate("chunks_refused_total"), "refused"),
            ),
        ),
        Panel(
            "Memory of processes",
            "Resident memory by role, summed over workers. It should be flat.",
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
            "Memory relative to its limit",
            "Memory of the data Redis divided by its maxmemory, from the feeder; 0 without a limit. At 1, writes fail.",
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

_ENGINES = PanelRow(
    "vLLM servers",
    (
        Panel(
            "Requests at each server",
            "Chunks that a vLLM server writes now, and those that wait for a place. Many that wait: more slots in "
            "front of it than it writes at a time.",
            "short",
            (
                Query("sum by (instance) (vllm:num_requests_running)", "{{instance}} running"),
                Query("sum by (instance) (vllm:num_requests_waiting)", "{{instance}} waiting"),
            ),
        ),
        Panel(
            "Tokens generated",
            "Tokens a second: what each vLLM server generated, for whoever asked it, and what this run's workers "
            "counted. The servers' sum may be larger: evaluations, other runs.",
            "suffix: /s",
            (
                Query(_of_server("generation_tokens_total"), "{{instance}}"),
                Query(rate("decode_tokens_total", role="rollout"), "rollout workers"),
            ),
        ),
        Panel(
            "Prefix cache hits",
            "Share of the tokens in requests whose keys and values the server still held. A request repeats the "
            "whole text, so it should be near 1; where it falls, the cache is too small for the rollouts in flight.",
            "percentunit",
            (
                Query(
                    f"{_of_server('prefix_cache_hits_total')} / {_of_server('prefix_cache_queries_total')}",
                    "{{instance}}",
                ),
            ),
            top=1.0,
        ),
        Panel(
            "Cache in use",
            "Share of a server's cache of keys and values that requests hold now.",
            "percentunit",
            (Query("max by (instance) (vllm:kv_cache_usage_perc)", "{{instance}}"),),
            top=1.0,
        ),
        Panel(
            "Time to the first token",
            "From a request's arrival at a server until its first token: waiting, and reading what the prefix cache "
            "lacks. It is paid once a chunk.",
            "s",
            tuple(
                Query(
                    f"histogram_quantile({share}, {_of_server('time_to_first_token_seconds_bucket', 'le, ')})", legend
                )
                for share, legend in ((0.5, "{{instance}} median"), (0.95, "{{instance}} p95"))
            ),
        ),
        Panel(
            "Preemptions",
            "Requests a second that a server put back because its cache was full, and computes again.",
            "suffix: /s",
            (Query(_of_server("num_preemptions_total"), "{{instance}}"),),
        ),
    ),
)

DASHBOARDS = (
    Dashboard(
        "overview",
        "Katana: overview",
        "The saving by cutting, its effect on quality, and the state of the rule.",
        (_SAVINGS, _DIVERGENCE),
    ),
    Dashboard(
        "flow",
        "Katana: flow and latency",
        "Where work piles up, and how long each stage takes.",
        (_FLOW, _LATENCY, _ENGINES),
    ),
    Dashboard(
        "learner",
        "Katana: learner",
        "Loss and pace of the training, drift guards, and the staleness of its data.",
        (_LEARNING, _DRIFT, _REWARDS, _STALENESS),
    ),
    Dashboard(
        "faults",
        "Katana: faults and Redis",
        "Faults that were survived, records that were given up, and the state of Redis.",
        (_FAULTS, _REDIS),
    ),
)
