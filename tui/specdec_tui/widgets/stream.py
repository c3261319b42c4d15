"""The text of the run, each token by its origin; what the last cycle dropped stands struck out in its place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from specdec_tui.pieces import Name
from specdec_tui.widgets.view_lines import Cell, ViewLines
from specdec_tui.words import Story, Word


class Stream(ViewLines):
    """Text by provenance."""

    HELP = "Text by where each token came from. Click a token to inspect it."

    def __init__(self, name: Name, id: str = "stream") -> None:
        super().__init__(id=id)
        self.border_title = "text"
        self._story = Story(name)

    def count(self, width: int) -> int:
        self._lines = self._story.lines(self.view, width)
        return len(self._lines)

    def line_cells(self, y: int, width: int) -> Sequence[Cell]:
        return [cell for word in self._lines[y] for cell in self._cells(word)] if y < len(self._lines) else []

    def _cells(self, word: Word) -> Iterator[Cell]:
        """The word alone is styled: a struck or underlined space before it looks like a fault."""
        token = None if word.cycle < 0 else (word.cycle, word.position)
        bare = word.text.lstrip()
        if space := word.text[: len(word.text) - len(bare)]:
            yield space, "", token
        if bare:
            yield bare, "cursor" if self._pointed_at(word) else word.kind, token

    def _pointed_at(self, word: Word) -> bool:
        return (
            word.cycle == self.view.shown - 1 and self.view.position is not None and word.position == self.view.position
        )
