"""The grid of `katana compare`: rows (policies, or variants by name) × seeds; every cell is a run in its own folder.

    runs_dir/NAME/                  the grid
        compare.json                what was asked for: rows with their changes to the config, seeds, budget
        kat-s0/ …                   the cells, LABEL-sSEED: runs like any other
        configs/, logs/             what each cell was started with, and what it printed

Asking for more rows or seeds later makes the grid larger. What is there is used again only if its config is the one
that is asked for now.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common import policies
from common.config import Config, ConfigError, load, parse
from ops.matching import matched_config
from ops.rundir import read_json, write_json

FILE = "compare.json"
MATCHED, MATCHED_TO = "random_matched", "kat"
"""The row that is made from another one of the same seed, and that other one."""
_MOST_SEEDS = 1000
_OWN_KEYS = ("seed", "name", "runs_dir")  # the grid's, not a row's
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")

State = Literal["new", "begun", "done"]


@dataclass(frozen=True, slots=True)
class Row:
    """What is compared: a label, and how its config differs from the one that all rows begin with, as `a.b=c`."""

    label: str
    changes: tuple[str, ...]


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    label: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.label}-s{self.seed}"

    @property
    def needs(self) -> Cell | None:
        """The cell that has to be done before this one can be made."""
        return Cell(MATCHED_TO, self.seed) if self.label == MATCHED else None


@dataclass(frozen=True, slots=True)
class Grid:
    """Rows × seeds under one budget: `steps`, or `tokens:N` generated."""

    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    budget: str

    def cells(self) -> Iterator[Cell]:
        """Seed by seed, so that pairs are complete early; what others are made from comes first."""
        labels = sorted((row.label for row in self.rows), key=lambda label: label == MATCHED)
        return (Cell(label, seed) for seed in self.seeds for label in labels)


# --- reading what was asked for ------------------------------------------------------------------------------------


def read_seeds(text: str) -> tuple[int, ...]:
    """`0-4` or `0,2,7-9`, in order, each once. Raises ConfigError."""
    seeds: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]{1,10})(?:-([0-9]{1,10}))?", part.strip(), re.ASCII)
        low, high = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if low > high or high >= 2**31 or high - low >= _MOST_SEEDS:
            raise ConfigError(
                f"--seeds {text!r:.80}: {part!r:.40} is no range of seeds; expected numbers and ranges of at most "
                f"{_MOST_SEEDS} with commas between them, for example 0-4 or 0,2,7-9"
            )
        seeds.update(range(low, high + 1))
    return tuple(sorted(seeds))


def read_budget(text: str) -> int | None:
    """Tokens of `tokens:N`; None for `steps`. Raises ConfigError."""
    if text == "steps":
        return None
    found = re.fullmatch(r"tokens:([1-9][0-9]{0,14})", text, re.ASCII)
    if not found:
        raise ConfigError(f"--budget {text!r:.80}: expected `steps`, or `tokens:N` with N at least 1")
    return int(found[1])


def read_rows(names: str, variants: Sequence[str]) -> tuple[Row, ...]:
    """A row for each policy of `none,kat,…`, and for each variant `LABEL:a.b=c,d.e=f`. Raises ConfigError."""
    rows = [_policy_row(name.strip()) for name in names.split(",") if name.strip()]
    rows += [_variant_row(text) for text in variants]
    labels = [row.label for row in rows]
    if not rows:
        raise ConfigError("--policies: names no policy")
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"--policies, --variant: two rows are called {label!r}")
    return tuple(rows)


def _policy_row(name: str) -> Row:
    try:
        policies.check_name(name)
    except policies.PolicyError as error:
        raise ConfigError(f"--policies {name!r:.80}: {error}") from error
    return Row(_label(name.replace(":", "."), f"--policies {name!r:.80}"), (f"termination.policy={name}",))


def _variant_row(text: str) -> Row:
    where = f"--variant {text!r:.80}"
    label, _, rest = text.partition(":")
    # A comma inside a value, as in {a: 1, b: 2}, stands before no key.
    changes = tuple(part.strip() for part in re.split(r",(?=\s*[A-Za-z_][A-Za-z0-9_.]*=)", rest))
    if not rest.strip():
        raise ConfigError(f"{where}: expected LABEL:section.key=value, for example kat_early:termination.eta=0.1")
    for change in changes:
        key = change.partition("=")[0].strip()
        if key in _OWN_KEYS:
            raise ConfigError(f"{where}: {key} is the grid's own and cannot differ by row")
    if label == MATCHED:
        raise ConfigError(f"{where}: {MATCHED!r} is made from the row {MATCHED_TO!r}; name it in --policies")
    return Row(_label(label, where), changes)


def _label(text: str, where: str) -> str:
    if not _LABEL.fullmatch(text):
        raise ConfigError(
            f"{where}: {text!r:.80} is no name for a row; allowed: up to 40 letters, digits, '.', '_', '-'"
        )
    return text


def with_source_of_match(rows: tuple[Row, ...]) -> tuple[tuple[Row, ...], bool]:
    """The rows, with `kat` before `random_matched` where it is missing; and whether it was."""
    labels = [row.label for row in rows]
    if MATCHED not in labels or MATCHED_TO in labels:
        return rows, False
    place = labels.index(MATCHED)
    return (*rows[:place], _policy_row(MATCHED_TO), *rows[place:]), True


# --- the folder ----------------------------------------------------------------------------------------------------


def read_grid(folder: Path) -> Grid:
    """What was asked for in this folder so far. Raises ConfigError."""
    path = folder / FILE
    if not path.is_file():
        raise ConfigError(f"{folder}: no comparison, there is no {FILE} in it")
    found = read_json(path)
    try:
        rows = tuple(
            Row(_label(label, str(path)), tuple(map(str, changes))) for label, changes in found["rows"].items()
        )
        seeds = tuple(sorted(int(seed) for seed in found["seeds"]))
        read_budget(found["budget"])
        return Grid(rows, seeds, found["budget"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path}: damaged ({error!r:.200}); expected rows, seeds and budget") from error


def write_grid(folder: Path, grid: Grid) -> None:
    rows = {row.label: list(row.changes) for row in grid.rows}
    write_json(folder / FILE, {"budget": grid.budget, "rows": rows, "seeds": list(grid.seeds)})


def joined(folder: Path, asked: Grid) -> Grid:
    """What is asked for now together with what the folder has; the order of rows is that of now.

    Raises ConfigError: the folder is something else, or has another budget or another row of the same label.
    """
    if not folder.exists() or all(path.name.startswith(".") for path in folder.iterdir()):
        return asked
    if not (folder / FILE).is_file():
        raise ConfigError(f"{folder} is there already and is no comparison (no {FILE} in it): choose another --name")
    before = read_grid(folder)
    if before.budget != asked.budget:
        raise ConfigError(f"{folder}: its budget is {before.budget}, not {asked.budget}: choose another --name")
    known = {row.label: row for row in asked.rows}
    for row in before.rows:
        if known.setdefault(row.label, row) != row:
            now, then = (" ".join(one.changes) for one in (known[row.label], row))
            raise ConfigError(f"{folder}: its row {row.label!r} has {then}, not {now}: choose another label or --name")
    return Grid(tuple(known.values()), tuple(sorted({*before.seeds, *asked.seeds})), asked.budget)


def state_of(folder: Path) -> State:
    """Of a cell's folder: `done` once the run has written its summary. Raises ConfigError where it is no run."""
    if not folder.exists() or not any(folder.iterdir()):
        return "new"
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} is there already and is no run (no config.yaml in it): remove it")
    return "done" if (folder / "summary.json").is_file() else "begun"


