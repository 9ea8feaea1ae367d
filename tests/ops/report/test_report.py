"""The report: its figures against numbers worked by hand, and a picture for a run's folder in any state."""

import json
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from run_folders import CONFIG, booked, evaluation, fill, fill_long, line, step_line, trace_line, write_lines

from common.config import ConfigError, parse
from common.pretrained import PACKAGE_ROOT
from common.runfiles.records import BookLine, Evaluation, Saving, Trace
from common.runfiles.run import RunFolder
from ops import plots
from ops.cli.main import main
from ops.report import command as report
from ops.report import data as report_data
from ops.report import panels as report_panels
from ops.report import plots as report_plots
from ops.report import run as report_run
from ops.report import series as report_series
from ops.stats import intervals
from ops.stats.saving import length_saving
from ops.words import policy_text

pytestmark = pytest.mark.slow


def test_lines_here_have_the_fields_of_the_books() -> None:
    always = {one.name for one in fields(BookLine) if not one.metadata.get("sparse")}
    assert always == set(line()) <= {one.name for one in fields(BookLine)}


def trace(divergence: list[float], keep: int, trigger: int, arm: str = "treated", rid: str = "r0") -> report_data.Trace:
    return Trace.from_json(trace_line(divergence, keep, trigger, arm, rid))


# --- figures -------------------------------------------------------------------------------------------------------


def test_tokens_at_a_step_are_all_that_was_booked_up_to_its_last_trajectory() -> None:
    lines = [
        booked(tokens_generated=5),
        booked(tokens_generated=7, ending="dropped", reason="empty"),
        booked(tokens_generated=11),  # the second trajectory: step 1 at 23 tokens
        booked(tokens_generated=2, ending="dead"),
        booked(tokens_generated=3),
        booked(tokens_generated=4),  # the fourth: step 2 at 32
        booked(tokens_generated=100),
    ]
    assert report_data.generated_at_steps(lines, 2) == [0, 23, 32]
    assert report_data.generated_at_steps([], 2) == [0]


def test_accuracy_is_over_tokens_and_leaves_out_steps_that_are_not_booked_yet() -> None:
    curve = report_data.accuracy_curve(
        map(Evaluation.from_json, [evaluation(2, 0.5), evaluation(0, 0.25), evaluation(3, 0.75)]), [0, 23, 32]
    )
    assert [(point.step, point.tokens, point.avg_at_k) for point in curve] == [(0, 0, 0.25), (2, 32, 0.5)]


def test_length_is_binned_by_version_without_rollouts_that_the_run_ended() -> None:
    lines = [
        booked(tokens_generated=10, policy_version_last=0),
        booked(tokens_generated=14, policy_version_last=1),
        booked(tokens_generated=30, policy_version_last=3),
        booked(tokens_generated=99, policy_version_last=3, arm="control"),
        booked(tokens_generated=1, ending="dropped", reason="run_end"),
        booked(tokens_generated=1, ending="dead"),
        booked(tokens_generated=1, ending="dropped", reason="stale", finish_reason="unfinished"),
    ]
    first, second = report_data.length_curve(lines, "treated", 2)
    assert (first.version, first.tokens, first.rollouts) == (0.5, 12.0, 2)
    assert first.half_width == pytest.approx(1.96 * 2.0)  # s = √8, over √2
    assert (second.version, second.tokens, second.half_width) == (3.0, 30.0, 0.0)


@pytest.mark.parametrize(("newest", "width"), [(0, 1), (15, 1), (16, 2), (79, 5)])
def test_there_are_at_most_sixteen_bins(newest: int, width: int) -> None:
    assert report_data.bin_width([booked(policy_version_last=newest)]) == width


def test_active_from_the_first_version_that_could_cut() -> None:
    lines = [
        booked(active=False, policy_version_last=1),
        booked(policy_version_first=2, policy_version_last=5),
        booked(policy_version_first=3, policy_version_last=3),
    ]
    assert report_data.active_from(lines) == 3
    assert report_data.active_from(lines[:1]) is None


