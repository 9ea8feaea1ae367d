"""Axes of a comparison: rows crossed with values of keys, `--sweep A.B=C,D` and `--loss MODE,MODE`."""

from __future__ import annotations

from collections.abc import Sequence

from common.config import ConfigError
from ops.compare.grid import GridRow, check_key, check_label, source_of

_LOSS = "loss.mode"
MOST_ROWS = 200


def read_axes(losses: str, sweeps: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each key with its values: of `--loss` first, then of each `--sweep`. Raises ConfigError."""
    found: dict[str, list[str]] = {}
    for option, item in [*([("--loss", f"{_LOSS}={losses}")] if losses else []), *(("--sweep", one) for one in sweeps)]:
        key, equals, text = (part.strip() for part in item.partition("="))
        where = f"{option} {item.removeprefix(f'{_LOSS}=') if option == '--loss' else item!r:.80}"
        values = list(dict.fromkeys(part.strip() for part in text.split(",")))
        if not equals or not key or not all(values):
            raise ConfigError(f"{where}: expected section.key=VALUE,VALUE, for example learner.max_staleness=0,1,4")
        if key in found:
            raise ConfigError(f"{where}: {key} is given twice")
        check_key(key, where)
        found[key] = values
    return list(found.items())


def crossed(rows: Sequence[GridRow], axes: Sequence[tuple[str, list[str]]]) -> tuple[GridRow, ...]:
    """Every row with every combination of values. The last axis changes first.

    A label is the row's and then, for each axis, the value of a loss mode without `_topk_tail`, or the key's last part
    and the value: `none.forward_kl.max_staleness-4`. Raises ConfigError.
    """
    if not axes:
        return tuple(rows)
    if made := [row.label for row in rows if source_of(row.label) is not None]:
        raise ConfigError(
            f"--policies {made[0]}: it is made from one row of {source_of(made[0])}; compare it without --sweep and "
            f"--loss"
        )
    for key, values in axes:
        where = f"--sweep {key}={','.join(values)}"
        if taken := [row.label for row in rows if _changes(row, key)]:
            raise ConfigError(f"{where:.80}: the row {taken[0]!r} sets {key} already")
        rows = [
            GridRow(check_label(f"{row.label}.{_in_label(key, value)}", where), (*row.changes, f"{key}={value}"))
            for row in rows
            for value in values
        ]
    if len(rows) > MOST_ROWS:
        raise ConfigError(f"--sweep, --loss: {len(rows)} rows; at most {MOST_ROWS}")
    return tuple(rows)


def _changes(row: GridRow, key: str) -> bool:
    return any(change.partition("=")[0].strip() == key for change in row.changes)


def _in_label(key: str, value: str) -> str:
    return value.removesuffix("_topk_tail") if key == _LOSS else f"{key.rpartition('.')[2]}-{value}"
