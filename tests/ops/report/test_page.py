"""report.html: it needs no other file, stays small, and shows any text of a rollout as text."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import browser
from run_folders import CONFIG, fill, fill_long, line, trace_line, write_html, write_lines
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel

from common.config import ConfigError
from common.runfiles.records import BookLine
from ops.cli.main import main
from ops.report import command as report
from ops.report import page as html_report
from ops.report import plots as report_plots

pytestmark = pytest.mark.slow

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "{{data}}",
    "&lt;b&gt;",
    "<!--",
    '"',
    "$",
]


class Reader(HTMLParser):
    """Elements with their attributes, and the text of the scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[str] = []
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag == "script":
            self.scripts.append("")
            self._in_script = True

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data

    @property
    def data(self) -> dict[str, Any]:
        """The data for the page's script."""
        found: dict[str, Any] = json.loads(self.scripts[0])
        return found


def read(folder: Path) -> Reader:
    return Reader(write_html(folder).read_text())


def unpacked(reading: dict[str, Any], pieces: list[list[Any]], kind: str = "<u2") -> str:
    return "".join(pieces[place][1] for place in np.frombuffer(base64.b64decode(reading["pieces"]), kind))


def test_the_page_shows_what_ends_the_run(tmp_path: Path) -> None:
    steps, tokens = (tmp_path / name for name in ("steps", "tokens"))
    for folder in (steps, tokens):
        folder.mkdir()
    fill(steps)
    fill(tokens, config=CONFIG.replace("max_steps: 2", "max_steps: 2, max_generated_tokens: 1000"))
    assert "2 of 2 steps of 2 rollouts" in write_html(steps).read_text()
    assert "40 of 1,000 tokens generated, in 2 steps of 2 rollouts" in write_html(tokens).read_text()


def hostile_model(folder: Path) -> Path:
    """A model's folder without weights whose tokens are HOSTILE, ids from 0."""
    folder.mkdir()
    tokenizer = Tokenizer(WordLevel({text: place for place, text in enumerate(HOSTILE)}, unk_token=HOSTILE[0]))
    tokenizer.decoder = Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(HOSTILE), "eos_token_id": 4}))
    return folder


def test_a_page_holds_its_rollouts_word_for_word(tmp_path: Path) -> None:
    page = read(fill_long(tmp_path, 30))
    data = page.data
    traces = [json.loads(text) for text in (tmp_path / "traces.jsonl").read_text().splitlines()]
    books = [json.loads(text) for text in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    names = [column["name"] for column in data["columns"]]
    assert [row[names.index("generated")] for row in data["rows"]] == [item["tokens_generated"] for item in books]
    assert [row[names.index("kept")] for row in data["rows"]] == [item["tokens_kept"] for item in books]
    for trace in traces:
        reading = data["readings"][trace["rid"]]
        ids = [data["pieces"][place][0] for place in np.frombuffer(base64.b64decode(reading["pieces"]), "<u2")]
        assert ids == np.frombuffer(base64.b64decode(trace["tokens"]), "<i4").tolist()
        assert reading["divergence"] == trace["divergence"]
        assert (reading["keep"], reading["trigger"]) == (trace["keep"], trace["trigger"])
    texts = "".join(unpacked(reading, data["pieces"]) for reading in data["readings"].values())
    assert set("0123456789+-=;#") <= set(texts)


def test_the_figures_at_the_top(tmp_path: Path) -> None:
    text = re.sub(r"<[^>]+>", " ", write_html(fill(tmp_path)).read_text())
    for expected in ("small: 2 of 2 steps", "4 admitted = 4 trained", "unknown until the run ends", "step 2", "0.400"):
        assert expected in text
    both = re.search(r"both\s+([\d, .]+)", text)
    assert both is not None
    assert both[1].split() == ["4", "40", "24", "24", "10", "6", "10.0"]  # rollouts, generated, kept, trained …


def test_the_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    page = read(fill_long(tmp_path, 40))
    assert {tag for tag, _ in page.elements} & {"iframe", "object", "embed", "base", "video", "audio"} == set()
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "action", "srcset", "data", "poster"):
                assert value.startswith(("#", "data:")), (tag, name, value)
            assert not name.startswith("on"), (tag, name)
    assert "http://" not in (tmp_path / "report.html").read_text()
    assert "https://" not in (tmp_path / "report.html").read_text()
    assert "@import" not in (tmp_path / "report.html").read_text()


def test_its_security_policy_allows_only_its_own_script(tmp_path: Path) -> None:
    page = read(fill(tmp_path))
    (policy,) = [values["content"] for tag, values in page.elements if tag == "meta" and "http-equiv" in values]
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert "unsafe-eval" not in policy and "script-src 'unsafe" not in policy


def test_the_text_of_a_rollout_does_no_harm(tmp_path: Path) -> None:
    model = hostile_model(tmp_path / "model")
    folder = fill(
        tmp_path, config=CONFIG.replace("./absent-student", str(model)).replace("./absent-teacher", str(model))
    )
    count = len(HOSTILE)
    named = {"rid": "r<b>&", "finish_reason": "</script>", "reason": "<i>", "ending": "dropped"}
    write_lines(
        folder / "rollouts.jsonl", [line(tokens_generated=count, tokens_kept=count, **named), line(arm="control")]
    )
    write_lines(folder / "traces.jsonl", [trace_line([0.5] * count, count, count, rid="r<b>&")])
    page = read(folder)
    assert len(page.scripts) == 2
    assert "<" not in page.scripts[0]
    data = page.data
    assert unpacked(data["readings"]["r<b>&"], data["pieces"]) == "".join(HOSTILE)
    assert "alert(1)" not in page.scripts[1]
    assert [tag for tag, _ in page.elements if tag in ("img", "b", "i")] == []


