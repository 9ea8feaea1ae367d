"""Dashboards and the picture of their panels: what is committed, what is asked, and what is drawn from the answers."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.image import imread

from common.config import ConfigError
from common.metrics import REGISTRY
from ops.monitoring import panels
from ops.monitoring.dashboards import DASHBOARDS, Panel
from ops.monitoring.grafana import FOLDER, render, text

OPS = Path(__file__).parents[3] / "ops"
PANELS = [panel for board in DASHBOARDS for row in board.rows for panel in row.panels]
EXPRESSIONS = [query.expr for panel in PANELS for query in panel.queries]
UNITS = {"percentunit", "short", "s", "bytes", "Bps", "ops"}  # of Grafana's; beside them its `suffix:…`
# Of the client library and of Prometheus itself: not declared in common/metrics.py.
GIVEN = {"process_resident_memory_bytes", "ALERTS"}
# vLLM's own, as 0.32.0 serves them: of a server, which knows no runs.
OF_VLLM = {
    f"vllm:{name}"
    for name in (
        *("num_requests_running", "num_requests_waiting", "generation_tokens_total", "kv_cache_usage_perc"),
        *("prefix_cache_hits_total", "prefix_cache_queries_total", "num_preemptions_total"),
        "time_to_first_token_seconds_bucket",
    )
}
WORDS = {"sum", "max", "min", "avg", "count", "rate", "histogram_quantile", "time", "and", "or", "le"}


def declared() -> set[str]:
    """Every name that a scrape of Katana's registry can show, and every recorded one."""
    names = set(GIVEN)
    for family in REGISTRY.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        names |= {family.name + suffix for suffix in suffixes}
    rules = yaml.safe_load((OPS / "prometheus" / "recording.rules.yml").read_text())
    return names | OF_VLLM | {rule["record"] for group in rules["groups"] for rule in group["rules"]}


def metrics_of(expr: str) -> set[str]:
    """The identifiers of an expression that are neither labels nor words of the language."""
    bare = re.sub(r'"[^"]*"', "", expr)
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(by|on|without|ignoring) *\([^)]*\)", " ", bare)
    return set(re.findall(r"[A-Za-z_][\w:]*", bare)) - WORDS


@pytest.mark.parametrize("board", DASHBOARDS, ids=lambda board: board.name)
def test_the_committed_dashboards_are_what_the_module_writes(board: Any) -> None:
    told = "run: python -m ops.monitoring.grafana"
    assert (FOLDER / f"{board.name}.json").read_text() == text(board), told
    assert {path.stem for path in FOLDER.iterdir()} == {one.name for one in DASHBOARDS}, told


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.title)
def test_each_panel_says_what_it_shows_and_in_what_unit(panel: Panel) -> None:
    assert panel.title
    assert panel.description.endswith(".")
    assert panel.unit in UNITS or panel.unit.startswith("suffix:")
    assert panel.queries
    assert all(query.expr and query.legend for query in panel.queries)
    assert len({query.legend for query in panel.queries}) == len(panel.queries)
    assert not all(query.reference for query in panel.queries)


def test_ids_titles_and_places_are_apart() -> None:
    assert len({render(board)["uid"] for board in DASHBOARDS}) == len(DASHBOARDS) == 4
    for board in DASHBOARDS:
        placed = render(board)["panels"]
        assert [panel["id"] for panel in placed] == list(range(1, len(placed) + 1))
        titles = [panel["title"] for panel in placed if panel["type"] != "row"]
        assert len(set(titles)) == len(titles)
        cells = [
            (x, y)
            for panel in placed
            for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
            for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
        ]
        assert len(set(cells)) == len(cells), "two panels lie on each other"
        assert max(x for x, _ in cells) < 24


