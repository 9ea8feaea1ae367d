"""How cost grows: tokens/s over slots, rollouts in flight, workers, shards and length, as a table, a picture and JSON.

    .venv/bin/python benchmarks/growth.py --out growth.json
    .venv/bin/python benchmarks/growth.py --out growth.json --only slots,length --repeats 5
    .venv/bin/python benchmarks/growth.py --from growth.json

Each part measures its points in turn, within every repeat: what slows the machine for a while slows all of them. The
picture is beside the JSON. README.md in this folder says what each part measures.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from made_pair import make_pair
from transformers import PreTrainedModel

from actors.engine import Scorer
from actors.engine.models import load_model
from common.config import Config, ConfigError, load
from common.files import write_json
from common.pretrained import PACKAGE_ROOT, ModelError, Pair, check_pair
from ops.bench.bus import bus
from ops.bench.score import score_speed
from ops.bench.speed import decode_speed, machine, one_run
from ops.cli.arguments import positive
from ops.tasks.source import TaskSource

DEMO = PACKAGE_ROOT / "ops/experiments/demo.yaml"
WARMUP_SHARE = 3  # of a run's steps, one in so many is left out: workers have written ahead of the first ones
_SLOTS_OF_LENGTHS = 8  # rows of the part `length`: the made pair is large, and its longest texts are long
_TOKENS_A_ROW = 160  # of the part `slots`

Figures = dict[str, float]
Measure = Callable[[str], Figures]
"""Measures a point by its name."""


@dataclass(frozen=True, slots=True)
class Part:
    """One panel. `points`: the usual ones, by name. `prepare` loads what all points share, and warms it up."""

    points: tuple[str, ...]
    form: str  # a regular expression of what a point may be
    allowed: str  # the same in words
    prepare: Callable[[argparse.Namespace], Measure]


def config_of(arguments: argparse.Namespace, *more: str) -> Config:
    """The demo's config, with what the command line and then the part change. Raises ConfigError."""
    return load(DEMO, [*arguments.overrides, *more])


def _student(config: Config, pair: Pair) -> PreTrainedModel:
    torch.set_num_threads(config.rollout.threads)
    rollout = config.rollout
    return load_model(pair.student.folder, dtype=rollout.dtype, device=rollout.device, vocab_size=pair.vocab_size)


def _teacher(config: Config, pair: Pair) -> PreTrainedModel:
    torch.set_num_threads(config.only_teacher.threads)
    teacher = config.only_teacher
    return load_model(pair.teacher.folder, dtype=teacher.dtype, device=teacher.device, vocab_size=pair.vocab_size)


def _scorer(model: PreTrainedModel, pair: Pair, config: Config) -> Scorer:
    return Scorer(
        model,
        slots=config.only_teacher.slots,
        max_slots=config.only_teacher.max_slots,
        max_length=config.max_length,
        stop_ids=pair.stop_ids,
        vocab_size=pair.vocab_size,
        prefill_tokens=config.only_teacher.prefill_tokens,
    )


def _prompts(config: Config, count: int) -> Any:
    """int32 [count, m]: prompts of the config's task, all as short as the shortest of them."""
    source = TaskSource(config)
    prompts = [source.prompt(index) for index in range(count)]
    return np.stack([prompt[: min(map(len, prompts))] for prompt in prompts])


# --- the parts -------------------------------------------------------------------------------------------------------


def _slots(arguments: argparse.Namespace) -> Measure:
    """The slot engine with so many rows, all at work."""
    config = config_of(arguments)
    pair = check_pair(config)
    model = _student(config, pair)
    tokens = min(_TOKENS_A_ROW, config.rollout.max_completion_length)

    def measure(point: str) -> Figures:
        speed = decode_speed(model, pair, config, _prompts(config, int(point)), tokens)
        return {"tokens_per_s": speed, "step_ms": 1e3 * int(point) / speed}

    measure("8")
    return measure


