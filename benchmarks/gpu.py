"""Katana on one GPU with random models of Qwen3's shapes: engine, scorer, learner and the whole loop, against floors.

    benchmarks/gpu.sh --out gpu.json                      # one large GPU, under ten minutes
    benchmarks/gpu.sh --device cpu --tiny --out tiny.json # tiny shapes: shows that all of it runs

Each part is a process of its own with a time limit: one that fails or takes too long is reported, and the others go on.
README.md in this folder says what is measured, and what a floor is.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison import markdown, number
from gpu_models import SHAPES, TINY, Shape, copy_bandwidth, folder_of, free, make_model, matmul_rate
from made_pair import EOS_ID, PROMPT_WORDS, write_prompts
from transformers import PreTrainedModel

from actors.engine import Scorer, UnsupportedModelError, self_test
from actors.engine.outcomes import support_size
from common.config import Config
from common.failing import brief, out_of_memory
from common.files import write_json
from common.pretrained import ModelFacts, Pair
from learner.batch import Trajectory
from ops.bench.learner import measure_steps
from ops.bench.resident import peak_mb
from ops.bench.score import score_speed
from ops.bench.speed import decode_speed, full_decoder, machine, one_run, spread, written_per_s
from ops.cli.arguments import positive
from ops.reach.children import end, start

_GRACE_S = 15.0  # for a part that is told to end
_LOG_SHOWN = 1500  # characters of a failed part's log


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured, and how long a part may take."""

    shapes: dict[str, Shape]
    slots: tuple[int, ...]  # of the decode engine
    written: int  # tokens of a row in it
    in_flight: tuple[int, ...]  # rollouts of the scorer
    completion: int  # tokens of a rollout in scorer, learner and loop
    chunk: int
    batch: int  # rollouts of a step
    micro_batch: int  # tokens
    steps: int  # of the loop
    copied: int  # bytes, to measure the bandwidth
    product: int  # rows of a product, to measure the arithmetic
    limits_s: dict[str, float]  # of each part


BIG = Sizes(
    SHAPES,
    slots=(32, 128, 512),
    written=128,
    in_flight=(64, 256),
    completion=256,
    chunk=64,
    batch=32,
    micro_batch=8192,
    steps=12,
    copied=4 << 30,
    product=8192,
    limits_s={"engine": 110.0, "scorer": 80.0, "learner": 120.0, "loop": 130.0, "compiled": 100.0},
)
SMALL = Sizes(
    TINY,
    slots=(2, 4),
    written=8,
    in_flight=(2, 4),
    completion=16,
    chunk=8,
    batch=4,
    micro_batch=256,
    steps=8,
    copied=1 << 20,
    product=64,
    limits_s=dict.fromkeys(BIG.limits_s, 90.0),
)
ON_DISK = ("0.6B", "1.7B")  # the students
HERE = Path(__file__).resolve().parent

Point = dict[str, Any]
Keep = Callable[[Point], None]
"""Gets each point when it is measured: a part that is cut off keeps its points."""


def sizes_of(arguments: argparse.Namespace) -> Sizes:
    return SMALL if arguments.tiny else BIG


def config_of(arguments: argparse.Namespace, **models: str) -> Config:
    """The settings of all parts. `models`: folders of student and teacher, where they are on disk."""
    sizes, device = sizes_of(arguments), arguments.device
    role = {"dtype": "bfloat16", "device": device}
    return Config.model_validate(
        {
            "name": "gpu",
            "student": {"model": models.get("student", "made")},
            "teacher": {"model": models.get("teacher", "made"), "slots": 64, "prefill_tokens": 4096, **role},
            "data": {
                "task": "dataset",
                "path": str(arguments.work / "prompts.jsonl"),
                "verifier": "none",
                "max_prompt_length": PROMPT_WORDS[1],
            },
            "rollout": {
                "slots": 2 * sizes.batch,
                "compile": "off",  # the part `compiled` has it
                "prefill_tokens": 8192,
                "chunk_tokens": sizes.chunk,
                "max_completion_length": sizes.completion,
                **role,
            },
            "termination": {"policy": "none", "teacher_top_k": 64},
            "learner": {
                "max_steps": sizes.steps,
                "batch_size": sizes.batch,
                "micro_batch_tokens": sizes.micro_batch,
                **role,
            },
            "checkpoints": {"every_steps": sizes.steps, "keep": 1},
            "eval": {"every_steps": 0},
            "redis": {"maxmemory_mb": 2048},
        }
    )


