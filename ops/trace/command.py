"""`katana trace`: the trace of a run as one file for a viewer, or as a picture."""

from __future__ import annotations

from pathlib import Path

from common.runfiles.names import TRACE_JSON
from ops.trace.events import traces_of, write_events


def trace(run: Path, out: Path | None, png: Path | None, steps: int) -> str:
    """Write the viewer's file (unless only the picture is asked for) and the picture; returns what to print. Raises
    ConfigError."""
    traces, lines = traces_of(run), []
    for one in traces:
        if one.damaged:
            lines.append(f"{one.name}: {one.damaged} damaged lines left out")
        if one.full:
            lines.append(f"{one.name}: full, what it did after that is not on record")
    if png is not None:
        from ops.trace.picture import draw  # matplotlib is slow to import

        draw(traces, png, steps)
        lines.append(str(png))
    if png is None or out is not None:
        path = out or run / TRACE_JSON
        count = write_events(traces, path)
        lines.append(
            f"{path}: {count} events of {len(traces)} processes; open it in ui.perfetto.dev or chrome://tracing"
        )
    return "\n".join(lines)
