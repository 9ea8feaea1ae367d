"""Shared by all commands: arguments for a config, types of numbers, loading of the config."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from common.config import Config, load
from common.runfiles.names import CONFIG, RUN

Commands = argparse._SubParsersAction  # argparse has no public name for the type that `add_subparsers` returns
N = TypeVar("N", int, float)


def command(
    commands: Commands[argparse.ArgumentParser], name: str, act: Callable[[argparse.Namespace], int], help_text: str
) -> argparse.ArgumentParser:
    """Add a sub-parser. `act` gets its arguments and returns the exit code."""
    parser = commands.add_parser(name, help=help_text)
    parser.set_defaults(act=act)
    return parser


def add_config(parser: argparse.ArgumentParser, *, of_a_run: bool = False, judges: bool = False) -> None:
    """Add CONFIG, --set and --name, which `load_config` reads.

    `of_a_run`: the command is about an existing run, so CONFIG may be its folder.
    `judges`: the command judges rollouts, or starts a role that does: only then is a custom policy imported.
    """
    parser.set_defaults(of_a_run=of_a_run, judges=judges)
    known = "a YAML file, for example ops/experiments/demo.yaml" + ("; or a run's folder" if of_a_run else "")
    parser.add_argument("config", type=Path, metavar="CONFIG", help=known)
    add_overrides(parser, "override a key; may be given again")
    parser.add_argument("--name", help="name of the run and of its folder")


def add_overrides(parser: argparse.ArgumentParser, help_text: str | None = None) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides", help=help_text)


def add_run_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="the run's folder, for example runs/demo")


def load_config(arguments: argparse.Namespace, more: Sequence[str] = ()) -> Config:
    """The config that the arguments name, with the overrides `more`. Raises ConfigError, PolicyError."""
    path: Path = arguments.config
    if arguments.of_a_run and path.is_dir():
        path = arguments.config = path / CONFIG
    if not path.exists():
        from common.pretrained import PACKAGE_ROOT

        shipped = PACKAGE_ROOT / path
        path = shipped if shipped.exists() else path
    where = [f"name={json.dumps(arguments.name)}"] if arguments.name else []
    folder = path.resolve().parent
    if (arguments.of_a_run or getattr(arguments, "resume", False)) and (folder / RUN).is_file():
        # The config in a run's folder: the folder is the run, even if it was moved or renamed.
        where = [f"name={json.dumps(folder.name)}", f"runs_dir={json.dumps(str(folder.parent))}"]
    config = load(path, [*arguments.overrides, *more, *where])
    if arguments.judges:
        from common.policies import check_policy

        check_policy(config, source=str(path))
    return config


class Once(argparse.Action):
    """Stores a value and refuses a second one; argparse would silently keep the last."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        # The value does not show whether the option was given: it may equal the default.
        given = f"_given_{self.dest}"
        if hasattr(namespace, given):
            former = getattr(namespace, self.dest)
            raise argparse.ArgumentError(self, f"given twice ({former!r:.40}, then {values!r:.40}); expected once")
        setattr(namespace, given, True)
        setattr(namespace, self.dest, values)


def positive(text: str) -> int:
    return _number(text, int, lambda value: value >= 1, "a whole number of at least 1")


def positive_float(text: str) -> float:
    return _number(text, float, lambda value: 0 < value < float("inf"), "a number above 0")


def chance(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def _number(text: str, kind: Callable[[str], N], allowed: Callable[[N], bool], expected: str) -> N:
    with suppress(ValueError):
        if allowed(value := kind(text)):
            return value
    raise argparse.ArgumentTypeError(f"{text!r:.40}: expected {expected}")
