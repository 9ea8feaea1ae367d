"""The command `katana`. Exit codes: 0 done, 1 the run failed, 2 bad input, 130 interrupted."""

from __future__ import annotations

import argparse
import json
import locale
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from common.config import Config, ConfigError, keys, load
from common.policy_names import PolicyError
from common.pretrained import ModelError
from common.runfiles.names import CONFIG, REPORT_PAGE, RUN

_EPILOG = """\
A first run:       katana run ops/experiments/demo.yaml
Look before:       katana check ops/experiments/demo.yaml
Change a setting:  katana run ops/experiments/demo.yaml --set learner.max_steps=20 --name short
Stop, go on:       Ctrl-C, then  katana run runs/short/config.yaml --resume
Every key:         katana keys

On a cluster each role is a process of its own: start `katana feeder CONFIG`, then the others, as many rollout and
teacher workers as there are devices. All of them need redis.url in the config and see the same runs folder.

exit codes: 0 done, 1 the run failed, 2 bad input, 130 interrupted
"""


# What may be asked of a run that is there: its folder stands for the config in it.
_OF_A_RUN = ("check", "dead", "health", "top", "watch")
# What judges rollouts, or starts what does: only there is a custom policy imported.
_JUDGES = ("arbiter", "chaos", "check", "compare", "feeder", "run", "soak")


