"""The vLLM server of the comparison with slots: started on this machine, or one that somebody started; its counter."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from sides import SideFailed

from actors.engine import Shared, Writer
from actors.engine.loaded import Engines
from actors.vllm.server import OwnServer
from actors.vllm.weights import OfModel
from common.config import Config
from ops.chaos.servers import written_tokens

_START_S = 600.0


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers. `run`: the run's key in the labels of its weights, for writers that belong to no run."""

    url: str
    run: str

    def generated(self) -> int:
        """How many tokens it has written since it started, by its own counter. Raises SideFailed."""
        try:
            return written_tokens(httpx.get(f"{self.url}/metrics", timeout=60, trust_env=False).text)
        except httpx.HTTPError as error:
            raise SideFailed(f"{self.url}/metrics: {error}") from error


def command(python: Path, *, threads: int, length: int, slots: int) -> list[str]:
    """Of a server on this machine's CPU, for `OwnServer`.

    `threads`: of its torch. `length`: tokens of prompt and completion. `slots`: rollouts at a time. The block of 32
    tokens is the smallest that a CPU has; without TORCH_COMPILE_DISABLE the first request takes a minute.
    """
    environment = {
        "OMP_NUM_THREADS": threads,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": 1,
        "VLLM_NO_USAGE_STATS": 1,
        "TORCH_COMPILE_DISABLE": 1,
        "HF_HUB_OFFLINE": 1,
    }
    options: dict[str, object] = {
        "--model": "{model}",
        "--host": "127.0.0.1",
        "--port": "{port}",
        "--dtype": "float32",
        "--logprobs-mode": "raw_logprobs",
        "--block-size": 32,
        "--max-logprobs": 128,
        "--max-model-len": length,
        "--max-num-seqs": slots,
    }
    # Not `vllm serve`: that of vllm-cpu looks for a distribution that is named vllm, and fails.
    server = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", "--enable-scale-out"]
    return ["env", *(f"{name}={one}" for name, one in environment.items()), *server, *_words(options)]


def _words(options: dict[str, object]) -> Iterator[str]:
    for name, value in options.items():
        yield from (name, str(value))


@contextlib.contextmanager
def serving(argv: Sequence[str], model: Path) -> Iterator[Server]:
    """A server of this script with `model`, until the block ends. Raises SideFailed if it does not start."""
    own = OwnServer(tuple(argv), model)
    own.start()
    try:
        until = time.monotonic() + _START_S
        while not _answers(own.url):
            if not own.runs or time.monotonic() > until:
                raise SideFailed(f"the vLLM server did not start: {own.last_words()}")
            time.sleep(0.25)
        yield server_at(own.url)
    finally:
        own.end()


def server_at(url: str) -> Server:
    """A server that somebody has started."""
    return Server(url, f"writers-{secrets.token_hex(4)}")


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def writer_of(config: Config, server: Server) -> Writer:
    """What a rollout worker with this config would write with, ready, with the weights of the student's folder.

    Nobody else gives weights to the server meanwhile, so the lock is always free. Raises ModelError.
    """
    engines = Engines(config)
    writer = engines.writer
    if config.rollout.engine == "vllm":
        alone = contextlib.nullcontext(lambda: True)
        writer.attach(
            Shared(server.run, config.run_dir / "weights", lambda: 0, lambda _: alone, lambda s: bool(time.sleep(s)))
        )
        writer.swap(OfModel.of(engines.pair.student.folder))
    return writer
