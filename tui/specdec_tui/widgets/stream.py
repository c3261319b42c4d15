"""The text of the run, each token by its origin; what the last cycle dropped stands struck out in its place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from specdec_tui.frame import View
from specdec_tui.pieces import Name
from specdec_tui.widgets.view_lines import Cell, ViewLines
from specdec_tui.words import TextLayout, Word


class _Text:
    """Lines of the text."""

    def __init__(self, name: Name) -> None:
        self._layout = TextLayout(name)

    def count(self, view: View, width: int) -> int:
        self._lines = self._layout.lines(view, width)
        return len(self._lines)

    def cells(self, view: View, y: int, width: int) -> Sequence[Cell]:
        return [cell for word in self._lines[y] for cell in _cells(word, view)] if y < len(self._lines) else []


def _cells(word: Word, view: View) -> Iterator[Cell]:
    """The word alone is styled: a struck or underlined space before it looks like a fault."""
    token = word.cycle, word.position
    bare = word.text.lstrip()
    if space := word.text[: len(word.text) - len(bare)]:
        yield space, "", token
    if bare:
        pointed_at = word.cycle == view.shown - 1 and view.position is not None and word.position == view.position
        yield bare, "cursor" if pointed_at else word.kind, token


class Stream(ViewLines):
    """Text by provenance."""

    HELP = "Text by where each token came from. Click a token to inspect it, the prompt to unfold it."

    def __init__(self, name: Name, id: str = "stream") -> None:
        super().__init__(_Text(name), id=id, title="text")
