"""Where in the run the screen is; click or drag to move."""

from __future__ import annotations

from textual import events
from textual.content import Content
from textual.message import Message
from textual.widget import Widget

from specdec_tui.frame import View
from specdec_tui.theme import STYLES


class Scrubber(Widget):
    """One line."""

    DEFAULT_CSS = "Scrubber { height: 1; }"

    class Moved(Message):
        """To this cycle."""

        def __init__(self, shown: int) -> None:
            super().__init__()
            self.shown = shown

    def __init__(self) -> None:
        super().__init__(id="scrubber")
        self._view, self._end = View(), "end"

    def show(self, view: View, end: str) -> None:
        """end: what the right end is called."""
        self._view, self._end = view, end
        self.refresh()

    def render(self) -> Content:
        view, total = self._view, len(self._view.frame.cycles)
        left, right = f" ◀ cycle {view.shown}/{total} ", f" {self._end} ▶ "
        self._left = len(left)
        self._room = max(1, self.size.width - len(left) - len(right))
        done = round(view.shown / total * self._room) if total else 0
        return Content.assemble(
            (left, STYLES["muted"]),
            ("━" * done, STYLES["key"]),
            ("─" * (self._room - done), STYLES["muted"]),
            (right, STYLES["muted"]),
        )

    def on_mouse_down(self, event: events.MouseDown) -> None:
        self.capture_mouse()
        self._to(event.x)

    def on_mouse_move(self, event: events.MouseMove) -> None:
        if event.button:
            self._to(event.x)

    def on_mouse_up(self, event: events.MouseUp) -> None:
        self.release_mouse()

    def _to(self, x: int) -> None:
        share = (x - self._left + 1) / self._room
        self.post_message(self.Moved(round(max(0.0, min(1.0, share)) * len(self._view.frame.cycles))))
