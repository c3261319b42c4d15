"""The decision about one drafted token: q and p on one scale, the draw, the verdict, and what is left after a rejection."""

from __future__ import annotations

from specdec_engine.core.registry import OURS
from specdec_engine.record.events import Cycle
from specdec_tui.bars import bar, dart
from specdec_tui.decision import draw, left_after, left_title, scales, verdict
from specdec_tui.frame import View
from specdec_tui.panels import Line, PanelContent, PanelContext, fitted, number, padded
from specdec_tui.panels.warping import in_full, in_short
from specdec_tui.pieces import alone, plain

_LABEL, _NUMBER = 11, 7


def inspector(view: View, context: PanelContext) -> PanelContent | None:
    """None before the first cycle."""
    cycle, at = view.cycle, view.inspected
    if cycle is None:
        return None
    if at is None:
        return _without_draft(view, cycle, context)
    token = fitted(f"“{alone(cycle.drafted[at], context.name)}”", context.width - 22)
    lines: list[Line] = [
        [(f"cycle {cycle.index + 1} · token {at + 1} of {len(cycle.drafted)} · ", "muted"), (token, "strong")]
    ]
    lines += _remarks(cycle, at)
    if view.warping:
        return PanelContent("before and after · ▒ gained ░ lost", [*lines, *in_full(view, cycle, at, context)])
    seen = view.partial
    if seen is not None and not seen.verified:
        return PanelContent("inspector", [*lines, *_draft(cycle, at, context.width)])
    thrown = seen is None or at in cycle.tests[: seen.tested]
    lines += _scales(cycle, at, context.width, view.frame.rule, thrown)
    lines += in_short(cycle, at, view.frame.upto(view.shown))
    if seen is not None and not thrown and not seen.final:
        return PanelContent("inspector", [*lines, [("not tested yet", "muted")]])
    lines += [[], *_verdict(cycle, at, view.frame.rule)]
    if at == cycle.rejected and (seen is None or seen.final):
        lines += _residual(cycle, context, view.frame.rule)
    overlap = cycle.overlap[at] if at < len(cycle.overlap) else None
    if overlap is not None and cycle.fate(at) != "untested":
        lines += [[("overlap Σ min(p, q) ", "muted"), (number(overlap), "")]]
    return PanelContent("inspector", lines)


def _without_draft(view: View, cycle: Cycle, context: PanelContext) -> PanelContent:
    """The last decision that there was."""
    said: Line = [(f"cycle {cycle.index + 1}: nothing drafted", "muted")]
    before = view.last_draft
    if before is None or (found := inspector(before, context)) is None:
        return PanelContent("inspector", [said, [], [("the pass gave the target's own token", "muted")]])
    return PanelContent(found.title, [said, *found.lines])


def _remarks(cycle: Cycle, at: int) -> list[Line]:
    """Where the token is from, where that is not simply drawn from q."""
    lines = list[Line]()
    if _is_lookup(cycle.drafter) and cycle.q[at] == 1.0 and not cycle.forced:
        lines.append([(f"by {plain(cycle.drafter)}, a lookup: it names one token, so q is 1", "muted")])
    if at in cycle.guessed:
        lines.append([("» a lookup expected it; the draft model chose it too", "muted")])
    if cycle.forced:
        lines.append([("≡ the grammar allows nothing else here: a free token", "muted")])
    return lines


def _is_lookup(drafter: str) -> bool:
    """Say whether a drafter of this name is one of ours that look up; a model's q of 1 is that of temperature 0."""
    return any(entry.lookup and entry.name == drafter.partition(":")[0] for entry in OURS)


def _draft(cycle: Cycle, at: int, width: int) -> list[Line]:
    return [_scale("q draft", cycle.q[at], "draft", width), [], [("a guess; the target has not seen it yet", "muted")]]


def _scales(cycle: Cycle, at: int, width: int, rule: str, thrown: bool) -> list[Line]:
    """thrown: whether the test was shown; the draw is, where it decided something."""
    lines = [_scale(scale.label, scale.value, scale.style, width) for scale in scales(cycle, at, rule)]
    if thrown and (u := draw(cycle, at, rule)) is not None:
        cells = max(1, width - _LABEL - _NUMBER - 1)
        lines.append(
            [("u the draw".ljust(_LABEL + 1), "muted"), (dart(u, cells).ljust(cells), "strong"), (_right(u), "")]
        )
    return lines


def _scale(label: str, value: float | None, style: str, width: int) -> Line:
    cells = max(1, width - _LABEL - _NUMBER - 1)
    return [(label.ljust(_LABEL + 1), "muted"), (bar(value or 0.0, cells), style), (_right(value), "")]


def _right(value: float | None) -> str:
    return number(value, 3).rjust(_NUMBER)


def _verdict(cycle: Cycle, at: int, rule: str) -> list[Line]:
    said, why = verdict(cycle, at, rule)
    mark = (said, "accepted" if cycle.fate(at) == "accepted" else "refused")
    if rule != "token":
        return [[mark], [(why, "muted")]]
    if cycle.fate(at) == "untested":
        return [[(f"{said}: ", "strong"), (why, "muted")]]
    return [[(f"{why}  →  ", ""), mark]]


def _residual(cycle: Cycle, context: PanelContext, rule: str) -> list[Line]:
    entries = sorted(left_after(cycle, most=4), key=lambda left: not left.drawn)  # first: low screens cut the last
    width = max(6, context.width - 32)
    lines: list[Line] = [[(left_title(rule), "muted")]] if entries else []
    for left in entries:
        if left.token is None:
            lines.append(
                [("  others".ljust(15), "muted"), (bar(left.mass, width), "muted"), (f"{left.mass:.2f} ".rjust(6), "")]
            )
        elif left.drawn and not left.mass:
            lines.append([("  ↳ drawn: ", "muted"), (fitted(alone(left.token, context.name), 20), "recovered")])
        else:
            name = padded(alone(left.token, context.name), 13)
            mark = ("↳ drawn", "recovered") if left.drawn else ("", "")
            of_it = (bar(left.mass, width), "target"), (f"{left.mass:.2f} ".rjust(6), "")
            lines.append([(f"  {name}", ""), *of_it, mark])
    return lines
