"""Colours and styles. Hue says who made a token (Okabe and Ito's palette, safe for colour-blind eyes): the draft blue, the
target orange. Weight, underline, strike and a glyph say it again, for greyscale and for terminals without colour."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from textual.content import Content
from textual.style import Style
from textual.theme import Theme

from specdec_tui.panels import Line
from specdec_tui.pieces import one_line

_DARK = {"draft": "#56B4E9", "target": "#E69F00", "bonus": "#CC79A7", "refused": "#E8743B", "ratio": "#F0E442"}
_LIGHT = {"draft": "#0072B2", "target": "#A65300", "bonus": "#8C3A70", "refused": "#A33E00", "ratio": "#7A6A00"}

STYLES: Mapping[str, str] = {
    "": "$foreground",
    "prompt": "$text-muted",
    "accepted": "$draft",
    "drafted": "dim $draft",
    "recovered": "bold underline $target",
    "bonus": "bold $bonus",
    "plain": "$foreground",
    "rejected": "strike $refused",
    "untested": "strike $text-muted",
    "refused": "bold $refused",
    "draft": "$draft",
    "target": "$target",
    "ratio": "$ratio",
    "muted": "$text-muted",
    "strong": "bold $foreground",
    "headline": "bold reverse $foreground",
    "key": "bold $accent",
    "brand": "bold $background on $accent",
    "cursor": "reverse bold",
}

DARK = Theme(
    name="specdec-dark",
    primary="#56B4E9",
    accent="#E6C84F",
    foreground="#D8D8D8",
    background="#101214",
    surface="#101214",
    panel="#1B1F23",
    boost="#1B1F23",
    dark=True,
    variables={**_DARK, "text-muted": "#8A9199", "border": "#3A4149", "border-blurred": "#3A4149"},
)
LIGHT = Theme(
    name="specdec-light",
    primary="#0072B2",
    accent="#7A5F00",
    foreground="#202428",
    background="#FBFBF9",
    surface="#FBFBF9",
    panel="#EFEFEA",
    boost="#EFEFEA",
    dark=False,
    variables={**_LIGHT, "text-muted": "#646B72", "border": "#C4C8CC", "border-blurred": "#C4C8CC"},
)

HIGH_CONTRAST = Theme(
    name="specdec-high-contrast",
    primary="#FFFFFF",
    accent="#FFE54A",
    foreground="#FFFFFF",
    background="#000000",
    surface="#000000",
    panel="#000000",
    boost="#000000",
    dark=True,
    variables={
        "draft": "#7CCBFF", "target": "#FFB52E", "bonus": "#FF9BD8", "refused": "#FF8A5C", "ratio": "#FFF25C",
        "text-muted": "#D0D0D0", "border": "#FFFFFF", "border-blurred": "#FFFFFF",
    },
)  # fmt: skip
THEMES = {"dark": DARK, "light": LIGHT, "high-contrast": HIGH_CONTRAST}
_wanted = "auto"


def want(theme: str) -> None:
    """For every screen of this process, which has one terminal: a name of `THEMES`, or auto."""
    global _wanted
    _wanted = theme


def theme_of(light: Callable[[], bool | None]) -> Theme:
    """The one that is wanted; light: asks whether the terminal's background is, where auto is wanted."""
    if _wanted in THEMES:
        return THEMES[_wanted]
    return LIGHT if light() else DARK


def content(lines: list[Line]) -> Content:
    """Lines of a panel as Textual draws them."""
    return Content("\n").join(
        Content.assemble(*((one_line(text), STYLES[style]) for text, style in line)) for line in lines
    )


def styles(variables: Mapping[str, str]) -> dict[str, Style]:
    """Every style of `STYLES` in the colours of the theme in force."""
    return {name: Style.parse(text, dict(variables)) for name, text in STYLES.items()}
