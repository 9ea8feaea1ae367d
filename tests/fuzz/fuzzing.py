"""atheris, set up once for both targets."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import atheris


def run(
    check: Callable[[bytes], int], seeds: list[bytes], mutate: Callable[[bytes, int, int], bytes], *options: str
) -> None:
    """Fuzz until libFuzzer's own options end it. Says at the end how many inputs got past the door."""
    folders = [item for item in sys.argv[1:] if not item.startswith("-")]
    given = [item for item in sys.argv[1:] if item.startswith("-")]
    counts = {"inputs": 0, "taken": 0}
    began = time.monotonic()

    def one(data: bytes) -> None:
        counts["inputs"] += 1
        counts["taken"] += check(data)
        if counts["inputs"] % 100_000 == 0:
            print(f"{counts['inputs']} inputs, {counts['taken']} valid, {time.monotonic() - began:.0f} s", flush=True)

    with tempfile.TemporaryDirectory() as made:
        for number, data in enumerate(seeds):
            (Path(made) / f"{number:03d}").write_bytes(data)
        arguments = [sys.argv[0], "-rss_limit_mb=1024", *options, *given, *(folders or [made])]
        atheris.Setup(arguments, one, custom_mutator=mutate)
        atheris.Fuzz()
