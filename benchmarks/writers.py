"""Slots beside a vLLM server: speed, stops, whole runs, and verdicts on the same text.

    .venv/bin/katana pretrain --which student --for-vllm --out runs/models/for-vllm
    make .venv-vllm/.ready
    .venv/bin/python benchmarks/writers.py --out writers.json
    .venv/bin/python benchmarks/writers.py --out writers.json --only speed,stop --models made --repeats 5
    .venv/bin/python benchmarks/writers.py --out writers.json --only speed,stop --models student \\
        --config my.yaml --url http://127.0.0.1:8000 --rollouts 128

README.md in this folder says what each part measures.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from made_pair import make_pair
from sides import ROOT, exit_code
from vllm_side import Server, command, server_at, serving, writer_of
from writers_runs import run_repeats, run_table
from writers_speed import Prompts, speed_repeats, speed_table, stop_repeats, stop_table
from writers_verdicts import Judge, figures, verdicts_table, write_texts

from actors.engine import Writer
from common.config import Config, ConfigError, load
from common.files import write_json
from common.pretrained import check_pair
from ops.bench.speed import machine
from ops.cli.arguments import positive
from ops.tasks.source import TaskSource

PARTS = ("speed", "stop", "run", "verdicts")
MODELS = ("student", "made")
STUDENT = Path("runs/models/for-vllm/student")


@dataclass(frozen=True, slots=True)
class Bench:
    """A model that is measured: its name, its config but for the engine, and a server that has it."""

    name: str
    config: Path
    overrides: tuple[str, ...]
    server: Server

    def config_of(self, engine: str, **keys: object) -> Config:
        """`keys`: with two underscores for the point. Raises ConfigError."""
        sets = {f"{key.replace('__', '.')}": value for key, value in keys.items()}
        if engine == "vllm":
            sets |= {"rollout.engine": "vllm", "rollout.vllm.urls": f"[{self.server.url}]"}
        return load(self.config, [*self.overrides, *(f"{key}={value}" for key, value in sets.items())])

    def writer(self, engine: str, chunk: int) -> Writer:
        return writer_of(self.config_of(engine, rollout__chunk_tokens=chunk), self.server)


# --- the parts -------------------------------------------------------------------------------------------------------

Keep = Callable[[Any], None]
"""Takes what a part has found so far."""


def _prompts(config: Config, count: int) -> Prompts:
    source = TaskSource(config)
    return [source.prompt(number) for number in range(count)]


def _collected(repeats: Iterator[Any], keep: Keep, what: str) -> list[Any]:
    """All repeats; those that are done are kept after each."""
    found = []
    for one in repeats:
        found.append(one)
        keep(found)
        print(f"{what}: {len(found)} done", file=sys.stderr, flush=True)
    return found


def _speed(bench: Bench, arguments: argparse.Namespace, keep: Keep) -> str:
    config = bench.config_of("slots")
    longest = config.rollout.max_completion_length
    chunks = [*(chunk for chunk in arguments.chunks if chunk < longest), longest]
    repeats = speed_repeats(
        bench.writer,
        _prompts(config, 4 * arguments.rollouts),
        chunks=chunks,
        tokens=longest,
        seconds=arguments.seconds,
        repeats=arguments.repeats,
    )
    return speed_table(_collected(repeats, keep, f"speed, {bench.name}"))


def _stop(bench: Bench, arguments: argparse.Namespace, keep: Keep) -> str:
    config = bench.config_of("slots")
    repeats = stop_repeats(
        bench.writer,
        _prompts(config, 4 * arguments.rollouts),
        chunk=config.rollout.chunk_tokens,
        tokens=config.rollout.max_completion_length,
        stops=arguments.stops,
        repeats=arguments.repeats,
    )
    return stop_table(_collected(repeats, keep, f"stop, {bench.name}"))


def _run(bench: Bench, arguments: argparse.Namespace, keep: Keep) -> str:
    def config_of(engine: str, repeat: int) -> Config:
        return bench.config_of(
            engine,
            name=f"{engine}-{repeat}",
            seed=repeat,
            runs_dir=arguments.work,
            learner__max_steps=arguments.steps,
            eval__every_steps=arguments.steps,
        )

    return run_table(_collected(run_repeats(config_of, bench.server, arguments.runs), keep, f"run, {bench.name}"))


def _verdicts(bench: Bench, arguments: argparse.Namespace, keep: Keep) -> str:
    config = bench.config_of("vllm")
    texts = [*write_texts(writer_of(config, bench.server), config, arguments.texts)]
    judge = Judge(config)
    found = figures([judge.judge(text) for text in texts], config.termination)
    keep(found)
    return verdicts_table(found)


_MEASURE = {"speed": _speed, "stop": _stop, "run": _run, "verdicts": _verdicts}
_ON_MADE = ("speed", "stop")  # nothing can be learned from it


# --- the command -----------------------------------------------------------------------------------------------------


def _chunks(text: str) -> list[int]:
    return sorted({positive(word) for word in text.split(",")})


def _some(text: str, allowed: tuple[str, ...]) -> list[str]:
    """Names of `allowed`, separated by commas, in its order."""
    names = text.split(",")
    if wrong := [name for name in names if name not in allowed]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r:.40} is not known; allowed: {', '.join(allowed)}")
    return [name for name in allowed if name in names]


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Exits with 2 for arguments that do not fit together."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="JSON file for all figures")
    some = functools.partial(_some, allowed=PARTS)
    add("--only", type=some, default=[*PARTS], help=f"parts, comma-separated (default: all): {', '.join(PARTS)}")
    some = functools.partial(_some, allowed=MODELS)
    add("--models", type=some, default=[*MODELS], help="of speed and stop: student, made (default: both)")
    add(
        "--config",
        type=Path,
        default=ROOT / "ops/experiments/demo.yaml",
        help="of the student's runs (default: the demo)",
    )
    add("--student", type=Path, help=f"the model of --config that vLLM can run (default with the demo: {STUDENT})")
    add("--url", help="of a server that has the student; without it one is started for it")
    add("--vllm-python", type=Path, default=Path(".venv-vllm/bin/python"), help="the Python that has vLLM")
    add("--threads", type=positive, default=1, help="of torch, in the slots' process and in the server (default 1)")
    add("--rollouts", type=positive, default=32, help="written at a time (default 32)")
    add("--chunks", type=_chunks, default=[16, 32, 64], help="chunk_tokens of speed, besides the whole completion")
    add("--seconds", type=positive, default=5, help="of each point of speed (default 5)")
    add("--stops", type=positive, default=40, help="of stop, for each engine and repeat (default 40)")
    add("--steps", type=positive, default=40, help="optimizer steps of a run (default 40)")
    add("--texts", type=positive, default=256, help="of verdicts (default 256)")
    add("--repeats", type=positive, default=3, help="of speed and stop (default 3)")
    add("--runs", type=positive, default=1, help="runs of each engine, with seeds 0, 1 … (default 1)")
    add("--work", type=Path, default=Path("runs/writers"), help="folder for runs, logs and the made pair")
    add("--set", action="append", default=[], metavar="A.B=C", dest="overrides", help="a key of --config")
    arguments = parser.parse_args(words)
    if arguments.out.is_dir() or not arguments.out.absolute().parent.is_dir():
        parser.error(f"--out {arguments.out}: expected a file in a folder that is there")
    arguments.work = arguments.work.resolve()
    arguments.vllm_python = arguments.vllm_python.absolute()
    return arguments


def _student_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The key that names the student. Raises ConfigError."""
    is_demo = arguments.config == ROOT / "ops/experiments/demo.yaml"
    student = arguments.student or (STUDENT if is_demo else None)
    if student is None:
        return ()
    if not (student / "config.json").is_file():
        raise ConfigError(
            f"--student {student}: no model there; make one with `katana pretrain --which student --for-vllm --out "
            f"{STUDENT.parent}`"
        )
    return (f"student.model={student.resolve()}",)