def test_fired_share_counts_treated_rollouts_that_could_have_been_cut() -> None:
    cut = {"tokens_kept": 4, "tokens_detection": 5, "tokens_overshoot": 1}
    lines = [booked(), booked(**cut), booked(arm="control", **cut), booked(active=False)]
    assert report_data.fired_share(lines) == (1, 2)


def test_every_generated_token_has_one_fate() -> None:
    lines = [
        booked(tokens_kept=4, tokens_trained=4, tokens_detection=5, tokens_overshoot=1),
        booked(ending="dropped", reason="stale", tokens_trained=0),
        booked(arm="control", tokens_kept=4, tokens_trained=10, tokens_detection=5, tokens_overshoot=1),
    ]
    assert report_data.token_fates(lines, "treated") == report_data.Fates(4, 10, 5, 1)
    assert report_data.token_fates(lines, "treated").total == 20
    assert report_data.token_fates(lines, "control") == report_data.Fates(10, 0, 0, 0)  # control_trains: whole


def test_window_means() -> None:
    means = report_data.window_means(np.array([1.0, 3.0, 5.0, 1.0], dtype=np.float32), 2)
    assert np.isnan(means[0])
    assert means[1:].tolist() == [2.0, 4.0, 3.0]
    assert np.isnan(report_data.window_means(np.ones(3), 4)).all()


def test_heat_map_is_the_logarithm_and_empty_after_the_end() -> None:
    image = report_data.heat_map([trace([0.1, 10.0, 1.0], 1, 2), trace([0.0], 0, 1)], 2)
    assert image[0].tolist() == pytest.approx([-1, 1])
    assert image[1].tolist() == pytest.approx([-6, float("nan")], nan_ok=True)


def test_rows_are_spread_over_the_run_and_sorted_by_cut() -> None:
    traces = [trace([1.0] * 9, keep, 9) for keep in (5, 8, 1, 8, 3)]
    assert [row.keep for row in report_data.heat_rows(traces, 3)] == [1, 3, 5]
    assert report_data.spread([1, 2], 5) == [1, 2]


def test_one_long_rollout_does_not_set_the_width() -> None:
    rows = [trace([1.0] * 10, 2, 4) for _ in range(9)] + [trace([1.0] * 90, 2, 12)]
    assert report_data.shown_width(rows) == 12
    assert report_data.shown_width(rows[:9]) == 10


def test_mean_divergence_on_the_sides_of_the_cut() -> None:
    assert report_data.mean_divergences([trace([4.0, 2.0, 1.0, 1.0, 8.0], 2, 4), trace([9.0], 1, 1)]) == (5.0, 1.0, 8.0)
    assert report_data.mean_divergences([]) == (None, None, None)


def test_the_typical_rollout_keeps_the_median_and_is_the_newest_of_equals() -> None:
    traces = [trace([1.0] * 9, keep, 9, rid=f"r{place}") for place, keep in enumerate((0, 0, 0, 2, 5, 5, 7))]
    chosen = report_data.typical(traces)
    assert chosen is not None
    assert chosen.rid == "r5"
    assert report_data.typical([]) is None


def test_text_around_the_cut() -> None:
    cut = trace([1.0] * 20, 8, 14)
    assert report_data.cut_text(cut, lambda ids: "".join(chr(97 + i) for i in ids), 60) == (
        "abcdefgh",
        "ijklmn",
        "opqrst",
    )
    assert report_data.cut_text(cut, lambda ids: "".join(chr(97 + i) for i in ids), 9) == ("…fgh", "ij…n", "opq…")
    assert report_data.visible("a\n\x00$b") == "a↵·$b"


