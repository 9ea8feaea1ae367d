"""The grid of `katana compare`: rows (policies, or variants by name) × seeds; every cell is a run in its own folder.

    runs_dir/NAME/                  the grid
        compare.json                what was asked for: rows with their changes to the config, seeds, budget
        kat-s0/ …                   the cells, LABEL-sSEED: runs like any other
        configs/, logs/             what each cell was started with, and what it printed

Asking for more rows or seeds later makes the grid larger. What is there is used again only if its config is the one
that is asked for now.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common import policy_names
from common.config import Config, ConfigError, flatten, parse
from common.files import write_json
from common.runfiles.names import CONFIG, EVALUATIONS, RUN, SUMMARY
from common.runfiles.run import RunFolder, read_json
from ops.compare.match import matched_config

FILE = "compare.json"
MATCHED, MATCHED_TO = "random_matched", "kat"
"""The row that is made from another one of the same seed, and that other one. `random_matched-POLICY` is made from the
row of that policy."""
_MOST_SEEDS = 1000
_OWN_KEYS = ("seed", "name", "runs_dir")  # the grid's, not a row's
_MATCHED_KEYS = tuple(f"termination.{key}" for key in ("hazard", "hazard_scale", "detection_tokens", "warmup_steps"))
_BUDGET_KEYS = ("learner.max_steps", "learner.max_generated_tokens")
_LEFT_OVER = (RUN, f"{RUN}.tmp", f"{CONFIG}.tmp")  # of a run that was killed before its config was there
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")

State = Literal["new", "begun", "done"]


def source_of(label: str) -> str | None:
    """The label of the row that a row is made from; None: from none."""
    if label == MATCHED:
        return MATCHED_TO
    return label.removeprefix(f"{MATCHED}-") if label.startswith(f"{MATCHED}-") else None


@dataclass(frozen=True, slots=True)
class GridRow:
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
        source = source_of(self.label)
        return None if source is None else Cell(source, self.seed)


@dataclass(frozen=True, slots=True)
class Grid:
    """Rows × seeds under one budget: `steps`, or `tokens:N` generated."""

    rows: tuple[GridRow, ...]
    seeds: tuple[int, ...]
    budget: str

    def cells(self) -> Iterator[Cell]:
        """Seed by seed, so that pairs are complete early; what others are made from comes first."""
        labels = sorted((row.label for row in self.rows), key=lambda label: source_of(label) is not None)
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
                f"--seeds {text!r:.80}: {part!r:.40} is not a range of seeds; expected numbers and ranges of at most "
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


def resolved_budget(text: str, base: Config) -> str:
    """The budget with its number: to `tokens` comes that of the config that all rows begin with. Raises ConfigError."""
    if text != "tokens":
        return text
    if base.learner.max_generated_tokens is None:
        raise ConfigError(
            "--budget 'tokens': how many? Expected `tokens:N`, or N in the config as learner.max_generated_tokens"
        )
    return f"tokens:{base.learner.max_generated_tokens}"


def read_rows(names: str, variants: Sequence[str], folder: Path = Path()) -> tuple[GridRow, ...]:
    """A row for each policy of `none,kat,…`, and for each variant `LABEL:a.b=c,d.e=f`. Raises ConfigError.

    `folder`: that of the config, where files of custom policies are looked for first.
    """
    rows = [_policy_row(name.strip(), folder) for name in names.split(",") if name.strip()]
    rows += [_variant_row(text, folder) for text in variants]
    labels = [row.label for row in rows]
    if not rows:
        raise ConfigError("--policies: names no policy")
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"--policies, --variant: two rows are called {label!r}")
    return tuple(rows)


def _policy_row(name: str, folder: Path = Path()) -> GridRow:
    source = source_of(name)
    if source is not None and name != MATCHED:
        if source not in policy_names.BUILT_IN or source in ("none", MATCHED):
            raise ConfigError(
                f"--policies {name!r:.80}: {source!r:.40} is no built-in policy that cuts; expected {MATCHED}-POLICY, "
                f"for example {MATCHED}-entropy"
            )
        return GridRow(name, (f"termination.policy={MATCHED}",))
    try:
        policy_names.check(name)
    except policy_names.PolicyError as error:
        raise ConfigError(f"--policies {name!r:.80}: {error}") from error
    where, class_name = policy_names.split(name)
    label = f"{Path(where).stem}.{class_name}" if policy_names.in_file(name) else name.replace(":", ".")
    return GridRow(check_label(label, f"--policies {name!r:.80}"), (_located(f"termination.policy={name}", folder),))


def _located(change: str, folder: Path) -> str:
    """A change with the absolute path of the policy's file, if it names one: the grid may be asked from elsewhere."""
    key, _, name = change.partition("=")
    if key.strip() != "termination.policy" or not policy_names.in_file(name.strip()):
        return change
    return f"termination.policy={json.dumps(policy_names.located(name.strip(), folder))}"