@contextlib.contextmanager
def _bench(name: str, arguments: argparse.Namespace) -> Iterator[Bench]:
    """A model, with its server. Raises ConfigError, ModelError, SideFailed."""
    same = (f"rollout.threads={arguments.threads}", f"rollout.slots={arguments.rollouts}")
    if name == "made":
        config, overrides = make_pair(arguments.work / "made-pair"), same
    else:
        config, overrides = arguments.config, (*_student_of(arguments), *same, *arguments.overrides)
    if name == "student" and arguments.url:
        yield Bench(name, config, overrides, server_at(arguments.url))
        return
    plain = load(config, [*overrides])
    if not arguments.vllm_python.is_file():
        raise ConfigError(f"--vllm-python {arguments.vllm_python}: no such file; `make .venv-vllm/.ready` makes it")
    argv = command(arguments.vllm_python, threads=arguments.threads, length=plain.max_length, slots=arguments.rollouts)
    with serving(argv, check_pair(plain).student.folder) as server:
        yield Bench(name, config, overrides, server)


def measure_all(arguments: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> str:
    """All parts, model by model; `keep` gets all figures whenever there are more. Raises ConfigError, ModelError,
    SideFailed."""
    found: dict[str, Any] = {}
    texts = []
    for name in MODELS:
        parts = [one for one in arguments.only if one not in _ON_MADE or name in arguments.models]
        parts = [one for one in parts if name == "student" or one in _ON_MADE]
        if not parts:
            continue
        with _bench(name, arguments) as bench:
            for part in parts:

                def keep_part(figures: Any, at: str = f"{part}, {name}") -> None:
                    found[at] = figures
                    keep(found)

                texts.append(f"{part}, {name}\n\n{_MEASURE[part](bench, arguments, keep_part)}")
    return "\n\n".join(texts)


def main(words: list[str] | None = None) -> int:
    arguments = parse_arguments(words)
    shown = {name: value for name, value in vars(arguments).items() if name not in ("out", "work")}
    facts = {
        "what": "slots beside a vLLM server",
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in shown.items()},
        "machine": machine() | {"load_average": os.getloadavg()},
    }

    def measure() -> str:
        arguments.work.mkdir(parents=True, exist_ok=True)
        return measure_all(arguments, lambda found: write_json(arguments.out, facts | found))

    return exit_code(measure, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
