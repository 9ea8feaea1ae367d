"""How cost grows: arguments, tables and picture of recorded figures, and the parts that need no other process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import growth
import pytest
from growth_figures import FIGURES, TITLES, tables
from PIL import Image

RECORDED = {
    "what": "how cost grows",
    "parts": {
        "slots": {
            "points": ["8", "32"],
            "repeats": [
                [{"tokens_per_s": 100.0, "step_ms": 80.0}, {"tokens_per_s": 300.0, "step_ms": 106.7}],
                [{"tokens_per_s": 120.0, "step_ms": 66.7}, {"tokens_per_s": 200.0, "step_ms": 160.0}],
                [{"tokens_per_s": 110.0, "step_ms": 72.7}, {"tokens_per_s": 400.0, "step_ms": 80.0}],
            ],
        },
        "workers": {
            "points": ["1+1", "2+2"],
            "repeats": [
                [
                    {"tokens_per_s": 9.0, "steps_per_s": 1.0, "tokens_forwarded_per_token_scored": 1.0},
                    {"tokens_per_s": 8.0, "steps_per_s": 0.9, "tokens_forwarded_per_token_scored": 1.2},
                ],
                [
                    {"tokens_per_s": 3.0, "steps_per_s": 0.5, "tokens_forwarded_per_token_scored": 1.05},
                    {"tokens_per_s": 5.0, "steps_per_s": 0.6, "tokens_forwarded_per_token_scored": 1.0},
                ],
            ],
        },
        "length": {"points": ["64"], "repeats": [[{"tokens_per_s": 7.0, "scored_tokens_per_s": 9.0}]]},
    },
}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "expected either --out, to measure, or --from"),
        (["--out", "{}/o.json", "--from", "{}/o.json"], "expected either --out"),
        (["--out", "{}"], "expected a file in a folder that is there"),
        (["--out", "{}/none/o.json"], "expected a file in a folder that is there"),
        (["--out", "{}/o.json", "--repeats", "0"], "a whole number of at least 1"),
        (["--out", "{}/o.json", "--steps", "1"], "--steps 1: expected at least 2"),
        (["--out", "{}/o.json", "--only", "slots,heads"], "--only: 'heads' is not a part; allowed: slots"),
        (["--out", "{}/o.json", "--only", "slots", "--points", "length=8"], "'length' is not a part to measure"),
        (["--out", "{}/o.json", "--points", "slots=8,x"], "--points slots: 'x'; allowed: a whole number from 1"),
        (["--out", "{}/o.json", "--points", "workers=2"], "--points workers: '2'; allowed: rollout workers + teachers"),
        (["--out", "{}/o.json", "--points", "length=993"], "a whole number from 1 to 992"),
    ],
)
def test_bad_arguments_exit_with_2(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        growth.main([word.format(tmp_path) for word in words])
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("text", [None, "not JSON", "{}", '{"parts": {}}'])
def test_what_is_not_a_recording_exits_with_2(
    text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "o.json"
    if text is not None:
        path.write_text(text)
    assert growth.main(["--from", str(path)]) == 2
    assert f"error: --from {path}: " in capsys.readouterr().err


def test_a_wrong_key_of_the_config_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert growth.main(["--out", str(tmp_path / "o.json"), "--set", "rollout.slot=3"]) == 2
    assert "rollout.slot" in capsys.readouterr().err


def test_points_of_chosen_parts(tmp_path: Path) -> None:
    words = ["--out", str(tmp_path / "o.json"), "--only", "length,workers", "--points", "workers=4+2"]
    assert growth.parse_arguments(words).points == {"workers": ("4+2",), "length": growth.PARTS["length"].points}


def test_recorded_figures_become_tables_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "o.json"
    path.write_text(json.dumps(RECORDED))
    assert growth.main(["--from", str(path)]) == 0
    said = capsys.readouterr().out
    assert "| slots, all at work | tokens/s | ms a decode step |" in said
    assert "| 32 | 300 (200–400) | 107 (80–160) |" in said
    # Ratios are taken within a repeat: the medians' own ratio would be another.
    assert "two rollout workers and two teachers / one and one: 1.05 (0.9–1.2)" in said
    assert "of all numbers of workers: 1.12 (1.05–1.2)" in said
    with Image.open(tmp_path / "o.png") as picture:
        assert picture.size[0] > 2 * picture.size[1]  # three panels in a row
        assert len(set(picture.convert("L").get_flattened_data())) > 10


def test_only_what_was_measured_is_compared() -> None:
    part: dict[str, Any] = RECORDED["parts"]["workers"]  # type: ignore[index]
    alone = {"points": ["1+1"], "repeats": [repeat[:1] for repeat in part["repeats"]]}
    assert "one and one" not in tables({"parts": {"workers": alone}})


def test_engines_are_measured_point_by_point_in_every_repeat(tmp_path: Path) -> None:
    path = tmp_path / "o.json"
    words = ["--only", "slots,in-flight", "--points", "slots=1,3", "--points", "in-flight=2", "--repeats", "2"]
    sets = ["rollout.max_completion_length=24", "termination.window=4", "termination.grace_tokens=0"]
    settings = [word for item in sets for word in ("--set", item)]
    assert growth.main(["--out", str(path), *words, *settings]) == 0
    found = json.loads(path.read_text())
    assert found["arguments"] == {"repeats": 2, "steps": 12, "set": sets}
    assert {name: part["points"] for name, part in found["parts"].items()} == {"slots": ["1", "3"], "in-flight": ["2"]}
    for name, part in found["parts"].items():
        assert name in TITLES and len(part["repeats"]) == 2
        for figures in (one for repeat in part["repeats"] for one in repeat):
            assert figures.keys() <= FIGURES.keys() and all(value > 0 for value in figures.values())
    assert path.with_suffix(".png").is_file()