def _variant_row(text: str, folder: Path) -> GridRow:
    where = f"--variant {text!r:.80}"
    label, _, rest = text.partition(":")
    # A comma inside a value, as in {a: 1, b: 2}, stands before no key.
    changes = tuple(part.strip() for part in re.split(r",(?=\s*[A-Za-z_][A-Za-z0-9_.]*=)", rest))
    if not rest.strip():
        raise ConfigError(f"{where}: expected LABEL:section.key=value, for example kat_early:termination.eta=0.1")
    for change in changes:
        check_key(change.partition("=")[0].strip(), where)
    if (source := source_of(label)) is not None:
        raise ConfigError(f"{where}: {label!r} is made from the row {source!r}; name it in --policies")
    if label in policy_names.BUILT_IN:
        raise ConfigError(f"{where}: {label!r} is a policy's name; choose another label")
    return GridRow(check_label(label, where), tuple(_located(change, folder) for change in changes))


def check_key(key: str, where: str) -> None:
    """Raises ConfigError for a key that no row may change."""
    if key in _OWN_KEYS:
        raise ConfigError(f"{where}: {key} is the grid's own and cannot differ by row")


def check_label(text: str, where: str) -> str:
    """A row's name, as it was given. Raises ConfigError."""
    if not _LABEL.fullmatch(text):
        raise ConfigError(
            f"{where}: {text!r:.80} is not a name for a row; allowed: up to 40 letters, digits, '.', '_', '-'"
        )
    return text


def name_policies(rows: Iterable[GridRow]) -> bool:
    """Whether every row names its policy, so that the policy of the common config is not used."""
    return all(any(change.partition("=")[0].strip() == "termination.policy" for change in row.changes) for row in rows)


def with_source_of_match(rows: tuple[GridRow, ...]) -> tuple[tuple[GridRow, ...], list[str]]:
    """The rows, with `kat` before `random_matched` where it is missing, and so for other policies; and the labels of
    the matched rows that were without."""
    labels = {row.label for row in rows}
    whole: list[GridRow] = []
    lacking: list[str] = []
    for row in rows:
        source = source_of(row.label)
        if source is not None and source not in labels:
            labels.add(source)
            whole.append(_policy_row(source))
            lacking.append(row.label)
        whole.append(row)
    return tuple(whole), lacking


# --- the folder ----------------------------------------------------------------------------------------------------


def read_grid(folder: Path) -> Grid:
    """What was asked for in this folder so far. Raises ConfigError."""
    path = folder / FILE
    if not path.is_file():
        raise ConfigError(f"{folder}: not a comparison (no {FILE} in it)")
    found = read_json(path)
    try:
        rows = tuple(
            GridRow(check_label(label, str(path)), tuple(map(str, changes))) for label, changes in found["rows"].items()
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
    if not folder.exists() or (folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())):
        return asked
    if not (folder / FILE).is_file():
        raise ConfigError(f"{folder} exists already and is not a comparison (no {FILE} in it): choose another --name")
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
    """Of a cell's folder: `done` when nothing is missing. Raises ConfigError if it is not a run, or is damaged."""
    if not folder.exists() or _only_left_over(folder):
        return "new"
    if not RunFolder(folder).begun:
        raise ConfigError(f"{folder} exists already and is not a run (no {CONFIG} in it): remove it")
    return "begun" if missing(folder) else "done"


def missing(folder: Path) -> str:
    """What a run's folder lacks to be done, in words; "" of one that is. Raises ConfigError where it is damaged.

    The summary is written when the books are closed, and the evaluator may be at work on the last weights then.
    """
    run = RunFolder(folder)
    summary = run.summary
    if summary is None:
        return f"no {SUMMARY}"
    if summary.wall_s is None:
        return f"no wall-clock time in {SUMMARY}"
    last = max((one.step for one in run.evaluations()), default=None)
    if run.config.eval.every_steps > 0 and last != summary.steps:
        there = "–" if last is None else last
        return f"its last step, {summary.steps}, is not evaluated (last in {EVALUATIONS}: {there})"
    return ""


def clear(folder: Path) -> None:
    """Remove what a run that was killed while it began has left: `katana run` begins in an empty folder only."""
    if folder.is_dir() and _only_left_over(folder):
        for path in folder.iterdir():
            path.unlink()


def _only_left_over(folder: Path) -> bool:
    return folder.is_dir() and all(
        path.is_file() and (path.name in _LEFT_OVER or path.name.startswith(".")) for path in folder.iterdir()
    )


# --- configs -------------------------------------------------------------------------------------------------------


