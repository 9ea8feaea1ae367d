"""A run of either side as a process of its own, and its course: when each step ended, and how many tokens it had."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exported import export

from common.config import Config, ConfigError
from common.pretrained import ModelError
from common.runfiles.run import RunFolder
from ops.reach.children import end, katana, start

ROOT = Path(__file__).resolve().parent.parent
_TRL_SIDE = ROOT / "benchmarks" / "trl_side.py"
_GRACE_S = 30.0  # for a run to stop, when this is interrupted


class SideFailed(RuntimeError):
    """A side's process ended with an error. The message names its log."""


@dataclass(frozen=True, slots=True)
class Course:
    """A finished run. Times are seconds since 1970; `generated` and `trained` are tokens of each step.

    generated: what was written in that step's time. Katana's workers write ahead of the learner, so a step's number
    is not that of its batch; over many steps it comes to the same.
    """

    started_unix_s: float  # of its process
    over_unix_s: float
    ended_unix_s: tuple[float, ...]
    generated: tuple[int, ...]
    trained: tuple[int, ...]
    versions: dict[str, str]

    def seconds_a_step(self, warmup: int) -> float:
        """Mean time of the steps after the first `warmup` (at least 1), from the end of one to the end of the other."""
        ends = self.ended_unix_s
        return (ends[-1] - ends[warmup - 1]) / (len(ends) - warmup)

    def seconds_to(self, step: int) -> dict[str, float]:
        """Seconds until step `step` (from 1) ended: since its process began, and since its first step ended."""
        end = self.ended_unix_s[step - 1]
        return {"since_start_s": end - self.started_unix_s, "since_first_step_s": end - self.ended_unix_s[0]}

    def to_json(self, warmup: int) -> dict[str, Any]:
        return {
            "seconds_a_step": self.seconds_a_step(warmup),
            "generated_a_step": _mean(self.generated[warmup:]),
            "trained_a_step": _mean(self.trained[warmup:]),
            "wall_s": self.over_unix_s - self.started_unix_s,
            "last_step_s": self.ended_unix_s[-1] - self.started_unix_s,
            "steps_s": [end - begin for begin, end in zip(self.ended_unix_s[:-1], self.ended_unix_s[1:], strict=True)],
        }


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)


def run_trl(python: Path, config: Config, *, threads: int, save: Path | None = None) -> Course:
    """TRL's trainer on the prompts and settings of `config`, in files beside the run's folder; `save`: its model."""
    base = config.run_dir
    base.parent.mkdir(parents=True, exist_ok=True)
    job, result = base.with_suffix(".job.json"), base.with_suffix(".result.json")
    result.unlink(missing_ok=True)
    job.write_text(json.dumps(export(config, threads=threads)))
    command = [str(python), str(_TRL_SIDE), str(job), str(result), *(["--save", str(save)] if save else [])]
    started, over = _run(command, base.with_suffix(".log"), {"OMP_NUM_THREADS": str(threads)})
    found = json.loads(result.read_text())
    tokens = tuple(found["tokens"])  # every token that is written is trained on
    return Course(started, over, tuple(found["ended_unix_s"]), tokens, tokens, found["versions"])


def run_katana(config: Config) -> Course:
    """`katana run` with `config`; a former folder of its name is moved aside."""
    base = config.run_dir
    base.parent.mkdir(parents=True, exist_ok=True)
    file = base.with_suffix(".yaml")
    file.write_text(config.to_yaml())
    started, over = _run(katana("run", str(file), "--fresh"), base.with_suffix(".log"), {})
    return replace(course_of(base), started_unix_s=started, over_unix_s=over)


def course_of(folder: Path) -> Course:
    """The course of a run, from its folder; begun and over with its first and last step."""
    run = RunFolder(folder)
    steps = [*run.steps()]
    written = [step.tokens_generated or 0 for step in steps]
    ends = tuple(step.unix_s for step in steps)
    versions = json.loads((folder / "run.json").read_text()).get("versions", {})
    return Course(
        ends[0],
        ends[-1],
        ends,
        tuple(now - before for before, now in zip([0, *written[:-1]], written, strict=True)),
        tuple(step.tokens_trained for step in steps),
        versions,
    )


def exit_code(measure: Callable[[], str], out: Path) -> int:
    """Of a script whose `measure` runs sides, keeps the repeats in `out`, and returns what to print."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the process of a side is ended too
    try:
        text = measure()
    except (ConfigError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SideFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; the repeats until then: {out}", file=sys.stderr)
        return 130
    print(f"\n{text}\n\nall figures: {out}")
    return 0


def _run(command: list[str], log: Path, environment: dict[str, str]) -> tuple[float, float]:
    """When the process began and ended, in seconds since 1970; it ends with this one. Raises SideFailed."""
    log.unlink(missing_ok=True)
    began = time.time()
    process = start(command, log, environment)
    try:
        code = process.wait()
    finally:  # Ctrl-C: a run stops its roles in order
        end([process], _GRACE_S)
    if code != 0:
        raise SideFailed(f"{' '.join(command)} ended with {code}; see {log}")
    return began, time.time()
