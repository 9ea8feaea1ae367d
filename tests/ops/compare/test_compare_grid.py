"""The grid of a comparison: what is asked for, what is there, and refusals that name what is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from run_folders import evaluation, write_lines
from samples import make_config

from common.config import Config, ConfigError
from ops.compare import grid as grids
from ops.compare.axes import crossed, read_axes
from ops.compare.grid import Cell, Grid, GridRow
from ops.run.summary import summarize


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


def test_a_budget_without_a_number_takes_that_of_the_config(tmp_path: Path) -> None:
    counted = make_config(tmp_path, learner={"max_generated_tokens": 900})
    assert grids.resolved_budget("tokens", counted) == "tokens:900"
    for text in ("steps", "tokens:7", "tokens:x"):
        assert grids.resolved_budget(text, counted) == text
    with pytest.raises(ConfigError, match=r"Expected `tokens:N`, or N in the config as learner\.max_generated_tokens"):
        grids.resolved_budget("tokens", make_config(tmp_path))


def test_whether_rows_leave_the_policy_to_the_config() -> None:
    assert grids.name_policies(grids.read_rows("none,kat", ["own:loss.mode=x,termination.policy=fixed"]))
    assert not grids.name_policies(grids.read_rows("none,kat", ["own:termination.eta=0.1"]))
    assert not grids.name_policies(grids.read_rows("", ["own:termination.options={termination.policy: 1}"]))


def test_rows_of_policies_and_variants() -> None:
    rows = grids.read_rows(
        "none, kat,own_policy:Halved", ["soft:termination.eta=0.1,termination.options={a: 1, b: 2},loss.mode=x"]
    )
    assert rows == (
        GridRow("none", ("termination.policy=none",)),
        GridRow("kat", ("termination.policy=kat",)),
        GridRow("own_policy.Halved", ("termination.policy=own_policy:Halved",)),
        GridRow("soft", ("termination.eta=0.1", "termination.options={a: 1, b: 2}", "loss.mode=x")),
    )


@pytest.mark.parametrize(
    ("names", "variant", "said"),
    [
        ("nonne", None, "the nearest is 'none'"),
        (" , ", None, "names no policy"),
        ("kat,kat", None, "two rows are called 'kat'"),
        ("kat", "kat:termination.eta=0.1", "'kat' is a policy's name"),
        ("kat", "none:termination.policy=fixed", "'none' is a policy's name"),
        ("kat", "early", "expected LABEL:section.key=value"),
        ("kat", "early:", "expected LABEL:section.key=value"),
        ("kat", "a/b:termination.eta=0.1", "'a/b' is not a name for a row"),
        ("kat", "early:seed=3", "seed is the grid's own"),
        ("kat", "early:termination.eta=0.1,runs_dir=x", "runs_dir is the grid's own"),
        ("kat", "random_matched:termination.eta=0.1", "is made from the row 'kat'"),
        ("kat", "random_matched-entropy:termination.eta=0.1", "is made from the row 'entropy'"),
        ("random_matched-none", None, "'none' is no built-in policy that cuts; expected random_matched-POLICY"),
        ("random_matched-random_matched", None, "'random_matched' is no built-in policy that cuts"),
        ("random_matched-own_policy:Halved", None, "is no built-in policy that cuts"),
    ],
)
def test_rows_that_are_refused(names: str, variant: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        grids.read_rows(names, [variant] if variant else [])


def test_kat_is_added_for_random_matched_and_runs_before_it() -> None:
    rows, added = grids.with_source_of_match(grids.read_rows("random_matched,none", []))
    assert added == ["random_matched"]
    assert [row.label for row in rows] == ["kat", "random_matched", "none"]
    rows, added = grids.with_source_of_match(grids.read_rows("random_matched,kat", []))
    assert added == []
    assert list(Grid(rows, (3, 5), "steps").cells()) == [
        Cell("kat", 3),
        Cell("random_matched", 3),
        Cell("kat", 5),
        Cell("random_matched", 5),
    ]
    assert Cell("random_matched", 3).needs == Cell("kat", 3)
    assert Cell("none", 3).needs is None


def test_each_policy_that_cuts_may_have_a_matched_row() -> None:
    rows, added = grids.with_source_of_match(grids.read_rows("none,random_matched-entropy,kat,random_matched", []))
    assert added == ["random_matched-entropy"]
    assert [row.label for row in rows] == ["none", "entropy", "random_matched-entropy", "kat", "random_matched"]
    assert rows[2].changes == ("termination.policy=random_matched",)
    assert Cell("random_matched-entropy", 3).needs == Cell("entropy", 3)
    order = [cell.label for cell in Grid(rows, (3,), "steps").cells()]
    assert order == ["none", "entropy", "kat", "random_matched-entropy", "random_matched"]


def row(label: str, *changes: str) -> GridRow:
    return GridRow(label, changes or (f"termination.policy={label}",))


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
    with pytest.raises(ConfigError, match="is not a comparison"):
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
    with pytest.raises(ConfigError, match="is not a run"):
        grids.state_of(folder)
    (folder / "config.yaml").write_text(make_config(tmp_path).to_yaml())
    assert grids.state_of(folder) == "begun"


@pytest.mark.parametrize(
    ("steps", "summary", "lacking"),
    [
        ([0, 4, 7], {"steps": 7, "wall_s": 60.0}, ""),
        ([0, 4], {"steps": 7, "wall_s": 60.0}, r"its last step, 7, is not evaluated \(last in eval.jsonl: 4\)"),
        ([], {"steps": 7, "wall_s": 60.0}, r"its last step, 7, is not evaluated"),
        ([0, 4, 7], {"steps": 7, "wall_s": None}, "no wall-clock time"),
    ],
)
def test_a_cell_is_done_when_nothing_is_missing(
    steps: list[int], summary: dict[str, Any], lacking: str, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(make_config(tmp_path).to_yaml())
    write_lines(tmp_path / "eval.jsonl", [evaluation(step, 0.5) for step in steps])
    assert grids.missing(tmp_path) == "no summary.json"
    (tmp_path / "summary.json").write_text(json.dumps(summarize(tmp_path).to_json() | summary))
    assert grids.state_of(tmp_path) == ("begun" if lacking else "done")
    assert re.fullmatch(f"{lacking}.*" if lacking else "", grids.missing(tmp_path))


@pytest.mark.parametrize("text", ["{}", "[]", '{"steps": 7'])
def test_a_damaged_summary_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(make_config(tmp_path).to_yaml())
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path))):
        grids.state_of(tmp_path)


def test_what_a_run_left_that_was_killed_while_it_began_is_new(tmp_path: Path) -> None:
    folder = tmp_path / "kat-s0"
    folder.mkdir()
    for name in ("run.json", "config.yaml.tmp", ".lock"):
        (folder / name).write_text("{}")
    assert grids.state_of(folder) == "new"
    grids.clear(folder)
    assert list(folder.iterdir()) == []
    (folder / "run.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    grids.clear(folder)
    assert (folder / "run.json").exists()
    with pytest.raises(ConfigError, match="is not a run"):
        grids.state_of(folder)


def test_files_in_the_place_of_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "kat-s0").write_text("mine")
    with pytest.raises(ConfigError, match="is not a run"):
        grids.state_of(tmp_path / "kat-s0")
    with pytest.raises(ConfigError, match="is not a comparison"):
        grids.joined(tmp_path / "kat-s0", Grid((row("kat"),), (0,), "steps"))


@pytest.fixture
def base(tmp_path: Path) -> Config:
    return make_config(tmp_path, learner={"batch_size": 32, "max_steps": 7})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("learner.max_steps=9", r"row 'early': learner\.max_steps = 9: the budget is the same in all rows"),
        ("learner={max_steps: 9, batch_size: 32}", r"learner\.max_steps = 9: the budget is the same"),
        ("learner.max_generated_tokens=500", "the budget is the same"),
        ("eval.k=1", r"eval\.k = 1: data and evaluation are the same in all rows"),
        ("eval={k: 2}", r"eval\.k = 2: data and evaluation are the same"),
        ("data.options={a: 1}", r"data\.options"),
    ],
)
def test_a_variant_has_the_budget_and_the_problems_of_all(base: Config, change: str, said: str) -> None:
    for tokens in (None, 1000):
        with pytest.raises(ConfigError, match=said):
            grids.row_config(base, row("early", change), tokens)


def test_a_base_that_gives_nothing_to_compare_is_refused(tmp_path: Path) -> None:
    blind = make_config(tmp_path, eval={"every_steps": 0})
    with pytest.raises(ConfigError, match=r"eval\.every_steps is 0"):
        grids.check_base(blind, 1000)
    counted = make_config(tmp_path, learner={"max_generated_tokens": 900})
    with pytest.raises(ConfigError, match="ask for --budget tokens:900"):
        grids.check_base(counted, None)
    grids.check_base(counted, 1000)
    grids.check_base(make_config(tmp_path), None)


ROWS = (row("none"), row("kat"), row("small", "learner.batch_size=8"), row("random_matched"))


def experiment(base: Config, *, budget: int | None = None) -> dict[Cell, Config]:
    """Configs of all cells, two seeds; of random_matched the hazards are another seed's each."""
    found = {}
    for one in ROWS:
        for seed in (0, 1):
            config = grids.row_config(base, one, budget)
            rule = {"policy": "random_matched", "hazard": {20 + seed: 0.5}, "warmup_steps": seed}
            if one.label == "random_matched":
                config = config.model_copy(update={"termination": config.termination.model_copy(update=rule)})
            found[Cell(one.label, seed)] = config.model_copy(update={"seed": seed, "name": f"{one.label}-s{seed}"})
    return found


