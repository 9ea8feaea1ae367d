"""Grafana's dashboards, written from ops/monitoring/dashboards.py: `python -m ops.monitoring.grafana`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ops.monitoring.dashboards import DASHBOARDS, Dashboard, Panel, Query

FOLDER = Path(__file__).parents[1] / "grafana" / "dashboards"
_COLUMNS = 24  # of Grafana's grid
_SCHEMA_VERSION = 39  # Grafana 11's; later versions read it too
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_SIZES = {"stat": (6, 4), "timeseries": (8, 8)}  # width and height in units of the grid


def render(dashboard: Dashboard) -> dict[str, Any]:
    """A dashboard in Grafana's own form."""
    return {
        "uid": f"katana-{dashboard.name}",
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": ["katana"],
        "editable": True,
        "graphTooltip": 1,  # one crosshair over all panels
        "refresh": "5s",
        "schemaVersion": _SCHEMA_VERSION,
        "time": {"from": "now-30m", "to": "now"},
        "timepicker": {"refresh_intervals": ["5s", "10s", "30s", "1m", "5m"]},
        "timezone": "",
        "version": 1,
        "links": [_links()],
        "templating": {"list": [_datasource_variable(), _run_variable()]},
        "annotations": {"list": []},
        "panels": _placed(dashboard),
    }


def _links() -> dict[str, Any]:
    return {
        "type": "dashboards",
        "title": "Katana",
        "tags": ["katana"],
        "asDropdown": False,
        "includeVars": True,
        "keepTime": True,
        "targetBlank": False,
    }


def _datasource_variable() -> dict[str, Any]:
    return {
        "type": "datasource",
        "name": "datasource",
        "label": "Prometheus",
        "query": "prometheus",
        "current": {"text": "Prometheus", "value": "prometheus"},
        "hide": 0,
        "includeAll": False,
        "multi": False,
        "refresh": 1,
    }


def _run_variable() -> dict[str, Any]:
    values = "label_values(katana_rollouts_open, run)"
    return {
        "type": "query",
        "name": "run",
        "label": "Run",
        "description": "Runs in the time range shown.",
        "datasource": _SOURCE,
        "definition": values,
        "query": {"qryType": 1, "query": values, "refId": "run"},
        "refresh": 2,  # when the time range changes: a finished run is found in its own time range
        "sort": 1,
        "hide": 0,
        "includeAll": False,
        "multi": False,
    }


def _placed(dashboard: Dashboard) -> list[dict[str, Any]]:
    """Rows and panels with their places: from left to right, with a new line when the width or the kind requires it."""
    placed: list[dict[str, Any]] = []
    y = 0
    for row in dashboard.rows:
        placed.append(_row(len(placed) + 1, row.title, y))
        x, y, line_height = 0, y + 1, 0
        for panel in row.panels:
            width, height = _SIZES[panel.kind]
            if x and (x + width > _COLUMNS or height != line_height):
                x, y = 0, y + line_height
            place = {"x": x, "y": y, "w": width, "h": height}
            placed.append({"id": len(placed) + 1, "gridPos": place, **_panel(panel)})
            x, line_height = x + width, height
        y += line_height
    return placed


def _row(number: int, title: str, y: int) -> dict[str, Any]:
    place = {"x": 0, "y": y, "w": _COLUMNS, "h": 1}
    return {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}


def _panel(panel: Panel) -> dict[str, Any]:
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _SOURCE,
        "fieldConfig": {
            "defaults": _defaults(panel),
            "overrides": [_dashed(query) for query in panel.queries if query.reference],
        },
        "options": _stat_options() if panel.kind == "stat" else _series_options(),
        "targets": [_target(place, query) for place, query in enumerate(panel.queries)],
    }


def _target(place: int, query: Query) -> dict[str, Any]:
    return {
        "refId": chr(ord("A") + place),
        "datasource": _SOURCE,
        "editorMode": "code",
        "expr": query.expr,
        "legendFormat": query.legend,
        "range": True,
        "instant": False,
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "thresholds": _thresholds(panel)}
    if panel.kind == "stat":
        return {**defaults, "color": {"mode": "thresholds"}}
    if not panel.signed and not panel.log:
        defaults["min"] = 0
    if panel.top is not None:
        defaults["max"] = panel.top
    defaults["color"] = {"mode": "palette-classic"}
    defaults["custom"] = {
        "drawStyle": "line",
        "lineInterpolation": "linear",
        "lineWidth": 2,
        "fillOpacity": 30 if panel.stacked else 0,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        "scaleDistribution": {"type": "log", "log": 10} if panel.log else {"type": "linear"},
        "thresholdsStyle": {"mode": "off" if panel.alarm is None else "dashed"},
    }
    return defaults


def _thresholds(panel: Panel) -> dict[str, Any]:
    """Grafana's steps begin at minus infinity (null)."""
    good, bad = ("red", "green") if panel.alarm_below else ("green", "red")
    steps: list[dict[str, Any]] = [{"color": good, "value": None}]
    if panel.alarm is not None:
        steps.append({"color": bad, "value": panel.alarm})
    return {"mode": "absolute", "steps": steps}


def _dashed(query: Query) -> dict[str, Any]:
    return {
        "matcher": {"id": "byName", "options": query.legend},
        "properties": [
            {"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [8, 8]}},
            {"id": "custom.lineWidth", "value": 1},
            {"id": "custom.fillOpacity", "value": 0},
            {"id": "color", "value": {"mode": "fixed", "fixedColor": "text"}},
        ],
    }


def _series_options() -> dict[str, Any]:
    return {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }


def _stat_options() -> dict[str, Any]:
    return {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "value",
        "graphMode": "area",
        "justifyMode": "auto",
        "orientation": "auto",
        "textMode": "auto",
        "wideLayout": True,
    }


def text(dashboard: Dashboard) -> str:
    """Content of the dashboard's file."""
    return json.dumps(render(dashboard), indent=2, ensure_ascii=False) + "\n"


def write(folder: Path = FOLDER) -> list[Path]:
    """Write every dashboard's file into the folder; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{dashboard.name}.json" for dashboard in DASHBOARDS]
    for path, dashboard in zip(paths, DASHBOARDS, strict=True):
        path.write_text(text(dashboard))
    return paths


if __name__ == "__main__":
    print("\n".join(map(str, write())))
