"""What temperature and filters make of p and q at one drafted token."""

from __future__ import annotations

from specdec_engine.record.events import Cycle, Raw
from specdec_tui.bars import changed
from specdec_tui.frame import Frame, View
from specdec_tui.panels import Line, PanelContext, padded
from specdec_tui.pieces import alone, plain

_FILTERS = (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))
_NAME, _NUMBERS = 12, 14


def in_short(cycle: Cycle, at: int, frame: Frame) -> list[Line]:
    """The drafted token's own p and q before; nothing where they were left alone, or the run did not say."""
    told = [
        f"{letter} {value:.3f}"
        for letter, raw, after in (("q", cycle.raw_q, cycle.q[at]), ("p", cycle.raw_p, cycle.p[at]))
        if raw is not None
        and (value := raw.drafted[at]) is not None
        and after is not None
        and abs(value - after) > 5e-4
    ]
    by, drafts = warper(frame), warper(frame, "draft_temperature")
    return [[(f"before {by if by == drafts else 'warping'}: {', '.join(told)}", "muted")]] if told else []


def in_full(view: View, cycle: Cycle, at: int, context: PanelContext) -> list[Line]:
    """The likeliest tokens of both, before and after; p only when the cycle, shown in part, has come to its verification."""
    lines, frame = list[Line]([[]]), view.frame.upto(view.shown)
    if view.partial is None or view.partial.verified:
        lines += [*_side("target", cycle.raw_p, cycle.p[at], cycle, at, warper(frame), context), []]
    if cycle.raw_q is None and cycle.raw_p is not None and cycle.q[at] == 1.0:
        return [*lines, [("q draft", "strong"), (" looked this up: q is 1, whatever the temperature", "muted")]]
    return lines + _side("draft", cycle.raw_q, cycle.q[at], cycle, at, warper(frame, "draft_temperature"), context)


def _side(
    who: str, raw: Raw | None, now: float | None, cycle: Cycle, at: int, by: str, context: PanelContext
) -> list[Line]:
    label = ("q " if who == "draft" else "p ") + who
    if raw is None:
        return [[(label, "strong"), (" before temperature was not recorded", "muted")]]
    if not raw.likeliest[at]:
        return [[(label, "strong"), (" before temperature: not worked out, it was never tested", "muted")]]
    lines: list[Line] = [[(label, "strong"), (f", before → after {by}", "muted")]]
    width, drafted, was = max(4, context.width - _NAME - _NUMBERS - 3), cycle.drafted[at], raw.drafted[at]
    rows = list(raw.likeliest[at])
    if drafted is not None and was is not None and now is not None and all(token != drafted for token, _, _ in rows):
        rows.append((drafted, was, now))
    for token, before, after in rows:
        mark = "› " if token == drafted else "  "
        lines.append(
            [
                (mark + padded(alone(token, context.name), _NAME), "strong" if token == drafted else ""),
                (changed(before, after, width), who),
                (f" {before:.3f}→{after:.3f}".rjust(_NUMBERS), ""),
            ]
        )
    return lines


def warper(frame: Frame, temperature: str = "temperature") -> str:
    """What comes between logits and distributions, in words, as set in the last cycle of the frame."""
    t = frame.setting("temperature", 1.0)
    if t != 0 and (own := frame.setting(temperature)) is not None:
        t = own
    if t == 0:
        return "greedy"
    used = [
        f"{name.replace('_', '-')} {plain(value)}"
        for name, off in _FILTERS
        if (value := frame.setting(name, off)) != off
    ]
    noise = ["the shared noise"] if frame.setting("coupling") == "gumbel" else []
    return ", ".join([*([f"T {plain(t)}"] if t != 1 or not (used or noise) else []), *used, *noise])
