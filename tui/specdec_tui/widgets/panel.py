"""A box around a panel function; it hides while the function has nothing to say."""

from __future__ import annotations

from textual.widget import Widget
from textual.widgets import Static

from specdec_tui.frame import View
from specdec_tui.panels import Panel, Room
from specdec_tui.pieces import Name
from specdec_tui.theme import content


class PanelBox(Static):
    """Draws one `Panel`."""

    def __init__(self, panel: Panel, name: Name, *, id: str) -> None:
        super().__init__(id=id, classes="panel", markup=False)
        self._panel, self._token_name = panel, name

    def show(self, view: View) -> None:
        drawn = self._panel(view, Room(max(10, self._room()), self._token_name))
        self.set_class(drawn is None, "-silent")
        if drawn is not None:
            self.border_title = content([[(drawn.title, "muted")]])
            self.update(content(drawn.lines))

    def _room(self) -> int:
        """Cells within the border; the column's, while this one is hidden and has none."""
        column = self.parent
        return self.content_region.width or (column.region.width - 4 if isinstance(column, Widget) else 0)