def test_traces_are_sampled_by_kind(tmp_path: Path) -> None:
    lines = [trace_line([1.0] * 6, keep, 6, rid=f"r{keep}") for keep in range(5)]
    lines += [
        trace_line([1.0] * 6, 6, 6, rid="whole"),
        trace_line([1.0] * 6, 2, 4, "control", "marked"),
        trace_line([1.0] * 6, 6, 6, "control", "unmarked"),
    ]
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(item) + "\n" for item in lines) + '{"torn')
    samples = report_data.sample_traces(RunFolder(tmp_path), 3)
    assert [item.rid for item in samples["treated"].traces] == ["r0", "r2", "r4"]
    assert samples["treated"].found == 5
    assert [item.rid for item in samples["control"].traces] == ["marked"]
    assert [item.rid for item in samples["uncut"].traces] == ["whole"]


def test_policy_and_finish_reasons_in_words() -> None:
    config = parse(CONFIG)
    lines = [booked(threshold=0.25), booked(threshold=0.5), booked(threshold=None, finish_reason="kl_trap"), booked()]
    thresholds = [line.threshold for line in lines]
    assert policy_text(config, thresholds).endswith("threshold 0.25 … 0.5 nats")
    assert policy_text(config, []).endswith("threshold never active")
    fixed = parse(CONFIG, ["termination.policy=fixed", "termination.fixed_tokens=7"])
    assert policy_text(fixed, thresholds) == "fixed: the first 7 tokens"
    custom = parse(CONFIG, ["termination.policy=katydid.policies:Chirp"])
    assert policy_text(custom, thresholds) == "katydid.policies:Chirp"
    repetition = parse(CONFIG, ["termination.policy=repetition", "termination.shadow=true"])
    assert policy_text(repetition, [None]) == "repetition (shadow): the first 8 tokens that come twice"
    margin = parse(CONFIG, ["termination.policy=margin_change", "termination.apply=mask"])
    assert policy_text(margin, [8.0]) == "margin_change (mask): where the margin falls, drift 0.5, threshold 8 nats"
    adaptive = parse(CONFIG, ["termination.policy=adaptive"])
    assert policy_text(adaptive, [0.05]) == "adaptive: δ 0.05, blocks of 8 tokens"
    assert report_data.reasons_text(lines) == "eos 3 · kl_trap 1"


@pytest.mark.parametrize(
    ("ledger", "words"),
    [
        ({"admitted": 6, "trained": 4, "dropped": {"empty": 1}, "dead": 1, "open": 0}, "(closed)"),
        ({"admitted": 6, "trained": 4, "dropped": {}, "dead": 0, "open": 2}, "(adds up)"),
        ({"admitted": 6, "trained": 4, "dropped": {}, "dead": 0, "open": 0}, "DOES NOT ADD UP: 4"),
        ({}, "cannot be read"),
    ],
)
def test_the_ledger_is_added_up(tmp_path: Path, ledger: dict[str, Any], words: str) -> None:
    (tmp_path / "ledger.json").write_text(json.dumps(ledger))
    assert words in report_data.ledger_text(RunFolder(tmp_path))
    assert report_data.ledger_text(RunFolder(tmp_path / "absent")) == "no ledger.json yet"


# --- the picture ---------------------------------------------------------------------------------------------------


def pixels(path: Path) -> Any:
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return imread(path)


def words(run: report_run.ReportRun) -> str:
    """All text of the picture."""
    figure = report.draw(run, None)
    titles = [panel.get_title(loc="left") for panel in figure.axes]
    texts = [text.get_text() for text in (*figure.texts, *(text for panel in figure.axes for text in panel.texts))]
    return "\n".join(titles + texts)


def test_the_picture_is_written(tmp_path: Path) -> None:
    path = report.write_report(fill(tmp_path))
    assert path == tmp_path / "report.png"
    image = pixels(path)
    assert image.shape[:2] == (1000, 1600)
    assert 0.02 < (image[..., :3].min(axis=2) < 0.9).mean() < 0.6  # neither blank nor black


