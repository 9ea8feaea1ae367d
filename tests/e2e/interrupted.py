"""What test_interrupted_tests.py runs and interrupts: a test with a Redis and processes in sessions of their own."""

from __future__ import annotations

import subprocess
import time

from ops.reach.embedded import EmbeddedRedis


def test_at_work(embedded_redis: EmbeddedRedis) -> None:
    for _ in range(4):
        subprocess.Popen(["sleep", "200"], start_new_session=True)
    time.sleep(200)