def test_each_dashboard_has_the_run_as_a_variable_and_asks_the_provisioned_source() -> None:
    sources = yaml.safe_load((OPS / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    for board in DASHBOARDS:
        variables = {one["name"]: one for one in render(board)["templating"]["list"]}
        assert variables["run"]["query"]["query"] == "label_values(katana_rollouts_open, run)"
        assert variables["datasource"]["current"]["value"] == sources[0]["uid"]
        for panel in render(board)["panels"]:
            for target in panel.get("targets", []):
                assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    provider = yaml.safe_load((OPS / "grafana/provisioning/dashboards/katana.yml").read_text())["providers"][0]
    assert (provider["type"], provider["options"]["path"]) == ("file", "/var/lib/grafana/dashboards")


@pytest.mark.parametrize("expr", EXPRESSIONS)
def test_each_expression_asks_for_metrics_that_there_are_and_for_one_run(expr: str) -> None:
    used = metrics_of(expr)
    assert used
    for name in used:
        assert name.startswith("redis_") or name in declared(), f"{name}: no metric and no recording rule of this name"
        if name not in GIVEN | OF_VLLM and not name.startswith("redis_"):
            filters = re.findall(rf"\b{name}\b(?:\{{([^}}]*)\}})?", expr)
            assert all('run="$run"' in one for one in filters), f"{name}: of all runs at once"
    # Of the rest of the process's metrics only those of targets of the run.
    assert not used & GIVEN or "$run" in expr


def test_gauges_that_every_role_serves_are_asked_of_one_role_alone() -> None:
    # A gauge or a histogram without labels is there, as 0, in each process that declares it.
    gauges = (family for family in REGISTRY.collect() if family.type == "gauge")
    bare = {family.name for family in gauges if any(not sample.labels for sample in family.samples)}
    assert len(bare) > 5
    for expr in EXPRESSIONS:
        for name in metrics_of(expr) & bare:
            filters = re.findall(rf"\b{name}\b\{{([^}}]*)\}}", expr)
            assert all('job="' in one for one in filters), f"{name} in {expr}"


# --- drawing -------------------------------------------------------------------------------------------------------

Answer = Callable[[str, dict[str, str]], tuple[int, bytes]]


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    """`serve(answer)`: an HTTP server on this machine that answers `answer(path, question)`; returns its address."""
    servers: list[ThreadingHTTPServer] = []

    def begin(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path, _, question = self.path.partition("?")
                code, body = answer(path, dict(urllib.parse.parse_qsl(question)))
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield begin
    for server in servers:
        server.shutdown()
        server.server_close()


def success(data: Any) -> tuple[int, bytes]:
    return 200, json.dumps({"status": "success", "data": data}).encode()


class Canned:
    """Answers as a Prometheus would that has seen a run for ten minutes; notes what it was asked."""

    def __init__(self) -> None:
        self.now = time.time()
        self.asked: list[str] = []

    def __call__(self, path: str, question: dict[str, str]) -> tuple[int, bytes]:
        if path == "/api/v1/label/run/values":
            return success(["demo", "other"])
        assert path == "/api/v1/query_range"
        expr = question["query"]
        self.asked.append(expr)
        if 'run="demo' not in expr and "redis_" not in expr:
            return success({"resultType": "matrix", "result": []})
        if "redis_" in expr and "katana" not in expr:  # no exporter
            return success({"resultType": "matrix", "result": []})
        step, end = float(question["step"]), min(float(question["end"]), self.now)
        times = np.arange(max(float(question["start"]), self.now - 600), end, step)
        result = [
            {"metric": labels, "values": self._values(place, times)} for place, labels in enumerate(_labels(expr))
        ]
        return success({"resultType": "matrix", "result": result})

    @staticmethod
    def _values(place: int, times: Any) -> list[list[Any]]:
        first = [[float(times[0]), "NaN"]]
        return first + [[float(moment), f"{0.3 + 0.2 * np.sin(moment / 60 + place):.4f}"] for moment in times[1:]]


def _labels(expr: str) -> list[dict[str, str]]:
    for label, values in {
        "arm": ("treated", "control"),
        "role": ("rollout", "teacher"),
        "reason": ("eos", "length", "kl_trap"),
        "stream": ("prompts", "scores", "trajectories", "finished", "dead"),
    }.items():
        if re.search(rf"\bby \((le, )?{label}\)", expr):
            return [{label: value} for value in values]
    return [{}]


def test_every_panel_is_asked_for_and_drawn(serve: Callable[[Answer], str], tmp_path: Path) -> None:
    canned = Canned()
    out = panels.draw(serve(canned), "demo", tmp_path / "panels.png", minutes=30)
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert out.stat().st_size < 400_000
    height, width, _ = imread(out).shape
    assert 1500 < width < 2200
    assert 1500 < height < 3000
    # The first question finds the run; then each expression is asked once, with nothing of Grafana's left in it.
    assert len(canned.asked) == 1 + len(EXPRESSIONS)
    assert not any("$" in expr for expr in canned.asked)


def test_a_page_says_which_panels_have_no_data_and_draws_the_others(serve: Callable[[Answer], str]) -> None:
    prometheus = panels.Prometheus(serve(Canned()))
    span = panels.find_span(prometheus, "demo", 30)
    assert 590 < span.end_s - span.begin_s < 620
    row = next(row for board in DASHBOARDS for row in board.rows if row.title == "Redis")
    section = panels.ask_row(prometheus, row, "demo", span)
    assert [panel.title for panel, _ in section.shown] == ["Memory relative to its limit"]
    assert section.empty == ["Memory", "Commands", "Clients", "Network", "Keys evicted, clients refused"]
    figure = panels.page([section], "demo", span)
    drawn = " ".join(one.get_text() for one in figure.findobj(lambda one: hasattr(one, "get_text")))
    assert "Memory relative to its limit" in drawn
    assert "no data in this time range: Memory, Commands, Clients" in drawn


def test_no_two_texts_of_the_page_lie_on_each_other(serve: Callable[[Answer], str]) -> None:
    prometheus = panels.Prometheus(serve(Canned()))
    span = panels.find_span(prometheus, "demo", 30)
    sections = [panels.ask_row(prometheus, row, "demo", span) for board in DASHBOARDS for row in board.rows]
    figure = panels.page(sections, "demo", span)
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    figure.draw(renderer)
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in figure.texts]
    boxes += [("legend", axes.get_legend().get_window_extent(renderer)) for axes in figure.axes]
    overlapping = [
        (one, other)
        for place, (one, box) in enumerate(boxes)
        for other, beside in boxes[:place]
        if box.overlaps(beside)
    ]
    assert not overlapping
    for axes in figure.axes:
        box = axes.get_tightbbox(renderer)
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1


def test_a_run_that_was_not_seen_is_refused_with_those_that_were(
    serve: Callable[[Answer], str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"run 'none'.*last 30 minutes; runs known there: demo, other"):
        panels.draw(serve(Canned()), "none", tmp_path / "panels.png", minutes=30)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "body", "said"),
    [
        (200, b"<html>a web page</html>", "not JSON"),
        (200, b"[]", "not an object"),
        (
            400,
            b'{"status": "error", "errorType": "bad_data", "error": "parse error at char 7"}',
            "parse error at char 7",
        ),
        (200, b'{"status": "success", "data": "?"}', "is it a Prometheus"),
        (200, b'{"status": "success"}', "is it a Prometheus"),
        (200, b"[" * 100_000, "not JSON"),
        (502, b"", "not JSON"),
    ],
)
def test_an_answer_that_is_none_of_a_prometheus_is_refused(
    serve: Callable[[Answer], str], tmp_path: Path, code: int, body: bytes, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        panels.draw(serve(lambda *_: (code, body)), "demo", tmp_path / "panels.png")


NOW = 1_000_000.0
SERIES = {"metric": {}, "values": [[NOW, "1"]]}


@pytest.mark.parametrize(
    ("series", "said"),
    [
        ("a string", "is not a series"),
        (None, "is not a series"),
        ({"metric": {}}, "without metric or values"),
        ({"values": []}, "without metric or values"),
        (SERIES | {"values": "12"}, "without metric or values"),
        (SERIES | {"values": [[NOW]]}, "is not .time, reading."),
        (SERIES | {"values": ["ab"]}, "is not .time, reading."),
        (SERIES | {"values": [[True, "1"]]}, "is not .time, reading."),
        (SERIES | {"values": [[NOW, ["1"]]]}, "is not .time, reading."),
        (SERIES | {"values": [[NOW, "many"]]}, "could not convert"),
        (SERIES | {"values": [[1e300, "1"]]}, r"a reading of 1e\+300, asked for"),
        (SERIES | {"values": [[10**400, "1"]]}, "not one of a Prometheus"),
        (SERIES | {"values": [[-5, "1"]]}, "a reading of -5, asked for"),
    ],
)
def test_a_series_that_is_none_is_refused(serve: Callable[[Answer], str], series: Any, said: str) -> None:
    prometheus = panels.Prometheus(serve(lambda *_: success({"resultType": "matrix", "result": [series]})))
    with pytest.raises(ConfigError, match=said):
        prometheus.matrix("up", panels.Span(NOW - 60, NOW, 1.0))


def test_readings_that_cannot_be_drawn_count_as_none(serve: Callable[[Answer], str]) -> None:
    told = ["1.5", "NaN", "+Inf", "-Inf", "1e308"]
    series = {"metric": {"arm": 7}, "values": [[NOW - place, text] for place, text in enumerate(told)]}
    prometheus = panels.Prometheus(serve(lambda *_: success({"result": [series, {"metric": {}, "values": []}]})))
    found, empty = prometheus.matrix("up", panels.Span(NOW - 60, NOW, 1.0))
    assert found.labels == {"arm": "7"}
    np.testing.assert_equal(found.values, [1.5, *[np.nan] * 4])
    assert found.times_s.tolist() == [NOW - place for place in range(5)]
    assert len(empty.values) == 0


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1:9090", "file:///etc/passwd", "http://[", ""])
def test_an_address_where_none_answers_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no Prometheus answers there|expected the address of a Prometheus"):
        panels.draw(url, "demo", tmp_path / "panels.png")


def test_a_folder_that_is_not_there_is_said(serve: Callable[[Answer], str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        panels.draw(serve(Canned()), "demo", tmp_path / "nowhere" / "panels.png")


def test_a_run_s_name_cannot_leave_its_quotes() -> None:
    span = panels.Span(0.0, 60.0, 1.0)
    assert panels.filled('up{run="$run"}[$__rate_interval]', 'a"} or b{c="\\', span) == (
        'up{run="a\\"} or b{c=\\"\\\\"}[20s]'
    )
