"""The cycles, one a row."""

from __future__ import annotations

from collections.abc import Sequence

from specdec_tui.frame import View
from specdec_tui.ladder import LEGEND, row
from specdec_tui.pieces import Name
from specdec_tui.widgets.view_lines import Cell, ViewLines


class _Cycles:
    """A line a cycle."""

    def __init__(self, name: Name) -> None:
        self._name = name

    def count(self, view: View, width: int) -> int:
        return view.shown

    def cells(self, view: View, y: int, width: int) -> Sequence[Cell]:
        partial = view.partial if y == view.shown - 1 else None
        return [(text, style, (y, -1)) for text, style in row(view.frame.cycles[y], self._name, width, partial)]


class Ladder(ViewLines):
    """One row a cycle; a click shows the run as it was after it."""

    HELP = (
        "One row a cycle: ✓ kept, × rejected, · never tested, ↳ recovered, + bonus, » expected by a lookup, "
        "≡ forced by the grammar; at the right its milliseconds."
    )

    def __init__(self, name: Name) -> None:
        super().__init__(_Cycles(name), id="ladder", title=f"cycles  {LEGEND}")
