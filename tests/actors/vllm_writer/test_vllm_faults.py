"""A server that is wrong, dies, hangs, fails or comes back with other weights, and one that a worker starts itself."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from vllm_servers import Server, begin, command_of, make_qwen3, serving, wait_until, wait_until_ready
from vllm_writers import LENGTH, SERVER, Make, Models, make_fixture, models_fixture  # noqa: F401

from actors.blame import EngineBroken, step_or_part
from actors.vllm.client import Client, RequestRefused, ServerFailed
from actors.vllm.facts import check_server
from actors.vllm.weights import OfModel
from common.pretrained import ModelError, read_facts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def server(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving("standin", models.folder, tmp_path_factory.mktemp("server") / "log", *SERVER) as found:
        yield found


# --- refused at the start ------------------------------------------------------------------------------------------


def test_a_server_that_cannot_write_the_run_is_refused_with_the_options_that_mend_it(
    models: Models, make: Make, tmp_path: Path
) -> None:
    options = ("--enable-scale-out", "--max-model-len", "64", "--max-logprobs", "9", "--no-enable-prefix-caching")
    options = (*options, "--logprobs-mode", "raw_logits")
    with serving("standin", models.folder, tmp_path / "log", *options) as server:
        with pytest.raises(ModelError) as refused:
            make(server)
        for words in (
            "at most 9 tokens, 10 are needed: --max-logprobs 10",
            "--logprobs-mode raw_logprobs",
            "--max-model-len 120",
            "--enable-prefix-caching",
        ):
            assert words in str(refused.value)


def test_a_server_without_the_routes_is_refused(server: Server, make: Make) -> None:
    def closed(path: str, _: bytes | None) -> tuple[int, bytes] | None:
        return (403, b'{"error": {"message": "Scale-out endpoints are disabled."}}') if "/inference/" in path else None

    def without_dev_mode(path: str, _: bytes | None) -> tuple[int, bytes] | None:
        return (404, b'{"detail": "Not Found"}') if path in ("/weight_info", "/server_info") else None

    with in_front_of(server.url, closed) as url, pytest.raises(ModelError, match="--enable-scale-out"):
        make(url)
    with in_front_of(server.url, without_dev_mode) as url, pytest.raises(ModelError, match="VLLM_SERVER_DEV_MODE=1"):
        make(url)


def test_a_server_of_another_model_is_refused(server: Server, make: Make) -> None:
    with pytest.raises(ModelError, match=r"has the model .*student, whose hidden_size is .*models/teacher has"):
        make(server, student=Path("ops/models/teacher").resolve())


def test_a_server_of_another_vocabulary_is_refused(server: Server, make: Make, models: Models) -> None:
    with pytest.raises(ModelError, match=r"has a vocabulary of 37, that of .*student is 38"):
        make(server, head_size=38)


def test_a_tied_head_is_refused_where_the_server_would_not_swap_it(
    server: Server, make: Make, models: Models, tmp_path: Path
) -> None:
    info = server.get("/server_info?config_format=json").json()
    info["vllm_config"]["device_config"]["device"] = "cpu"

    def on_a_cpu(path: str, _: bytes | None) -> tuple[int, bytes] | None:
        return (200, json.dumps(info).encode()) if path.startswith("/server_info") else None

    tied = make_qwen3(tmp_path / "tied", 0, tied=True)
    with in_front_of(server.url, on_a_cpu) as url:
        make(url)
        words = r": the server .* does not swap an output head that is tied .* allowed: a model whose head"
        with pytest.raises(ModelError, match=rf"^rollout\.vllm{words}"):
            make(url, student=tied)
        client = Client(url, request_timeout_s=60.0)
        with contextlib.closing(client), pytest.raises(ModelError, match=rf"^eval\.vllm{words}"):
            check_server(client, read_facts(tied), models.outcomes(), LENGTH, section="eval.vllm")
    make(server, student=tied)


def test_nobody_there_and_something_else_there(make: Make) -> None:
    with pytest.raises(ModelError, match=r"no usable answer in 0.5 s \(http://127.0.0.1:9/health: .*vllm serve"):
        make("http://127.0.0.1:9", start_timeout_s=0.5)
    with web(lambda _, __: (200, b"<html>hello</html>")) as url, pytest.raises(ModelError, match="not JSON"):
        make(url, start_timeout_s=0.5)


def elsewhere(server: Server, folder: Path) -> Any:
    """What a server answers for a folder that it does not see, as one on another machine: for `in_front_of`."""

    def spoil(path: str, body: bytes | None) -> tuple[int, bytes] | None:
        if path != "/collective_rpc" or body is None:
            return None
        asked = json.loads(body.replace(str(folder.resolve()).encode(), b"/nowhere"))
        found = server.post(path, asked)
        return found.status_code, found.content

    return spoil


def test_a_server_that_does_not_see_the_run_s_folder_is_refused_unharmed(
    server: Server, make: Make, models: Models, tmp_path: Path
) -> None:
    had = make(server, version=2)
    label = server.get("/weight_info").json()
    with in_front_of(server.url, elsewhere(server, tmp_path)) as url:
        words = r"^rollout\.vllm: the server .* does not read .*/weights/vllm/.* under the same path \(docs/vllm\.md\)"
        with pytest.raises(ModelError, match=words):
            make(url, version=3)
        assert server.get("/weight_info").json() == label
        # What another worker has brought to it can be used.
        make(url, version=2)
    had.add("a")
    had.finish()
    assert {chunk.version for chunk in had.chunks["a"]} == {2}
    assert models.worst(had.chunks["a"]) < 2e-3


def test_a_server_that_sees_the_folder_no_more_ends_the_worker_with_that_reason(
    server: Server, make: Make, models: Models, tmp_path: Path
) -> None:
    gone = threading.Event()
    spoil = elsewhere(server, tmp_path)
    with in_front_of(server.url, lambda *asked: spoil(*asked) if gone.is_set() else None) as url:
        written = make(url, version=2, patience_s=1.0)
        gone.set()
        server.swap(models.folder, "default")  # as one that was started again, with another mount
        written.add("a")
        with pytest.raises(EngineBroken, match=r"cannot be used for .* does not read .*/weights/vllm/"):
            written.finish()
    assert server.get("/health").is_success


def test_a_model_s_folder_that_a_server_cannot_load_is_named(models: Models, make: Make, tmp_path: Path) -> None:
    with serving("standin", models.folder, tmp_path / "log", *SERVER) as server:
        writer = make(server, version=None).writer
        with pytest.raises(ModelError, match=r"^rollout\.vllm: .* did not load /nowhere/model, .* same path"):
            writer.swap(OfModel.of(Path("/nowhere/model")))


# --- faults --------------------------------------------------------------------------------------------------------


def test_a_server_that_is_killed_and_started_again_has_its_weights_again(
    models: Models, make: Make, tmp_path: Path
) -> None:
    with serving("standin", models.folder, tmp_path / "log", *SERVER) as server:
        written = make(server, version=3)
        written.add("a", "b", length=60)
        written.step_until(lambda: bool(written.chunks["a"]))
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()
        written.step_until(lambda: written.writer.free == 0)
        began = time.monotonic()
        assert written.writer.step() == [] and written.writer.close_chunks() == []
        assert time.monotonic() - began < 5, "nobody waits for a server that is down"
        again = begin("standin", models.folder, tmp_path / "log", *SERVER, port=server.port)
        try:
            wait_until_ready(again)
            written.finish()
            assert written.writer.free == 8
            assert again.get("/weight_info").json()["weight_version"].startswith("katana:run-1:3:")
            assert again.generated() < written.writer.decoded_tokens
        finally:
            again.stop()
    for key in ("a", "b"):
        assert {chunk.version for chunk in written.chunks[key]} == {3}
        assert models.worst(written.chunks[key]) < 2e-3


def test_an_idle_writer_notices_that_its_server_is_back(server: Server, make: Make) -> None:
    written = make(server)
    with stopped(server):
        written.add("a", length=60)
        written.step_until(lambda: written.writer.free == 0)
        began = time.monotonic()
        assert written.writer.remove("a") == 0
        assert time.monotonic() - began < 1, "a server that hangs is not waited for"
        assert written.writer.busy == () and written.writer.free == 0
    wait_until(lambda: written.writer.free == 8)


def test_a_server_that_hung_goes_on_with_what_was_open(server: Server, make: Make) -> None:
    written = make(server)
    before = server.generated()
    written.add("a", "b", length=100, unwatched=100)
    written.step_until(lambda: server.generated() > before + 3)
    with stopped(server):
        written.step_until(lambda: written.writer.free == 0)
    written.finish()
    assert server.generated() - before == written.writer.decoded_tokens


def test_a_server_that_stays_away_breaks_the_engine(server: Server, make: Make) -> None:
    written = make(server, patience_s=1.0)
    with stopped(server):
        written.add("a", length=60)
        with pytest.raises(EngineBroken, match="cannot be used for"):
            for _ in range(2000):
                step_or_part(written.writer, ["a"], may_economize=True)
        assert written.writer.remove("a") == 0


@contextmanager
def stopped(server: Server) -> Iterator[None]:
    os.killpg(server.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(server.process.pid, signal.SIGCONT)


@contextmanager
def web(answer: Any) -> Iterator[str]:
    """A server that answers (path, body) by a function: a status and a body."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            status, body = answer(self.path, self.rfile.read(length) if length else None)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None: ...

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.daemon_threads = True
    thread = threading.Thread(target=found.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{found.server_port}"
    finally:
        found.shutdown()
        found.server_close()
        thread.join()


@contextmanager
def in_front_of(url: str, spoil: Any) -> Iterator[str]:
    """Passes on to a server, unless `spoil` (path, body) answers itself."""
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:

        def answer(path: str, body: bytes | None) -> tuple[int, bytes]:
            if (own := spoil(path, body)) is not None:
                return int(own[0]), bytes(own[1])
            asks = body is None and path not in ("/resume", "/pause?mode=keep")
            headers = {"Content-Type": "application/json"}
            found = client.request("GET" if asks else "POST", path, content=body, headers=headers)
            return found.status_code, found.content

        with web(answer) as front:
            yield front


def test_a_rollout_whose_requests_fail_is_at_fault_and_the_others_go_on(server: Server, make: Make) -> None:
    def spoil(_: str, body: bytes | None) -> tuple[int, bytes] | None:
        if body and b'"request_id":"failing' in body:
            return 500, b'{"error": {"message": "it failed"}}'
        if body and b'"request_id":"refused' in body:
            return 400, b'{"error": {"message": "never"}}'
        return None

    with in_front_of(server.url, spoil) as url:
        written = make(url)
        written.add("a", "b", "failing", "refused", length=100)
        failures: dict[str, Exception] = {}
        until = time.monotonic() + 100
        while written.writer.busy and time.monotonic() < until:
            closed, failed = step_or_part(written.writer, list(written.writer.busy), may_economize=True)
            written.take(closed)
            for key, error in failed:
                failures[key] = error
                assert written.writer.discard(key) == 0
        assert {key: type(error) for key, error in failures.items()} == {
            "failing": ServerFailed,
            "refused": RequestRefused,
        }
        assert written.chunks["a"][-1].finish and written.chunks["b"][-1].finish
        written.writer.prove()


def test_failures_of_all_are_nobody_s_and_pass(server: Server, make: Make) -> None:
    broken: list[bool] = []

    def spoil(path: str, _: bytes | None) -> tuple[int, bytes] | None:
        return (500, b"out of memory") if broken and path.endswith("/generate") else None

    with in_front_of(server.url, spoil) as url:
        written = make(url)
        broken.append(True)
        written.add("a", "b", length=20)
        for _ in range(100):
            assert step_or_part(written.writer, ["a", "b"], may_economize=True) == ([], [])
        broken.clear()
        written.finish()


# --- a server of its own -------------------------------------------------------------------------------------------


def test_a_server_of_its_own_is_started_again_and_ended(models: Models, make: Make, tmp_path: Path) -> None:
    command = [*command_of("standin", Path("{model}"), *SERVER), "--port", "{port}"]
    written = make(None, command=command)
    own = written.writer._own
    assert own is not None and own.runs
    written.add("a", length=100)
    written.step_until(lambda: bool(written.chunks["a"]))
    os.kill(server_of(own.url), signal.SIGKILL)
    written.finish()
    assert models.worst(written.chunks["a"]) < 2e-3
    pid = server_of(own.url)
    written.writer.end()
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), 20)


