"""k over time, with the reason of its last change; and memory."""

from __future__ import annotations

from specdec_tui.bars import columns
from specdec_tui.frame import View
from specdec_tui.panels import Drawn, Line, Room, flowed
from specdec_tui.pieces import one_line, plain


def k_over_time(view: View, room: Room) -> Drawn | None:
    """None while k has never changed."""
    past = view.past
    changes = [change for change in past.changes if change.name == "k"]
    if not changes or not past.cycles:
        return None
    ks = [cycle.k for cycle in past.cycles[-room.width :]]
    lines: list[Line] = [[(row, "ratio")] for row in columns([float(k) for k in ks], float(max(*ks, 1)), room.width)]
    last = changes[-1]
    lines += flowed(f"from cycle {last.cycle + 1}: {one_line(last.reason) or 'changed'}", room.width, "muted")[:3]
    return Drawn(f"k · now {plain(last.new)}", lines)
