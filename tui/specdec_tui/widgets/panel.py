"""A box around a panel function; it hides while the function has nothing to say."""

from __future__ import annotations

from rich.cells import cell_len
from textual.widget import Widget
from textual.widgets import Static

from specdec_tui.frame import View
from specdec_tui.panels import Panel, PanelContent, PanelContext
from specdec_tui.pieces import Name
from specdec_tui.theme import content


class PanelBox(Static):
    """Draws one `Panel`."""

    def __init__(self, panel: Panel, name: Name, *, id: str) -> None:
        super().__init__(id=id, classes="panel -silent", markup=False)
        self._panel, self._token_name = panel, name
        self._shown: PanelContent | None = None

    def show(self, view: View) -> None:
        shown, before = self._panel(view, PanelContext(max(10, self._room()), self._token_name)), self._shown
        if shown == before:
            return
        self._shown = shown
        self.set_class(shown is None, "-silent")
        if shown is None:
            return
        if before is None or before.title != shown.title:
            self.border_title = content([[(shown.title, "muted")]])
        # A layout draws the whole screen again: only where this box grows or shrinks.
        fixed = self.styles.height is not None and not self.styles.height.is_auto
        same = before is not None and (fixed or self._rows(before) == self._rows(shown))
        self.update(content(shown.lines), layout=not same)

    def _rows(self, panel: PanelContent) -> int:
        """Rows that its lines take: one that is too wide is wrapped."""
        width = max(1, self._room())
        return sum(max(1, -(-sum(cell_len(text) for text, _ in line) // width)) for line in panel.lines)

    def _room(self) -> int:
        """Cells within the border; the column's, while this one is hidden and has none."""
        column = self.parent
        return self.content_region.width or (column.region.width - 4 if isinstance(column, Widget) else 0)
