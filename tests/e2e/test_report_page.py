"""report.html in headless Chromium, opened as a file: its plots are there, nothing is amiss, its table works."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, browser
from matplotlib.image import imread
from run_folders import fill, fill_long, line, write_html, write_lines

from ops.report.plots import PLOTS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ROLLOUTS = 160
ROW = "#table tr.row"


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_html(fill_long(tmp_path_factory.mktemp("run"), ROLLOUTS))


@pytest.fixture
def page(window: Browser, report: Path) -> Browser:
    """The report, opened afresh."""
    window.open(report)
    return window


def cells(page: Browser, title: str) -> list[str]:
    """A column of the rows that are shown."""
    place = [text.split()[0] for text in page.texts("#table thead button")].index(title) + 1
    return page.texts(f"{ROW} td:nth-child({place})")


def choose(page: Browser, name: str, value: str) -> None:
    page.run(
        "const box = document.querySelector(arguments[0]); box.value = '=' + arguments[1];"
        "box.dispatchEvent(new Event('change', {bubbles: true}))",
        f"[data-filter={name}]",
        value,
    )


def test_every_plot_is_shown_and_nothing_is_amiss(page: Browser) -> None:
    boxes = page.run(
        "return Object.fromEntries([...document.querySelectorAll('figure')].map(figure => {"
        "const box = figure.querySelector('svg').getBoundingClientRect();"
        "return [figure.id, [box.width, box.height, figure.querySelectorAll('path').length]]}))"
    )
    assert set(boxes) == {f"plot-{name}" for name in PLOTS}
    for name, (width, height, paths) in boxes.items():
        assert width > 400 and height > 200, (name, width, height)
        assert paths > 5, name
    for name in PLOTS:
        image = imread(io.BytesIO(page.picture(f"#plot-{name}")))[..., :3]
        assert 0.005 < (image.min(axis=2) < 0.8).mean() < 0.9, f"{name} is blank or black"
    assert page.log() == []
    assert page.run("return performance.getEntriesByType('resource').map(entry => entry.name)") == []


def test_the_log_would_show_what_is_amiss(window: Browser, report: Path, tmp_path: Path) -> None:
    """What the other tests rely on: a script that the page's policy refuses and a broken one come into the log."""
    refused = tmp_path / "refused.html"
    refused.write_text(report.read_text().replace("</body>", "<script>var other = 1</script></body>"))
    window.open(refused)
    assert any("Content Security Policy" in entry["message"] for entry in window.log())
    broken = tmp_path / "broken.html"
    broken.write_text(report.read_text().replace('"columns"', '"colums"'))
    window.open(broken)
    assert any(entry["level"] == "SEVERE" for entry in window.log())


def test_a_row_opens_to_tokens_coloured_by_divergence(page: Browser) -> None:
    choose(page, "finish", "kl_trap")
    page.click(ROW)
    assert len(page.texts(".token")) > 10
    kept, detection, overshoot = (int(cells(page, name)[0]) for name in ("kept", "detection", "overshoot"))
    for part, count in (("kept", kept), ("detection", detection), ("overshoot", overshoot)):
        assert len(page.texts(f".tokens .token.{part}")) == count, part
    colours = page.run(
        "return [...document.querySelectorAll('.tokens .token')].map(e => getComputedStyle(e).backgroundColor)"
    )
    assert len(set(colours)) > 5
    assert page.texts(".mark.cut") == ["✂"]
    assert page.texts(".mark.trigger") == ["◂"]
    # The cut stands between the last kept token and the first that was not.
    assert page.run("return document.querySelector('.mark.cut').previousSibling.className").endswith("kept")
    assert page.run("return document.querySelector('.mark.cut').nextSibling.className").endswith("detection")
    page.click(ROW)
    assert page.texts(".tokens") == []
    assert page.log() == []


def test_a_token_tells_its_position_id_and_divergence(page: Browser) -> None:
    page.click(ROW)
    page.type(".tokens", "\ue014\ue014\ue014")  # the right arrow, three times
    (told,) = page.texts(".readout")
    assert "position 2, id " in told
    assert "nats, kept" in told
    assert page.run("return document.querySelectorAll('.token.current').length") == 1
    title = page.run("return document.querySelectorAll('.tokens .token')[2].title")
    assert title in told


