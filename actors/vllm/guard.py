"""Runs a server for a worker, and ends it with the worker, however that ends. Run by its path; imports no package.

    python -I guard.py COMMAND ARGUMENT …

The worker holds the other end of this process's standard input: when it closes, the server and all that it started
are ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

GRACE_S = 10.0


def main() -> int:
    server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_end_with_the_worker, args=(server,), daemon=True).start()
    code = server.wait()
    _end(server.pid, 0.0)  # what it may have left in its group
    return code if code >= 0 else 128 - code


def _end_with_the_worker(server: subprocess.Popen[bytes]) -> None:
    while os.read(0, 4096):
        pass
    _end(server.pid, GRACE_S)


def _end(group: int, grace_s: float) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGTERM)
        until = time.monotonic() + grace_s
        while time.monotonic() < until:
            time.sleep(0.1)
            os.killpg(group, 0)
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OSError as error:
        sys.exit(f"{sys.argv[1]}: {error.strerror}")
