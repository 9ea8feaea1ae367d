"""Metrics of a run's processes, scraped once from their ports; files beside its folder have the addresses."""

from __future__ import annotations

import glob
import http.client
import json
import math
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from common.metrics import TARGETS

_MOST_TARGETS = 64
_AT_A_TIME = 8
_MOST_BYTES = 4 << 20
_ADDRESS = re.compile(r"[A-Za-z0-9_.:\[\]-]{1,255}:[0-9]{1,5}")
# The ports are on this machine or in the cluster's network: ignore the environment's proxy.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Target:
    """A process of a run: the name of its file, its role, where it serves."""

    process: str
    role: str
    address: str


@dataclass(frozen=True, slots=True)
class Served:
    """The metrics of a target: values by series name and labels. `trouble`: why there are none."""

    target: Target
    values: Mapping[str, Mapping[Labels, float]] = field(default_factory=dict)
    trouble: str = ""

    def value(self, name: str, **labels: str) -> float | None:
        """A series' value; of several that have these labels, their sum. None where there is none, and for NaN."""
        wanted = set(labels.items())
        found = [value for own, value in self.values.get(name, {}).items() if wanted <= set(own)]
        total = sum(found)
        return total if found and math.isfinite(total) else None


def targets(folder: Path) -> list[Target]:
    """Processes of the run in this folder with their addresses (Prometheus's file_sd format), 64 at most.

    A file that is not such a list (or is gone before it is read) is skipped.
    """
    found: list[Target] = []
    begin = f"{folder.name}--"
    for path in sorted((folder.parent / TARGETS).glob(f"{glob.escape(begin)}*.json"))[:_MOST_TARGETS]:
        try:
            for group in json.loads(path.read_text()):
                # The name of another run may begin with this one's.
                if group["labels"].get("run", folder.name) == folder.name:
                    role, addresses = str(group["labels"]["job"]), filter(_ADDRESS.fullmatch, group["targets"])
                    found += [Target(path.stem.removeprefix(begin), role, address) for address in addresses]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return found[:_MOST_TARGETS]


def scrape(wanted: Sequence[Target], timeout_s: float = 1.0) -> list[Served]:
    """Scrape every target once, several at a time; each result has the metrics or the reason why not."""
    if not wanted:
        return []
    with ThreadPoolExecutor(min(_AT_A_TIME, len(wanted))) as pool:
        return list(pool.map(lambda target: _ask(target, timeout_s), wanted))


def _ask(target: Target, timeout_s: float) -> Served:
    try:
        with _OPENER.open(f"http://{target.address}/metrics", timeout=timeout_s) as answer:
            text = answer.read(_MOST_BYTES + 1)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        return Served(target, trouble=f"does not answer ({getattr(error, 'reason', error)})")
    if len(text) > _MOST_BYTES:
        return Served(target, trouble=f"answers with more than {_MOST_BYTES >> 20} MB")
    try:
        return Served(target, parse(text.decode()))
    except ValueError as error:
        return Served(target, trouble=f"does not serve metrics ({error!s:.80})")


def parse(text: str) -> dict[str, dict[Labels, float]]:
    """Katana's series of an exposition, by name as served (`…_total`, `…_sum`). Raises ValueError for invalid text."""
    found: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("katana_"):
                found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found
