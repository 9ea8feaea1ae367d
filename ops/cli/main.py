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
Check it first:    katana check ops/experiments/demo.yaml
Change a setting:  katana run ops/experiments/demo.yaml --set learner.max_steps=20 --name short
Stop, resume:      Ctrl-C, then  katana run runs/short/config.yaml --resume
Every key:         katana keys

On a cluster each role is a separate process: start `katana feeder CONFIG`, then the others, with one rollout or teacher
worker per device. All need redis.url in the config and the same runs folder.

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
    except BrokenPipeError:  # the reader of our output has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return code


def _in_utf8() -> None:
    """Restart in Python's UTF-8 mode if the locale has another encoding: run files and messages are UTF-8, also in the
    processes that this one starts."""
    if not sys.flags.utf8_mode and locale.getpreferredencoding(do_setlocale=False).lower().replace("-", "") != "utf8":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
