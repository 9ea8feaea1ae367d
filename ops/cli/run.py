"""Commands around a run: start it or one role, check its config, train the shipped models, remove the run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common.config import ConfigError, keys
from ops.cli.arguments import Commands, add_config, add_run_folder, chance, command, load_config, positive

ROLES = {
    "feeder": "opens the run, admits rollouts, sends worker tasks, keeps the books",
    "rollout": "a Celery worker that writes rollouts (student)",
    "teacher": "a Celery worker that scores chunks (teacher)",
    "arbiter": "gives every rollout its verdict",
    "learner": "trains, checkpoints, publishes weights",
    "evaluator": "measures avg@k and pass@k of published weights",
}


def add_to(commands: Commands[argparse.ArgumentParser]) -> None:
    run = command(commands, "run", _run, "run all roles on this machine until the run has ended")
    add_config(run, judges=True)
    former = run.add_mutually_exclusive_group()
    former.add_argument(
        "--resume", action="store_true", help="continue from the run's folder; docs/running.md: which keys may change"
    )
    former.add_argument("--fresh", action="store_true", help="move an earlier run of this name to NAME.1, NAME.2 …")

    for role, text in ROLES.items():
        parser = command(commands, role, _role, f"one role, for clusters: {text}")
        add_config(parser, judges=role in ("feeder", "arbiter"))
        if role == "teacher":
            parser.add_argument("--teacher", metavar="NAME", help="of several teachers the one whose chunks it scores")

    check = command(commands, "check", _check, "validate a config, its models and data, and show what would run")
    add_config(check, of_a_run=True, judges=True)
    check.add_argument(
        "--gpus", type=positive, metavar="N", help="estimate memory for a machine with N GPUs, not this one"
    )
    check.add_argument(
        "--gpu-gb", type=positive, metavar="G", help="with --gpus: memory of each of them in GB (default 80)"
    )

    command(commands, "scaling", _scaling, "memory by role for Qwen3 0.6B to 14B, as the table in docs/scaling.md")

    add_run_folder(command(commands, "clean", _clean, "remove a run from Redis and from disk"))

    known = command(commands, "keys", _keys, "every config key with its default and meaning")
    known.add_argument("--markdown", action="store_true", help="as the table in docs/configuration.md")

    pretrain = command(
        commands, "pretrain", _pretrain, "train the tiny teacher and the tiny base student that Katana ships"
    )
    pretrain.add_argument("--out", type=Path, default=Path("ops/models"), help="folder for teacher/ and student/")
    pretrain.add_argument("--which", choices=("teacher", "student", "both"), default="both")
    pretrain.add_argument("--seed", type=int, default=0)
    pretrain.add_argument(
        "--exchange-end",
        type=Path,
        metavar="MODEL",
        help="train nothing; copy MODEL into --out with another id for its end token, as in an instruct model",
    )
    pretrain.add_argument(
        "--shift",
        type=Path,
        metavar="MODEL",
        help="train nothing; copy MODEL into --out as a model of the other dialect (docs/teachers.md)",
    )
    pretrain.add_argument(
        "--bilingual",
        action="store_true",
        help="train the shipped student on for a minute, half of its documents in the other dialect",
    )
    pretrain.add_argument(
        "--leave-loop",
        type=chance,
        metavar="P",
        help="probability that a loop in the teacher's documents ends at each repetition (default 0.15); low: a trap",
    )
    pretrain.add_argument(
        "--loop", type=chance, metavar="P", help="probability of a loop in a document of the student (default 0.12)"
    )
    pretrain.add_argument(
        "--for-vllm",
        action="store_true",
        help="heads 64 wide and an untied output head: models that vLLM can run on a CPU (docs/development.md)",
    )


def _run(arguments: argparse.Namespace) -> int:
    from ops.run.nursery import begin_nursery

    config = load_config(arguments)
    with begin_nursery(config) as nursery:
        from ops.run.local import run_locally  # not before: the nursery imports at the same time

        return run_locally(config, nursery, resume=arguments.resume, fresh=arguments.fresh)


def _role(arguments: argparse.Namespace) -> int:
    from ops.run.roles import run_role

    return run_role(arguments.command, load_config(arguments), getattr(arguments, "teacher", None))


def _check(arguments: argparse.Namespace) -> int:
    from ops.run.check import check
    from ops.run.memory import GB, Machine, machine_here

    asked = arguments.gpus
    if asked is None and arguments.gpu_gb is not None:
        raise ConfigError("--gpu-gb is the memory of each of the GPUs that --gpus names: give both")
    machine = machine_here(sizes=True) if asked is None else Machine(asked, (arguments.gpu_gb or 80) * GB)
    found = check(load_config(arguments), machine, examine=True)
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


def _scaling(_: argparse.Namespace) -> int:
    from ops.run.memory import scaling_table

    print("\n".join(scaling_table()))
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


def _pretrain(arguments: argparse.Namespace) -> int:
    from ops.tasks.pretrain import bilingual, exchange_end, for_vllm, pretrain, shift, with_loops

    copies = {"--exchange-end": (arguments.exchange_end, exchange_end), "--shift": (arguments.shift, shift)}
    asked = {name: one for name, one in copies.items() if one[0] is not None}
    if len(asked) > 1:
        raise ConfigError("--exchange-end and --shift each make a copy: give one of them")
    for name, (source, copy) in asked.items():
        loops = arguments.loop is not None or arguments.leave_loop is not None
        if loops or arguments.bilingual or arguments.for_vllm:
            others = "--loop, --leave-loop, --for-vllm or --bilingual"
            raise ConfigError(f"{name} trains no model: it cannot be combined with {others}")
        copy(source, arguments.out)
        return 0
    for option, value, other, role in (
        ("--loop", arguments.loop, "teacher", "student"),
        ("--leave-loop", arguments.leave_loop, "student", "teacher"),
    ):
        if value is not None and arguments.which == other:
            raise ConfigError(f"{option} is for the {role}'s documents: use it with --which {role} or both")
    changed = arguments.loop is not None or arguments.for_vllm
    if arguments.bilingual and (changed or arguments.which != "student"):
        raise ConfigError("--bilingual needs --which student, and cannot be combined with --loop or --for-vllm")
    settings = with_loops(student_loop=arguments.loop, teacher_leaves=arguments.leave_loop)
    if arguments.bilingual:
        settings = bilingual()
    if arguments.for_vllm:
        settings = for_vllm(settings)
    pretrain(arguments.out, which=arguments.which, seed=arguments.seed, settings=settings)
    return 0
