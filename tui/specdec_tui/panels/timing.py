"""Speed: tokens a second against plain decoding, where a cycle's time goes, and what the speedup is made of."""

from __future__ import annotations

from specdec_engine.record.cycle_stats import budget, median_phases, rate, rates
from specdec_tui.bars import columns, stacked
from specdec_tui.frame import View
from specdec_tui.panels import Line, PanelContent, PanelContext, number

RECENT = 32
"""Cycles that medians look back on."""


def throughput(view: View, context: PanelContext) -> PanelContent | None:
    """Columns from zero, one a cycle; below plain decoding they are red."""
    past = view.past
    found = rates(past.cycles[-context.width :])
    if not any(found):
        return None
    plain = 1 / past.plain_s if past.plain_s else None
    top = max(*(v for v in found if v is not None), plain or 0.0, 1e-9)
    lines = list[Line]()
    for row in columns(found, top, context.width, 2):
        shown = [None] * (context.width - len(found)) + found
        lines.append(
            [
                (cell, "refused" if v is not None and plain is not None and v < 0.97 * plain else "draft")
                for cell, v in zip(row, shown, strict=True)
            ]
        )
    title = f"tokens/s · now {number(rate(past.cycles[-16:]), 0)}" + (f" · plain {plain:.0f}" if plain else "")
    return PanelContent(title, lines)


def time_split(view: View, context: PanelContext) -> PanelContent | None:
    found = median_phases(view.past.cycles[-RECENT:])
    if found is None or not found.total_s:
        return None
    parts = (found.draft_s, found.verify_s, found.other_s)
    cells = stacked(parts, context.width)
    bars: Line = [
        (glyph * n, style) for glyph, n, style in zip("█▓░", cells, ("draft", "target", "muted"), strict=True)
    ]
    words = [f"{name} {1e3 * s:.1f}" for name, s in zip(("draft", "verify", "other"), parts, strict=True)]
    return PanelContent("where a cycle's time goes, median", [bars, [("  ".join(words) + " ms", "")]])


def made_of(view: View, context: PanelContext) -> PanelContent | None:
    """None where plain decoding is not known, or nothing was drafted."""
    past = view.past
    if past.plain_s is None or not past.summary().drafted:
        return None
    found = budget(past.summary(), past.plain_s)
    if found is None:
        return None
    lines: list[Line] = [
        [(f"{found.emitted:.2f} tokens a cycle ÷ {found.cost:.2f} plain passes", "")],
        [(f"= {found.speedup:.2f}×", "strong"), (f" · {number(found.at_constant_alpha)}× by α alone", "muted")],
    ]
    lost = found.lost
    if found.speedup < 0.97:
        lines.append(
            [
                ("slower than plain: ", "refused"),
                (f"mostly {lost[0][0]}, {lost[0][1]:.2f}" if lost else "few are kept", ""),
            ]
        )
    elif lost:
        lines.append([("lost to " + ", ".join(f"{name} {cost:.2f}" for name, cost in lost), "muted")])
    return PanelContent("what the speedup is made of", lines)