def test_cells_of_one_experiment(base: Config) -> None:
    for budget, name in ((None, "steps"), (1001, "tokens:1001")):
        grids.check_one_experiment(Grid(ROWS, (0, 1), name), experiment(base, budget=budget))


@pytest.mark.parametrize(
    ("cells", "section", "key", "value", "said"),
    [
        ([Cell("kat", 1)], "learner", "learning_rate", 0.5, r"learning_rate is 1e-06 in none-s0 and 0\.5 in kat-s1"),
        ([Cell("kat", 0), Cell("kat", 1)], "learner", "max_steps", 9, "max_steps is 7 in none-s0 and 9 in kat-s0"),
        ([Cell("small", 1)], "learner", "batch_size", 4, "batch_size is 8 in small-s0 and 4 in small-s1"),
        ([Cell("none", 0), Cell("none", 1)], "termination", "eta", 0.5, "eta is 0.5 in none-s0"),
        ([Cell("kat", 1)], "termination", "policy", "fixed", "policy is 'kat' in kat-s0 and 'fixed' in kat-s1"),
        ([Cell("random_matched", 1)], "termination", "window", 5, "window is 4 in none-s0 and 5 in random_matched-s1"),
    ],
)
def test_cells_of_two_experiments_are_refused(
    base: Config, cells: list[Cell], section: str, key: str, value: Any, said: str
) -> None:
    configs = experiment(base)
    for cell in cells:
        part = getattr(configs[cell], section).model_copy(update={key: value})
        configs[cell] = configs[cell].model_copy(update={section: part})
    with pytest.raises(ConfigError, match=said):
        grids.check_one_experiment(Grid(ROWS, (0, 1), "steps"), configs)


