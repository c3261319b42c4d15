"""The keys that matter now, as many as fit: the rest is in the help."""

from __future__ import annotations

from textual.content import Content
from textual.widget import Widget

from specdec_tui.theme import STYLES

_KEYS = (
    ("space", "Pause"), ("← →", "Cycle"), (", .", "Step"), ("!", "Rejection"), ("i", "Inspect"), ("?", "Help"), ("q", "Quit"),
    ("+ -", "Speed"), ("s", "Save"), ("/", "Find"), ("k K", "k"), ("t T", "Temperature"), ("r", "Prompt"),
)  # fmt: skip


class Keys(Widget):
    """One line."""

    _playing = True

    def show(self, playing: bool) -> None:
        if playing != self._playing:
            self._playing = playing
            self.refresh()

    def render(self) -> Content:
        parts, used = list[tuple[str, str]](), 0
        for key, label in _KEYS:
            label = ("Pause" if self._playing else "Play") if key == "space" else label
            if used + len(key) + len(label) + 3 > self.size.width:
                break
            parts += [(f" {key}", STYLES["key"]), (f" {label} ", STYLES["muted"])]
            used += len(key) + len(label) + 3
        return Content.assemble(*parts)
