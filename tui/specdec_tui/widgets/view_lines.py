"""Lines of a view that scroll: the base of the stream and the ladder. Only lines on screen are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from rich.segment import Segment
from rich.style import Style as RichStyle
from textual import events
from textual.binding import Binding, BindingType
from textual.cache import LRUCache
from textual.geometry import Size
from textual.message import Message
from textual.reactive import var
from textual.scroll_view import ScrollView
from textual.strip import Strip

from specdec_tui.frame import View
from specdec_tui.pieces import one_line
from specdec_tui.theme import styles

Cell = tuple[str, str, tuple[int, int] | None]
"""Text, style name, and the (cycle, position) it stands for."""


class Rows(Protocol):
    """**Protocol:** what stands on the lines."""

    def count(self, view: View, width: int) -> int:
        """Lines of this view at this width; asked before any `cells`."""
        ...

    def cells(self, view: View, y: int, width: int) -> Sequence[Cell]: ...


class ViewLines(ScrollView, can_focus=True, inherit_bindings=False):  # home and end are the screen's
    """Draws `Rows`; a click on a cell tells which token was meant."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "scroll_up", "Scroll up", show=False, id="scroll-up"),
        Binding("down", "scroll_down", "Scroll down", show=False, id="scroll-down"),
        Binding("pageup", "page_up", "Page up", show=False, id="page-up"),
        Binding("pagedown", "page_down", "Page down", show=False, id="page-down"),
    ]

    DEFAULT_CSS = """
    ViewLines { overflow-y: scroll; overflow-x: hidden; scrollbar-size-vertical: 1; }
    ViewLines { scrollbar-background: $background; scrollbar-color: $border; }
    ViewLines { scrollbar-background-hover: $background; scrollbar-color-hover: $text-muted; }
    ViewLines { scrollbar-background-active: $background; scrollbar-color-active: $text-muted; }
    """
    view: var[View] = var(View())

    class Pointed(Message):
        """A drafted or emitted token was clicked."""

        def __init__(self, cycle: int, position: int) -> None:
            super().__init__()
            self.cycle, self.position = cycle, position

    def __init__(self, rows: Rows, *, id: str, title: str) -> None:
        super().__init__(id=id)
        self._rows, self.border_title = rows, title
        self._strips = LRUCache[tuple[object, ...], Strip](1024)
        self._drawn: dict[int, tuple[Cell, ...]] = {}

    def on_mount(self) -> None:
        self._restyle()
        self.app.theme_changed_signal.subscribe(self, lambda _: self._restyle())

    def _restyle(self) -> None:
        self._base = self.rich_style
        self._styles = {name: self._base + style.rich_style for name, style in styles(self.app.theme_variables).items()}
        self._strips.clear()
        self._drawn.clear()
        self.refresh()

    def show(self, view: View) -> None:
        """Draw this view, and follow its end."""
        self.view = view
        width = self.scrollable_content_region.width
        if width < 1:
            return
        self._grow(Size(width, self._rows.count(self.view, width)))
        self.scroll_end(animate=False, immediate=True, x_axis=False)  # where that moves, all lines are drawn
        top = self.scroll_offset.y
        for line in range(top, top + self.scrollable_content_region.height):
            if self._content(line, width) != self._drawn.get(line):
                self.refresh_line(line)

    def _grow(self, size: Size) -> None:
        """Setting `virtual_size` would lay out and draw the whole screen again, which doubles what a cycle costs."""
        self.set_reactive(ViewLines.virtual_size, size)
        self.vertical_scrollbar.window_virtual_size = size.height

    def action_page_up(self) -> None:
        self.scroll_page_up(animate=False)

    def action_page_down(self) -> None:
        self.scroll_page_down(animate=False)

    def on_resize(self) -> None:
        self.show(self.view)

    def render_line(self, y: int) -> Strip:
        width, line = self.scrollable_content_region.width, y + self.scroll_offset.y
        cells = self._drawn[line] = self._content(line, width)
        key = self.size.width, cells
        if (strip := self._strips.get(key)) is None:
            strip = Strip([self._segment(cell) for cell in cells]).adjust_cell_length(self.size.width, self._base)
            self._strips[key] = strip
        return strip

    def _content(self, line: int, width: int) -> tuple[Cell, ...]:
        return tuple(self._rows.cells(self.view, line, width)) if 0 <= line < self.virtual_size.height else ()

    def _segment(self, cell: Cell) -> Segment:
        text, name, token = cell
        style = self._styles[name]
        return Segment(one_line(text), style if token is None else style + RichStyle.from_meta({"token": token}))

    def on_click(self, event: events.Click) -> None:
        if (token := event.style.meta.get("token")) is not None:
            self.post_message(self.Pointed(*token))