def _in_flight(arguments: argparse.Namespace) -> Measure:
    """The teacher's engine with so many rollouts that come in turn, chunk by chunk."""
    config = config_of(arguments)
    pair = check_pair(config)
    model, source = _teacher(config, pair), TaskSource(config)

    def measure(point: str) -> Figures:
        prompts = [source.prompt(index) for index in range(int(point))]
        speed, again = score_speed(_scorer(model, pair, config), config, prompts, pair.vocab_size, pair.stop_ids)
        return {"tokens_per_s": speed, "tokens_forwarded_per_token_scored": 1 + again}

    measure("8")
    return measure


def _workers(arguments: argparse.Namespace) -> Measure:
    """Whole runs with so many rollout and teacher workers, all roles on this machine."""
    warmup = max(1, arguments.steps // WARMUP_SHARE)

    def measure(point: str) -> Figures:
        rollout, teacher = point.split("+")
        sets = [f"rollout.workers={rollout}", f"teacher.workers={teacher}", f"learner.max_steps={arguments.steps}"]
        found = one_run(config_of(arguments, *sets), warmup)
        return {
            "tokens_per_s": found["generated_tokens_per_s"],
            "steps_per_s": found["steps_per_s"],
            "tokens_forwarded_per_token_scored": found["tokens_forwarded_per_token_scored"],
            "forwarded_with_start": found["forwarded_with_start"],
        }

    return measure


def _shards(arguments: argparse.Namespace) -> Measure:
    """Chunks through the roles as fast as it goes, with recorded payloads for models, on so many streams of chunks."""

    def measure(point: str) -> Figures:
        found = bus(config_of(arguments, f"redis.shards={point}"), 1)
        chunks = found["chunks_per_s"]["median"]
        return {
            "tokens_per_s": chunks * found["mean_chunk_tokens"],
            "chunks_per_s": chunks,
            "scored_ms_p50": found["scored_ms_p50"]["median"],
            "scored_ms_p99": found["scored_ms_p99"]["median"],
        }

    return measure


def _length(arguments: argparse.Namespace) -> Measure:
    """Both engines on the made pair, whose rollouts are all as long as the limit, with that limit."""
    with tempfile.TemporaryDirectory(prefix="katana-growth-") as folder:
        made = load(make_pair(Path(folder)))
        pair = check_pair(made)
        student, teacher = _student(made, pair), _teacher(made, pair)
        prompts = _prompts(made, _SLOTS_OF_LENGTHS)

    def measure(point: str) -> Figures:
        tokens = int(point)
        longer = made.rollout.model_copy(update={"max_completion_length": tokens})
        config = made.model_copy(update={"rollout": longer})
        written = decode_speed(student, pair, config, prompts, tokens)
        scored, _ = score_speed(_scorer(teacher, pair, config), config, prompts, pair.vocab_size, pair.stop_ids)
        return {"tokens_per_s": written, "scored_tokens_per_s": scored}

    measure("8")
    return measure


_COUNT = r"[1-9][0-9]{0,4}"
PARTS = {
    "slots": Part(("8", "16", "32", "64", "96", "192"), _COUNT, "a whole number from 1", _slots),
    "in-flight": Part(("32", "64", "80", "128", "256"), _COUNT, "a whole number from 1", _in_flight),
    "workers": Part(
        ("1+1", "2+1", "1+2", "2+2", "4+2"),
        r"[1-9][0-9]?\+[1-9][0-9]?",
        "rollout workers + teachers, such as 2+1",
        _workers,
    ),
    "shards": Part(("1", "16", "64"), _COUNT, "a whole number from 1", _shards),
    "length": Part(("64", "128", "256", "512"), _COUNT, "a whole number from 1 to 992", _length),
}


# --- the command -----------------------------------------------------------------------------------------------------


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Exits with 2 for arguments that do not fit together. `points`: by part, of those to measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="JSON file for all figures; the picture is beside it")
    parser.add_argument("--from", type=Path, dest="recorded", metavar="JSON", help="measure nothing: table and picture")
    parser.add_argument("--only", help=f"parts, comma-separated (default: all): {', '.join(PARTS)}")
    parser.add_argument("--repeats", type=positive, default=3, help="of every point (default 3)")
    parser.add_argument("--steps", type=positive, default=12, help="of a run of the part workers (default 12)")
    parser.add_argument(
        "--points", action="append", default=[], metavar="PART=A,B", help="points of a part; may be given for each"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", dest="overrides", help="a key of the demo's config"
    )
    arguments = parser.parse_args(words)
    try:
        arguments.points = _chosen(arguments)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def _chosen(given: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    if (given.out is None) == (given.recorded is None):
        raise ValueError("expected either --out, to measure, or --from, to show what was measured")
    if given.out is not None and (given.out.is_dir() or not given.out.absolute().parent.is_dir()):
        raise ValueError(f"--out {given.out}: expected a file in a folder that is there")
    if given.steps < 2:
        raise ValueError(f"--steps {given.steps}: expected at least 2, since the first ones are left out")
    names = given.only.split(",") if given.only is not None else [*PARTS]
    if wrong := [name for name in names if name not in PARTS]:
        raise ValueError(f"--only: {wrong[0]!r:.40} is not a part; allowed: {', '.join(PARTS)}")
    points = {name: part.points for name, part in PARTS.items() if name in names}
    for word in given.points:
        name, _, listed = word.partition("=")
        if name not in points:
            raise ValueError(f"--points: {name!r:.40} is not a part to measure; allowed: {', '.join(points)}")
        points[name] = tuple(listed.split(","))
        if bad := [one for one in points[name] if not _fits(name, one)]:
            raise ValueError(f"--points {name}: {bad[0]!r:.40}; allowed: {PARTS[name].allowed}")
    return points


def _fits(name: str, point: str) -> bool:
    known = re.fullmatch(PARTS[name].form, point) is not None
    return known and (name != "length" or int(point) <= 992)


def measure_all(arguments: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All parts; `keep` gets everything that was measured so far, after each repeat. Raises ConfigError, ModelError,
    RuntimeError."""
    parts: dict[str, Any] = {}
    found = {
        "what": "how cost grows",
        "arguments": {"repeats": arguments.repeats, "steps": arguments.steps, "set": arguments.overrides},
        "machine": machine(),
        "parts": parts,
    }
    for name, points in arguments.points.items():
        began = time.monotonic()
        parts[name] = {"points": list(points), "repeats": []}
        measure = PARTS[name].prepare(arguments)
        for repeat in range(1, arguments.repeats + 1):
            parts[name]["repeats"].append([measure(point) for point in points])
            parts[name]["seconds"] = time.monotonic() - began
            keep(found)
            print(f"{name}: repeat {repeat} of {arguments.repeats}, {parts[name]['seconds']:.0f} s", file=sys.stderr)
    return found


def show(found: dict[str, Any], picture: Path) -> str:
    """Draw the picture; returns the tables. Raises ConfigError if the picture cannot be written."""
    from growth_figures import draw, tables  # matplotlib: not in each of the processes that the bus starts

    draw(found, picture)
    return tables(found)


def _recorded(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        if found["parts"]:
            return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--from {path}: not a JSON file that --out wrote ({error})") from error
    raise ConfigError(f"--from {path}: no part was measured")


def main(words: list[str] | None = None) -> int:
    arguments = parse_arguments(words)
    path = arguments.recorded or arguments.out
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the roles that are measured end too
    try:
        if arguments.recorded:
            found = _recorded(path)
        else:
            config_of(arguments)  # before anything is measured
            found = measure_all(arguments, lambda so_far: write_json(path, so_far))
        print(f"{show(found, path.with_suffix('.png'))}\n\nall figures: {path}, picture: {path.with_suffix('.png')}")
    except (ConfigError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {error}; what was measured until then: {path}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; what was measured until then: {path}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
