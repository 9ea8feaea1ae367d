"""A headless Chromium for tests, driven through its chromedriver's HTTP interface; on this machine alone."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from system import need

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # how the WebDriver standard marks an element in JSON
_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1500,1100",
)


class Browser:
    """One window. Scripts and their results go as JSON."""

    def __init__(self, port: int, profile: Path, chromium: str) -> None:
        self._base = f"http://127.0.0.1:{port}"
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": {"binary": chromium, "args": [*_FLAGS, f"--user-data-dir={profile}"]},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        self._base += f"/session/{session}"

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._base + path, data=data, method=method, headers={"Content-Type": "application/json"}
        )
        try:
            with self._opener.open(request, timeout=120) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            with error:
                pytest.fail(f"{path}: {json.load(error)['value'].get('message', error)}")

    def open(self, path: Path) -> None:
        """Open a file, with an empty log."""
        self.log()
        self._call("POST", "/url", {"url": path.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a function's body returns; `arguments` are its arguments."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def texts(self, selector: str) -> list[str]:
        """Text of all elements that a CSS selector finds."""
        found: list[str] = self.run(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)", selector
        )
        return found

    def click(self, selector: str) -> None:
        """A click of the mouse on the first such element; the test fails where something lies over it."""
        self._call("POST", f"/element/{self._find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Keys pressed while the first such element has the focus."""
        self._call("POST", f"/element/{self._find(selector)}/value", {"text": text})

    def picture(self, selector: str = "") -> bytes:
        """PNG of the first such element, or of the window."""
        place = f"/element/{self._find(selector)}/screenshot" if selector else "/screenshot"
        return base64.b64decode(self._call("GET", place))

    def log(self) -> list[dict[str, Any]]:
        """What came into the console since it was read last: messages, errors, violations of a page's policy."""
        entries: list[dict[str, Any]] = self._call("POST", "/se/log", {"type": "browser"})
        return entries

    def command(self, name: str, **parameters: Any) -> Any:
        """A command of Chromium's own (DevTools protocol)."""
        return self._call("POST", "/goog/cdp/execute", {"cmd": name, "params": parameters})

    def close(self) -> None:
        self._call("DELETE", "")

    def _find(self, selector: str) -> str:
        found: dict[str, str] = self._call("POST", "/element", {"using": "css selector", "value": selector})
        return found[_ELEMENT]


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser with a profile of its own. Skips the test, by name, where one of the two programs is not installed."""
    chromium, driver = need("chromium"), need("chromedriver")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert process.stdout is not None
            ports = (re.search(r"successfully on port (\d+)", line) for line in process.stdout)
            port = next(int(found[1]) for found in ports if found)
            window = Browser(port, Path(profile), chromium)
            try:
                yield window
            finally:
                window.close()
        finally:
            process.terminate()
            process.wait(timeout=20)
            if process.stdout is not None:
                process.stdout.close()
