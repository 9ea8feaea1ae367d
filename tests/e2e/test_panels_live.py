"""A real Prometheus beside a real run: every panel has data, and the saving it records is the one in the books."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from system import need
from test_run import SMALL, finish, start

from common.runfiles.run import RunFolder
from ops.monitoring import panels
from ops.monitoring.dashboards import DASHBOARDS, Panel
from ops.stats.saving import length_saving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
RULES = Path(__file__).parents[2] / "ops" / "prometheus"
NAME = "demo"
SETTINGS = (
    *SMALL,
    "learner.max_steps=30",
    "termination.window=16",
    "termination.patience=4",
    "termination.grace_tokens=0",
    "eval.every_steps=10",
)
PANELS = [panel for board in DASHBOARDS for row in board.rows for panel in row.panels]
# Lines of a panel that a healthy run may lack, since nothing was counted under their label: then this one says 0.
NOTHING_HAPPENED = {
    ("Given up", "{{reason}}"): "all",
    ("Failed calls", "{{kind}}"): "all",
    ("Taken over", "{{stream}}"): "all",
    ("Trajectories dropped", "{{reason}}"): "all",
}


@dataclass(frozen=True)
class Measured:
    """A run that is over, and the Prometheus that has seen it."""

    url: str
    folder: Path
    span: panels.Span

    @property
    def prometheus(self) -> panels.Prometheus:
        return panels.Prometheus(self.url)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measured]:
    program = need("prometheus")
    folder = tmp_path_factory.mktemp("measured")
    runs = folder / "runs"
    config = adapted(folder, runs)
    port = free_port()
    with (folder / "prometheus.log").open("wb") as log:
        server = subprocess.Popen(
            [
                program,
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(url, server, folder / "prometheus.log")
        code, output = finish(start(runs, name=NAME, settings=SETTINGS))
        assert code == 0, output
        yield Measured(url, runs / NAME, panels.find_span(panels.Prometheus(url), NAME, 10))
    finally:
        server.terminate()
        server.wait(30)


def adapted(folder: Path, runs: Path) -> Path:
    """ops/prometheus/local.yml with other intervals and another runs folder, and the shipped rules beside it."""
    config = yaml.safe_load((RULES / "local.yml").read_text())
    config["global"] |= {"scrape_interval": "1s", "scrape_timeout": "900ms", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES / pattern) for pattern in config["rule_files"]]
    found = 0
    for job in config["scrape_configs"]:
        for files in job.get("file_sd_configs", []):
            assert all(path.startswith("../../runs/") for path in files["files"])
            files["files"] = [path.replace("../../runs", str(runs)) for path in files["files"]]
            files["refresh_interval"] = "1s"
            found += 1
    assert found, "local.yml finds no processes by file"
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{url}/-/ready", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"Prometheus was not ready within 30 s:\n{log.read_text()}")


def of_exporter(panel: Panel) -> bool:
    """Whether all of a panel comes from redis_exporter, which one machine's run has none of."""
    return all("redis_" in query.expr and "katana_" not in query.expr for query in panel.queries)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.title)
def test_each_panel_of_the_dashboards_has_data(measured: Measured, panel: Panel) -> None:
    # A question that does not parse is refused, with ConfigError, by Prometheus.
    found = {query.legend: panels.ask(measured.prometheus, query, NAME, measured.span) for query in panel.queries}
    if of_exporter(panel):
        assert not any(found.values()), "there is an exporter after all"
        return
    for legend, series in found.items():
        if any(one.last is not None for one in series):
            continue
        total = NOTHING_HAPPENED.get((panel.title, legend))
        assert total is not None, f"{panel.title}: no data for {legend!r}"
        assert [one.last for one in found[total]] == [0.0], f"{panel.title}: something happened, but not by {legend}"


def test_only_the_exporter_s_panels_are_without_data() -> None:
    assert [panel.title for panel in PANELS if of_exporter(panel)] == [
        "Memory",
        "Commands",
        "Clients",
        "Network",
        "Keys evicted, clients refused",
    ]


def test_the_recorded_saving_is_the_one_in_the_books(measured: Measured) -> None:
    summary = json.loads((measured.folder / "summary.json").read_text())
    lines = [line for line in RunFolder(measured.folder).rollouts() if line.compared]
    assert summary["length_saving"]["ratio"] == length_saving(lines).ratio
    moment, saving = last_sample(measured, f'katana:length_saving:ratio{{run="{NAME}"}}')
    # The feeder books its last rollouts just before its port goes: the last scrape may have missed some of them, and a
    # rule may be worked out while a scrape is being stored. So: exactly what the books said at that time.
    counted = int(
        reading(measured, f'sum(katana_rollout_length_tokens_count{{run="{NAME}",job="feeder"}})', moment - 2)
    )
    assert counted > 0.5 * len(lines)
    savings = [length_saving(lines[:count], resamples=10).ratio for count in range(counted, len(lines) + 1)]
    assert any(one is not None and abs(one - saving) < 1e-9 for one in savings), (saving, savings)


def test_a_run_that_is_over_leaves_no_target(measured: Measured) -> None:
    time.sleep(2.5)  # the files are read again every second
    with urllib.request.urlopen(f"{measured.url}/api/v1/targets?state=active", timeout=10) as answer:
        assert json.load(answer)["data"]["activeTargets"] == []


def test_the_page_is_drawn(measured: Measured, tmp_path: Path) -> None:
    out = panels.draw(measured.url, NAME, tmp_path / "panels.png", minutes=10)
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert out.stat().st_size < 400_000


def last_sample(measured: Measured, selector: str) -> tuple[float, float]:
    """Unix time and reading of the newest sample of a series, as it is stored."""
    (series,) = instant(measured, f"{selector}[10m]", measured.span.end_s)
    moment, value = series["values"][-1]
    return float(moment), float(value)


def reading(measured: Measured, expr: str, moment: float) -> float:
    (one,) = instant(measured, expr, moment)
    return float(one["value"][1])


def instant(measured: Measured, expr: str, moment: float) -> list[dict[str, Any]]:
    question = urllib.parse.urlencode({"query": expr, "time": moment})
    with urllib.request.urlopen(f"{measured.url}/api/v1/query?{question}", timeout=10) as answer:
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return found
