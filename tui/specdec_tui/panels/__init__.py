"""Panels: what each shows, as a pure function of a view. Lines of (text, style) parts, without Textual.

A panel that has nothing to say is None, and hides. Styles are names of `theme.STYLES`; text is safe to show already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size

from specdec_tui.frame import View
from specdec_tui.pieces import Name

Part = tuple[str, str]
Line = list[Part]


@dataclass(frozen=True, slots=True)
class PanelContext:
    """What a panel is drawn into."""

    width: int
    name: Name
    """Token id -> text."""


@dataclass(frozen=True, slots=True)
class PanelContent:
    """A panel's content."""

    title: str
    lines: list[Line]


Panel = Callable[[View, PanelContext], PanelContent | None]


def number(value: float | None, digits: int = 2) -> str:
    """Undefined is a dash, never 0."""
    return "–" if value is None else f"{value:.{digits}f}"


def fitted(text: str, width: int) -> str:
    """At most so many cells, an ellipsis where something is cut."""
    return text if cell_len(text) <= width else set_cell_size(text, max(0, width - 1)) + "…"


def padded(text: str, width: int) -> str:
    """Exactly so many cells."""
    return set_cell_size(fitted(text, width), width)


def flowed(text: str, width: int, style: str = "") -> list[Line]:
    """Words on lines of this width."""
    lines, line = list[Line](), ""
    for word in text.split(" "):
        if line and len(line) + 1 + len(word) > width:
            lines.append([(line, style)])
            line = word
        else:
            line = f"{line} {word}" if line else word
    return [*lines, [(line, style)]]
