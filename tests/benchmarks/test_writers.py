"""Slots beside a vLLM server: figures from runs' folders, worked by hand; lists of a server; the parts, before the
stand-in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import writers
from run_folders import line, write_lines
from savings import NeverActive
from vllm_servers import OPTIONS, STANDIN, make_qwen3
from vllm_side import command, serving
from writers_runs import accuracy, books_closed, run_table, saved
from writers_speed import speed_table, stop_table
from writers_verdicts import differing, list_of, listed

from actors.vllm.chunks import UNLISTED, Outcomes
from common.files import write_json
from common.runfiles.run import RunFolder
from common.termination import Cut


def folder_of(path: Path, lines: Sequence[dict[str, Any]], **ledger: Any) -> RunFolder:
    """A run that trained on r0 and r1 and dropped what else it has."""
    path.mkdir()
    write_lines(path / "rollouts.jsonl", [*lines])
    step = {"step": 1, "policy_version": 1, "rids": ["r0", "r1"], "tokens": [10, 10], "digests": ["", ""]}
    write_lines(path / "trained.jsonl", [step])
    counts = {"admitted": len(lines), "trained": 2, "dropped": {"stale": len(lines) - 2}, "dead": 0, "open": 0}
    write_json(path / "ledger.json", counts | ledger)
    return RunFolder(path)


DROPPED = line(rid="r2", ending="dropped", reason="stale", tokens_trained=0)
LINES = [line(rid="r0"), line(rid="r1", arm="control", tokens_generated=40, tokens_kept=40), DROPPED]


def test_books_are_closed_where_every_rollout_ended_once(tmp_path: Path) -> None:
    assert books_closed(folder_of(tmp_path / "right", LINES))
    assert not books_closed(folder_of(tmp_path / "open", LINES, admitted=4, open=1))
    assert not books_closed(folder_of(tmp_path / "lost", LINES[:2], admitted=3, dropped={"stale": 1}))
    assert not books_closed(folder_of(tmp_path / "twice", [*LINES[:2], {**DROPPED, "rid": "r1"}]))
    assert not books_closed(folder_of(tmp_path / "tokens", [*LINES[:2], {**DROPPED, "tokens_overshoot": 3}]))
    assert not books_closed(folder_of(tmp_path / "ends", [*LINES[:2], {**DROPPED, "ending": "dead"}]))


def test_saved_is_the_treated_mean_beside_that_of_the_control_arm(tmp_path: Path) -> None:
    assert saved(folder_of(tmp_path / "both", LINES)) == pytest.approx(1 - 10 / 40)
    with pytest.raises(NeverActive, match="an arm has no rollout"):
        saved(folder_of(tmp_path / "one", LINES[:1]))


def test_accuracy_is_that_of_the_last_evaluation(tmp_path: Path) -> None:
    run = folder_of(tmp_path / "run", LINES)
    assert accuracy(run) is None
    scores = {"k": 4, "n": 96, "pass@k": 1.0, "mean_length": 9.0, "eos_rate": 1.0, "wall_s": 1.0}
    head = {"policy_version": 1, "step": 1, "tokens_trained": 9}
    write_lines(run.path / "eval.jsonl", [{**head, **scores, "avg@k": share} for share in (0.25, 0.5)])
    assert accuracy(run) == pytest.approx({"avg": 0.5, "se": (0.25 / 96) ** 0.5, "k": 4, "problems": 96})


def test_the_list_ends_with_the_drawn_token_where_it_is_not_among_the_likeliest() -> None:
    rows = np.log(np.array([[0.1, 0.4, 0.3, 0.15, 0.05]] * 2))
    tokens = np.array([4, 3], np.int32)
    ids = list_of(rows, tokens, 3)
    assert ids.tolist() == [[1, 2, 4], [1, 2, 3]]
    found = listed(rows, tokens, ids, Outcomes((0,), 5, 5, 1))
    assert found.support_ids.tolist() == [[1], [1]]
    assert found.support[:, 0].tolist() == [UNLISTED] * 2  # STOP is in the tail
    assert found.tail is not None and np.exp(found.tail) == pytest.approx([0.6, 0.6])


def test_verdicts_differ_in_being_or_in_place() -> None:
    first, later = Cut(9, 5, "kl"), Cut(10, 6, "kl")
    found = differing([None, first, first, first], [None, None, later, first])
    assert found == {"only_one_cuts": 1, "another_token": 1}


def test_tables_have_ratios_within_a_repeat() -> None:
    def point(slots: float, vllm: float) -> dict[str, dict[str, float]]:
        speeds = {"slots": slots, "vllm": vllm}
        return {engine: {"tokens_per_s": speed, "all_processors": 0.5} for engine, speed in speeds.items()}

    text = speed_table([{"16": point(100, 50), "64": point(100, 100)}, {"16": point(200, 40), "64": point(200, 50)}])
    assert "| 16 | 150 (100–200) | 45 (40–50) | 0.35 (0.2–0.5) | 0.65 (0.5–0.8) | 0.5 (0.5–0.5) |" in text
    stops = stop_table([{"slots": [1.0, 3.0], "vllm": [10.0]}, {"slots": [4.0, 4.0], "vllm": [30.0]}])
    assert "| slots | 4 | 3 (2–4) | " in stops and "| vllm | 2 | 20 (10–30) | 20 (10–30) |" in stops


def test_the_table_of_runs_shows_books_and_counter() -> None:
    run: dict[str, Any] = {
        "seconds": 20.0,
        "tokens_generated": 1234,
        "server_counted": None,
        "books_closed": True,
        "accuracy": {"avg": 0.5, "se": 0.051},
        "saved": 0.25,
        "overshoot": {"stopped": 12, "tokens_p50": 8.0, "tokens_p95": 20.0, "tokens_p99": 31.0},
    }
    other = {**run, "server_counted": 1234, "books_closed": False, "accuracy": None, "saved": 0.0}
    text = run_table([{"slots": run, "vllm": other}])
    assert "| held-out avg@k ± standard error | 0.500 ± 0.051 | not evaluated |" in text
    assert "| tokens written, by the server's counter |  | 1,234 |" in text
    assert "| books closed | yes | NO |" in text
    assert "| the same, p99 | 31 (31–31) | 31 (31–31) |" in text
    assert "| share of tokens saved, treated against control | 0.25 (0.25–0.25) | 0 (0–0) |" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--out"),
        (["--out", "{}"], "expected a file in a folder that is there"),
        (["--out", "{}/o.json", "--only", "all"], "'all' is not known; allowed: speed, stop, run, verdicts"),
        (["--out", "{}/o.json", "--models", "teacher"], "'teacher' is not known; allowed: student, made"),
        (["--out", "{}/o.json", "--chunks", "16,x"], "a whole number of at least 1"),
    ],
)
def test_bad_arguments_exit_with_2(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        writers.main([word.format(tmp_path) for word in words])
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--student", "{}/none"], "no model there; make one with `katana pretrain --which student --for-vllm"),
        (["--student", "{}/none", "--url", "http://127.0.0.1:9"], "no model there"),
        (["--models", "made", "--only", "speed", "--vllm-python", "{}/none"], "`make .venv-vllm/.ready` makes it"),
    ],
)
def test_what_is_missing_exits_with_2(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--out", f"{tmp_path}/o.json", "--work", f"{tmp_path}/work", *(word.format(tmp_path) for word in words)]
    assert writers.main(given) == 2
    assert said in capsys.readouterr().err


def test_the_command_of_a_server_has_its_threads_length_and_slots() -> None:
    words = command(Path("/opt/python"), threads=2, length=300, slots=16)
    text = " ".join(words)
    assert words[0] == "env" and "OMP_NUM_THREADS=2" in words and "{model}" in words and "{port}" in words
    assert "--max-model-len 300 --max-num-seqs 16" in text


@pytest.mark.slow
def test_speed_stops_and_verdicts_are_measured_before_a_server(tmp_path: Path) -> None:
    student = make_qwen3(tmp_path / "student", 0)
    options = ("--max-model-len", "216", "--max-logprobs", "20", "--max-num-seqs", "4")
    argv = [*STANDIN, "--model", "{model}", "--host", "127.0.0.1", "--port", "{port}", *OPTIONS, *options]
    out = tmp_path / "o.json"
    words = ["--only", "speed,stop,verdicts", "--models", "student", "--rollouts", "4", "--chunks", "8,500"]
    sizes = ["--seconds", "1", "--stops", "3", "--texts", "6", "--repeats", "2", "--work", str(tmp_path / "work")]
    with serving(argv, student) as server:
        given = ["--out", str(out), "--student", str(student), "--url", server.url, *words, *sizes]
        assert writers.main(given) == 0
        assert server.generated() > 0
    found = json.loads(out.read_text())
    speeds = found["speed, student"]
    assert [[*one] for one in speeds] == [["8", "192"]] * 2  # 500 is longer than a completion
    points = [point[engine] for one in speeds for point in one.values() for engine in ("slots", "vllm")]
    assert all(point["tokens_per_s"] > 0 for point in points)
    assert all(0 < point["own_processors"] < point["all_processors"] + 0.1 for point in points)  # counted in 10 ms
    assert all(len(one[engine]) == 3 for one in found["stop, student"] for engine in ("slots", "vllm"))
    verdicts = found["verdicts, student"]
    assert verdicts["texts"] == 6
    assert 0 < verdicts["tokens_with_a_stop_id_unlisted"] < 1  # random weights: STOP is as likely as others
    nats = verdicts["nats"]
    # Random weights leave much to the tail; what the list leaves out explains all of it but rounding.
    assert nats["server and exact"]["max"] > 1e-2
    assert nats["by how much the latter is above the bound"]["max"] < 1e-4
    by_list = nats["server's list of the exact numbers, and exact"]
    assert nats["server and exact"]["max"] == pytest.approx(by_list["max"], rel=1e-3)
