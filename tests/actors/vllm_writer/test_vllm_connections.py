"""Connections to a server: kept between requests, and not until the server drops them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from actors.vllm.client import Client

_SERVER_KEEPS_S = 5.0  # VLLM_HTTP_TIMEOUT_KEEP_ALIVE


class Counting(ThreadingHTTPServer):
    """Answers `{}` to everything, and holds the ports from which connections came."""

    def __init__(self) -> None:
        self.came_from: set[int] = set()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.came_from.add(self.client_address[1])
                self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_: object) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)
        self.daemon_threads = True


@pytest.fixture
def server() -> Iterator[Counting]:
    with Counting() as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


@pytest.mark.slow
def test_a_connection_serves_several_requests_and_is_dropped_before_the_server_drops_it(server: Counting) -> None:
    client = Client(f"http://127.0.0.1:{server.server_address[1]}", request_timeout_s=5.0)
    try:
        client.get("/health")
        client.get("/health")
        assert len(server.came_from) == 1
        time.sleep(_SERVER_KEEPS_S / 2)
        client.get("/health")
        assert len(server.came_from) == 2
    finally:
        client.close()
