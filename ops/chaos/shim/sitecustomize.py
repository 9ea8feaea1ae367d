"""Shifts the wall clock of the Python process that finds this folder on its PYTHONPATH, while it runs.

`$KATANA_CHAOS_CLOCK/<pid>` holds the shift in seconds; without such a file, or without a number in it, there is none.
It is read again every 0.2 s at most. Without KATANA_CHAOS_CLOCK nothing is touched.

Shifted: time.time and time.time_ns, for all who import them from now on. Not shifted, because they read the system's
clock in C: datetime.now, utcnow and today, time.localtime, gmtime, ctime and strftime of "now", time.clock_gettime,
and what libraries in C do. Never shifted: monotonic clocks.

With KATANA_CHAOS_POISON, see poison.py.

Python imports one `sitecustomize` only; the one that this hides is run at the end.
"""

import os
import sys
import time


def _shift_clock(folder: str) -> None:
    wall, wall_ns, monotonic = time.time, time.time_ns, time.monotonic
    infinity = float("inf")
    shift_s, read_at = 0.0, -infinity

    def shift() -> float:
        nonlocal shift_s, read_at
        now = monotonic()
        if now - read_at >= 0.2:
            read_at = now
            try:
                # By pid at each read: a forked child has a clock of its own.
                with open(os.path.join(folder, str(os.getpid()))) as file:
                    found = float(file.read())
                shift_s = found if -infinity < found < infinity else 0.0
            except (OSError, ValueError):
                shift_s = 0.0
        return shift_s

    def shifted() -> float:
        return wall() + shift()

    def shifted_ns() -> int:
        return wall_ns() + int(shift() * 1e9)

    time.time, time.time_ns = shifted, shifted_ns


def _run_hidden() -> None:
    """Only entries after this folder, so that two files which both do this cannot call each other for ever."""
    own = os.path.realpath(os.path.dirname(__file__))
    folders = [os.path.realpath(folder) for folder in sys.path]
    if own not in folders:
        return
    for folder in folders[folders.index(own) + 1 :]:
        path = os.path.join(folder, "sitecustomize.py")
        if folder != own and os.path.isfile(path):
            with open(path, "rb") as file:
                code = compile(file.read(), path, "exec")
            exec(code, {"__name__": __name__, "__file__": path, "__builtins__": __builtins__})
            return


if folder := os.environ.get("KATANA_CHAOS_CLOCK"):
    _shift_clock(folder)
if os.environ.get("KATANA_CHAOS_POISON"):
    from poison import begin  # type: ignore[import-not-found]

    begin()
_run_hidden()
