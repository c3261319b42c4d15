"""The two lines above everything: what runs, and its figures."""

from __future__ import annotations

from specdec_engine.record.cycle_stats import budget, rate
from specdec_tui.frame import Frame, View
from specdec_tui.panels import Line, PanelContext, fitted, number
from specdec_tui.pieces import plain


def header(view: View, context: PanelContext, state: str) -> Line:
    """state: playing, paused, finished, in words and a glyph."""
    frame = view.past
    if not frame.run:
        return [(" specdec ", "brand")]
    most = plain(frame.setting("k"))
    adaptive = frame.setting("adaptive")
    k = f"k {'≤ ' if adaptive and most != '0' else ''}{most}{' auto' if adaptive else ''}"
    facts = f"{k}  T {plain(frame.setting('temperature'))}  seed {plain(frame.seed)}{_observed(view.frame)}"
    models = f"draft {plain(frame.settings.get('draft'))} → target {plain(frame.settings.get('target'))}"
    models = fitted(models, max(8, context.width - len(facts) - len(state) - 14))
    return [(" specdec ", "brand"), (f" {models}  ", "strong"), (f"{facts}  ", ""), (state, "key")]


def _observed(frame: Frame) -> str:
    """Who tells the run, where it is not our own engine, and whether it was seen or deduced."""
    if frame.observer == "specdec":
        return ""
    return f"  {plain(frame.observer)}, {frame.summary().exactness}"


def figures(view: View, context: PanelContext) -> Line:
    """Figures of what is shown, the same that `stats` gives for those events: the speedup, then speed, drafts, and how far
    the run is. As many as there is room for, whole ones."""
    past = view.past
    s = past.summary()
    made = None if past.plain_s is None or not s.drafted else budget(s, past.plain_s)
    speedup = None if made is None else made.speedup
    most = past.settings.get("max_tokens")
    headline = "muted" if speedup is None else "headline" if speedup >= 1 else "refused"
    groups: list[Line] = [
        [(f" {number(speedup)}{'' if speedup is None else '×'} plain ", headline)],
        [(f"{number(s.tokens_per_second, 1)} tok/s", "strong")],
        [(f"{number(s.mean_emitted_per_cycle)} tokens a cycle", ""), (f", α {number(s.alpha)}", "")],
        [
            (f"cycle {s.cycles + (view.step is not None)}", ""),
            (f", {s.emitted}{'/' + str(most) if most else ''} tokens", ""),
        ],
        [(f"last 16: {number(rate(past.cycles[-16:]), 0)} tok/s", "muted")],
    ]
    texts = [
        (f"   {text}" if group and not part else text, style)
        for group, parts in enumerate(groups)
        for part, (text, style) in enumerate(parts)
    ]
    line, used = list[tuple[str, str]](), 0
    for text, style in texts:
        if used + len(text) > context.width:
            break
        line.append((text, style))
        used += len(text)
    return line
