"""HTTP to one server: requests for tokens in a loop of its own, everything else with a limit of time."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TookTooLong
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from actors.vllm.answers import Answer, BadAnswer, read_answer

logging.getLogger("httpx").setLevel(logging.WARNING)  # else a line for each request
logging.getLogger("httpcore").setLevel(logging.WARNING)
CONTROL_S = 10.0  # for a small question; a server that generates answers in milliseconds
_IDLE_S = 2.0  # an idle connection is dropped; vLLM closes it after 5 s, and a request that is sent then is lost
_ID_PREFIX = "generate-tokens-"  # what vLLM puts in front of a request's id
_MOST_TEXT = 500
T = TypeVar("T")


class ServerDown(Exception):
    """No usable answer, and nothing that was asked is at fault: not reached, too slow, overloaded, without a route."""


class ServerFailed(Exception):
    """The server failed on this request (500): it may be the request, or the server."""


class RequestRefused(Exception):
    """The server cannot serve this request (400), now or later."""


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """One chunk. tokens: prompt and completion so far; most: tokens to write; listed: tokens to list at each; salt:
    requests share what is cached of a text if they have the same."""

    request_id: str
    tokens: tuple[int, ...]
    most: int
    seed: int
    listed: int
    stop_ids: tuple[int, ...]
    temperature: float
    top_p: float
    salt: str

    def body(self) -> dict[str, Any]:
        return {
            "request_id": self.request_id,
            "token_ids": self.tokens,
            "sampling_params": {
                "max_tokens": self.most,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "logprobs": self.listed,
                "seed": self.seed,
                "stop_token_ids": self.stop_ids,
                "ignore_eos": True,  # what ends a rollout is the run's stop set
                "detokenize": False,
            },
            "cache_salt": self.salt,
            "stream": False,
        }


class Client:
    """One server. `request_timeout_s`: of a request for tokens. Every method may be called from any thread."""

    def __init__(self, url: str, *, request_timeout_s: float) -> None:
        self.url, self._request_timeout_s = url, request_timeout_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="vllm", daemon=True)
        self._thread.start()
        self._http = self._wait(self._open(), CONTROL_S)

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    async def _open(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_IDLE_S)
        # No proxy from the environment: a server is a machine of one's own.
        return httpx.AsyncClient(base_url=self.url, limits=limits, trust_env=False)

    def close(self) -> None:
        """End the loop; what is open is cancelled, and with that at the server too."""
        if self._loop.is_running():
            self._wait(self._end(), CONTROL_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CONTROL_S)

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._http.aclose()

    def generate(self, request: TokenRequest, done: Callable[[Future[Answer]], None]) -> Future[Answer]:
        """Ask for tokens; `done` is called in the client's thread. The future has the answer, or raises ServerDown,
        ServerFailed, RequestRefused, BadAnswer; cancelled, it ends the request at the server too."""
        found = asyncio.run_coroutine_threadsafe(self._generate(request), self._loop)
        found.add_done_callback(done)
        return found

    async def _generate(self, request: TokenRequest) -> Answer:
        body = await self._send("POST", "/inference/v1/generate", request.body(), self._request_timeout_s)
        return read_answer(body)

    def abort(self, request_ids: list[str]) -> None:
        """End requests: each is then answered with what it has. Raises ServerDown."""
        self.post("/inference/v1/abort_requests", {"request_ids": [_ID_PREFIX + one for one in request_ids]})

    def get(self, path: str, timeout_s: float = CONTROL_S) -> Any:
        """The answer's JSON, None if it has no content. Raises ServerDown, ServerFailed, RequestRefused, BadAnswer."""
        return self._wait(self._send("GET", path, None, timeout_s), timeout_s + CONTROL_S)

    def post(self, path: str, body: Mapping[str, Any] | None = None, timeout_s: float = CONTROL_S) -> Any:
        """Like `get`."""
        return self._wait(self._send("POST", path, body, timeout_s), timeout_s + CONTROL_S)

    def load(self, path: str, body: Mapping[str, Any], timeout_s: float) -> None:
        """Like `post`, of work that may take long: given up sooner if the server does not say that it is well."""
        future = asyncio.run_coroutine_threadsafe(self._send("POST", path, body, timeout_s), self._loop)
        try:
            while True:
                try:
                    future.result(CONTROL_S)
                    return
                except TookTooLong:
                    self.get("/health")
        finally:
            future.cancel()

    def label(self) -> str:
        """What the server calls its weights. Raises as `get`."""
        return str(_field(self.get("/weight_info"), "weight_version"))

    def paused(self) -> bool:
        """Whether the server generates nothing at the moment. Raises as `get`."""
        return bool(_field(self.get("/is_paused"), "is_paused"))

    def healthy(self, timeout_s: float) -> Future[Any]:
        """Raises if the server does not answer."""
        return asyncio.run_coroutine_threadsafe(self._send("GET", "/health", None, timeout_s), self._loop)

    def _wait(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        except TookTooLong:
            future.cancel()
            raise ServerDown(f"{self.url}: no answer in {timeout_s:g} s") from None

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Any:
        where = f"{self.url}{path}"
        try:
            async with asyncio.timeout(timeout_s):
                # httpx's own limits are for each read; a slow server could send a byte now and then.
                response = await self._http.request(method, path, json=body, timeout=None)
        except TimeoutError:
            raise ServerDown(f"{where}: no answer in {timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise ServerDown(f"{where}: {type(error).__name__} {error}".rstrip()) from None
        if response.is_success:
            return _json(response, where)
        said = f"{where}: {response.status_code} {_message(response)}"
        if response.status_code in (400, 413, 422):
            raise RequestRefused(said)
        if response.status_code == 500:
            raise ServerFailed(said)
        raise ServerDown(said)


def _json(response: httpx.Response, where: str) -> Any:
    if not response.content:
        return None
    try:
        return response.json()
    except ValueError as error:
        raise BadAnswer(f"{where}: not JSON ({error})") from None


def _message(response: httpx.Response) -> str:
    """What an error's answer says, in one short line."""
    try:
        body = response.json()
        text = str(body["error"]["message"] if "error" in body else body.get("detail", body))
    except (ValueError, LookupError, TypeError, AttributeError):
        text = response.text
    return " ".join(text.split())[:_MOST_TEXT]


def _field(body: Any, name: str) -> Any:
    if not isinstance(body, dict) or name not in body:
        raise BadAnswer(f"an answer without {name}: {body!r:.100}")
    return body[name]
