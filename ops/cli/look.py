"""Commands that look at an existing run: health, a view of the cluster or of one rollout, panels, dead letters."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ops.cli.arguments import (
    Commands,
    add_config,
    add_run_folder,
    command,
    load_config,
    positive,
    positive_float,
)
from ops.cli.run import ROLES


def add_to(commands: Commands[argparse.ArgumentParser]) -> None:
    health = command(commands, "health", _health, "health check of a role on this host")
    health.add_argument("role", choices=sorted(ROLES))
    add_config(health, of_a_run=True)
    health.add_argument(
        "--within",
        type=positive_float,
        default=60.0,
        metavar="S",
        help="longest time since the last iteration of its loop (default 60 s)",
    )

    top = command(commands, "top", _top, "a running cluster at a glance: roles, streams, saving, recent verdicts")
    add_config(top, of_a_run=True)
    top.add_argument(
        "--interval", type=positive_float, default=1.0, metavar="S", help="seconds between updates (default 1)"
    )
    top.add_argument(
        "--once",
        action="store_true",
        help="print one snapshot and exit (without --json the default when output is not a terminal)",
    )
    top.add_argument("--json", action="store_true", help="print JSON lines until the run ends; with --once, one line")

    watch = command(commands, "watch", _watch, "one rollout: its text, coloured by divergence, and where it was cut")
    add_config(watch, of_a_run=True)
    watch.add_argument("rid", metavar="RID", help="id or number of the rollout")
    watch.add_argument("--follow", action="store_true", help="update until it has its verdict")
    watch.add_argument("--json", action="store_true", help="a JSON object: position, token, divergence, kept")

    trace = command(commands, "trace", _trace, "what each process of a run did when, for a viewer or as a picture")
    add_run_folder(trace)
    trace.add_argument(
        "--out", type=Path, metavar="FILE", help="file for ui.perfetto.dev or chrome://tracing (default RUN/trace.json)"
    )
    trace.add_argument("--png", type=Path, metavar="FILE", help="draw a few steps; writes no trace.json without --out")
    trace.add_argument("--steps", type=positive, default=4, help="learner steps to draw (default 4)")

    panels = command(commands, "panels", _panels, "draw the dashboards' panels of one run from a running Prometheus")
    panels.add_argument("prometheus", metavar="PROMETHEUS", help="its address, for example http://127.0.0.1:9090")
    panels.add_argument("--run", required=True, metavar="NAME", help="the run's name")
    panels.add_argument("--out", type=Path, required=True, metavar="FILE", help="the PNG")
    panels.add_argument(
        "--minutes", type=positive_float, default=60.0, help="length of the plotted period up to now (default 60)"
    )

    dead = command(commands, "dead", _dead, "list the dead letters of a run; send a rollout back, or remove it")
    add_config(dead, of_a_run=True)
    what = dead.add_mutually_exclusive_group()
    what.add_argument("--json", action="store_true", help="print the list as JSON, one line per letter")
    what.add_argument("--show", metavar="ENTRY", help="show all fields of a letter and of its rollout")
    what.add_argument(
        "--again", metavar="ENTRY", help="send the rollout back: its problem is admitted as a new rollout"
    )
    what.add_argument("--drop", metavar="ENTRY", help="remove the letter and the dead rollout's record permanently")


def _health(arguments: argparse.Namespace) -> int:
    from ops.run.health import health

    troubles = health(arguments.role, load_config(arguments), within_s=arguments.within)
    for trouble in troubles:
        print(trouble, file=sys.stderr)
    if not troubles:
        print(f"{arguments.role}: healthy")
    return 1 if troubles else 0


def _top(arguments: argparse.Namespace) -> int:
    from ops.live.top import top

    config, interval_s = load_config(arguments), arguments.interval
    return top(config, arguments.config, interval_s=interval_s, once=arguments.once, as_json=arguments.json)


def _watch(arguments: argparse.Namespace) -> int:
    from ops.live.watch import watch

    config, rid = load_config(arguments), arguments.rid
    return watch(config, arguments.config, rid, as_json=arguments.json, follow=arguments.follow)


def _trace(arguments: argparse.Namespace) -> int:
    from ops.trace.command import trace

    print(trace(arguments.run, arguments.out, arguments.png, arguments.steps))
    return 0


def _panels(arguments: argparse.Namespace) -> int:
    from ops.monitoring.panels import draw

    print(draw(arguments.prometheus, arguments.run, arguments.out, arguments.minutes))
    return 0


def _dead(arguments: argparse.Namespace) -> int:
    from ops.run import dead

    config, source = load_config(arguments), arguments.config
    if arguments.show is not None:
        dead.show(config, source, arguments.show)
    elif arguments.again is not None:
        dead.send_back(config, source, arguments.again)
    elif arguments.drop is not None:
        dead.drop(config, source, arguments.drop)
    else:
        dead.list_letters(config, source, as_json=arguments.json)
    return 0