def _pair(shape: Shape) -> Pair:
    """Of models that are in no folder."""
    facts = ModelFacts(Path(), "qwen3", shape.ids, None, (EOS_ID,), 0)
    return Pair(facts, {"": facts}, (EOS_ID,), shape.ids)


def _prompts(shape: Shape, rows: int) -> Any:
    """int32 [rows, m], random."""
    return np.random.default_rng(0).integers(3, shape.ids, (rows, PROMPT_WORDS[1]), dtype=np.int32)


def _measured(
    arguments: argparse.Namespace,
    point: Point,
    measure: Callable[[], dict[str, list[float]]],
    floor: float,
    keep: Keep,
) -> None:
    """Keep a point with the spreads of its figures, the tokens a second that the floor allows, the share of it, and the
    most memory; one without enough memory says so."""
    free(arguments.device)
    try:
        found = measure()
        found["share_of_floor"] = [speed / floor for speed in found["tokens_per_s"]]
        point |= {name: spread(values) for name, values in found.items()}
        point |= {"floor_tokens_per_s": floor, "peak_memory_mb": peak_mb(arguments.device)}
    except Exception as error:
        if not out_of_memory(error):
            raise
        point["out_of_memory"] = brief(error)
    gc.collect()
    keep(point)


# --- the parts -------------------------------------------------------------------------------------------------------


def engine(arguments: argparse.Namespace, keep: Keep) -> None:
    """Both students write with more and more slots. The floor of a step: every weight, and the keys and values of all
    rows' texts, are read once, at the speed of a copy."""
    sizes, config = sizes_of(arguments), config_of(arguments)
    bandwidth = copy_bandwidth(arguments.device, sizes.copied)
    for name in ON_DISK:
        shape = sizes.shapes[name]
        model = make_model(shape, arguments.device)
        facts = {"model": name, "copy_bytes_per_s": bandwidth, "self_test": _self_test(model, shape)}
        for slots in sizes.slots:
            text = PROMPT_WORDS[1] + (sizes.written + 1) / 2  # tokens of a row's text, in the mean of the steps
            floor_s = (shape.read_bytes + slots * text * shape.cache_bytes) / bandwidth
            write = partial(decode_speed, model, _pair(shape), config, _prompts(shape, slots), sizes.written)
            speeds = partial(_again_and_again, write, arguments.repeats)
            _measured(arguments, {**facts, "slots": slots}, speeds, slots / floor_s, keep)


def compiled(arguments: argparse.Namespace, keep: Keep) -> None:
    """The smaller student writes with a compiled decode step, which on CUDA is a CUDA graph, and beside it without."""
    sizes, config = sizes_of(arguments), config_of(arguments)
    shape, slots = sizes.shapes["0.6B"], sizes.slots[-1]
    model, prompts = make_model(shape, arguments.device), _prompts(shape, sizes.slots[-1])
    plain, made = (full_decoder(model, _pair(shape), config, prompts, sizes.written) for _ in range(2))
    began = time.monotonic()
    made.compile()
    point: Point = {"model": "0.6B", "slots": slots, "compile_s": time.monotonic() - began}
    found: dict[str, list[float]] = {"plain": [], "compiled": [], "ratio": []}
    for repeat in range(arguments.repeats + 1):
        speeds = [written_per_s(decoder, prompts, sizes.written) for decoder in (plain, made)]
        if repeat:  # the first warms up
            for name, speed in zip(found, [*speeds, speeds[1] / speeds[0]], strict=True):
                found[name].append(speed)
    keep(point | {name: spread(values) for name, values in found.items()})


def _self_test(model: PreTrainedModel, shape: Shape) -> float | str:
    """How far logits through slots are from a plain forward's, as a share of the largest; more than a worker accepts is
    a sentence, and the part fails once it has its figures: they are as good."""
    try:
        return self_test(model, vocab_size=shape.ids)
    except UnsupportedModelError as error:
        return str(error)