def test_titles_state_the_finding(tmp_path: Path) -> None:
    text = words(report_run.read_run(fill(tmp_path)))
    assert "Accuracy: avg@4 0.20 → 0.40 in 40 tokens" in text
    assert "Length saving 0 %" in text
    assert "Cut where the teacher agrees: 1 of 2 rollouts" in text
    assert "Of 40 tokens, 60 % were trained on" in text
    assert "(closed)" in text


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.1, 0.3, "20 % shorter by cutting"), (-0.1, 0.5, "no clear length saving"), (None, None, "no clear")],
)
def test_the_headline_claims_no_more_than_the_interval(low: float | None, high: float | None, said: str) -> None:
    assert said in report_panels._saved(Saving(0.2, low, high))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("eval.jsonl", "no eval.jsonl yet"),
        ("rollouts.jsonl", "no finished rollout in rollouts.jsonl"),
        ("traces.jsonl", "no traces.jsonl"),
        ("ledger.json", "no ledger.json yet"),
        ("metrics.jsonl", "0 of 2 steps"),
    ],
)
def test_a_panel_says_what_is_missing(tmp_path: Path, name: str, said: str) -> None:
    (fill(tmp_path) / name).unlink()
    assert said in words(report_run.read_run(tmp_path))


def test_a_folder_with_only_a_config_has_a_picture(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "rollouts.jsonl").touch()
    (tmp_path / "traces.jsonl").write_text('{"rid": "torn')
    assert pixels(report.write_report(tmp_path)).shape[:2] == (1000, 1600)


def test_a_run_that_cuts_nothing(tmp_path: Path) -> None:
    fill(tmp_path, config=CONFIG.replace("{window", "{policy: none, window"))
    (tmp_path / "traces.jsonl").write_text(json.dumps(trace_line([0.1, 0.2, 0.3], 3, 3)) + "\n")
    text = words(report_run.read_run(tmp_path))
    assert "The policy never fired" in text
    assert "nothing is cut (policy none)" in text


def test_text_is_decoded_by_the_tokenizer_of_the_run(tmp_path: Path) -> None:
    fill(tmp_path, config=CONFIG.replace("./absent-student", "ops/models/student"))
    decode = report_run.find_decoder(report_run.read_run(tmp_path))
    assert decode is not None
    assert isinstance(decode([3, 4]), str)
    fill(tmp_path)
    assert report_run.find_decoder(report_run.read_run(tmp_path)) is None


def test_without_its_student_a_run_uses_the_tokenizer_in_its_folder(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE_ROOT / "ops" / "models" / "student", fill(tmp_path) / "model")
    decode = report_run.find_decoder(report_run.read_run(tmp_path))
    assert decode is not None
    assert decode([3, 4])


@pytest.mark.parametrize("name", ["figures", "report.png", "report.html"])
def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path)
    if name == "figures":
        (tmp_path / name).write_text("a file")
    else:
        (tmp_path / name).mkdir()
    assert main(["report", str(tmp_path)]) == 2
    assert f"error: {tmp_path / name}: cannot be written (" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rollouts.jsonl", "traces.jsonl"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (fill(tmp_path) / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    assert main(["report", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert str(tmp_path / name) in told and "directory" in told.lower()


def test_no_runs_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)):
        report.write_report(tmp_path)
    with pytest.raises(ConfigError, match="absent"):
        report.write_report(tmp_path / "absent")


# --- series over the run -------------------------------------------------------------------------------------------


def test_the_saving_so_far_ends_with_that_of_the_whole_run() -> None:
    lines = [booked(problem=place, arm=("treated", "control")[place % 2]) for place in range(20)]
    lines += [booked(problem=place, arm="treated", tokens_generated=5) for place in range(20)]
    whole = length_saving(lines)
    curve = report_series.saving_curve(lines, whole)
    assert whole.ratio == pytest.approx(1 - (10 * 10 + 20 * 5) / 30 / 10)
    assert (curve[-1].tokens, curve[-1].ratio, curve[-1].low) == (300, whole.ratio, whole.low)
    assert curve[0].ratio == 0.0
    assert [point.tokens for point in curve] == sorted({point.tokens for point in curve})
    assert report_series.saving_curve([], Saving(None, None, None)) == []


