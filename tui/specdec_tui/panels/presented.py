"""The cycle for people at the back of a room: its tokens with room around them, a pointer at the one that is spoken of, and
the test of that one in a line."""

from __future__ import annotations

from rich.cells import cell_len

from specdec_engine.record.events import Cycle
from specdec_tui.decision import draw, verdict
from specdec_tui.frame import Step, View
from specdec_tui.ladder import MARKS, pieces
from specdec_tui.panels import Line, PanelContent, PanelContext, fitted, number
from specdec_tui.pieces import alone

_GAP = "   "


def presented(view: View, context: PanelContext) -> PanelContent | None:
    """Lines for the last cycle that is shown; None before the first."""
    cycle = view.cycle
    if cycle is None:
        return None
    title = f"cycle {cycle.index + 1} of {len(view.frame.cycles)}"
    if not cycle.drafted:
        own = fitted(f"“{alone(cycle.emitted[-1], context.name)}”", context.width - 30) if cycle.emitted else ""
        return PanelContent(title, [[], [("nothing drafted; the target says ", "muted"), (own, "strong")], []])
    at = _spoken_of(cycle, view)
    return PanelContent(title, [[], *_tokens(cycle, view.partial, at, context), [], *_test(cycle, view, at), []])


def _spoken_of(cycle: Cycle, view: View) -> int:
    """The place of a drafted token, or the one past them for the target's own."""
    whole = view.partial is None or view.partial.final
    if whole and view.position is None and len(cycle.emitted) > cycle.accepted:
        return len(cycle.drafted)
    return view.inspected or 0


def _tokens(cycle: Cycle, partial: Step | None, at: int, context: PanelContext) -> list[Line]:
    """On as many lines as they take, the pointer under its own."""
    lines, line, pointer, used = list[Line](), Line(), "", 0
    for place, (token, kind) in enumerate(pieces(cycle, partial)):
        mark = f"{MARKS[kind]} " if MARKS[kind] else ""
        text = fitted(alone(token, context.name).strip() or "␣", max(4, context.width - 6))
        size = cell_len(mark + text)
        if line and used + size > context.width:
            lines += [line, [(pointer, "key")], []]
            line, pointer, used = [], "", 0
        if place == at:
            pointer = " " * (used + size // 2) + "▲"
        line += [(mark, "strong"), (text, kind), (_GAP, "")]
        used += size + len(_GAP)
    return [*lines, line, [(pointer, "key")]]


def _test(cycle: Cycle, view: View, at: int) -> list[Line]:
    """The numbers that decide, and the verdict."""
    rule, seen = view.frame.rule, view.partial
    if at >= len(cycle.drafted):
        last = cycle.origins[-1]
        why = "drawn from what p has more than q" if last == "recovered" else "the pass gives one token more"
        return [[(f"{last}: ", "strong"), (why, "muted")]]
    if seen is not None and not seen.verified:
        return [[("guessed; the target has not seen it yet", "muted")]]
    figures: Line = [
        ("p ", "muted"), (number(cycle.p[at], 3), "target"), ("   q ", "muted"), (number(cycle.q[at], 3), "draft"),
    ]  # fmt: skip
    if seen is not None and not seen.final and at not in cycle.tests[: seen.tested]:
        return [[*figures, ("   not tested yet", "muted")]]
    if (u := draw(cycle, at, rule)) is not None:
        figures += [("   u ", "muted"), (number(u, 3), "strong")]
    said, _ = verdict(cycle, at, rule)
    return [[*figures, ("   → ", "muted"), (said, "accepted" if cycle.fate(at) == "accepted" else "refused")]]