def check_base(base: Config, tokens: int | None) -> None:
    """Raises ConfigError where the config that all rows begin with gives nothing to compare, or another budget."""
    if base.eval.every_steps == 0:
        raise ConfigError("eval.every_steps is 0: without evaluations there is nothing to compare; allowed: 1 or more")
    if tokens is None and base.learner.max_generated_tokens is not None:
        raise ConfigError(
            f"learner.max_generated_tokens is {base.learner.max_generated_tokens}, and with --budget steps it is the "
            f"steps that end a run: ask for --budget tokens:{base.learner.max_generated_tokens}, or set it to null"
        )


def row_config(base: Config, row: GridRow, tokens: int | None) -> Config:
    """The config of a row, for any seed; of `random_matched` that of the row it is made from. Raises ConfigError."""
    made_from = source_of(row.label)
    source = f"row {row.label!r}"
    changes = row.changes if made_from is None else (f"termination.policy={made_from}",)
    config = parse(base.to_yaml(), changes, source=source)
    _check_comparable(base, config, source)
    if tokens is not None:
        # Every trajectory has a token at least: this many steps cannot end a run before the tokens do.
        steps = -(-tokens // config.learner.batch_size)
        budget = (f"learner.max_generated_tokens={tokens}", f"learner.max_steps={steps}")
        config = parse(config.to_yaml(), budget, source=source)
    return config


def _check_comparable(base: Config, config: Config, source: str) -> None:
    """Raises ConfigError where a row has another budget, other problems, or another measure."""
    for key, _, own in _differences(base, config):
        if key in _BUDGET_KEYS:
            raise ConfigError(
                f"{source}: {key} = {own}: the budget is the same in all rows; set it by --set or --budget"
            )
        if key.partition(".")[0] in ("eval", "data"):
            raise ConfigError(f"{source}: {key} = {own!r:.60}: data and evaluation are the same in all rows; use --set")


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


def check_cell(row: Config, cell: Cell, folder: Path) -> None:
    """Raises ConfigError, with the keys, where a cell that is there was not begun with its row's config."""
    if cell.needs is not None and state_of(folder / cell.needs.name) == "begun":
        # What it was matched to is being completed: how it was matched cannot be worked out again yet.
        check_same(
            folder / cell.name, row.model_copy(update={"seed": cell.seed}), ("termination.policy", *_MATCHED_KEYS)
        )
    else:
        check_same(folder / cell.name, cell_config(row, cell, folder))


def check_same(folder: Path, wanted: Config, ignored: Sequence[str] = ()) -> None:
    """Raises ConfigError, with the keys, where a cell's folder has another config than the one wanted."""
    there = RunFolder(folder).config
    skipped = {"name", "runs_dir", *ignored}  # a grid may be moved
    differing = [
        f"{key} is {was!r:.60} there and {now!r:.60} now"
        for key, was, now in _differences(there, wanted)
        if key not in skipped
    ]
    if differing:
        raise ConfigError(
            f"{folder} has another config: {'; '.join(differing)}. Choose another --name, or remove that folder"
        )


def check_one_experiment(grid: Grid, configs: Mapping[Cell, Config]) -> None:
    """Raises ConfigError where the configs of cells differ by more than their seeds and what their rows change.

    Within a row all is the same; between rows a key is the same in all those that do not change it.
    """
    changed = {row.label: _changed_by(row, grid.budget) for row in grid.rows}
    flat = {cell: flatten(config) for cell, config in configs.items()}
    for cell, values in flat.items():
        if values["seed"] != cell.seed:
            raise ConfigError(f"{cell.name}: its config has seed {values['seed']}; it is another cell's")
    for key in dict.fromkeys(key for values in flat.values() for key in values):
        if key in _OWN_KEYS:
            continue
        first: dict[str, Cell] = {}  # by the row, or "" for all rows that leave the key as it is
        for cell, values in flat.items():
            if source_of(cell.label) is not None and key in _MATCHED_KEYS:
                continue  # another one for every seed
            other = first.setdefault(cell.label if _names(changed[cell.label], key) else "", cell)
            if flat[other][key] != values[key]:
                raise ConfigError(
                    f"no one experiment: {key} is {flat[other][key]!r:.60} in {other.name} and {values[key]!r:.60} in "
                    f"{cell.name}; remove the folders of one of the two, and run the comparison again"
                )


def _changed_by(row: GridRow, budget: str) -> tuple[str, ...]:
    keys = tuple(change.partition("=")[0].strip() for change in row.changes)
    # Under a budget of tokens the most steps follow from the row's batch size.
    return keys if budget == "steps" else (*keys, "learner.max_steps")


def _names(changed: Sequence[str], key: str) -> bool:
    """Whether a key, one of its parts, or the section that it is in is changed."""
    return any(one == key or one.startswith(f"{key}.") or key.startswith(f"{one}.") for one in changed)


def _differences(old: Config, new: Config) -> Iterable[tuple[str, Any, Any]]:
    now = flatten(new)
    return ((key, was, now[key]) for key, was in flatten(old).items() if was != now[key])