def test_cut_rate_counts_treated_rollouts_that_could_have_been_cut() -> None:
    cut = {"tokens_kept": 4, "tokens_detection": 6}
    lines = [booked(active=False, **cut), booked(arm="control", **cut), *[booked(**cut)] * 12, *[booked()] * 4]
    first, second = report_series.fired_curve(lines)
    assert (first.share, second.share, first.count, second.count) == (1.0, 0.5, 8, 8)
    assert second.low < 0.5 < second.high
    assert first.tokens == np.mean([30, 40, 50, 60, 70, 80, 90, 100])
    # What the policy would have cut of the control arm, at its place among all tokens.
    [control] = report_series.fired_curve(lines, arm="control")
    assert (control.share, control.count, control.tokens) == (1.0, 1, 20)


def test_wilsons_interval() -> None:
    # 2 of 10 at 95 %: 0.0567 to 0.5098 (Wilson's formula by hand, z = 1.96)
    assert intervals.wilson(2, 10) == pytest.approx((0.0567, 0.5098), abs=1e-4)
    assert intervals.wilson(0, 10)[0] == 0.0


def test_thresholds_over_tokens() -> None:
    tokens, values = report_series.threshold_curve(
        [booked(threshold=None), booked(threshold=0.5), booked(threshold=0.25)]
    )
    assert tokens.tolist() == [20, 30]
    assert values.tolist() == [0.5, 0.25]


def test_reasons_are_shares_of_an_arm_the_most_frequent_first() -> None:
    lines = [
        *[booked()] * 8,
        *[booked(finish_reason="kl_trap")] * 8,
        booked(finish_reason="kl_trap"),
        booked(arm="control"),
    ]
    mix = report_series.reasons_mix(lines, "treated")
    assert mix.counts == {"kl_trap": 9, "eos": 8}
    assert list(mix.counts) == ["kl_trap", "eos"]
    assert (mix.shares["kl_trap"] + mix.shares["eos"]).tolist() == pytest.approx([1.0, 1.0])
    assert mix.shares["eos"].tolist() == pytest.approx([8 / 9, 0.0])


def test_staleness_of_trained_and_of_stale_trajectories() -> None:
    lines = [booked(), booked(staleness=2), booked(staleness=2), booked(staleness=5, ending="dropped", reason="stale")]
    lines += [booked(staleness=None, ending="dead"), booked(staleness=1, ending="dropped", reason="run_end")]
    assert report_series.staleness_counts(lines) == {"trained": {0: 1, 2: 2}, "dropped": {5: 1}}


def test_stage_latencies_are_of_rollouts_that_have_both_times() -> None:
    wrong = booked(ending="dead", admitted_unix_s=1.0, verdict_unix_s=9.0)
    timed = [booked(admitted_unix_s=10.0, verdict_unix_s=10.0 + wait, ended_unix_s=20.0) for wait in (1.0, 2.0, 6.0)]
    lines = [
        *timed,
        booked(),
        booked(admitted_unix_s=10.0),
        wrong,
    ]
    (written,) = report_series.stage_latencies(lines, "admission to verdict")
    (trained,) = report_series.stage_latencies(lines, "verdict to checkpoint")
    assert (written.median_s, written.count, trained.median_s) == (2.0, 3, 8.0)
    assert written.p95_s == pytest.approx(2 + 0.9 * 4)
    assert report_series.stage_latencies([booked()], "verdict to checkpoint") == []


def test_books_without_times_are_those_of_an_old_run(tmp_path: Path) -> None:
    old = {name: value for name, value in line().items() if not name.endswith("_unix_s")}
    write_lines(fill(tmp_path) / "rollouts.jsonl", [old])
    run = report_run.read_run(tmp_path)
    latency = report_plots.draw_all(run)["latency"]
    assert "the books have no times" in [text.get_text() for panel in latency.axes for text in panel.texts]