def test_a_cell_of_another_seed_is_refused(base: Config) -> None:
    configs = experiment(base) | {Cell("kat", 1): base}
    with pytest.raises(ConfigError, match="kat-s1: its config has seed 0"):
        grids.check_one_experiment(Grid(ROWS, (0, 1), "steps"), configs)


def test_configs_of_rows_and_cells(base: Config, tmp_path: Path) -> None:
    config = grids.row_config(base, row("early", "termination.eta=0.1", "learner.batch_size=8"), None)
    assert (config.termination.policy, config.termination.eta, config.learner.max_steps) == ("kat", 0.1, 7)
    found = grids.cell_config(config, Cell("early", 4), tmp_path)
    assert (found.name, found.seed, found.run_dir) == ("early-s4", 4, tmp_path / "early-s4")
    assert found.termination == config.termination


def test_a_budget_of_tokens_ends_every_row(base: Config) -> None:
    for changes, steps in ((("learner.batch_size=8",), 126), ((), 32)):
        learner = grids.row_config(base, GridRow("any", changes), 1001).learner
        # A trajectory of one token at least: so many steps have generated the tokens, whatever is cut.
        assert learner.max_generated_tokens == 1001
        assert learner.max_steps == steps
        assert steps * learner.batch_size >= 1001


def test_a_row_of_a_policy_in_a_file_is_called_after_it_and_finds_it_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "rule.py").write_text("")
    found, variant = grids.read_rows("my/rule.py:P", ["own:termination.policy=my/rule.py:Q,loss.mode=x"], tmp_path)
    assert found == GridRow("rule.P", (f'termination.policy="{tmp_path}/my/rule.py:P"',))
    assert variant == GridRow("own", (f'termination.policy="{tmp_path}/my/rule.py:Q"', "loss.mode=x"))


