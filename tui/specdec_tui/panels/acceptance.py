"""Acceptance: by position of the draft, and over time."""

from __future__ import annotations

from specdec_engine.record.cycle_stats import rolling_alpha
from specdec_engine.record.stats import Position
from specdec_tui.bars import bar, columns
from specdec_tui.frame import View
from specdec_tui.panels import Line, PanelContent, PanelContext, number

WINDOW = 32
_SHOWN = 5
"""Rows; the last stands for all later positions, where there are more."""


def positions(view: View, context: PanelContext) -> PanelContent | None:
    """How often the token at each position was kept, of those tested there."""
    found = view.past.summary().positions
    if len(found) > _SHOWN:
        rest = found[_SHOWN - 1 :]
        sums = (sum(getattr(p, name) for p in rest) for name in ("drafted", "tested", "accepted"))
        found = (*found[: _SHOWN - 1], Position(*sums))
    if not found:
        return None
    cells = max(4, context.width - 15)
    lines: list[Line] = [
        [
            (f"{i}{'+' if i == _SHOWN else ' '}", "muted"),
            (bar(p.rate or 0.0, cells), "draft"),
            (f" {number(p.rate)}", ""),
            (f"{'of ' + str(p.tested):>8}", "muted"),
        ]
        for i, p in enumerate(found, 1)
        if p.tested
    ]
    return PanelContent("kept, by position in the draft", lines)


def rolling(view: View, context: PanelContext) -> PanelContent | None:
    found = rolling_alpha(view.past.cycles[-context.width - WINDOW :], WINDOW)
    if not any(value is not None for value in found):
        return None
    return PanelContent(
        f"kept of tested, last {WINDOW} cycles · {number(found[-1])}",
        [[(row, "draft")] for row in columns(found, 1.0, context.width)],
    )
