"""Commands that analyse results: scores of a model, reports, replays and audits of a run, comparisons of several."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import suppress
from pathlib import Path

from common.config import Config, ConfigError
from common.runfiles.names import REPORT_PAGE
from ops.cli.arguments import Commands, Once, add_config, add_overrides, add_run_folder, command, load_config, positive


def add_to(commands: Commands[argparse.ArgumentParser]) -> None:
    add_run_folder(
        command(commands, "report", _report, "write report.html, report.png and figures/ from a run's folder")
    )

    evaluate = command(commands, "eval", _eval, "avg@k and pass@k of a model on the held-out problems")
    add_config(evaluate)
    evaluate.add_argument("--model", required=True, help="folder or hub id of the model to measure")
    evaluate.add_argument(
        "--engine", choices=("slots", "vllm"), help="what writes the samples (default: eval.engine of the config)"
    )
    evaluate.add_argument(
        "--vllm-url",
        metavar="URL",
        help="with --engine vllm: a server that is there (default: eval.vllm of the config)",
    )
    evaluate.add_argument(
        "--k", type=positive, help="samples per problem (default: the k of each benchmark; 8 on held-out problems)"
    )

    replay = command(commands, "replay", _replay, "what other settings would have cut in the recorded rollouts")
    add_run_folder(replay)
    add_overrides(replay, "a termination key; may be repeated")
    replay.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="A.B=C,D",
        help="a termination key with several values; repeat it for all combinations; writes RUN/replay/",
    )
    replay.add_argument(
        "--arm",
        choices=("control", "all"),
        help="rollouts to count (default: all if nothing was stopped, else control)",
    )

    audit = command(commands, "audit", _audit, "whether cut rollouts were recoverable: continue and judge them")
    add_run_folder(audit)
    audit.add_argument("--samples", type=positive, default=8, help="continuations of each prefix (default 8)")
    audit.add_argument(
        "--rollouts", type=positive, default=200, metavar="N", help="largest number of cuts (default 200)"
    )
    audit.add_argument(
        "--student", metavar="MODEL", help="the model that continues (default: the student in the run's folder)"
    )
    audit.add_argument("--seed", type=int, default=0, help="seed of the sampling (default 0)")

    match = command(
        commands,
        "match",
        _match,
        "print a config of random_matched that cuts at random as often and as much as a run of kat, or another one",
    )
    match.add_argument("run", type=Path, help="the folder of that run, for example runs/demo")
    match.add_argument("--against", type=Path, metavar="RUN", help="compare its means with those of RUN")
    match.add_argument(
        "--correct", action="store_true", help="with --against: print a corrected config, from both runs"
    )

    compare = command(commands, "compare", _compare, "run several policies and seeds one by one, with tables and plots")
    add_config(compare, judges=True)
    compare.add_argument(
        "--policies",
        action=Once,
        default="none,kat",
        help="comma-separated names (default none,kat): one row each",
    )
    compare.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="LABEL:A.B=C,D.E=F",
        help="one more row: the config with these keys changed; may be repeated",
    )
    compare.add_argument(
        "--loss",
        action=Once,
        default="",
        metavar="MODE,MODE",
        help="values of loss.mode: each row with each of them; the same as --sweep loss.mode=MODE,MODE",
    )
    compare.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="A.B=C,D",
        help="a key with several values: each row with each of them; repeat it for all combinations",
    )
    compare.add_argument("--seeds", action=Once, default="0-4", help="for example 0-4 or 0,2,7-9 (default 0-4)")
    compare.add_argument(
        "--budget",
        action=Once,
        default="steps",
        help="steps: learner.max_steps; tokens:N: each run ends after N generated tokens; tokens: N is "
        "learner.max_generated_tokens of the config (default steps)",
    )
    compare.add_argument("--jobs", type=positive, default=1, help="parallel runs (default 1)")
    compare.add_argument(
        "--report-only", action="store_true", help="run nothing; CONFIG may be the folder of the comparison"
    )


def _report(arguments: argparse.Namespace) -> int:
    from ops.report.command import write_report

    write_report(arguments.run)
    print(arguments.run / REPORT_PAGE)
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from common.pretrained import find_model
    from ops.run.evaluator import Evaluator, NotWritten

    config = load_config(arguments, _engine_of(arguments))
    folder = find_model(arguments.model)
    try:
        scores = Evaluator(config, folder).measure(k=arguments.k or (None if config.eval.data else 8))
    except NotWritten as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    assert scores is not None
    print(json.dumps({"model": str(folder), **scores.to_json()}))
    return 0


def _engine_of(arguments: argparse.Namespace) -> list[str]:
    """Overrides for --engine and --vllm-url. Raises ConfigError."""
    url = arguments.vllm_url
    if url is not None and arguments.engine != "vllm":
        raise ConfigError("--vllm-url is the server of --engine vllm: give both")
    # No run is evaluated while it goes on: its rollout workers' server will do.
    idle = "eval.every_steps=0"
    if arguments.engine == "vllm" and url is None and load_config(arguments, [idle]).eval.vllm is None:
        raise ConfigError(
            f"--engine vllm needs a server, and eval.vllm of {arguments.config} names none: give --vllm-url "
            f"http://host:port, or eval.vllm.urls or eval.vllm.command in the config"
        )
    chosen = [f"eval.engine={arguments.engine}", idle] if arguments.engine else []
    return chosen + ([f"eval.vllm={json.dumps({'urls': [url]})}"] if url is not None else [])


def _replay(arguments: argparse.Namespace) -> int:
    from ops.replay.command import replay

    print(replay(arguments.run, arguments.overrides, arguments.sweep, arguments.arm))
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    from ops.audit.command import audit

    chosen = {name: getattr(arguments, name) for name in ("samples", "rollouts", "student", "seed")}
    print(audit(arguments.run, **chosen))
    return 0


def _match(arguments: argparse.Namespace) -> int:
    from ops.compare import match as matching

    if arguments.correct and arguments.against is None:
        raise ConfigError("--correct needs --against RUN, the run with the matched config")
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
        arguments.loss,
        arguments.sweep,
    )
    return compare.compare(config, name, request)


def _load_base(arguments: argparse.Namespace) -> Config:
    """The config on which all rows of a comparison are based. Raises ConfigError.

    If every row names its policy, the config need not be valid with its own policy, which is in no row: each row is
    checked with its policy.
    """
    from ops.compare.grid import name_policies, read_rows

    try:
        return load_config(arguments)
    except ConfigError:
        if not name_policies(read_rows(arguments.policies, arguments.variant)):
            raise
        with suppress(ConfigError):  # if it is wrong without a policy too, raise the first error
            return load_config(arguments, ["termination.policy=none"])
        raise