def test_settings_that_no_row_can_have_are_refused(base: Config) -> None:
    with pytest.raises(ConfigError, match=r"row 'early': unknown key 'termination\.etta'"):
        grids.row_config(base, row("early", "termination.etta=0.1"), None)


def test_another_config_in_a_cell_is_refused_by_key(base: Config, tmp_path: Path) -> None:
    wanted = grids.cell_config(base, Cell("kat", 0), tmp_path)
    (tmp_path / "config.yaml").write_text(wanted.to_yaml())
    grids.check_same(tmp_path, wanted)
    moved = wanted.model_copy(update={"name": "other", "runs_dir": "elsewhere"})
    grids.check_same(tmp_path, moved)
    other = grids.row_config(wanted, row("kat", "learner.batch_size=9", "tracking=[tensorboard]"), None)
    with pytest.raises(ConfigError, match=r"learner\.batch_size is 32 there and 9 now; tracking is \[\] there"):
        grids.check_same(tmp_path, other)


def test_random_matched_needs_its_kat_done(base: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="random_matched-s0 is made from kat-s0, which is not done"):
        grids.cell_config(base, Cell("random_matched", 0), tmp_path)


# --- axes ---


def test_rows_are_crossed_with_loss_modes_and_other_values() -> None:
    rows = grids.read_rows("none,kat", [])
    axes = read_axes("forward_kl_topk_tail,mixed", ["learner.max_staleness=0, 4"])
    assert axes == [("loss.mode", ["forward_kl_topk_tail", "mixed"]), ("learner.max_staleness", ["0", "4"])]
    found = crossed(rows, axes)
    assert [one.label for one in found[:4]] == [
        "none.forward_kl.max_staleness-0",
        "none.forward_kl.max_staleness-4",
        "none.mixed.max_staleness-0",
        "none.mixed.max_staleness-4",
    ]
    assert [one.label.split(".")[0] for one in found[4:]] == ["kat"] * 4
    assert found[-1].changes == ("termination.policy=kat", "loss.mode=mixed", "learner.max_staleness=4")
    assert crossed(rows, read_axes("", [])) == rows


def test_a_crossed_grid_is_written_read_and_made_into_configs(tmp_path: Path) -> None:
    rows = crossed(grids.read_rows("none", []), read_axes("jsd_topk_tail", ["loss.beta=0.1,0.9"]))
    grids.write_grid(tmp_path, Grid(rows, (0,), "steps"))
    assert grids.read_grid(tmp_path).rows == rows
    base = make_config(tmp_path, eval={"every_steps": 5})
    configs = [grids.row_config(base, one, None) for one in rows]
    assert [(one.loss.mode, one.loss.beta) for one in configs] == [("jsd_topk_tail", 0.1), ("jsd_topk_tail", 0.9)]


@pytest.mark.parametrize(
    ("losses", "sweeps", "said"),
    [
        ("a,,b", [], "expected section.key=VALUE,VALUE"),
        ("", ["loss.mode"], "expected section.key=VALUE,VALUE"),
        ("", ["=1"], "expected section.key=VALUE,VALUE"),
        ("a", ["loss.mode=b"], "loss.mode is given twice"),
        ("", ["seed=1,2"], "seed is the grid's own"),
        ("", ["termination.policy=fixed"], "the row 'none' sets termination.policy already"),
        ("", ["loss.beta=" + "1" * 40], "is not a name for a row"),
        ("", ["loss.beta={a}"], "is not a name for a row"),
        ("", ["loss.beta=" + ",".join(map(str, range(300)))], "300 rows; at most 200"),
    ],
)
def test_axes_that_are_refused(losses: str, sweeps: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        crossed(grids.read_rows("none", []), read_axes(losses, sweeps))


def test_a_matched_row_cannot_be_crossed() -> None:
    with pytest.raises(ConfigError, match="compare it without --sweep and --loss"):
        crossed(grids.read_rows("none,random_matched", []), read_axes("mixed", []))
