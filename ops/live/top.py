"""`katana top`: a running cluster in a terminal, refreshed; `ops/live/snapshot.py` makes each snapshot."""

from __future__ import annotations

import json
import math
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from common.config import Config, ConfigError
from ops.live.coloured import excerpt, plain
from ops.live.snapshot import Observer, Role, Snapshot, as_dict

_PLAIN_WIDTH = 120
_BESIDE_WIDTH = 100  # from this many columns on roles and streams are side by side
_MOST_ROWS = 12  # workers shown by themselves
_LATE_S = 60.0  # a loop without an iteration for this long is shown as trouble, as in `katana health`


def top(config: Config, source: Path, *, interval_s: float, once: bool, as_json: bool) -> int:
    """Show the run until it has ended, or one snapshot: with `once`, or without a terminal.

    `source` is the file that the config was read from. With `as_json` a snapshot is a line of JSON. Speeds need two
    snapshots, so one snapshot takes `interval_s`. Raises ConfigError: there is no such run, or Redis refuses.
    """
    observer = Observer(config, source)
    try:
        if once or not (as_json or sys.stdout.isatty()):
            _show_once(observer, config, interval_s, as_json)
        elif as_json:
            _each(observer, interval_s, lambda snapshot: print(_json(snapshot), flush=True))
        else:
            _live(observer, interval_s)
    finally:
        observer.close()
    return 0


def _show_once(observer: Observer, config: Config, interval_s: float, as_json: bool) -> None:
    first = observer.look()
    if first.redis and observer.nothing:
        raise ConfigError(f"run {config.name!r}: {first.redis}; and there is no folder {config.run_dir}")
    snapshot = first if first.state == "ended" else _look_again(observer, first, config, interval_s)
    if as_json:
        print(_json(snapshot))
        return
    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    console.print(picture(snapshot, console.width))


def _look_again(observer: Observer, first: Snapshot, config: Config, interval_s: float) -> Snapshot:
    # Without metrics ports progress comes from the workers' heartbeats.
    time.sleep(max(interval_s, 1.1 * config.liveness.heartbeat_s) if first.metrics and first.workers else interval_s)
    return observer.look()


def _each(observer: Observer, interval_s: float, show: Any) -> Snapshot:
    """Refresh until the run has ended."""
    while True:
        began = time.monotonic()
        snapshot = observer.look()
        show(snapshot)
        if snapshot.state == "ended":
            return snapshot
        time.sleep(max(0.05, interval_s - (time.monotonic() - began)))


def _live(observer: Observer, interval_s: float) -> None:
    console = Console()
    last: list[Snapshot] = []

    def show(snapshot: Snapshot) -> None:
        last[:] = [snapshot]
        live.update(picture(snapshot, console.width, console.height), refresh=True)

    try:
        with Live(console=console, auto_refresh=False, screen=True, vertical_overflow="crop") as live:
            _each(observer, interval_s, show)
    finally:
        for snapshot in last:  # the screen is given back as it was: what was seen last stays below
            console.print(picture(snapshot, console.width))


def _json(snapshot: Snapshot) -> str:
    return json.dumps(as_dict(snapshot), allow_nan=False)


# --- the picture ------------------------------------------------------------------------------------------------------


def picture(snapshot: Snapshot, width: int, height: int = 1000) -> Group:
    """A snapshot for a terminal of so many columns and rows: verdicts, which come last, take what is left of these."""
    parts: list[Any] = [_heading(snapshot), *_troubles(snapshot), _figures(snapshot), _rollouts(snapshot), Text()]
    roles, streams = _roles(snapshot), _streams(snapshot)
    if width >= _BESIDE_WIDTH:
        beside = Table.grid(padding=(0, 4))
        beside.add_row(roles, streams)
        parts.append(beside)
    else:
        parts += [roles, streams]
    if snapshot.workers:
        parts += [Text(), _workers(snapshot)]
    parts.append(Text())
    above = sum(_rows(part) for part in parts)
    return Group(*parts, _verdicts(snapshot, width, max(1, height - above - 1)))


def _rows(part: Any) -> int:
    """How high a part is; of two beside each other, the first, which is the higher one."""
    if not isinstance(part, Table):
        return 1
    first = next(iter(part.columns[0].cells)) if part.row_count == 1 and not part.show_header else None
    return _rows(first) if isinstance(first, Table) else part.row_count + part.show_header


def _heading(snapshot: Snapshot) -> Text:
    at = datetime.fromtimestamp(snapshot.at_unix_s, UTC)
    text = Text(f"katana top · {plain(snapshot.name)}", "bold")
    text.append(f" · {plain(snapshot.state)} · step {_count(snapshot.step)} / {_count(snapshot.max_steps)}")
    text.append(f" · policy version {_count(snapshot.policy_version)} · {at:%H:%M:%S} UTC", "not bold")
    return text


def _troubles(snapshot: Snapshot) -> list[Text]:
    if snapshot.state == "ended":  # then no role needs to be alive
        state = "the run is over" + ("; shown from its folder, without Redis" if snapshot.redis else "")
        return [Text(state), *(Text(plain(line), "red") for line in snapshot.notes)]
    lines = [f"redis: {snapshot.redis}"] if snapshot.redis else []
    lines += [f"metrics: {snapshot.metrics}"] if snapshot.metrics else []
    return [Text(plain(line), "red") for line in [*lines, *snapshot.notes]]


