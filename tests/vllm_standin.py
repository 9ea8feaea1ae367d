"""A stand-in for a vLLM server, as a process: the part of its HTTP API that Katana speaks, with a real model behind it.

    python tests/vllm_standin.py --model ops/models/student --port 8000 --enable-scale-out --max-logprobs 70

Options are vLLM's, and its variable VLLM_SERVER_DEV_MODE=1 opens the routes that change weights. It runs models that
vLLM does not (the shipped ones have heads of 20 and 28) and starts in seconds. Where it knows less than vLLM it refuses
rather than ignores. It ends when its parent does. tests/servers holds it and the real server to the same answers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":  # PYTHONSAFEPATH, which a run's roles have, leaves out the folder of a script
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from standin_engine import Engine, Request  # noqa: E402

DEV = {"/pause", "/resume", "/is_paused", "/collective_rpc", "/update_weight_version", "/weight_info", "/server_info"}
SCALE_OUT = {"/inference/v1/generate", "/inference/v1/abort_requests"}
DISABLED = "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them."
GENERATE = {"request_id", "token_ids", "sampling_params", "cache_salt", "stream", "model"}
SAMPLING = {
    *("max_tokens", "temperature", "top_p", "logprobs", "seed", "stop_token_ids", "ignore_eos", "detokenize"),
}
Answer = tuple[int, Any]


class Refused(Exception):
    """A request that is answered with an error of vLLM's shape."""

    def __init__(self, message: str, param: str | None = None, code: int = 400, kind: str = "BadRequestError") -> None:
        super().__init__(message)
        self.answer = code, {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, options: argparse.Namespace, engine: Engine) -> None:
        super().__init__((options.host, options.port), Handler)
        self.options, self.engine = options, engine
        self.routes: dict[tuple[str, str], Callable[[dict[str, Any], Handler], Answer]] = {
            ("GET", "/health"): lambda *_: (200, None),
            ("GET", "/version"): lambda *_: (200, {"version": "0.32.0+standin"}),
            ("GET", "/v1/models"): self._models,
            ("GET", "/server_info"): self._info,
            ("GET", "/is_paused"): lambda *_: (200, {"is_paused": self.engine.paused}),
            ("GET", "/weight_info"): lambda *_: (200, {"weight_version": self.engine.version}),
            ("POST", "/pause"): self._pause,
            ("POST", "/resume"): self._resume,
            ("POST", "/collective_rpc"): self._rpc,
            ("POST", "/update_weight_version"): self._label,
            ("POST", "/inference/v1/generate"): self._generate,
            ("POST", "/inference/v1/abort_requests"): self._abort,
        }

    def answer(self, method: str, path: str, body: dict[str, Any], handler: Handler) -> Answer:
        if path in DEV and os.environ.get("VLLM_SERVER_DEV_MODE") != "1":
            return 404, {"detail": "Not Found"}
        if path in SCALE_OUT and not self.options.enable_scale_out:
            raise Refused(DISABLED, code=403, kind="PermissionDeniedError")
        route = self.routes.get((method, path))
        if route is None:
            known = path in {known for _, known in self.routes}
            return (405, {"detail": "Method Not Allowed"}) if known else (404, {"detail": "Not Found"})
        return route(body, handler)

    def _models(self, *_: Any) -> Answer:
        name = self.options.model
        model = {"id": name, "object": "model", "owned_by": "vllm", "root": name, "parent": None}
        return 200, {"object": "list", "data": [model | {"max_model_len": self.options.max_model_len}]}

    def _info(self, *_: Any) -> Answer:
        options = self.options
        names = ("model", "max_model_len", "max_logprobs", "logprobs_mode", "enforce_eager")
        model = {name: getattr(options, name) for name in names} | {"dtype": "torch.float32"}
        cache = {"block_size": options.block_size, "enable_prefix_caching": options.enable_prefix_caching}
        scheduler = {"max_num_seqs": options.max_num_seqs}
        return 200, {
            "vllm_config": {
                "model_config": model,
                "cache_config": cache,
                "scheduler_config": scheduler,
                "device_config": {"device": "cuda"},  # as a GPU it swaps all heads: DECISIONS.md, 137
            },
            "vllm_env": {},
            "system_env": {},
        }

    def _pause(self, body: dict[str, Any], handler: Handler) -> Answer:
        mode = parse_qs(urlsplit(handler.path).query).get("mode", ["abort"])[0]
        if mode != "keep":
            raise Refused(f"the stand-in pauses with mode=keep alone, not {mode!r}", "query.mode", kind="Bad Request")
        self.engine.pause(True)
        return 200, {"status": "paused"}

    def _resume(self, *_: Any) -> Answer:
        self.engine.pause(False)
        return 200, {"status": "resumed"}

    def _label(self, body: dict[str, Any], handler: Handler) -> Answer:
        self.engine.label(_needed(body, "new_version"))
        return 200, {"success": True, "new_version": body["new_version"]}

    def _rpc(self, body: dict[str, Any], handler: Handler) -> Answer:
        failed = "Call to collective_rpc method failed: Worker failed with error"
        method = _needed(body, "method")
        if method != "reload_weights":
            raise Refused(f"{failed} '{method}'", code=500, kind="InternalServerError")
        try:
            self.engine.reload(Path(body["kwargs"]["weights_path"]))
        except Exception as error:
            raise Refused(f"{failed} '{error}'", code=500, kind="InternalServerError") from error
        return 200, {"results": [None]}

    def _abort(self, body: dict[str, Any], handler: Handler) -> Answer:
        names = _needed(body, "request_ids")
        threading.Thread(target=self.engine.abort, args=(names,)).start()  # as vLLM: answered before it is done
        return 200, None

    def _generate(self, body: dict[str, Any], handler: Handler) -> Answer:
        request = self._request(body)
        self.engine.add(request)
        while not request.done.wait(0.05):
            if handler.caller_is_gone():
                self.engine.abort([request.name])
        if request.finish == "error":
            raise Refused("EngineCore encountered an issue", code=500, kind="InternalServerError")
        written, read = len(request.tokens), len(request.prompt)
        choice = {
            "index": 0,
            "finish_reason": request.finish,
            "stop_reason": None,
            "token_ids": request.tokens,
            "weight_versions": request.spans,
            "logprobs": None if request.logprobs is None else {"content": request.content},
        }
        return 200, {
            "request_id": request.name,
            "model": self.options.model,
            "created": int(time.time()),
            "usage": {"prompt_tokens": read, "total_tokens": read + written, "completion_tokens": written},
            "output_mode": "tokens",
            "choices": [choice],
        }

    def _request(self, body: dict[str, Any]) -> Request:
        """Raises Refused as vLLM does, and for what the stand-in does not have."""
        ids, given = _needed(body, "token_ids"), _needed(body, "sampling_params")
        if unknown := sorted({*body} - GENERATE) + sorted({*given} - SAMPLING):
            raise Refused(f"the stand-in does not have {', '.join(unknown)}")
        if body.get("stream"):
            raise Refused("the stand-in does not stream")
        if body.get("cache_salt") == "":
            raise Refused("Parameter 'cache_salt' must be a non-empty string if provided.", "cache_salt")
        self._check_sampling(given)
        self._check_prompt(ids)
        ends, seed = () if given.get("ignore_eos") else self.engine.stop_ids, given.get("seed")
        longest = self.options.max_model_len
        return Request(
            name=f"generate-tokens-{body.get('request_id') or secrets.token_hex(16)}",
            prompt=ids,
            limit=min(given.get("max_tokens", longest), longest - len(ids)),
            stop_ids=frozenset([*ends, *given.get("stop_token_ids", [])]),
            logprobs=given.get("logprobs"),
            temperature=given.get("temperature", 1.0),
            top_p=given.get("top_p", 1.0),
            seed=secrets.randbits(64) if seed is None else seed % 2**64,
        )

    def _check_sampling(self, given: dict[str, Any]) -> None:
        if (max_tokens := given.get("max_tokens", 1)) < 1:
            raise Refused(f"max_tokens must be at least 1, got {max_tokens}.", "max_tokens")
        if (temperature := given.get("temperature", 1.0)) < 0:
            raise Refused(f"temperature must be non-negative, got {temperature}.", "temperature")
        if not 0 < (top_p := given.get("top_p", 1.0)) <= 1:
            raise Refused(f"top_p must be in (0, 1], got {top_p}.", "top_p")
        if (logprobs := given.get("logprobs") or 0) > (most := self.options.max_logprobs):
            text = f"Requested sample logprobs of {logprobs}, which is greater than max allowed: {most}"
            raise Refused(f"{text} (parameter=logprobs, value={logprobs})", "logprobs")
        size = self.engine.vocab_size
        if beyond := [one for one in given.get("stop_token_ids", []) if not 0 <= one < size]:
            text = f"token_id(s) {beyond} in stop_token_ids contain out-of-vocab token ids. Vocabulary size: {size}"
            raise Refused(f"{text} (parameter=stop_token_ids, value={beyond})", "stop_token_ids")

    def _check_prompt(self, ids: list[int]) -> None:
        longest = self.options.max_model_len
        if not ids or min(ids) < 0:
            raise Refused("1 validation error: token_ids", "body.token_ids", kind="Bad Request")
        if len(ids) >= longest:  # before the vocabulary is looked at
            more = "" if len(ids) > longest else " plus the number of requested output tokens (at least 1)"
            raise Refused(
                f"The decoder prompt (length {len(ids)}){more} is longer than the maximum model length of {longest}."
            )
        if max(ids) >= self.engine.vocab_size:
            raise Refused(f"Token id {max(ids)} is out of vocabulary")

    def metrics(self) -> bytes:
        labels = f'{{engine="0",model_name="{self.options.model}"}}'
        return (
            "# HELP vllm:generation_tokens_total Number of generation tokens processed.\n"
            "# TYPE vllm:generation_tokens_total counter\n"
            f"vllm:generation_tokens_total{labels} {float(self.engine.generated)}\n"
        ).encode()