def test_a_page_stays_small_however_long_the_run_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html_report, "NEWEST", 200)
    monkeypatch.setattr(html_report, "SAMPLED", 100)
    fill_long(tmp_path, 900)
    page = read(tmp_path)
    data = page.data
    names = [column["name"] for column in data["columns"]]
    places = [row[names.index("place")] for row in data["rows"]]
    assert len(places) == len(data["readings"]) == 300
    assert places[-200:] == list(range(701, 901))
    assert places == sorted(places)
    groups = {(row[names.index("arm")], row[names.index("finish")]) for row in data["rows"][:100]}
    assert groups == {("treated", "eos"), ("treated", "kl_trap"), ("control", "eos")}
    assert "300 of 900 booked rollouts" in (tmp_path / "report.html").read_text()


def test_tokens_are_limited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html_report, "MOST_TOKENS", 100)
    lines = [BookLine.from_json(line(tokens_generated=n)) for n in (30, 200, 30, 30)]
    assert html_report.choose(lines) == [0, 2, 3]
    assert html_report.choose([]) == []


@pytest.mark.slow
def test_the_longest_page_is_below_ten_megabytes(tmp_path: Path) -> None:
    """More tokens than fit, from a vocabulary so large that all of them differ: each is shown by its id."""
    config = CONFIG.replace("max_completion_length: 16", "max_completion_length: 4000")
    fill_long(tmp_path, 300, ids=150_000, length=4000, config=config)
    path = write_html(tmp_path)
    data = Reader(path.read_text()).data
    assert data["wide"]
    assert 100 < len(data["rows"]) < 300
    assert path.stat().st_size < 10_000_000


@pytest.mark.parametrize("name", ["eval.jsonl", "rollouts.jsonl", "traces.jsonl", "ledger.json", "metrics.jsonl"])
def test_a_run_that_lacks_a_file_has_a_page(tmp_path: Path, name: str) -> None:
    (fill(tmp_path) / name).unlink()
    page = read(tmp_path)
    assert len([values for tag, values in page.elements if tag == "figure"]) == len(report_plots.PLOTS)
    assert len(page.data["rows"]) == (0 if name == "rollouts.jsonl" else 4)
    assert len(page.data["readings"]) == (0 if name in ("rollouts.jsonl", "traces.jsonl") else 3)


def test_a_folder_with_only_a_config_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    page = read(tmp_path)
    assert page.data["rows"] == []
    assert "All 0 booked rollouts" in (tmp_path / "report.html").read_text()


def test_the_page_of_a_run_without_traces_says_why_there_is_no_text(tmp_path: Path) -> None:
    (fill(tmp_path, config=CONFIG + "feeder: {record_traces: false}\n") / "traces.jsonl").unlink()
    page = read(tmp_path)
    assert "feeder.record_traces is off" in page.data["why_no_text"]
    assert "not recorded (feeder.record_traces is off)" in (tmp_path / "report.html").read_text()


def test_a_run_that_cuts_nothing_has_no_threshold(tmp_path: Path) -> None:
    fill(tmp_path, config=CONFIG.replace("{window", "{policy: none, window"))
    write_lines(
        tmp_path / "rollouts.jsonl", [line(active=False, threshold=None, arm=arm) for arm in ("treated", "control")]
    )
    text = write_html(tmp_path).read_text()
    for expected in ("policy none has none", "nothing is cut (policy none)", "no rollout that could have been cut"):
        assert expected in text


def test_katana_report_writes_all_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(fill(tmp_path))]) == 0
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    assert (tmp_path / "report.html").is_file()
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {f"{name}.png" for name in report_plots.PLOTS}
    assert [path.name for path in tmp_path.iterdir() if ".tmp" in path.name] == []


def test_no_runs_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it has no config"):
        write_html(tmp_path)
    assert main(["report", str(tmp_path / "absent")]) == 2


def test_the_reports_path_is_the_pictures(tmp_path: Path) -> None:
    assert report.write_report(fill(tmp_path)) == tmp_path / "report.png"


def test_the_time_of_a_run_is_measured_or_taken_from_the_books(tmp_path: Path) -> None:
    fill_long(tmp_path, 20)
    assert "<td>1 min 15 s</td>" in write_html(tmp_path).read_text()
    (tmp_path / "wall.json").unlink()
    # Rollout i is admitted in second i, and ends two seconds later.
    assert "<td>21.0 s from the first to the last booked rollout</td>" in write_html(tmp_path).read_text()


@pytest.mark.slow
def test_a_browser_shows_rollouts_of_any_name_and_prompts_of_any_text(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    write_lines(folder / "rollouts.jsonl", [line(rid="constructor", problem=0), line(rid="r1", problem=1)])
    write_lines(folder / "traces.jsonl", [trace_line([0.5] * 10, 10, 10, rid="r1")])
    path = write_html(folder)
    text = path.read_text()
    assert text.count('"prompt":"') == 1
    path.write_text(text.replace('"prompt":"', '"prompt":"\\u202e\\u0007'))
    with browser() as window:
        window.open(path)
        window.click("#table tr.row[data-rid=constructor]")
        assert window.texts("#table tr.reading") == ["Its tokens were not recorded: it ended before its verdict."]
        window.click("#table tr.row[data-rid=constructor]")
        window.click("#table tr.row[data-rid=r1]")
        assert window.texts("#table tr.reading .prompt")[0].startswith("prompt: ··")
        window.type("#search", "constructor")
        assert len(window.texts("#table tr.row")) == 1
        assert window.log() == []
