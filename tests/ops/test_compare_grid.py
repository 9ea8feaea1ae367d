"""The grid of a comparison: what is asked for, what is there, and refusals that name what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from samples import make_config

from common.config import Config, ConfigError
from ops import compare_grid as grids
from ops.compare_grid import Cell, Grid, Row


@pytest.mark.parametrize(
    ("text", "seeds"), [("0-4", (0, 1, 2, 3, 4)), ("7", (7,)), (" 2, 0 ,7-9,8", (0, 2, 7, 8, 9)), ("3-3", (3,))]
)
def test_seeds(text: str, seeds: tuple[int, ...]) -> None:
    assert grids.read_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "4-0", "1,,2", "-1", "0-", "0-1000000", "2147483648", "0..4", "１"])
def test_seeds_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="expected numbers and ranges"):
        grids.read_seeds(text)


def test_budgets() -> None:
    assert grids.read_budget("steps") is None
    assert grids.read_budget("tokens:120000") == 120_000
    for text in ("tokens", "tokens:", "tokens:0", "tokens:-4", "tokens:1e6", "time:5", ""):
        with pytest.raises(ConfigError, match="expected `steps`, or `tokens:N`"):
            grids.read_budget(text)


def test_rows_of_policies_and_variants() -> None:
    rows = grids.read_rows(
        "none, kat,own_policy:Halved", ["soft:termination.eta=0.1,termination.options={a: 1, b: 2},loss.mode=x"]
    )
    assert rows == (
        Row("none", ("termination.policy=none",)),
        Row("kat", ("termination.policy=kat",)),
        Row("own_policy.Halved", ("termination.policy=own_policy:Halved",)),
        Row("soft", ("termination.eta=0.1", "termination.options={a: 1, b: 2}", "loss.mode=x")),
    )


@pytest.mark.parametrize(
    ("names", "variant", "said"),
    [
        ("nonne", None, "the nearest is 'none'"),
        (" , ", None, "names no policy"),
        ("kat,kat", None, "two rows are called 'kat'"),
        ("kat", "kat:termination.eta=0.1", "two rows are called 'kat'"),
        ("kat", "early", "expected LABEL:section.key=value"),
        ("kat", "early:", "expected LABEL:section.key=value"),
        ("kat", "a/b:termination.eta=0.1", "'a/b' is no name for a row"),
        ("kat", "early:seed=3", "seed is the grid's own"),
        ("kat", "early:termination.eta=0.1,runs_dir=x", "runs_dir is the grid's own"),
        ("kat", "random_matched:termination.eta=0.1", "is made from the row 'kat'"),
    ],
)
def test_rows_that_are_refused(names: str, variant: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        grids.read_rows(names, [variant] if variant else [])


def test_kat_is_added_for_random_matched_and_runs_before_it() -> None:
    rows, added = grids.with_source_of_match(grids.read_rows("random_matched,none", []))
    assert added
    assert [row.label for row in rows] == ["kat", "random_matched", "none"]
    rows, added = grids.with_source_of_match(grids.read_rows("random_matched,kat", []))
    assert not added
    assert list(Grid(rows, (3, 5), "steps").cells()) == [
        Cell("kat", 3),
        Cell("random_matched", 3),
        Cell("kat", 5),
        Cell("random_matched", 5),
    ]
    assert Cell("random_matched", 3).needs == Cell("kat", 3)
    assert Cell("none", 3).needs is None


def row(label: str, *changes: str) -> Row:
    return Row(label, changes or (f"termination.policy={label}",))


def test_a_grid_grows(tmp_path: Path) -> None:
    first = Grid((row("kat"), row("none")), (0, 1), "steps")
    assert grids.joined(tmp_path / "new", first) == first
    grids.write_grid(tmp_path, first)
    assert grids.read_grid(tmp_path) == first
    later = Grid((row("none"), row("fixed")), (1, 2), "steps")
    assert grids.joined(tmp_path, later) == Grid((row("none"), row("fixed"), row("kat")), (0, 1, 2), "steps")


def test_a_folder_that_is_something_else_is_refused(tmp_path: Path) -> None:
    grid = Grid((row("kat"),), (0,), "steps")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is no comparison"):
        grids.joined(tmp_path, grid)
    grids.write_grid(tmp_path, grid)
    with pytest.raises(ConfigError, match="its budget is steps, not tokens:9"):
        grids.joined(tmp_path, Grid((row("kat"),), (0,), "tokens:9"))
    with pytest.raises(ConfigError, match=r"its row 'kat' has termination\.policy=kat, not loss\.mode=x"):
        grids.joined(tmp_path, Grid((row("kat", "loss.mode=x"),), (0,), "steps"))


@pytest.mark.parametrize("text", ["", "[]", '{"rows": {}}', '{"rows": {"../x": []}, "seeds": [0], "budget": "steps"}'])
def test_a_damaged_compare_json_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text(text)
    with pytest.raises(ConfigError, match=r"compare\.json"):
        grids.read_grid(tmp_path)


def test_states_of_a_cell(tmp_path: Path) -> None:
    folder = tmp_path / "kat-s0"
    assert grids.state_of(folder) == "new"
    folder.mkdir()
    assert grids.state_of(folder) == "new"
    (folder / "x").touch()
    with pytest.raises(ConfigError, match="is no run"):
        grids.state_of(folder)
    (folder / "config.yaml").touch()
    assert grids.state_of(folder) == "begun"
    (folder / "summary.json").touch()
    assert grids.state_of(folder) == "done"


@pytest.fixture
def base(tmp_path: Path) -> Config:
    return make_config(tmp_path, learner={"batch_size": 32, "max_steps": 7})


def test_configs_of_rows_and_cells(base: Config, tmp_path: Path) -> None:
    config = grids.row_config(base, row("early", "termination.eta=0.1", "learner.batch_size=8"), None)
    assert (config.termination.policy, config.termination.eta, config.learner.max_steps) == ("kat", 0.1, 7)
    found = grids.cell_config(config, Cell("early", 4), tmp_path)
    assert (found.name, found.seed, found.run_dir) == ("early-s4", 4, tmp_path / "early-s4")
    assert found.termination == config.termination


def test_a_budget_of_tokens_ends_every_row(base: Config) -> None:
    for changes, steps in ((("learner.batch_size=8",), 126), ((), 32)):
        learner = grids.row_config(base, Row("any", changes), 1001).learner
        # A trajectory of one token at least: so many steps have generated the tokens, whatever is cut.
        assert learner.max_generated_tokens == 1001
        assert learner.max_steps == steps
        assert steps * learner.batch_size >= 1001


def test_settings_that_no_row_can_have_are_refused(base: Config) -> None:
    with pytest.raises(ConfigError, match=r"row 'early': unknown key 'termination\.etta'"):
        grids.row_config(base, row("early", "termination.etta=0.1"), None)
    with pytest.raises(ConfigError, match=r"row 'mine'.*cannot be imported"):
        grids.row_config(base, row("mine", "termination.policy=no_such_module:X"), None)


def test_another_config_in_a_cell_is_refused_by_key(base: Config, tmp_path: Path) -> None:
    wanted = grids.cell_config(base, Cell("kat", 0), tmp_path)
    (tmp_path / "config.yaml").write_text(wanted.to_yaml())
    grids.check_same(tmp_path, wanted)
    moved = wanted.model_copy(update={"name": "other", "runs_dir": "elsewhere"})
    grids.check_same(tmp_path, moved)
    other = grids.row_config(wanted, row("kat", "learner.max_steps=9", "tracking=[tensorboard]"), None)
    with pytest.raises(ConfigError, match=r"learner\.max_steps is 7 there and 9 now; tracking is \[\] there"):
        grids.check_same(tmp_path, other)


def test_random_matched_needs_its_kat_done(base: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="random_matched-s0 is made from kat-s0, which is not done"):
        grids.cell_config(base, Cell("random_matched", 0), tmp_path)