def server_of(url: str) -> int:
    """The pid of the process that serves at a port."""
    port = url.rpartition(":")[2]
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if port in words and not any(word.endswith("guard.py") for word in words):
            return int(entry.name)
    raise AssertionError(f"no server at {url}")


def test_a_command_that_fails_is_refused_with_its_last_lines(make: Make) -> None:
    with pytest.raises(ModelError, match=r"ended with code 3; its last lines:\n    no such model: .*student"):
        make(None, command=["/bin/sh", "-c", "echo no such model: {model}; exit 3; # {port}"])
    with pytest.raises(ModelError, match="No such file"):
        make(None, command=["/nowhere/vllm", "--port", "{port}"])


KILLED = """
import sys, time
from pathlib import Path
from actors.vllm.server import OwnServer
own = OwnServer(("/bin/sleep", "300.{port}"), Path("m"))
own.start()
print(own.url, flush=True)
time.sleep(300)
"""


def test_a_worker_that_is_killed_leaves_no_server(tmp_path: Path) -> None:
    worker = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, env=os.environ)
    assert worker.stdout is not None
    with worker.stdout:
        port = worker.stdout.readline().strip().rpartition(":")[2]
        argument = f"300.{port}"
        wait_until(lambda: running(argument))
        worker.kill()
        worker.wait()
    wait_until(lambda: not running(argument), 20)


def running(argument: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and argument in (entry / "cmdline").read_bytes().decode().split("\0"):
                found.append(entry.name)
        except OSError:
            continue
    return found