def _figures(snapshot: Snapshot) -> Table:
    table = Table.grid(padding=(0, 3))
    rates = snapshot.tokens_per_s
    speeds = " · ".join(f"{name} {_count(rates.get(name))}" for name in ("written", "scored", "trained"))
    rows = [
        ("saving", _saving(snapshot), "tokens/s", speeds),
        ("threshold", _threshold(snapshot), "redis", _memory(snapshot)),
        ("policy fired", _share(snapshot.cut_rate), "dead letters", _count(snapshot.dead_letters)),
        ("lag", f"{_number(snapshot.lag_versions, '.2f')} versions", "", ""),
    ]
    for left, value, right, other in rows:
        table.add_row(Text(left, "bold"), Text(value), Text(right, "bold"), Text(other))
    return table


def _saving(snapshot: Snapshot) -> str:
    saving = snapshot.saving
    if saving.ratio is None:
        return "–"
    if saving.low is None or saving.high is None:
        return f"{saving.ratio:.1%} (metrics: no interval)"
    return f"{saving.ratio:.1%} ({saving.low:.1%} … {saving.high:.1%}), {saving.rollouts:,} rollouts"


def _threshold(snapshot: Snapshot) -> str:
    if any(value is not None for value in snapshot.threshold_of.values()):
        each = snapshot.threshold_of.items()
        return ", ".join(f"{plain(name)} {'inactive' if value is None else f'{value:.2e}'}" for name, value in each)
    if snapshot.threshold_nats is not None:
        return f"{snapshot.threshold_nats:.2e} nats"
    return "inactive" if snapshot.minima is None else f"inactive ({snapshot.minima} minima)"


def _rollouts(snapshot: Snapshot) -> Text:
    ledger, text = snapshot.ledger, Text("rollouts   ", "bold")
    if not ledger:
        return text.append("–", "not bold")
    dropped = sum(many for name, many in ledger.items() if name.startswith("dropped:"))
    return text.append(
        f"{ledger.get('admitted', 0):,} admitted = {ledger.get('trained', 0):,} trained + {dropped:,} dropped + "
        f"{ledger.get('dead', 0):,} dead + {_count(snapshot.open_rollouts)} open",
        "not bold",
    )


def _memory(snapshot: Snapshot) -> str:
    used, most = snapshot.redis_used_bytes, snapshot.redis_max_bytes
    if used is None:
        return "–"
    text = f"{used / 2**20:.1f} MB"
    return f"{text} of {most / 2**20:.0f} MB ({used / most:.0%})" if most else f"{text}, no limit"


def _roles(snapshot: Snapshot) -> Table:
    table = _table("role", "alive", "lease", "metrics", "loop turned")
    for role in snapshot.roles:
        ports = f"{role.ports} answer" + (f", {role.silent} do not" if role.silent else "")
        turned = "–" if role.turned_s is None else f"{role.turned_s:.1f} s ago"
        late = role.turned_s is not None and role.turned_s > _LATE_S
        table.add_row(
            role.name,
            _alive(role, snapshot.state == "ended"),
            _lease(role),
            ports if role.ports or role.silent else "–",
            Text(turned, "red" if late else ""),
        )
    return table


def _alive(role: Role, over: bool) -> Text:
    if role.alive:
        return Text("yes", "green")
    return Text("ended") if over else Text("not seen", "red")


def _lease(role: Role) -> str:
    if role.lease is None:
        return "–"
    return f"held, {_number(role.lease_left_s, '.1f')} s left" if role.lease else "free"


def _workers(snapshot: Snapshot) -> Table:
    table = _table("worker", "role", "busy", "slots", "version", "tokens/s", "seen")
    for worker in snapshot.workers[:_MOST_ROWS]:
        slots = "–" if worker.slots is None else f"{_count(worker.writing)} of {worker.slots}"
        table.add_row(
            plain(worker.id),
            plain(worker.role),
            _share(worker.busy),
            slots,
            _count(worker.version),
            _count(worker.tokens_per_s),
            f"{worker.seen_s:.1f} s ago",
        )
    if len(snapshot.workers) > _MOST_ROWS:
        table.add_row(f"and {len(snapshot.workers) - _MOST_ROWS} more")
    return table


def _streams(snapshot: Snapshot) -> Table:
    table = _table("stream", "outstanding", "oldest pending")
    for name, stream in snapshot.streams.items():
        oldest = stream.oldest_pending_s
        table.add_row(name, f"{stream.outstanding:,}", "–" if oldest is None else f"{oldest:.1f} s")
    return table


def _verdicts(snapshot: Snapshot, width: int, most: int) -> Table:
    table = _table("verdict", "arm", "why", "kept/written", "text")
    room = max(20, width - 52)
    for judged in snapshot.verdicts[:most]:
        table.add_row(
            plain(judged.rid),
            plain(judged.arm),
            plain(judged.reason),
            f"{judged.kept}/{judged.generated}",
            excerpt(judged.text, judged.behind, room),
        )
    if not snapshot.verdicts:
        table.add_row("none yet")
    return table


def _table(*names: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True)
    return table


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _count(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:,.0f}"


def _number(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)
