"""k over time, with the reason of its last change; and memory."""

from __future__ import annotations

from collections.abc import Mapping

from specdec_tui.bars import columns, stacked
from specdec_tui.frame import View
from specdec_tui.panels import Line, PanelContent, PanelContext, flowed
from specdec_tui.pieces import one_line, plain


def memory(view: View, context: PanelContext) -> PanelContent | None:
    """Weights and caches so far; None where the run did not say how large its models are."""
    frame = view.past
    models = [frame.environment.get("target"), *(frame.environment.get("drafts") or {}).values()]
    parts = [m for m in models if isinstance(m, Mapping) and isinstance(m.get("weight_bytes"), int)]
    if not parts or parts[0] is not models[0]:
        return None
    tokens = len(frame.prompt) + frame.summaries[-1].emitted
    cache = tokens * sum(m.get("token_bytes") or 0 for m in parts)
    target, drafts = parts[0]["weight_bytes"], sum(m["weight_bytes"] for m in parts[1:])
    cells = stacked((drafts, target, cache), context.width)
    bars: Line = [(glyph * n, s) for glyph, n, s in zip("█▓░", cells, ("draft", "target", "muted"), strict=True)]
    said = ([f"draft {_size(drafts)}"] if drafts else []) + [f"target {_size(target)}"]
    said += [f"{_size(cache)} for {tokens} tokens"] if cache else []
    most = frame.finished.peak_bytes if frame.finished is not None else None
    title = "memory" if most is None else f"memory · at most {_size(most)} in all"
    return PanelContent(title, [bars, *flowed("  ".join(said), context.width)])


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def k_over_time(view: View, context: PanelContext) -> PanelContent | None:
    """None while k has never changed."""
    past = view.past
    changes = [change for change in past.changes if change.name == "k"]
    if not changes or not past.cycles:
        return None
    ks = [cycle.k for cycle in past.cycles[-context.width :]]
    most = max([1, *(k for k in ks if k is not None)])
    lines: list[Line] = [[(row, "ratio")] for row in columns(ks, most, context.width)]
    last = changes[-1]
    lines += flowed(f"from cycle {last.cycle + 1}: {one_line(last.reason) or 'changed'}", context.width, "muted")[:3]
    return PanelContent(f"k · now {plain(last.new)}", lines)
