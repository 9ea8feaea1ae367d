"""One public class, one name: who reads `Verdict` anywhere in the production code means the same thing."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = [path for package in ("common", "actors", "learner", "ops") for path in (ROOT / package).rglob("*.py")]


def test_no_two_public_classes_share_a_name() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(ROOT)))
    assert len(places) > 150
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