def scorer(arguments: argparse.Namespace, keep: Keep) -> None:
    """The large teacher scores rollouts that come in turn, chunk by chunk. The floor: the operations of one forward of
    every text, at the speed of a large product."""
    sizes, config = sizes_of(arguments), config_of(arguments)
    shape, rate = sizes.shapes["8B"], matmul_rate(arguments.device, sizes.product)
    model = make_model(shape, arguments.device)
    facts = {"model": "8B", "flops_per_s": rate, "self_test": _self_test(model, shape)}
    flops = shape.forward_flops(PROMPT_WORDS[1], sizes.completion) / sizes.completion  # of a scored token
    for count in sizes.in_flight:
        score = partial(_score, model, shape, config, count)
        speeds = partial(_again_and_again, score, arguments.repeats)
        _measured(arguments, {**facts, "rollouts_in_flight": count}, speeds, rate / flops, keep)


def _score(model: PreTrainedModel, shape: Shape, config: Config, count: int) -> float:
    made = Scorer(
        model,
        slots=count,
        max_length=config.max_length,
        stop_ids=(EOS_ID,),
        vocab_size=shape.ids,
        prefill_tokens=config.only_teacher.prefill_tokens,
    )
    return score_speed(made, config, [*_prompts(shape, count)], shape.ids, (EOS_ID,))[0]


def _again_and_again(measure: Callable[[], float], repeats: int) -> dict[str, list[float]]:
    """Several times, after one that warms up."""
    measure()
    return {"tokens_per_s": [measure() for _ in range(repeats)]}


def learner(arguments: argparse.Namespace, keep: Keep) -> None:
    """Steps of the real learner on rollouts of random tokens. The floor: three times the operations of a forward, at
    the speed of a large product in bfloat16."""
    sizes = sizes_of(arguments)
    rate = matmul_rate(arguments.device, sizes.product)
    for name in ON_DISK:
        shape = sizes.shapes[name]
        folder = str(folder_of(name, shape, arguments.device, arguments.work))
        config = config_of(arguments, student=folder, teacher=folder)
        flops = 3 * shape.forward_flops(PROMPT_WORDS[1], sizes.completion) / sizes.completion
        speeds = partial(_steps, shape, config, arguments.repeats)
        facts = {"model": name, "batch_size": sizes.batch, "flops_per_s": rate}
        _measured(arguments, facts, speeds, rate / flops, keep)


def _steps(shape: Shape, config: Config, repeats: int) -> dict[str, list[float]]:
    trajectories = [_trajectory(shape, config, number) for number in range(2 * config.learner.batch_size)]
    found = measure_steps(config, trajectories, repeats)
    return {figure: [one[figure] for one in found] for figure in found[0]}


def _trajectory(shape: Shape, config: Config, number: int) -> Trajectory:
    """Random tokens that student and teacher find as likely as any other."""
    rng, length = np.random.default_rng(number), config.rollout.max_completion_length
    support = support_size(config.termination.teacher_top_k, shape.ids, 1)

    def all_alike(outcomes: int, *size: int) -> Any:
        return np.full(size, np.log(outcomes / shape.ids), dtype=np.float32)

    return Trajectory(
        rid=f"r{number:09d}",
        arm="treated",
        prompt=_prompts(shape, 1)[0],
        tokens=rng.integers(3, shape.ids, length, dtype=np.int32),
        support_ids=np.tile(np.arange(3, 3 + support, dtype=np.int32), (length, 1)),
        teacher_logprobs=all_alike(1, length, support + 1),
        teacher_tail=all_alike(shape.ids - support - 1, length),
        teacher_sampled=all_alike(1, length),
        rollout_logprobs=all_alike(1, length),
        sampling_logprobs=all_alike(1, length),
        oldest_version=0,
        generated=length,
        finish_reason="length",
    )


