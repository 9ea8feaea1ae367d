"""The start of a run: seconds from the command `katana run` to the learner's first step, by what happens on the way."""

from __future__ import annotations

import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import redis

from common.config import Config
from common.runfiles.run import RunFolder
from common.wire.weights import read_pointer
from ops.bench.speed import machine, spread
from ops.reach.children import end, katana, start
from ops.reach.ports import targets
from ops.reach.run import Away, Outlook
from ops.run.local import roles_of

_LOOK_S = 0.03
_MOST_S = 600.0  # of one start
_GRACE_S = 40.0  # a run promises to stop within 20 s
EVENTS = ("roles_up_s", "first_weights_s", "first_chunk_scored_s", "first_step_s")


def first_step(config: Config, repeats: int) -> dict[str, Any]:
    """Seconds from the command until all roles serve their metrics, the first weights are announced, the first chunk is
    scored, and the first optimizer step is done; each repeat is a run of its own, stopped after its first step.

    A worker serves its metrics when its model is loaded. Raises RuntimeError for a run that does not come so far.
    """
    found = [_one_start(config, repeat) for repeat in range(repeats)]
    return {
        "what": "start of a run, s from the command",
        "roles": len(roles_of(config)),
        **{event: spread([one[event] for one in found]) for event in EVENTS},
        "machine": machine(),
    }


def _one_start(config: Config, repeat: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="katana-bench-") as folder:
        here = config.model_copy(update={"name": f"bench-{repeat}", "runs_dir": folder})
        source, log = Path(folder) / "bench.yaml", Path(folder) / "bench.log"
        source.write_text(here.to_yaml())
        outlook = Outlook(here, source)
        began = time.time()
        process = start(katana("run", str(source)), log)
        try:
            return _watch(here, outlook, process, began)
        except RuntimeError as error:
            raise RuntimeError(f"{error}: {log.read_text(errors='replace')[-500:]}") from None
        finally:
            outlook.close()
            process.send_signal(signal.SIGINT)
            end([process], _GRACE_S)


def _watch(config: Config, outlook: Outlook, process: subprocess.Popen[bytes], began: float) -> dict[str, float]:
    """Seconds since `began` (unix time) of each event. Raises RuntimeError."""
    found: dict[str, float] = {}
    while missing := [event for event in EVENTS if event not in found]:
        if process.poll() is not None:
            raise RuntimeError(f"the run to measure ended with {process.returncode}")
        if time.time() > began + _MOST_S:
            raise RuntimeError(f"no {missing[0]} within {_MOST_S:.0f} s")
        for event in missing:
            if (at := _HAPPENED[event](config, outlook)) is not None:
                found[event] = at - began
        time.sleep(_LOOK_S)
    return found


# Each gives the unix time at which an event was (or was seen to be) over; None while it is not.


def _roles_up(config: Config, _: Outlook) -> float | None:
    up, wanted = Counter(target.role for target in targets(config.run_dir)), Counter(roles_of(config))
    return time.time() if up >= wanted else None


def _first_weights(_: Config, outlook: Outlook) -> float | None:
    try:
        found = read_pointer(outlook.look().plane.policy())
    except (Away, redis.exceptions.RedisError):
        return None
    return None if found is None else time.time()


def _first_chunk_scored(_: Config, outlook: Outlook) -> float | None:
    try:
        run = outlook.look()
        last = run.client.xinfo_stream(run.key("scores"))["last-generated-id"]
    except (Away, redis.exceptions.RedisError):
        return None
    return time.time() if last != b"0-0" else None


def _first_step(config: Config, _: Outlook) -> float | None:
    first = next(iter(RunFolder(config.run_dir).steps()), None)
    return None if first is None else first.unix_s


_HAPPENED = {
    "roles_up_s": _roles_up,
    "first_weights_s": _first_weights,
    "first_chunk_scored_s": _first_chunk_scored,
    "first_step_s": _first_step,
}