# --- damaged folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rollouts.jsonl", "[]\n", "rollouts.jsonl:1: damaged (expected an object, found list)"),
        ("rollouts.jsonl", json.dumps(line()) + "\n{oops}\n", "rollouts.jsonl:2"),
        ("rollouts.jsonl", '{"rid":"r0"}\n', "arm is missing"),
        ("rollouts.jsonl", json.dumps(line(tokens_generated="10")) + "\n", "tokens_generated is '10', expected int"),
        ("rollouts.jsonl", json.dumps(line(min_window=float("nan"))) + "\n", "min_window is not finite"),
        ("rollouts.jsonl", json.dumps(line(ended_unix_s="now")) + "\n", "ended_unix_s"),
        ("metrics.jsonl", '{"step": 1}\n', "policy_version is missing"),
        ("eval.jsonl", '{"step": 1, "avg@k": null}\n', "eval.jsonl:1"),
        ("traces.jsonl", '{"rid":"r0"}\n', "traces.jsonl:1: damaged"),
        ("traces.jsonl", json.dumps(trace_line([1.0], 1, 1) | {"divergence": "?"}) + "\n", "traces.jsonl:1: damaged"),
        ("traces.jsonl", json.dumps(trace_line([1.0], 3, 2)) + "\n", "keep 3, trigger 2, 1 tokens"),
        ("wall.json", "[]", "wall.json"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str, said: str) -> None:
    (fill(tmp_path) / name).write_text(content)
    with pytest.raises(ConfigError, match=re.escape(said)):
        report.write_report(tmp_path)
    assert main(["report", str(tmp_path)]) == 2


# --- plots ---------------------------------------------------------------------------------------------------------


def test_every_plot_is_a_separate_png(tmp_path: Path) -> None:
    report.write_report(fill_long(tmp_path, 60))
    written = {path.stem: pixels(path) for path in (tmp_path / "figures").iterdir()}
    assert set(written) == set(report_plots.PLOTS)
    for name, image in written.items():
        assert image.shape[1] >= 800, name
        assert 0.005 < (image[..., :3].min(axis=2) < 0.9).mean() < 0.8, f"{name} is blank or black"


def test_the_plot_of_the_drift_guards_says_what_is_missing(tmp_path: Path) -> None:
    folder = fill_long(tmp_path, 60)

    figure = report_plots.draw_all(report_run.read_run(folder))["drift"]
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Drift: repetition 0.25 → 0.25", "Where the policy fired, by arm, with 95 % intervals"]
    old = [{name: value for name, value in step_line(1).items() if name != "repetition"}]
    write_lines(folder / "metrics.jsonl", old)
    figure = report_plots.draw_all(report_run.read_run(folder))["drift"]
    assert "no step in metrics.jsonl with drift guards" in {text.get_text() for text in figure.axes[0].texts}


def test_an_svg_has_the_pages_colours_and_refers_to_nothing_outside(tmp_path: Path) -> None:
    figures = report_plots.draw_all(report_run.read_run(fill_long(tmp_path, 60)))
    drawn = {name: report_plots.svg(figure, name) for name, figure in figures.items()}
    for name, text in drawn.items():
        assert text.startswith("<svg") and text.rstrip().endswith("</svg>"), name
        assert "http" not in text, name
        assert "var(--ink)" in text, name
        assert f": {plots.INK}" not in text, name
    ids = [found for text in drawn.values() for found in re.findall(r' id="([^"]+)"', text)]
    assert len(ids) == len(set(ids)), "two plots share an id"
    used = {found for text in drawn.values() for found in re.findall(r'(?:href="|url\()#([^")]+)', text)}
    assert used <= set(ids)


def test_reasons_may_contain_any_text(tmp_path: Path) -> None:
    write_lines(fill(tmp_path) / "rollouts.jsonl", [line(finish_reason="$\\frac{$<b>&"), line(arm="control")])
    figure = report_plots.draw_all(report_run.read_run(tmp_path))["reasons"]
    assert "&lt;b&gt;" in report_plots.svg(figure, "reasons")