# --- configs -------------------------------------------------------------------------------------------------------


def row_config(base: Config, row: Row, tokens: int | None) -> Config:
    """The config of a row, for any seed; of `random_matched` that of the row it is made from. Raises ConfigError."""
    matched = row.label == MATCHED
    source = f"row {row.label!r}"
    changes = (f"termination.policy={MATCHED_TO}",) if matched else row.changes
    config = parse(base.to_yaml(), changes, source=source)
    if tokens is not None:
        # Every trajectory has a token at least: this many steps cannot end a run before the tokens do.
        steps = -(-tokens // config.learner.batch_size)
        budget = (f"learner.max_generated_tokens={tokens}", f"learner.max_steps={steps}")
        config = parse(config.to_yaml(), budget, source=source)
    try:
        policies.check(config.termination, config.rollout.max_completion_length)
    except policies.PolicyError as error:
        raise ConfigError(f"{source}: termination.policy: {error}") from error
    return config


def cell_config(config: Config, cell: Cell, folder: Path) -> Config:
    """The config of a cell, from that of its row. Raises ConfigError, for `random_matched` also where its run of kat
    cannot be matched."""
    if cell.needs is not None:
        source = folder / cell.needs.name
        if state_of(source) != "done":
            raise ConfigError(f"{cell.name} is made from {cell.needs.name}, which is not done")
        config, _ = matched_config(source)
    changes = {"seed": cell.seed, "name": cell.name, "runs_dir": str(folder)}
    return Config.model_validate(config.model_dump() | changes)


def check_same(folder: Path, wanted: Config) -> None:
    """Raises ConfigError, with the keys, where a cell's folder has another config than the one wanted."""
    there = load(folder / "config.yaml", import_policy=False)
    differing = [
        f"{key} is {was!r:.60} there and {now!r:.60} now"
        for key, was, now in _differences(there.model_dump(), wanted.model_dump())
        if key not in ("name", "runs_dir")  # a grid may be moved
    ]
    if differing:
        raise ConfigError(
            f"{folder} has another config: {'; '.join(differing)}. Choose another --name, or remove that folder"
        )


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterable[tuple[str, Any, Any]]:
    for name in old:
        if isinstance(old[name], dict):
            pairs = ((f"{name}.{key}", old[name].get(key), new[name].get(key)) for key in old[name])
            yield from (pair for pair in pairs if pair[1] != pair[2])
        elif old[name] != new[name]:
            yield name, old[name], new[name]
