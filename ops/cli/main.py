"""The command `katana`. Exit codes: 0 done, 1 the run failed, 2 bad input, 130 interrupted."""

from __future__ import annotations

import argparse
import locale
import os
import sys
from collections.abc import Sequence

from common.config import ConfigError
from common.policy_names import PolicyError
from common.pretrained import ModelError
from ops.cli import analyse, faults, look, run

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


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="katana",
        description="On-policy distillation that cuts each rollout, while it is written, where the teacher's signal "
        "has gone dead.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for family in (run, look, analyse, faults):
        family.add_to(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    if argv is None:
        _in_utf8()
    arguments = command_line().parse_args(argv)
    try:
        code: int = arguments.act(arguments)
    except (ConfigError, ModelError, PolicyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return code


def _in_utf8() -> None:
    """Begin anew in Python's UTF-8 mode where the locale has another encoding: run files and messages are UTF-8, and
    the processes that are started from here are to read and write them alike."""
    if not sys.flags.utf8_mode and locale.getpreferredencoding(do_setlocale=False).lower().replace("-", "") != "utf8":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