def loop(arguments: argparse.Namespace, keep: Keep) -> None:
    """A whole run with real roles on an embedded Redis. Teacher workers load their model from disk, so it has the
    larger student's shape. The models are those that the learner's part has left, if it has."""
    sizes = sizes_of(arguments)
    student, teacher = (str(folder_of(name, sizes.shapes[name], arguments.device, arguments.work)) for name in ON_DISK)
    write_prompts(arguments.work / "prompts.jsonl", seed=0, ids=sizes.shapes["0.6B"].ids)
    config = config_of(arguments, student=student, teacher=teacher)
    found = one_run(config, max(1, sizes.steps // 4))
    keep({"student": "0.6B", "teacher": "1.7B", "steps": sizes.steps, **found})


PARTS: dict[str, Callable[[argparse.Namespace, Keep], None]] = {
    "engine": engine,
    "scorer": scorer,
    "learner": learner,
    "loop": loop,
    "compiled": compiled,
}


# --- each in a process of its own ------------------------------------------------------------------------------------


def serve(arguments: argparse.Namespace) -> None:
    """One part, in this process; its points are written to a file after each."""
    torch.set_num_threads(1)  # tiny matrices are not worth more, and a GPU needs one
    points: list[Point] = []
    path = _result_of(arguments.part, arguments.work)

    def keep(point: Point) -> None:
        points.append(point)
        write_json(path, points)

    PARTS[arguments.part](arguments, keep)


def _result_of(part: str, work: Path) -> Path:
    return work / f"{part}.json"


def run_part(part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A part's points, seconds, and why it failed, if it did: then the end of its log too."""
    log, began = arguments.work / f"{part}.log", time.monotonic()
    words = ["--part", part, "--device", arguments.device, "--work", str(arguments.work)]
    words += ["--repeats", str(arguments.repeats), *(["--tiny"] if arguments.tiny else [])]
    path = os.pathsep.join([str(HERE.parent), str(HERE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    # Large files go where the models are; the sockets of a Redis find a short path by themselves.
    environment = {"PYTHONPATH": path.rstrip(os.pathsep), "TMPDIR": str(arguments.work), "HF_HUB_OFFLINE": "1"}
    process = start([sys.executable, str(HERE / "gpu.py"), *words], log, environment)
    limit_s = sizes_of(arguments).limits_s[part]
    try:
        code = process.wait(limit_s)
        error = "" if code == 0 else f"ended with {code}"
    except subprocess.TimeoutExpired:
        error = f"not done within {limit_s:.0f} s"
    finally:
        end([process], _GRACE_S)
    result = _result_of(part, arguments.work)
    points: list[Point] = json.loads(result.read_text()) if result.is_file() else []
    if not error and points and all("out_of_memory" in point for point in points):
        error = "no point had enough memory"
    error = error or next((one["self_test"] for one in points if isinstance(one.get("self_test"), str)), "")
    found: dict[str, Any] = {"seconds": time.monotonic() - began, "points": points}
    if error:
        found |= {"error": error, "log": log.read_text(errors="replace")[-_LOG_SHOWN:]}
    return found


# --- the table -------------------------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    """Markdown tables of all parts with points; and which parts failed."""
    texts = [f"{found['device']}, torch {found['machine']['torch']}, bfloat16"]
    for part, (head, row) in _TABLES.items():
        points = found["parts"].get(part, {}).get("points", [])
        if points:
            texts.append(f"{part}\n\n{markdown(head, [row(point) for point in points])}")
    all_points = [point for one in found["parts"].values() for point in one.get("points", [])]
    tested = [point for point in all_points if isinstance(point.get("self_test"), float)]
    if differs := sorted({f"{point['model']} {point['self_test']:.2g}" for point in tested}):
        texts.append(f"Largest difference of logits through slots from a plain forward's: {', '.join(differs)}")
    texts += [f"FAILED: {part}: {one['error']}" for part, one in found["parts"].items() if "error" in one]
    return "\n\n".join(texts)


def _range(point: Point, figure: str) -> str:
    if figure not in point:
        return "–"
    low, middle, high = (number(point[figure][key]) for key in ("min", "median", "max"))
    return f"{middle} ({low}–{high})"


def _floor(point: Point) -> list[str]:
    """Tokens a second that were reached, that the floor allows, the share, and memory."""
    if "out_of_memory" in point:
        return ["out of memory", "–", "–", "–"]
    memory = f"{point['peak_memory_mb'] / 1024:.1f}"
    return [_range(point, "tokens_per_s"), number(point["floor_tokens_per_s"]), _range(point, "share_of_floor"), memory]


_FLOOR_HEAD = ["tokens/s", "floor allows", "share", "most memory, GB"]
_TABLES: dict[str, tuple[list[str], Callable[[Point], list[str]]]] = {
    "engine": (["model", "slots", *_FLOOR_HEAD], lambda one: [one["model"], str(one["slots"]), *_floor(one)]),
    "scorer": (
        ["model", "rollouts in flight", *_FLOOR_HEAD],
        lambda one: [one["model"], str(one["rollouts_in_flight"]), *_floor(one)],
    ),
    "learner": (
        ["model", *_FLOOR_HEAD, "tokens/s of gradients alone"],
        lambda one: [one["model"], *_floor(one), _range(one, "gradients_per_s")],
    ),
    "loop": (
        ["student, teacher", "steps/s", "tokens generated/s", "trained/s", "forwarded per scored", "busy"],
        lambda one: [
            f"{one['student']}, {one['teacher']}",
            number(one["steps_per_s"]),
            number(one["generated_tokens_per_s"]),
            number(one["trained_tokens_per_s"]),
            number(one["tokens_forwarded_per_token_scored"]),
            ", ".join(f"{role} {share:.2f}" for role, share in sorted(one["busy"].items())),
        ],
    ),
    "compiled": (
        ["model", "slots", "tokens/s", "compiled", "ratio", "seconds to compile"],
        lambda one: [
            one["model"],
            str(one["slots"]),
            *(_range(one, name) for name in ("plain", "compiled", "ratio")),
            number(one["compile_s"]),
        ],
    ),
}


# --- the command -----------------------------------------------------------------------------------------------------


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Exits with 2 for arguments that do not fit together, and for a device that is not there."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 …, or cpu with --tiny (default cuda)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: shows that all of it runs, measures nothing")
    parser.add_argument("--only", help=f"parts, comma-separated (default: all): {', '.join(PARTS)}")
    parser.add_argument("--repeats", type=positive, default=3, help="of every point (default 3)")
    parser.add_argument(
        "--work", type=Path, help="folder for models and runs, 30 GB (default: a temporary one, removed at the end)"
    )
    parser.add_argument("--part", choices=[*PARTS], help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if wrong := _misfit(arguments) or _missing(arguments.device):
        parser.error(wrong)
    arguments.parts = [name for name in PARTS if arguments.only is None or name in arguments.only.split(",")]
    return arguments


def _misfit(given: argparse.Namespace) -> str | None:
    if re.fullmatch(r"cpu|cuda(:[0-9]{1,2})?", given.device) is None:
        return f"--device {given.device!r:.40}: expected cuda, cuda:N or cpu"
    if given.device == "cpu" and not given.tiny:
        return "--device cpu: the real shapes are for a GPU; expected --tiny with it"
    unknown = [name for name in (given.only or "").split(",") if name not in PARTS]
    if given.only is not None and unknown:
        return f"--only: {unknown[0]!r:.40} is not a part; allowed: {', '.join(PARTS)}"
    if given.work is not None and given.work.is_file():
        return f"--work {given.work}: is a file; expected a folder"
    if given.part is None and given.out is None:
        return "expected --out, a JSON file for all figures"
    if given.out is not None and (given.out.is_dir() or not given.out.absolute().parent.is_dir()):
        return f"--out {given.out}: expected a file in a folder that is there"
    return None


def _missing(device: str) -> str | None:
    if device == "cpu":
        return None
    count, wanted = torch.cuda.device_count(), int(device.partition(":")[2] or 0)
    if wanted >= count:
        return f"--device {device}: torch sees {count} CUDA devices; without one only --device cpu --tiny runs"
    return None


def measure_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """All parts, in order; the JSON file is written after each."""
    cuda = arguments.device != "cpu"
    found: dict[str, Any] = {
        "what": "Katana on one device, random models of Qwen3's shapes",
        "device": torch.cuda.get_device_name(arguments.device) if cuda else "cpu",
        "tiny": arguments.tiny,
        "repeats": arguments.repeats,
        "machine": machine(),
        "parts": {},
    }
    for part in arguments.parts:
        one = found["parts"][part] = run_part(part, arguments)
        write_json(arguments.out, found)
        print(f"{part}: {one.get('error', 'done')}, {one['seconds']:.0f} s", file=sys.stderr, flush=True)
        if "error" in one:
            print(one["log"], file=sys.stderr, flush=True)
    return found


def main(words: list[str] | None = None) -> int:
    arguments = parse_arguments(words)
    if arguments.part is not None:
        serve(arguments)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part is ended too
    kept = arguments.work is not None
    arguments.work = (arguments.work if kept else Path(tempfile.mkdtemp(prefix="katana-gpu-"))).resolve()
    arguments.work.mkdir(parents=True, exist_ok=True)
    try:
        found = measure_all(arguments)
    except KeyboardInterrupt:
        print(f"interrupted; what was measured until then: {arguments.out}", file=sys.stderr)
        return 130
    finally:
        if not kept:
            shutil.rmtree(arguments.work, ignore_errors=True)
    print(f"{table(found)}\n\nall figures: {arguments.out}")
    return 1 if any("error" in one for one in found["parts"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