class _Once(argparse.Action):
    """Stores a value, and refuses a second one: by itself argparse keeps the last and says nothing."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        # Whether it was given shows in no value, which may be that of the default.
        given = f"_given_{self.dest}"
        if hasattr(namespace, given):
            former = getattr(namespace, self.dest)
            raise argparse.ArgumentError(self, f"given twice ({former!r:.40}, then {values!r:.40}); expected once")
        setattr(namespace, given, True)
        setattr(namespace, self.dest, values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="katana",
        description="On-policy distillation that cuts each rollout, while it is written, where the teacher's signal "
        "has gone dead.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="everything on this machine, until the run is done")
    _config_arguments(run)
    former = run.add_mutually_exclusive_group()
    former.add_argument(
        "--resume", action="store_true", help="go on in the run's folder; docs/running.md: which keys may change"
    )
    former.add_argument("--fresh", action="store_true", help="move a former run of this name to NAME.1, NAME.2 …")

    about = {
        "feeder": "admits rollouts, opens shifts, keeps the books; opens the run",
        "rollout": "a Celery worker that writes rollouts (student)",
        "teacher": "a Celery worker that scores chunks (teacher)",
        "arbiter": "gives every rollout its verdict",
        "learner": "trains, checkpoints, publishes weights",
        "evaluator": "measures avg@k and pass@k of published weights",
    }
    for role, text in about.items():
        _config_arguments(commands.add_parser(role, help=f"one role, for clusters: {text}"))

    health = commands.add_parser("health", help="whether a role on this host works: for health checks")
    health.add_argument("role", choices=sorted(about))
    _config_arguments(health)
    health.add_argument(
        "--within",
        type=_positive_float,
        default=60.0,
        metavar="S",
        help="longest time since its loop turned (default 60 s)",
    )

    check = commands.add_parser("check", help="validate a config, its models and data, and say what would run")
    _config_arguments(check)

    evaluate = commands.add_parser("eval", help="avg@k and pass@k of a model on the held-out problems")
    _config_arguments(evaluate)
    evaluate.add_argument("--model", required=True, help="folder or hub id of the model to measure")
    evaluate.add_argument(
        "--k", type=_positive, help="samples a problem (default: each benchmark's own; 8 on held-out problems)"
    )

    pretrain = commands.add_parser("pretrain", help="make the tiny teacher and the tiny base student that ship")
    pretrain.add_argument("--out", type=Path, default=Path("ops/models"), help="where teacher/ and student/ go")
    pretrain.add_argument("--which", choices=("teacher", "student", "both"), default="both")
    pretrain.add_argument("--seed", type=int, default=0)
    pretrain.add_argument(
        "--exchange-end",
        type=Path,
        metavar="MODEL",
        help="make nothing; copy MODEL into --out with another id for its end token, as base and instruct models have",
    )
    pretrain.add_argument(
        "--leave-loop",
        type=_chance,
        metavar="P",
        help="chance that a loop in the teacher's documents ends, at each repetition (default 0.15); low: a trap",
    )
    pretrain.add_argument(
        "--loop", type=_chance, metavar="P", help="chance of a loop in a document of the student's (default 0.12)"
    )

    bench = commands.add_parser("bench", help="measure speed; JSON on standard output")
    bench.add_argument(
        "what",
        choices=("engine", "head", "loop", "idle"),
        help="engine: decode tokens/s against a bare forward loop; "
        "head: seconds of a bfloat16 head with a bfloat16 and with a float32 result; "
        "loop: tokens/s of the whole and each role's busy share; idle: what workers without work cost",
    )
    bench.add_argument("config", type=Path, nargs="?", default=Path("ops/experiments/demo.yaml"))
    bench.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides")
    bench.add_argument("--repeats", type=_positive, default=5)
    bench.add_argument("--workers", type=_positive, default=1000, help="how many are idle (default 1000)")

    chaos = commands.add_parser("chaos", help="inject faults into a run of its own, then check that nothing was lost")
    _config_arguments(chaos)
    chaos.add_argument("--seed", type=int, action="append", help="of the schedule; several: a run for each (default 0)")
    chaos.add_argument("--faults", type=_positive, default=130, help="in each run (default 130)")
    chaos.add_argument("--kinds", help="names with commas between them (default: all); an unknown one lists them")
    chaos.add_argument(
        "--calm",
        type=_positive_float,
        default=120.0,
        metavar="SECONDS",
        help="how long what is open when the faults end may take (default 120)",
    )

    soak = commands.add_parser("soak", help="a long run whose processes are killed now and then; its memory stays flat")
    _config_arguments(soak)
    soak.add_argument("--minutes", type=_positive_float, default=30.0, help="how long (default 30)")
    soak.add_argument("--seed", type=int, default=0, help="of the kills (default 0)")

    top = commands.add_parser("top", help="a running cluster at a glance: roles, streams, saving, recent verdicts")
    _config_arguments(top)
    top.add_argument("--interval", type=_positive_float, default=1.0, metavar="S", help="between looks (default 1 s)")
    top.add_argument("--once", action="store_true", help="one snapshot; so it is, without --json, in a pipe")
    top.add_argument("--json", action="store_true", help="lines of JSON: until the run ends, or one with --once")

    watch = commands.add_parser("watch", help="one rollout: its text, coloured by divergence, and where it was cut")
    _config_arguments(watch)
    watch.add_argument("rid", metavar="RID", help="id or number of the rollout")
    watch.add_argument("--follow", action="store_true", help="until it has its verdict")
    watch.add_argument("--json", action="store_true", help="a JSON object: position, token, divergence, kept")

    panels = commands.add_parser("panels", help="draw the dashboards' panels of one run from a running Prometheus")
    panels.add_argument("prometheus", metavar="PROMETHEUS", help="its address, for example http://127.0.0.1:9090")
    panels.add_argument("--run", required=True, metavar="NAME", help="the run's name")
    panels.add_argument("--out", type=Path, required=True, metavar="FILE", help="the PNG")
    panels.add_argument("--minutes", type=_positive_float, default=60.0, help="how far back to look (default 60)")

    report = commands.add_parser("report", help="write report.html, report.png and figures/ from a run's folder")
    report.add_argument("run", type=Path, help="the run's folder, for example runs/demo")

    match = commands.add_parser("match", help="from a run of kat, the config of random_matched: it cuts by chance")
    match.add_argument("run", type=Path, help="the folder of the run of kat, for example runs/demo")
    match.add_argument("--against", type=Path, metavar="RUN", help="compare its means with this run's")
    match.add_argument("--correct", action="store_true", help="with --against: the config again, from both runs")

    replay = commands.add_parser("replay", help="what other settings would have cut of the rollouts on record")
    replay.add_argument("run", type=Path, help="the run's folder, for example runs/demo")
    replay.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        dest="overrides",
        help="a termination key; may be repeated",
    )
    replay.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="A.B=C,D",
        help="a termination key with several values; given again: all combinations; writes RUN/replay/",
    )
    replay.add_argument(
        "--arm",
        choices=("control", "all"),
        help="rollouts that count (default: all where nothing was stopped, else control)",
    )

    audit = commands.add_parser("audit", help="whether cut rollouts were recoverable: continue them, and judge")
    audit.add_argument("run", type=Path, help="the run's folder, for example runs/demo")
    audit.add_argument("--samples", type=_positive, default=8, help="continuations of each prefix (default 8)")
    audit.add_argument("--rollouts", type=_positive, default=200, metavar="N", help="most cuts (default 200)")
    audit.add_argument("--student", metavar="MODEL", help="who continues (default: the student that the run left)")
    audit.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")

    compare = commands.add_parser("compare", help="several policies and seeds, run one by one, with tables and plots")
    _config_arguments(compare)
    compare.add_argument(
        "--policies",
        action=_Once,
        default="none,kat",
        help="names with commas between them (default none,kat): a row each",
    )
    compare.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="LABEL:A.B=C,D.E=F",
        help="one more row: the config with these keys changed; may be given again",
    )
    compare.add_argument("--seeds", action=_Once, default="0-4", help="for example 0-4 or 0,2,7-9 (default 0-4)")
    compare.add_argument(
        "--budget",
        action=_Once,
        default="steps",
        help="steps: learner.max_steps; tokens:N: each run ends when N are generated; tokens: N is the config's "
        "learner.max_generated_tokens (default steps)",
    )
    compare.add_argument("--jobs", type=_positive, default=1, help="runs at a time (default 1)")
    compare.add_argument(
        "--report-only", action="store_true", help="run nothing; CONFIG may be the folder of the comparison"
    )

    dead = commands.add_parser("dead", help="list what a run gave up and why; send a rollout back, or remove it")
    _config_arguments(dead)
    what = dead.add_mutually_exclusive_group()
    what.add_argument("--json", action="store_true", help="the list as JSON, a line a letter")
    what.add_argument("--show", metavar="ENTRY", help="one letter whole, and what is left of its rollout")
    what.add_argument("--again", metavar="ENTRY", help="send the rollout back: its problem is admitted as a new one")
    what.add_argument("--drop", metavar="ENTRY", help="remove the letter, and the dead rollout's record, for good")

    clean = commands.add_parser("clean", help="remove what a run left in Redis and on disk")
    clean.add_argument("run", type=Path, help="the run's folder, for example runs/demo")

    known = commands.add_parser("keys", help="every config key with its default and meaning")
    known.add_argument("--markdown", action="store_true", help="as the table in docs/configuration.md")
    return parser


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    of_a_run = parser.prog.rpartition(" ")[2] in _OF_A_RUN
    known = "a YAML file, for example ops/experiments/demo.yaml" + ("; or a run's folder" if of_a_run else "")
    parser.add_argument("config", type=Path, metavar="CONFIG", help=known)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        dest="overrides",
        help="override a key; may be given again",
    )
    parser.add_argument("--name", help="name of the run and of its folder")


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r:.40}: expected a whole number of at least 1")
    return value


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r:.40}: expected a number above 0")
    return value


def _chance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r:.40}: expected a number from 0 to 1")
    return value


def _load(arguments: argparse.Namespace, more: Sequence[str] = ()) -> Config:
    """The config that is asked for, with `more` overrides on top. Raises ConfigError."""
    path: Path = arguments.config
    if arguments.command in _OF_A_RUN and path.is_dir():
        path = arguments.config = path / CONFIG  # a run's folder stands for the config in it
    if not path.exists():
        from common.pretrained import PACKAGE_ROOT

        shipped = PACKAGE_ROOT / path
        path = shipped if shipped.exists() else path
    where = [f"name={json.dumps(arguments.name)}"] if getattr(arguments, "name", None) else []
    folder = path.resolve().parent
    own = getattr(arguments, "resume", False) or arguments.command in _OF_A_RUN
    if own and (folder / RUN).is_file():
        # A run's own config: the folder it lies in is the run, also if it was moved or renamed.
        where = [f"name={json.dumps(folder.name)}", f"runs_dir={json.dumps(str(folder.parent))}"]
    config = load(path, [*arguments.overrides, *more, *where])
    if arguments.command in _JUDGES:
        from common.policies import check_policy

        check_policy(config, source=str(path))
    return config


def _in_utf8() -> None:
    """Begin anew in Python's UTF-8 mode where the locale has another encoding: run files and messages are UTF-8, and
    the processes that are started from here are to read and write them alike."""
    if not sys.flags.utf8_mode and locale.getpreferredencoding(do_setlocale=False).lower().replace("-", "") != "utf8":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    if argv is None:
        _in_utf8()
    arguments = _parser().parse_args(argv)
    try:
        return _dispatch(arguments)
    except (ConfigError, ModelError, PolicyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _dispatch(arguments: argparse.Namespace) -> int:
    command = arguments.command
    if command == "run":
        from ops.run.local import run_locally

        return run_locally(_load(arguments), resume=arguments.resume, fresh=arguments.fresh)
    if command in ("feeder", "rollout", "teacher", "arbiter", "learner", "evaluator"):
        from ops.run.roles import run_role

        return run_role(command, _load(arguments))
    return {
        "check": _check,
        "health": _health,
        "eval": _eval,
        "pretrain": _pretrain,
        "bench": _bench,
        "chaos": _chaos,
        "soak": _soak,
        "top": _top,
        "watch": _watch,
        "panels": _panels,
        "report": _report,
        "match": _match,
        "replay": _replay,
        "audit": _audit,
        "compare": _compare,
        "dead": _dead,
        "clean": _clean,
        "keys": _keys,
    }[command](arguments)


def _check(arguments: argparse.Namespace) -> int:
    from ops.run.check import check

    config = _load(arguments)
    found = check(config)
    for line in found.lines:
        print(line)
    for text in found.unchecked:
        print(f"unchecked  {text}")
    for text in found.problems:
        print(f"error: {text}", file=sys.stderr)
    if found.problems:
        print("not usable")
        return 2
    unchecked = len(found.unchecked)
    print(f"nothing wrong in what could be checked; {unchecked} could not be (above)" if unchecked else "ok")
    return 0


def _health(arguments: argparse.Namespace) -> int:
    from ops.run.health import health

    troubles = health(arguments.role, _load(arguments), within_s=arguments.within)
    for trouble in troubles:
        print(trouble, file=sys.stderr)
    if not troubles:
        print(f"{arguments.role}: well")
    return 1 if troubles else 0


def _eval(arguments: argparse.Namespace) -> int:
    from common.pretrained import find_model
    from ops.run.evaluator import Evaluator

    config = _load(arguments)
    folder = find_model(arguments.model)
    scores = Evaluator(config, folder).measure(k=arguments.k or (None if config.eval.data else 8))
    assert scores is not None
    print(json.dumps({"model": str(folder), **scores.to_json()}))
    return 0


def _pretrain(arguments: argparse.Namespace) -> int:
    from ops.tasks.pretrain import exchange_end, pretrain, with_loops

    if arguments.exchange_end is not None:
        if arguments.loop is not None or arguments.leave_loop is not None:
            raise ConfigError("--exchange-end makes no model: it goes with neither --loop nor --leave-loop")
        exchange_end(arguments.exchange_end, arguments.out)
        return 0
    for option, value, other, role in (
        ("--loop", arguments.loop, "teacher", "student"),
        ("--leave-loop", arguments.leave_loop, "student", "teacher"),
    ):
        if value is not None and arguments.which == other:
            raise ConfigError(f"{option} is for the {role}'s documents: it goes with --which {role} or both")
    settings = with_loops(student_loop=arguments.loop, teacher_leaves=arguments.leave_loop)
    pretrain(arguments.out, which=arguments.which, seed=arguments.seed, settings=settings)
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from ops.bench import idle as bench_idle
    from ops.bench import speed as bench

    config = _load(arguments)
    measure: dict[str, Callable[[Config, int], dict[str, Any]]] = {
        "engine": bench.engine,
        "head": bench.head,
        "loop": bench.loop,
        "idle": partial(bench_idle.idle, workers=arguments.workers),
    }
    print(json.dumps(measure[arguments.what](config, arguments.repeats), indent=2))
    return 0


def _chaos(arguments: argparse.Namespace) -> int:
    from ops.chaos.faults import KINDS
    from ops.chaos.harness import run_chaos

    kinds = [kind.strip() for kind in arguments.kinds.split(",")] if arguments.kinds else list(KINDS)
    seeds = arguments.seed or [0]
    return run_chaos(_load(arguments), seeds=seeds, faults=arguments.faults, kinds=kinds, calm_s=arguments.calm)


def _soak(arguments: argparse.Namespace) -> int:
    from ops.chaos.soak import soak

    return soak(_load(arguments), minutes=arguments.minutes, seed=arguments.seed)


def _top(arguments: argparse.Namespace) -> int:
    from ops.live.top import top

    config, interval_s = _load(arguments), arguments.interval
    return top(config, arguments.config, interval_s=interval_s, once=arguments.once, as_json=arguments.json)


def _watch(arguments: argparse.Namespace) -> int:
    from ops.live.watch import watch

    config, rid = _load(arguments), arguments.rid
    return watch(config, arguments.config, rid, as_json=arguments.json, follow=arguments.follow)


def _panels(arguments: argparse.Namespace) -> int:
    from ops.monitoring.panels import draw

    print(draw(arguments.prometheus, arguments.run, arguments.out, arguments.minutes))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from ops.report.command import write_report

    write_report(arguments.run)
    print(arguments.run / REPORT_PAGE)
    return 0


def _match(arguments: argparse.Namespace) -> int:
    from ops.compare import match as matching

    if arguments.correct and arguments.against is None:
        raise ConfigError("--correct needs --against RUN, the run that was matched before")
    if arguments.against is not None and not arguments.correct:
        text, agree = matching.compare(arguments.run, arguments.against)
        print(text)
        if not agree:
            again = f"katana match {arguments.run} --against {arguments.against} --correct > again.yaml"
            print(f"no match within 2 %; corrected: {again}", file=sys.stderr)
        return 0 if agree else 1
    if arguments.against is not None:
        config, text = matching.corrected_config(arguments.run, arguments.against)
    else:
        config, text = matching.matched_config(arguments.run)
    print(text, file=sys.stderr)
    print(config.to_yaml(), end="")
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    from ops.replay.command import replay

    print(replay(arguments.run, arguments.overrides, arguments.sweep, arguments.arm))
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    from ops.audit.command import audit

    chosen = {name: getattr(arguments, name) for name in ("samples", "rollouts", "student", "seed")}
    print(audit(arguments.run, **chosen))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from ops.compare import command as compare
    from ops.compare.grid import resolved_budget

    if arguments.report_only and arguments.config.is_dir():
        return compare.report(arguments.config)
    config, name = _load_base(arguments), arguments.name
    if arguments.report_only:
        return compare.report(compare.grid_folder(config, name))
    budget = resolved_budget(arguments.budget, config)
    request = compare.Request(
        arguments.policies,
        arguments.variant,
        arguments.seeds,
        budget,
        arguments.overrides,
        arguments.jobs,
        arguments.config.parent,
    )
    return compare.compare(config, name, request)


def _load_base(arguments: argparse.Namespace) -> Config:
    """The config that all rows of a comparison begin with. Raises ConfigError.

    Where every row names its policy, it need not be valid with its own one, which is in no row: rows are checked each
    with theirs.
    """
    from ops.compare.grid import name_policies, read_rows

    try:
        return _load(arguments)
    except ConfigError:
        if not name_policies(read_rows(arguments.policies, arguments.variant)):
            raise
        with suppress(ConfigError):  # also wrong without a policy: the first error says it best
            return _load(arguments, ["termination.policy=none"])
        raise


def _dead(arguments: argparse.Namespace) -> int:
    from ops.run import dead

    config, source = _load(arguments), arguments.config
    if arguments.show is not None:
        dead.show(config, source, arguments.show)
    elif arguments.again is not None:
        dead.send_back(config, source, arguments.again)
    elif arguments.drop is not None:
        dead.drop(config, source, arguments.drop)
    else:
        dead.list_letters(config, source, as_json=arguments.json)
    return 0


def _clean(arguments: argparse.Namespace) -> int:
    from ops.run.clean import clean

    print(clean(arguments.run))
    return 0


def _keys(arguments: argparse.Namespace) -> int:
    if arguments.markdown:
        print("| key | default | meaning |\n| --- | --- | --- |")
    for name, default, meaning in keys():
        if arguments.markdown:
            print(f"| `{name}` | {default} | {meaning} |")
        else:
            print(f"{name:36} {default:12} {meaning}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