def test_filters_search_and_order(page: Browser) -> None:
    assert page.texts("#count") == [f"1 to 50 of {ROLLOUTS} that match"]
    choose(page, "arm", "control")
    assert page.texts("#count") == [f"1 to 40 of {ROLLOUTS // 4} that match"]
    assert set(cells(page, "arm")) == {"control"}
    page.click("form button")
    assert page.texts("#count") == [f"1 to 50 of {ROLLOUTS} that match"]
    page.click("[data-order=generated]")
    lengths = [int(text) for text in cells(page, "generated")]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]
    page.click("[data-order=generated]")
    assert int(cells(page, "generated")[0]) < lengths[0]
    assert page.run("return document.querySelector('[aria-sort=ascending]').innerText").startswith("generated")
    page.type("#search", "R000000042")
    assert cells(page, "rollout") == ["r000000042"]
    assert page.log() == []


def test_search_finds_what_rollouts_say(page: Browser) -> None:
    page.click(ROW)
    # The tokens are drawn at random, special ones among them; of those that are shown as they are, a stretch.
    written = max(re.findall(r"[0-9+=;#-]+", "".join(page.texts(".tokens .token"))), key=len)
    assert len(written) > 3
    rid = cells(page, "rollout")[0]
    page.type("#search", written)
    assert rid in cells(page, "rollout")
    assert len(cells(page, "rollout")) < 10
    page.type("#search", " and nobody says this")
    assert page.texts("#count") == ["No rollout matches."]


def test_pages_and_keys(page: Browser) -> None:
    page.click("[data-page=last]")
    assert page.texts("#count") == [f"151 to 160 of {ROLLOUTS} that match"]
    page.click("[data-page=back]")
    assert cells(page, "#")[0] == "101"
    page.run("document.querySelector(arguments[0]).focus()", ROW)
    page.type(ROW, "\ue015\ue007")  # down, enter: the second row opens
    assert page.run("return document.querySelectorAll(arguments[0])[1].ariaExpanded", ROW) == "true"
    assert page.run("return document.querySelectorAll(arguments[0])[0].ariaExpanded", ROW) == "false"


def test_it_is_readable_in_the_dark(page: Browser) -> None:
    colours = (
        "const text = document.querySelector('#plot-length svg text');"
        "return [getComputedStyle(document.body).backgroundColor, getComputedStyle(text).fill]"
    )
    light = page.run(colours)
    page.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    try:
        dark = page.run(colours)
    finally:
        page.command("Emulation.setEmulatedMedia", features=[])
    assert light == ["rgb(255, 255, 255)", "rgb(34, 34, 34)"]
    paper, ink = (sum(int(part) for part in colour[4:-1].split(",")) for colour in dark)
    assert paper < 120 < 600 < ink


def test_it_fits_a_narrow_window(page: Browser) -> None:
    page.command("Emulation.setDeviceMetricsOverride", width=420, height=900, deviceScaleFactor=1, mobile=False)
    try:
        wide = page.run("return document.documentElement.scrollWidth")
    finally:
        page.command("Emulation.clearDeviceMetricsOverride")
    assert wide <= 420


def test_hostile_text_is_text(window: Browser, tmp_path: Path) -> None:
    write_lines(
        fill(tmp_path) / "rollouts.jsonl",
        [line(rid="r0", finish_reason="<img src=x onerror=alert(1)>"), line(rid="</script><script>alert(1)</script>")],
    )
    window.open(write_html(tmp_path))
    assert cells(window, "reason") == ["<img src=x onerror=alert(1)>", "eos"]
    assert cells(window, "rollout") == ["r0", "</script><script>alert(1)</script>"]
    window.click(ROW)
    assert "".join(window.texts(".tokens .token")).startswith("⟨0⟩⟨1⟩")
    assert window.log() == []


@pytest.mark.parametrize("name", ["eval.jsonl", "rollouts.jsonl", "traces.jsonl", "metrics.jsonl"])
def test_a_run_that_lacks_a_file_opens_without_an_error(window: Browser, tmp_path: Path, name: str) -> None:
    (fill(tmp_path) / name).unlink()
    window.open(write_html(tmp_path))
    assert len(window.texts("figure")) == len(PLOTS)
    if name == "rollouts.jsonl":
        assert window.texts("#count") == ["No rollout matches."]
    elif name == "traces.jsonl":
        window.click(ROW)
        assert "not recorded" in window.texts("tr.reading")[0]
    assert window.log() == []
