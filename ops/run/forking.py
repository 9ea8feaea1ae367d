"""The nursery's own process: it imports what the roles need, then forks one for each request of `katana run`."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ops.reach.children import ask_for_signal

_MESSAGE_BYTES = 1 << 16
# Imported before the first fork. What a module makes at import is shared then, so `actors.app`, which makes a Celery
# app for the Redis in the environment, is left to the roles.
MODULES = (
    "learner.train",
    "learner.culprits",
    "actors.rollout",
    "actors.teacher",
    "actors.arbiter",
    "actors.feeder",
    "actors.engine.loaded",
    "ops.run.roles",
    "ops.run.evaluator",
    "ops.run.tracking",
    "ops.run.check",
    "ops.tasks.source",
    # What `actors.app` and the command of a worker import.
    "celery.app.amqp",
    "celery.app.control",
    "celery.app.events",
    "celery.app.log",
    "celery.app.routes",
    "celery.apps.worker",
    "celery.backends.base",
    "celery.bin.celery",
    "celery.concurrency.thread",
    "celery.worker.autoscale",
    "celery.worker.components",
    "celery.worker.consumer",
    "celery.worker.strategy",
    "kombu.transport.redis",
)
LAZY = ("PreTrainedTokenizerFast", "AutoModelForCausalLM")  # transformers imports their modules when they are asked for


def serve(line: socket.socket, parent: int, model_types: Sequence[str] = ()) -> list[str] | None:
    """Fork until the other end is closed: None. In each fork this returns the words of its command.

    `parent`: the pid of `katana run`, whose child a fork becomes. `model_types`: as in config.json.
    """
    gc.disable()  # nothing of this is garbage
    for name in MODULES:
        _try(importlib.import_module, name)
    for name in LAZY:
        _try(_import_lazy, name)
    for name in model_types:
        _try(_import_model, name)
    gc.freeze()  # a collection in a fork would copy every page that it looks at
    retitle([sys.executable, "-m", *sys.orig_argv[2:4]])
    line.send(b"{}")  # ready
    while True:
        message, logs, *_ = socket.recv_fds(line, _MESSAGE_BYTES, 1)
        if not message:
            return None
        request = json.loads(message)
        if _fork(request["request"], line):
            line.close()
            _become(request, logs[0], parent)
            words: list[str] = request["words"]
            return words
        os.close(logs[0])


def _try(load: Callable[[str], object], name: str) -> None:
    """The roles that need what cannot be imported fail with it, each in its own log."""
    try:
        load(name)
    except Exception:
        traceback.print_exc()


def _import_lazy(name: str) -> None:
    getattr(importlib.import_module("transformers"), name)


def _import_model(model_type: str) -> None:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]


def _fork(number: int, line: socket.socket) -> bool:
    """True in the new process, once its pid is reported and its first parent has ended."""
    ready, report = os.pipe()
    middle = os.fork()
    if middle:
        os.close(ready)
        os.close(report)
        _, status = os.waitpid(middle, 0)
        if status:
            raise ChildProcessError(f"the fork for a role failed with status {status}")
        return False
    try:
        child = os.fork()
    except OSError:
        traceback.print_exc()
        os._exit(1)
    if child:
        code = 1
        try:
            line.send(json.dumps({"request": number, "pid": child}).encode())
            os.write(report, b".")
            code = 0
        finally:
            os._exit(code)
    os.close(report)
    if not os.read(ready, 1):  # nobody knows of this process
        os._exit(1)
    os.close(ready)
    return True


def _become(request: dict[str, Any], log: int, parent: int) -> None:
    """Make this fork what a process is that was started with these words: its output, its session, its environment."""
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.setsid()
    _wait_for(parent)
    for name, value in request["environment"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    words = request["words"]
    sys.orig_argv = [sys.executable, "-m", "ops.cli", *words]
    sys.argv = [str(Path(__file__).parents[1] / "cli" / "__main__.py"), *words]
    retitle(sys.orig_argv)
    random.seed()
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(request["threads"])
    gc.enable()


def _wait_for(parent: int) -> None:
    """Wait until this process is the child of `parent`, and end with it, see `end_with_parent`."""
    middle = os.getppid()
    while middle != parent and os.getppid() == middle:
        time.sleep(0.0005)
    ask_for_signal()
    if os.getppid() != parent:  # it has ended meanwhile
        os._exit(128 + signal.SIGTERM)


def retitle(words: list[str]) -> None:
    """Show these words as this process's command line, by which a role is found.

    They are written over the first one. What does not fit is left out; the rest is zeros, which read as empty words.
    """
    facts = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, size = int(facts[45]), int(facts[46]) - int(facts[45])
    shown = b"\0".join(map(os.fsencode, words))[: size - 1]
    ctypes.memmove(begin, shown.ljust(size, b"\0"), size)
