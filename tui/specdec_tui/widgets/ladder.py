"""The cycles, one a row."""

from __future__ import annotations

from collections.abc import Sequence

from specdec_tui.ladder import row
from specdec_tui.pieces import Name
from specdec_tui.widgets.view_lines import Cell, ViewLines


class Ladder(ViewLines):
    """One row a cycle; a click shows the run as it was after it."""

    HELP = "One row a cycle: ✓ kept, × rejected, · never tested, ↳ recovered, + bonus; at the right its milliseconds."

    def __init__(self, name: Name) -> None:
        super().__init__(id="ladder")
        self.border_title = "cycles"
        self._token_name = name

    def count(self, width: int) -> int:
        return self.view.shown

    def line_cells(self, y: int, width: int) -> Sequence[Cell]:
        last = y == self.view.shown - 1
        parts = row(self.view.frame.cycles[y], self._token_name, width, self.view.partial if last else None)
        return [(text, style, (y, -1)) for text, style in parts]
