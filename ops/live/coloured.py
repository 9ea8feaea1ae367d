"""A rollout's text in a terminal: each token coloured by its divergence, or followed by it as a number."""

from __future__ import annotations

import math

from rich.console import Console
from rich.style import Style
from rich.text import Text

from ops.reading.rollouts import Reading, Token

# The scale's ends in nats; what is beyond has the colour of the end. Agreement of sharp distributions rounds to 0.
LOW_NATS, HIGH_NATS = 1e-5, 10.0
_MARK = Style(bold=True, reverse=True)
_UNSCORED = Style(dim=True, italic=True)
_EXTRA = {"kept": Style(), "detection": Style(underline=True), "overshoot": Style(strike=True)}
_SEEN = {"\n": "↵\n", "\t": "→\t"}


def plain(text: str) -> str:
    """One line without characters that a terminal would act on: anyone's text may have been written."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _shown(text: str) -> str:
    """Line ends and tabs are kept, and marked."""
    return "".join(_SEEN.get(letter) or plain(letter) for letter in text)


def has_colours(console: Console) -> bool:
    """Whether divergence can be a colour: at least 256 of them, and NO_COLOR is not set."""
    return not console.no_color and console.color_system in ("256", "truecolor")


# --- the scale --------------------------------------------------------------------------------------------------------


def level(nats: float) -> float:
    """Where a divergence stands on the scale of log10 nats, 0 … 1."""
    low, high = math.log10(LOW_NATS), math.log10(HIGH_NATS)
    return (math.log10(min(max(nats, LOW_NATS), HIGH_NATS)) - low) / (high - low)


def colour(place: float) -> tuple[int, int, int]:
    """Red, green and blue (0 … 255) of a place on the scale.

    Dark blue to bright yellow with even steps of perceived lightness (OKLab's L), so that it reads the same in grey.
    """
    lightness, hue = 0.30 + 0.62 * place, math.radians(275 - 170 * place)
    chroma = 0.09 + 0.05 * place
    a, b = chroma * math.cos(hue), chroma * math.sin(hue)
    # OKLab to linear sRGB (Björn Ottosson's matrices).
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    red = 4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short
    green = -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short
    blue = -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short
    return _byte(red), _byte(green), _byte(blue)


def _byte(linear: float) -> int:
    value = min(max(linear, 0.0), 1.0)
    value = 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055
    return round(255 * value)


def _style(token: Token) -> Style:
    if token.divergence is None:
        return _UNSCORED + _EXTRA[token.part]
    place = level(token.divergence)
    red, green, blue = colour(place)
    # Black on bright, white on dark: readable on the background that it brings along, whatever the terminal's is.
    letters = "#000000" if place > 0.5 else "#ffffff"
    return Style(color=letters, bgcolor=f"rgb({red},{green},{blue})") + _EXTRA[token.part]


# --- the text ---------------------------------------------------------------------------------------------------------


def legend(colours: bool) -> Text:
    """What the colours, or the numbers, mean."""
    text = Text()
    if not colours:
        return text.append("token[divergence in nats, reverse KL]; [-] not scored")
    text.append("divergence, nats: ")
    decades = range(round(math.log10(LOW_NATS)), round(math.log10(HIGH_NATS)) + 1)
    for decade in decades:
        text.append(f" {10.0**decade:g} ", _style(Token("", 10.0**decade, "kept")))
    for name, sample in (
        ("not scored", _UNSCORED),
        ("detection", _EXTRA["detection"]),
        ("after it", _EXTRA["overshoot"]),
    ):
        text.append("  ").append(name, sample)
    return text


def text_of(reading: Reading, colours: bool) -> Text:
    """The rollout's text with every token's divergence; the cut and the moment the rule fired are marked."""
    text = Text()
    marks = _marks(reading)
    for place, token in enumerate(reading.tokens):
        _append_mark(text, marks.get(place), colours)
        letters = _shown(token.text)
        if token.stop:
            letters = f"⏹{letters}"
        if colours:
            text.append(letters, _style(token))
        else:
            text.append(f"{letters}[{_number(token.divergence)}]")
    _append_mark(text, marks.get(len(reading.tokens)), colours)
    return text


def _append_mark(text: Text, mark: str | None, colours: bool) -> None:
    if mark is not None:
        text.append(f" {mark} ", _MARK) if colours else text.append(f" <<{mark}>> ")


def _marks(reading: Reading) -> dict[int, str]:
    """Text by the place that it stands before."""
    if not reading.finished or reading.keep == reading.trigger == len(reading.tokens):
        return {}
    if reading.ending == "dead" or reading.finish_reason == "unfinished":
        return {}
    cut = "cut" if reading.stopped else "would be cut"
    marks = {reading.keep: f"✂ {cut}: {reading.keep} kept"}
    fired = f"fired: {reading.trigger} seen"
    if reading.trigger == reading.keep:
        return {reading.keep: f"{marks[reading.keep]}, {fired}"}
    return {**marks, reading.trigger: fired}


def _number(nats: float | None) -> str:
    return "-" if nats is None else f"{nats:.1g}"


def excerpt(text: str, rest: str, width: int) -> Text:
    """One line: the end of what is kept, then the text after the cut, about `width` characters together."""
    kept, rest = plain(text), plain(rest)
    room = max(8, width - min(len(rest), width // 3) - (3 if rest else 0))
    if len(kept) > room:
        kept = "…" + kept[-(room - 1) :]
    line = Text(kept)
    if rest:
        left = max(0, width - len(kept) - 3)
        line.append(" ✂ ", "bold").append(rest if len(rest) <= left else rest[: max(0, left - 1)] + "…", "dim")
    return line
