"""All positions of a cycle at once."""

from __future__ import annotations

from specdec_tui.frame import View
from specdec_tui.panels import Line, PanelContent, PanelContext, number, padded
from specdec_tui.pieces import alone

_MARKS = {"accepted": ("✓", "accepted"), "rejected": ("×", "refused"), "untested": ("·", "muted")}


def table(view: View, context: PanelContext) -> PanelContent | None:
    """None for a cycle without a draft. p past the first rejection is in parentheses: its prefix was given up."""
    cycle = view.cycle
    if cycle is None or not cycle.drafted:
        return None
    wide = max(8, context.width - 38)
    lines: list[Line] = [[(f"  {'token'.ljust(wide)}{'q':>7}{'p':>9}{'min(1,p/q)':>12}{'u':>7}", "muted")]]
    for i, token in enumerate(cycle.drafted):
        p, q, u = cycle.p[i], cycle.q[i], cycle.u[i]
        told = p is not None and q and cycle.fate(i) != "untested" and view.frame.rule == "token"
        ratio = min(1.0, p / q) if told and p is not None and q else None
        target = f"({number(p, 3)})" if cycle.fate(i) == "untested" and p is not None else f"{number(p, 3)} "
        mark, style = _MARKS[cycle.fate(i)]
        name = padded(alone(token, context.name), wide)
        row = f"{number(q, 3):>7}{target:>9}{number(ratio, 3):>11} {number(u, 3):>7}"
        lines.append([(f"{mark} ", style), (name, style if i != view.inspected else "cursor"), (row, "")])
    if len(cycle.emitted) > cycle.accepted:
        mark, style = ("+", "bonus") if cycle.rejected is None else ("↳", "recovered")
        how = "from what is left of p" if mark == "↳" else "free, from the same pass"
        lines.append(
            [
                (f"{mark} ", style),
                (padded(alone(cycle.emitted[-1], context.name), wide), style),
                (how, "muted"),
            ]
        )
    return PanelContent("every token of the cycle", lines)
