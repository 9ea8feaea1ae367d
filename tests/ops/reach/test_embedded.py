"""The embedded Redis: it comes up on its own data, and ends with whoever started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from common.wire.connect import connect
from ops.reach.embedded import EmbeddedRedis

HOLDER = """
import sys, time
from pathlib import Path
from ops.reach.embedded import EmbeddedRedis
server = EmbeddedRedis(Path(sys.argv[1]), maxmemory_mb=32)
server.start()
print(server.pid, flush=True)
time.sleep(60)
"""


def test_what_was_written_is_there_after_a_stop_and_a_start(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 90)  # its socket's path would be too long for the system
    server = EmbeddedRedis(deep, maxmemory_mb=32)
    for value in (None, b"written"):
        server.start()
        client = connect(server.url)
        assert client.get("key") == value
        client.set("key", "written")
        client.close()
        server.stop()
    assert not server.running()


def test_a_server_leaves_no_temporary_folder_whether_it_was_started_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = Path(tempfile.mkdtemp())  # short enough for a socket
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    server = EmbeddedRedis(tmp_path / ("d" * 90), maxmemory_mb=32)
    assert not list(temporary.iterdir())
    server.start()
    (folder,) = temporary.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    server.stop()
    temporary.rmdir()  # it is empty


def test_it_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    with holder.stdout:
        pid = int(holder.stdout.readline())
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "redis-server outlived its parent"
        time.sleep(0.05)
