"""The keys that matter now, as many as fit: the rest is in the help."""

from __future__ import annotations

from typing import Literal

from textual.content import Content
from textual.widget import Widget

from specdec_tui.theme import STYLES

_KEYS = (
    ("space", "Pause"), ("← →", "Cycle"), ("?", "Help"), ("q", "Quit"), (", .", "Step"), ("!", "Rejection"), ("i", "Inspect"),
)  # fmt: skip
"""In this order: where it is narrow, one must still find help and the way out."""
_LIVE = (("b", "Race"), ("[ ]", "k"), ("t T", "Temperature"), ("r", "Prompt"))
_MORE = (("+ -", "Speed"), ("s", "Save"), ("/", "Find"))
_PRESENT = (("v", "Present"),)
_PRESENTING = (
    ("space", "To the next decision"), ("v", "Leave"), ("?", "Help"), ("q", "Quit"), ("← →", "Cycle"), (", .", "Step"),
    ("h l", "Token"),
)  # fmt: skip
"""Keys of presenter mode, which has few panels."""
Mode = Literal["recorded", "live", "lesson", "presenting"]


class Keys(Widget):
    """One line; at its right what drawing takes of a core."""

    _said: tuple[bool, Mode, str] = (True, "recorded", "")

    def show(self, playing: bool, mode: Mode, display_cost: float | None) -> None:
        cost = "" if display_cost is None else f"screen {display_cost:.0%} "
        if (said := (playing, mode, cost)) != self._said:
            self._said = said
            self.refresh()

    def render(self) -> Content:
        playing, mode, cost = self._said
        parts, used = list[tuple[str, str]](), 0
        shown = (*_KEYS, *(_LIVE if mode == "live" else ()), *_MORE, *(() if mode == "lesson" else _PRESENT))
        for key, label in _PRESENTING if mode == "presenting" else shown:
            label = ("Pause" if playing else "Play") if label == "Pause" else label
            if used + len(key) + len(label) + 3 > self.size.width - len(cost):
                break
            parts += [(f" {key}", STYLES["key"]), (f" {label} ", STYLES["muted"])]
            used += len(key) + len(label) + 3
        parts.append((" " * (self.size.width - used - len(cost)) + cost, STYLES["muted"]))
        return Content.assemble(*parts)
