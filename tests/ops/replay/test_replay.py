"""`katana replay`: figures worked out by hand, the files of a sweep, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from run_folders import CONFIG, booked, line, trace_line, write_lines

from common.config import ConfigError, load
from common.pretrained import find_model, load_tokenizer
from common.rids import rid_of
from common.termination import Cut
from ops.cli.main import main
from ops.replay.answers import Answers, judged
from ops.replay.command import replay
from ops.replay.record import read_record
from ops.replay.results import HitShare, Outcome, outcomes, ratio_intervals, saving_intervals
from ops.replay.verdicts import Judgement, Replay
from ops.stats.intervals import wilson
from ops.stats.saving import length_saving
from ops.tasks.arithmetic import Arithmetic
from ops.tasks.source import TaskSource

SHIPPED = CONFIG.replace("./absent-", "ops/models/")
UNCUT = SHIPPED.replace("termination: {", "termination: {policy: none, ")
TEXT = "1+1=2#{};;;;;;;;;"  # 16 tokens; the answer ends behind 8 characters, which are 7 of them: "+1" is one
ANSWERS = [Arithmetic().problem(place, split="train", seed=0).answer for place in range(200)]
PROBLEMS = [place for place, answer in enumerate(ANSWERS) if len(answer) == 2]


def fill(folder: Path, rollouts: Sequence[dict[str, Any]], config: str = UNCUT) -> Path:
    """A run's folder with these rollouts, one after the other; each says what is not as usual.

    `text`: what was written, {} is the right answer, of two digits; `values`: its divergences, 0.5 nats where not said;
    the other names are of a booked line.
    """
    folder.mkdir(exist_ok=True)
    tokenizer = load_tokenizer(find_model("ops/models/student", weights=False))
    lines, traces = [], []
    for place, changes in enumerate(rollouts):
        changes = dict(changes)
        text = changes.pop("text", TEXT).format(ANSWERS[PROBLEMS[place % len(PROBLEMS)]])
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        values = changes.pop("values", [0.5] * len(ids))
        keep, trigger = changes.pop("cut_at", (len(ids), len(ids)))
        booked = line(
            rid=rid_of(place),
            problem=PROBLEMS[place % len(PROBLEMS)],
            active="policy: none" not in config,
            tokens_generated=len(ids),
            tokens_kept=keep,
            tokens_detection=trigger - keep,
            tokens_overshoot=len(ids) - trigger,
            admitted_unix_s=1e9 + place,
            verdict_unix_s=1e9 + place + 0.5,
        )
        lines.append(booked | changes)
        traced = trace_line(values, keep, trigger, lines[-1]["arm"], rid_of(place), ids)
        traces.append(traced | {"threshold": lines[-1]["threshold"]})
    write_lines(folder / "rollouts.jsonl", lines)
    write_lines(folder / "traces.jsonl", traces)
    (folder / "config.yaml").write_text(config)
    return folder


def figures(folder: Path, *overrides: str) -> Outcome:
    """The outcome of one setting, computed anew."""
    record = read_record(folder)
    settings = load(folder / "config.yaml", [f"termination.{one}" for one in overrides]).termination
    verdicts = [Replay(record).recomputed(settings)]
    return outcomes(record, verdicts, judged(record, verdicts, folder)[0])[0]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "replay" / "replay.csv").open() as file:
        return list(csv.DictReader(file))


# --- figures by hand ---


def test_false_stops_by_hand(tmp_path: Path) -> None:
    folder = fill(
        tmp_path / "run",
        [
            {"text": TEXT},  # right: the answer ends at 7
            {"text": "1+1=2;1+1=2#{};;;;"},  # right: 16 tokens, at 12
            {"text": "2#{}"},  # right, and over before it could be cut
            {"text": TEXT, "correct": False},
            {"text": TEXT, "correct": None},
            {"text": ";" * 11, "correct": True},  # right, it is said; to the verifier it is not, so it is left out
        ],
    )
    found = figures(folder, "policy=fixed", "fixed_tokens=8")
    assert found.early is not None and found.late is not None and found.unwritten is not None
    assert (found.early.hits, found.early.count) == (1, 3)
    assert (found.unwritten.hits, found.late.hits) == (1, 1)
    assert (found.wrong.hits, found.wrong.count) == (1, 1)
    assert (found.cut.hits, found.cut.count, found.active) == (5, 6, 6)
    assert found.generated == found.kept == pytest.approx((5 * 8 + 4) / 6)
    assert found.whole == pytest.approx((4 * 16 + 4 + 11) / 6)
    assert found.saving == pytest.approx(1 - 44 / 79)
    later = figures(folder, "policy=fixed", "fixed_tokens=6").early
    assert later is not None and later.hits == 2


def test_an_answer_that_is_written_and_not_kept_is_a_false_stop(tmp_path: Path) -> None:
    # Windows of 4 lie below 0.1 from token 9 on: it fires at token 10, and keeps what is before the first, 5 tokens.
    values = [0.5] * 5 + [0.01] * 11
    folder = fill(tmp_path / "run", [{"values": values}, {"values": [0.5] * 16}])
    found = figures(folder, "policy=kat_absolute", "floor_nats=0.1", "warmup_steps=0")
    # The first rollout has no number, as the first of any run.
    assert (found.active, found.cut.hits) == (1, 0)
    folder = fill(tmp_path / "run", [{"values": [0.5] * 16}, {"values": values}])
    found = figures(folder, "policy=kat_absolute", "floor_nats=0.1", "warmup_steps=0")
    assert (found.generated, found.kept, found.saving) == (10, 5, pytest.approx(6 / 16))
    assert found.early is not None and found.unwritten is not None
    assert (found.early.hits, found.unwritten.hits) == (1, 0)


def test_the_signal_behind_the_triggers_by_hand(tmp_path: Path) -> None:
    # It fires at token 10 of those that fall to 0.01. One of them is alive again behind it, at half of the uncut ones.
    falling, waking = [0.5] * 5 + [0.01] * 11, [0.5] * 5 + [0.01] * 5 + [0.2] * 6
    first, uncut = {"values": [0.5] * 16}, {"values": [0.4] * 16}
    settings = ("policy=kat_absolute", "floor_nats=0.1", "warmup_steps=0")
    found = figures(fill(tmp_path / "one", [first, {"values": falling}, uncut]), *settings)
    assert found.signal == pytest.approx(0.01 / 0.4)
    found = figures(fill(tmp_path / "two", [first, {"values": falling}, {"values": waking}, uncut]), *settings)
    assert found.signal == pytest.approx((0.01 + 0.2) / 2 / 0.4)
    # Draws may hold the one and not the other.
    assert found.signal_interval == (pytest.approx(0.01 / 0.4), pytest.approx(0.2 / 0.4))


def test_there_is_no_signal_to_compare_where_nothing_or_all_is_cut(tmp_path: Path) -> None:
    folder = fill(tmp_path / "run", [{"values": [0.5] * 16}] * 4)
    for tokens in (8, 16):
        found = figures(folder, "policy=fixed", f"fixed_tokens={tokens}")
        assert (found.signal, found.signal_interval) == (None, None)


def test_where_nothing_is_a_trap_the_signal_is_alive(tmp_path: Path) -> None:
    """Divergences that know nothing of each other and fall along the text: a cut tells nothing of what comes."""
    rng = np.random.default_rng(0)
    falling = np.exp(-np.arange(16) / 8)
    rollouts = [{"values": list(rng.lognormal(sigma=1.0, size=16) * falling)} for _ in range(600)]
    found = figures(fill(tmp_path / "run", rollouts), "policy=kat_absolute", "floor_nats=0.25", "warmup_steps=0")
    assert found.cut.value is not None and 0.2 < found.cut.value < 0.8
    assert found.signal_interval is not None
    assert found.signal_interval[0] < 1 < found.signal_interval[1]
    assert found.signal_interval[1] - found.signal_interval[0] < 0.4


BOXED = "data: {task: dataset, path: %s, prompt_key: q, answer_key: a, verifier: exact}"
REPEATED = "1=1\n" + "####2\n" * 5


def test_an_answer_that_is_repeated_is_kept_with_its_first(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "1+1?", "a": "2"}) + "\n")
    config = UNCUT + (BOXED % (tmp_path / "rows.jsonl")) + "\neval: {every_steps: 0}\n"
    folder = fill(tmp_path / "run", [{"text": REPEATED}, {"text": REPEATED}], config)
    ids = read_record(folder).rollouts[0].tokens.tolist()
    decode = load_tokenizer(find_model("ops/models/student", weights=False)).decode
    first = next(count for count in range(len(ids)) if "####2" in decode(ids[:count]))
    kept = figures(folder, "policy=fixed", f"fixed_tokens={first}")
    assert kept.early is not None and kept.late is not None
    assert (kept.early.hits, kept.late.hits, kept.early.count) == (0, 2, 2)
    lost = figures(folder, "policy=fixed", f"fixed_tokens={first - 1}")
    assert lost.early is not None and lost.unwritten is not None
    assert (lost.early.hits, lost.unwritten.hits) == (2, 2)


def test_a_text_is_judged_once_at_each_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fill(tmp_path / "run", [{}, {}])
    asked: list[tuple[int, int]] = []
    judge = TaskSource.judge

    def counted(source: TaskSource, problem: int, tokens: Any) -> bool | None:
        asked.append((problem, len(tokens)))
        return judge(source, problem, tokens)

    monkeypatch.setattr(TaskSource, "judge", counted)
    replay(folder, ["termination.policy=fixed"], ["termination.fixed_tokens=4,8", "termination.warmup_steps=0,1"])
    assert sorted(asked) == [(problem, length) for problem in PROBLEMS[:2] for length in (4, 8, 16)]


def test_answers_are_judged_with_the_model_that_the_run_left(tmp_path: Path) -> None:
    folder = fill(tmp_path / "run", [{}], UNCUT.replace("ops/models/student", "./absent"))
    shutil.copytree(find_model("ops/models/student"), folder / "model")
    found = figures(folder, "policy=fixed", "fixed_tokens=8")
    assert found.late is not None and found.late.hits == 1


def test_shares_of_rollouts_of_one_prompt_are_no_narrower_than_their_prompts(tmp_path: Path) -> None:
    texts = [TEXT, ";;;;;1+1=2#{};;;;"] * 10  # cut at 8: every other one is a false stop
    alone = fill(tmp_path / "alone", [{"text": text} for text in texts])
    four = fill(
        tmp_path / "four", [{"text": text, "problem": place} for place, text in enumerate(texts) for _ in range(4)]
    )
    one = outcome_of(alone)
    each = outcome_of(four)
    assert one.interval == wilson(one.hits, one.count)
    assert (one.hits, one.count) == (10, 20) and (each.hits, each.count) == (40, 80)
    assert one.interval is not None and each.interval is not None
    width = each.interval[1] - each.interval[0]
    assert width == pytest.approx(one.interval[1] - one.interval[0], rel=0.3)
    low, high = wilson(40, 80)
    assert width > 1.7 * (high - low)
    assert "each rollout has its own prompt" in replay(alone)
    assert "by a bootstrap by prompt (80 rollouts of 20 prompts)" in replay(four)
    assert "too narrow" not in replay(four)
    assert "with 2 prompts they are too narrow" in replay(fill(tmp_path / "few", [{}, {}]))


def outcome_of(folder: Path) -> HitShare:
    """The false stops at 8 tokens, every right rollout taken for one whose texts hold what their names say."""
    record = read_record(folder)
    settings = load(folder / "config.yaml", ["termination.policy=fixed", "termination.fixed_tokens=8"]).termination
    verdicts = [Replay(record).recomputed(settings)]
    starts = record.rollouts[0].tokens[0]
    right = {
        (place, end): end == 16 or one.tokens[0] == starts
        for place, one in enumerate(record.rollouts)
        for end in (8, 16)
    }
    found = outcomes(record, verdicts, Answers(right, frozenset()))[0].early
    assert found is not None
    return found


def test_where_all_prompts_are_alike_the_interval_keeps_its_width() -> None:
    of = np.ones((2, 40))
    of[1, 20:] = 0
    none, half = ratio_intervals(np.zeros((2, 40)), of, np.repeat(np.arange(10), 4).tolist())
    # The tables' upper limits for 0 of 10 and 0 of 5.
    assert none == (0.0, pytest.approx(0.3085, abs=5e-5))
    assert half == (0.0, pytest.approx(0.5218, abs=5e-5))


def test_rows_that_count_different_rollouts_say_so(tmp_path: Path) -> None:
    assert "Rows count different rollouts" not in replay(fill(tmp_path / "equal", [{}] * 3))
    folder = stop_run(tmp_path / "run")
    text = replay(folder, ["termination.fixed_tokens=8"], ["termination.policy=fixed,kat"])
    assert "Rows count different rollouts, " in text and "Compare rows of the same" in text
    assert "Rows count different rollouts, " in (folder / "replay" / "replay.md").read_text()


def test_the_saving_has_the_interval_of_the_summary() -> None:
    rng = np.random.default_rng(1)
    problems = np.repeat(np.arange(60), 4)
    whole = np.repeat(rng.integers(20, 200, 60), 4).astype(float)
    seen = np.round(whole * rng.uniform(0.4, 1.0, len(whole)))
    [found] = saving_intervals(seen[None], whole, np.ones((1, len(seen)), bool), problems.tolist())
    lines = [
        booked(arm=arm, problem=int(problem), tokens_generated=int(tokens))
        for arm, lengths in (("treated", seen), ("control", whole))
        for problem, tokens in zip(problems, lengths, strict=True)
    ]
    wanted = length_saving(lines)
    assert found == pytest.approx((wanted.low, wanted.high), abs=0.01)


def test_only_active_rollouts_count(tmp_path: Path) -> None:
    record = read_record(fill(tmp_path / "run", [{}, {}, {}]))
    cut = Cut(4, 4, "fixed")
    verdicts = [Judgement(None, False, cut), Judgement(0.5, True, cut), Judgement(0.7, True, None)]
    never = [Judgement(None, False, None)] * 3
    found, idle = outcomes(record, [verdicts, never], Answers({(0, 4): False, (1, 4): True}, frozenset()))
    assert (found.active, found.cut.hits, found.cut.count, found.generated) == (2, 1, 2, 10)
    assert found.number == pytest.approx(0.6)
    assert (idle.active, idle.saving, idle.saving_interval, idle.number) == (0, None, None, None)
    assert idle.cut.value is None


# --- which rollouts ---


def stop_run(folder: Path, config: str = SHIPPED) -> Path:
    # Windows of 4 lie below 0.2 from token 8 on: at the second of them it fires, and keeps what is before the first.
    quiet = [0.5] * 4 + [0.1] * 12
    return fill(
        folder,
        [
            {"active": False, "threshold": None},
            {"active": False, "threshold": None, "arm": "control"},
            {"arm": "control", "threshold": 0.2, "values": quiet, "cut_at": (4, 9)},
            {"threshold": 0.2, "values": quiet, "cut_at": (4, 9), "finish_reason": "kl_trap"},
            {"threshold": 0.2},
            {"arm": "control", "threshold": 0.2, "ending": "dropped", "reason": "run_end"},
        ],
        config,
    )


def test_what_could_be_stopped_is_left_out_and_said(tmp_path: Path) -> None:
    folder = stop_run(tmp_path / "run")
    text = replay(folder)
    assert "counted   2 control; 2 right, 0 wrong" in text
    assert "besides   1 control and 1 treated" in text
    assert "1 treated that were stopped" in text and "1 treated that were not: they alone" in text
    assert "counted   2 control and 1 treated" in replay(folder, arm="all")
    assert [one.free for one in read_record(folder).rollouts] == [True, True, True, False, False, True]


def test_a_record_that_does_not_come_out_is_said(tmp_path: Path) -> None:
    folder = fill(tmp_path / "run", [{}, {"cut_at": (3, 9)}])
    assert "1 of 2 recorded verdicts" in replay(folder)
    assert "not made by this code" in replay(folder)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("termination.calibrate_on=completed", "calibrate_on: completed takes minima"),
        ("termination.control_fraction=0.1", "control_fraction decides"),
    ],
)
def test_a_run_that_stopped_rollouts_cannot_tell_everything(tmp_path: Path, key: str, message: str) -> None:
    folder = stop_run(tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        replay(folder, [key])
    # Of such a run itself only the recorded numbers are used.
    own = stop_run(tmp_path / "own", SHIPPED.replace("window: 4", "calibrate_on: completed, window: 4"))
    assert "same, computed" not in replay(own)


def test_answers_that_cannot_be_placed_leave_their_columns_out(tmp_path: Path) -> None:
    folder = fill(tmp_path / "run", [{}, {}], UNCUT.replace("ops/models/student", "./absent"))
    assert "answers   not judged, because the task or the tokenizer is not available here" in replay(folder)
    assert figures(folder, "policy=fixed", "fixed_tokens=8").early is None
    none = fill(tmp_path / "none", [{"correct": None}] * 2)
    assert "answers   none was verified" in replay(none)


# --- the files of a sweep ---


def test_a_sweep_writes_its_table_and_its_picture(tmp_path: Path) -> None:
    folder = fill(tmp_path / "run", [{}] * 12 + [{"correct": False}] * 4)
    text = replay(
        folder,
        ["termination.policy=fixed"],
        ["termination.fixed_tokens=4,8,12,16", "termination.warmup_steps=0,1"],
    )
    assert f"wrote {folder}/replay/replay.csv, replay.md, replay.png" in text
    found = rows(folder)
    assert [row["setting"] for row in found[:3]] == ["as recorded", "same, computed", "fixed_tokens 4, warmup_steps 0"]
    assert [row["numbers"] for row in found[:2]] == ["recorded", "computed"]
    assert len(found) == 2 + 8
    by = {row["fixed_tokens"]: row for row in found[2::2]}
    assert [float(by[tokens]["saving"]) for tokens in ("4", "8", "12", "16")] == [0.75, 0.5, 0.25, 0]
    assert [by[tokens]["right_cut_before_answer"] for tokens in ("4", "8", "16")] == ["12", "0", "0"]
    assert by["8"]["right_cut_behind_answer_of"] == "12" and by["8"]["wrong_cut"] == "4"
    assert (folder / "replay" / "replay.md").read_text().count("| fixed_tokens ") == 8
    with Image.open(folder / "replay" / "replay.png") as picture:
        assert picture.size == (1100, 700)
    assert not list((folder / "replay").glob("*.tmp"))
    # Without a sweep, nothing is written.
    other = fill(tmp_path / "other", [{}])
    assert "fixed_tokens 4" in replay(other, ["termination.policy=fixed", "termination.fixed_tokens=4"])
    assert not (other / "replay").exists()


def test_long_names_are_not_cut_off(tmp_path: Path) -> None:
    folder = fill(tmp_path / ("a-run-with-a-name-as-long-as-a-sentence" * 2), [{}] * 12)
    sweeps = ["termination.fixed_tokens=4,8", "termination.detection_tokens=1,2", "termination.scheduled_tokens=8,12"]
    for asked in (sweeps, sweeps[:1]):
        replay(folder, ["termination.policy=fixed"], asked)
        with Image.open(folder / "replay" / "replay.png") as picture:
            width, height = picture.size
            edge = picture.convert("L").crop((width - 10, 0, width, height))
            assert edge.getextrema() == (255, 255)


def test_a_sweep_in_which_nothing_becomes_active_says_so(tmp_path: Path) -> None:
    folder = fill(tmp_path / "run", [{}] * 3)
    assert "–" in replay(folder, ["termination.policy=kat"], ["termination.warmup_steps=50,60"])
    assert (folder / "replay" / "replay.png").stat().st_size > 1000


# --- what is refused ---


@pytest.mark.parametrize(
    ("sets", "sweeps", "message"),
    [
        (["learner.max_steps=3"], [], "a replay knows only verdicts; allowed: termination.policy, termination.window"),
        ([], ["seed=1,2"], "expected key=value"),
        (["termination.teacher_top_k=8"], [], "the recorded divergences were made with it"),
        (["termination.shadow=true"], [], "as if cuts stopped"),
        (["termination.eta"], [], "expected key=value, for example termination.eta=0.1"),
        (["termination.eta=2"], [], "termination.eta"),
        (["termination.etta=0.2"], [], "unknown key 'termination.etta'.*eta"),
        (["termination.policy=katt"], [], "no such policy"),
        (["termination.policy=absent_module:P"], [], "cannot be imported"),
        (
            ["termination.policy=own_policy:Sure", "termination.options={nats: 1}"],
            [],
            r"^policy own_policy:Sure reads entropy, which this record lacks; record a run with feeder.record_views: t",
        ),
        ([], ["termination.eta=0.1,,0.2"], "a value is empty"),
        ([], ["termination.eta=0.1", "termination.eta=0.2"], "given twice"),
        (["termination.eta=0.1"], ["termination.eta=0.2"], "given twice"),
        ([], [f"termination.window={','.join(map(str, range(1, 402)))}"], "401 settings; at most 400"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, sets: list[str], sweeps: list[str], message: str) -> None:
    folder = fill(tmp_path / "run", [{}])
    with pytest.raises(ConfigError, match=message):
        replay(folder, sets, sweeps)
    assert not (folder / "replay").exists()


def test_a_folder_that_cannot_be_replayed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run's folder"):
        replay(tmp_path)
    folder = fill(tmp_path / "run", [{}, {}])
    with pytest.raises(ConfigError, match="no control rollout that ended unstopped"):
        replay(folder, arm="control")
    (folder / "traces.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"nothing to replay: no rollout has a trace \(feeder.record_traces\)"):
        replay(folder)
    (folder / "traces.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"traces\.jsonl: there is no such file"):
        replay(folder)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("rollouts", {"problem": "x"}, r"rollouts\.jsonl:2: damaged \(problem is 'x'"),
        ("traces", {"keep": 99}, r"traces\.jsonl:2: damaged"),
        ("traces", {"divergence": "!"}, r"traces\.jsonl:2: damaged"),
        ("traces", {"cut": None, "trigger": None}, r"traces\.jsonl:2: damaged"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, file: str, change: dict[str, Any], message: str) -> None:
    folder = fill(tmp_path / "run", [{}, {}])
    path = folder / f"{file}.jsonl"
    lines = [json.loads(one) for one in path.read_text().splitlines()]
    write_lines(path, [lines[0], lines[1] | change])
    with pytest.raises(ConfigError, match=message):
        replay(folder)
    path.write_text('{"torn')
    with pytest.raises(ConfigError, match="nothing to replay"):
        replay(folder)
    path.write_text("[1]\n")
    with pytest.raises(ConfigError, match=rf"{file}\.jsonl:1: damaged"):
        replay(folder)


def test_old_lines_without_times_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = fill(tmp_path / "run", [{}, {"verdict_unix_s": None}])
    assert "left out  1 without a trace or a time on record" in replay(folder)


def test_a_folder_that_is_no_run_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(tmp_path)]) == 2
    assert f"error: {tmp_path}" in capsys.readouterr().err
