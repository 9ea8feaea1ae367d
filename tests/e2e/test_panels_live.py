"""A real Prometheus beside a real run: every panel has data, and the saving it records is the one in the books."""

from __future__ import annotations

import json
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from system import need
from whole_run import NAME, WholeRun

from common.runfiles.run import RunFolder
from ops.monitoring import panels
from ops.monitoring.dashboards import DASHBOARDS, Panel, Query
from ops.stats.saving import length_saving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
PANELS = [panel for board in DASHBOARDS for row in board.rows for panel in row.panels]
# Lines of a panel that a healthy run may lack, since nothing was counted under their label: then this one says 0.
NOTHING_HAPPENED = {
    ("Given up", "{{reason}}"): "all",
    ("Failed calls", "{{kind}}"): "all",
    ("Taken over", "{{stream}}"): "all",
    ("Trajectories dropped", "{{reason}}"): "all",
    ("Groups without reward", "{{reason}}"): "all",
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


@pytest.fixture(scope="session")
def measured(whole_run: WholeRun) -> Measured:
    need("prometheus")
    assert whole_run.prometheus is not None
    span = panels.find_span(panels.Prometheus(whole_run.prometheus), NAME, 10)
    return Measured(whole_run.prometheus, whole_run.folder, span)


def of_another(query: Query) -> bool:
    """Whether it asks redis_exporter or a vLLM server, of which this run has none."""
    return any(word in query.expr for word in ("redis_", "vllm:")) and "katana_" not in query.expr


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.title)
def test_each_panel_of_the_dashboards_has_data(measured: Measured, panel: Panel) -> None:
    # A question that does not parse is refused, with ConfigError, by Prometheus.
    found = {query.legend: panels.ask(measured.prometheus, query, NAME, measured.span) for query in panel.queries}
    for query in filter(of_another, panel.queries):
        assert not found.pop(query.legend), "there is an exporter or a vLLM server after all"
    for legend, series in found.items():
        if any(one.last is not None for one in series):
            continue
        total = NOTHING_HAPPENED.get((panel.title, legend))
        assert total is not None, f"{panel.title}: no data for {legend!r}"
        assert [one.last for one in found[total]] == [0.0], f"{panel.title}: something happened, but not by {legend}"


def test_only_panels_of_other_programs_are_without_data() -> None:
    assert [panel.title for panel in PANELS if all(map(of_another, panel.queries))] == [
        "Requests at each server",
        "Prefix cache hits",
        "Cache in use",
        "Time to the first token",
        "Preemptions",
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