def _needed(body: dict[str, Any], name: str) -> Any:
    if body.get(name) is None:
        raise Refused(f"Missing '{name}' in request body", kind="Bad Request")
    return body[name]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        if urlsplit(self.path).path == "/metrics":
            return self._send(200, self.server.metrics(), "text/plain; version=0.0.4")
        return self._answer("GET", {})

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            body = json.loads(data or b"{}")
        except ValueError:
            return self._send_json(*Refused("JSON decode error", kind="Bad Request").answer)
        return self._answer("POST", body)

    def _answer(self, method: str, body: dict[str, Any]) -> None:
        try:
            answer = self.server.answer(method, urlsplit(self.path).path, body, self)
        except Refused as refused:
            answer = refused.answer
        self._send_json(*answer)

    def _send_json(self, code: int, content: Any) -> None:
        self._send(code, b"" if content is None else json.dumps(content).encode(), "application/json")

    def _send(self, code: int, data: bytes, kind: str) -> None:
        with contextlib.suppress(OSError):  # whoever asked is gone
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def caller_is_gone(self) -> bool:
        """vLLM aborts a request whose connection is closed."""
        if not select.select([self.connection], [], [], 0)[0]:
            return False
        try:
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            return True

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing a request."""


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--enable-scale-out", action="store_true")
    parser.add_argument("--max-logprobs", type=int, default=20)
    parser.add_argument("--logprobs-mode", default="raw_logprobs", choices=("raw_logprobs", "raw_logits"))
    parser.add_argument("--max-model-len", type=int, default=256)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--dtype", default="float32", choices=("float32",))
    return parser.parse_args()


def main() -> int:
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    options = _options()
    torch.set_num_threads(1)
    engine = Engine(
        Path(options.model),
        slots=options.max_num_seqs,
        max_model_len=options.max_model_len,
        logprobs_mode=options.logprobs_mode,
    )
    server = Server(options, engine)  # nobody listens before it can write, as with vLLM
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"serving {options.model} on port {server.server_port}", flush=True)
    try:
        engine.run()
    except RuntimeError as error:
        print(f"EngineCore encountered a fatal error: {error}", flush=True)
    time.sleep(0.2)  # the answers to what was pending
    return 1


if __name__ == "__main__":
    sys.exit(main())
