"""The keys that matter now, as many as fit: the rest is in the help."""

from __future__ import annotations

from textual.content import Content
from textual.widget import Widget

from specdec_tui.theme import STYLES

_KEYS = (
    ("space", "Pause"), ("← →", "Cycle"), (", .", "Step"), ("!", "Rejection"), ("i", "Inspect"), ("?", "Help"), ("q", "Quit"),
)  # fmt: skip
_LIVE = (("b", "Race"), ("k K", "k"), ("t T", "Temperature"), ("r", "Prompt"))
_MORE = (("+ -", "Speed"), ("s", "Save"), ("/", "Find"))


class Keys(Widget):
    """One line."""

    _playing, _live = True, False

    def show(self, playing: bool, live: bool) -> None:
        if (playing, live) != (self._playing, self._live):
            self._playing, self._live = playing, live
            self.refresh()

    def render(self) -> Content:
        parts, used = list[tuple[str, str]](), 0
        for key, label in (*_KEYS, *(_LIVE if self._live else ()), *_MORE):
            label = ("Pause" if self._playing else "Play") if key == "space" else label
            if used + len(key) + len(label) + 3 > self.size.width:
                break
            parts += [(f" {key}", STYLES["key"]), (f" {label} ", STYLES["muted"])]
            used += len(key) + len(label) + 3
        return Content.assemble(*parts)
