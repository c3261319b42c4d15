"""The text of a run as tokens with their origin, wrapped into lines: what the stream shows, without Textual."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from rich.cells import cell_len

from specdec_engine.record.events import Cycle, Origin
from specdec_engine.record.text import counted
from specdec_tui.frame import Frame, View
from specdec_tui.pieces import Name, StreamDecoder, alone

Kind = Origin | Literal["prompt", "rejected", "untested", "drafted"]
"""Where a token came from; the last three are drafted ones that are not part of the text, or not yet."""


@dataclass(frozen=True, slots=True)
class Word:
    """A token's text on a line, or a part of it."""

    text: str
    kind: Kind
    cycle: int = -1
    """Index of its cycle; -1 for the prompt."""
    position: int = 0
    """In the cycle: of the drafted tokens, then the target's own."""


@dataclass(frozen=True, slots=True)
class Mark:
    """An end of `Lines`: only the last line ever changes, so that the lines before it stay as they are."""

    lines: int
    last: tuple[Word, ...]
    used: int


class Lines:
    """Words wrapped greedily to a width in cells; a word of several tokens stays together where it fits on a line."""

    def __init__(self, width: int, words: Iterable[Word] = (), after: Mark | None = None) -> None:
        """after: begin with the last line of this end."""
        self.width = max(1, width)
        self.lines: list[list[Word]] = [[] if after is None else list(after.last)]
        self._used = 0 if after is None else after.used
        self.extend(words)

    def extend(self, words: Iterable[Word]) -> None:
        for word in words:
            if "\n" not in word.text:
                if word.text:
                    self._put(word)
                continue
            *parts, rest = word.text.split("\n")
            for part in parts:
                self._put(replace(word, text=part + "⏎"))
                self._break()
            if rest:
                self._put(replace(word, text=rest))

    def line(self, word: Word) -> None:
        """A line of its own."""
        self._put(word)
        self._break()

    def mark(self) -> Mark:
        """Where the text ends now."""
        return Mark(len(self.lines), tuple(self.lines[-1]), self._used)

    def _break(self) -> None:
        self.lines.append([])
        self._used = 0

    def _put(self, word: Word) -> None:
        text = word.text if "\t" not in word.text else word.text.replace("\t", "    ")
        size = len(text) if text.isascii() else cell_len(text)
        if self._used + size > self.width and self.lines[-1]:
            self._wrap(text)
            if not self.lines[-1]:
                text = text.removeprefix(" ")
                size = cell_len(text)
        while self._used + size > self.width:  # longer than a whole line
            head, text = _cut(text, self.width - self._used)
            self.lines[-1].append(replace(word, text=head))
            self._break()
            size = cell_len(text)
        self.lines[-1].append(word if text is word.text else replace(word, text=text))
        self._used += size

    def _wrap(self, text: str) -> None:
        """A new line, with the beginning of the word that goes on."""
        line = self.lines[-1]
        at = len(line)
        if not text[:1].isspace():
            at = next((i for i in range(len(line) - 1, 0, -1) if line[i].text[:1].isspace()), len(line))
        moved = line[at:]
        if sum(cell_len(word.text) for word in moved) + cell_len(text) > self.width:
            moved, at = [], len(line)
        del line[at:]
        self._break()
        for word in moved:  # without the space that the break stands for
            bare = word if self.lines[-1] else replace(word, text=word.text.removeprefix(" "))
            self.lines[-1].append(bare)
            self._used += cell_len(bare.text)


def _cut(text: str, width: int) -> tuple[str, str]:
    """The longest beginning of at most this many cells, at least a character; and the rest."""
    used = 0
    for i, char in enumerate(text):
        used += cell_len(char)
        if used > width and i:
            return text[:i], text[i:]
    return text, ""


class TextLayout:
    """The stream's text for any view of a run, at any width. Moving over it costs a cycle, not the text."""

    def __init__(self, name: Name) -> None:
        self._name = name
        self._begin(Frame())
        self._wrap(1, unfolded=False)

    def lines(self, view: View, width: int) -> list[list[Word]]:
        """All lines up to the view's last cycle, and of that what it shows."""
        frame = view.frame
        if frame.run != self._run or frame.cycles[:1] != self._first:
            self._begin(frame)
            self._wrap(width, view.unfolded)
        elif (width, view.unfolded) != (self._lines.width, self._unfolded):
            self._wrap(width, view.unfolded)
        before = max(0, view.shown - 1)
        for index in range(len(self._marks) - 1, before):
            self._lines.extend(self._emitted(frame.cycles[index], index))
            self._marks.append(self._lines.mark())
        mark = self._marks[before]
        end = Lines(width, [] if view.cycle is None else self._last(view, view.cycle), mark)
        return self._lines.lines[: mark.lines - 1] + end.lines

    def _begin(self, frame: Frame) -> None:
        """Another run."""
        self._run, self._first = frame.run, frame.cycles[:1]
        self._decode = StreamDecoder(self._name)
        self._prompt = [Word(self._decode(token), "prompt", position=i) for i, token in enumerate(frame.prompt)]
        self._texts = list[list[Word]]()

    def _wrap(self, width: int, unfolded: bool) -> None:
        """Another width, or the prompt unfolded: all that was decoded is laid out again."""
        self._unfolded = unfolded
        self._lines = Lines(width)
        if self._prompt:
            self._lines.line(
                Word(f"{'▼' if unfolded else '▶'} prompt, {counted(len(self._prompt), 'token')}", "prompt")
            )
        if unfolded:
            self._lines.extend(self._prompt)
        self._marks = [self._lines.mark()]

    def _emitted(self, cycle: Cycle, index: int) -> list[Word]:
        if index == len(self._texts):
            shown = zip(cycle.emitted, cycle.origins, strict=True)
            self._texts.append([Word(self._decode(token), kind, index, i) for i, (token, kind) in enumerate(shown)])
        return self._texts[index]

    def _last(self, view: View, cycle: Cycle) -> list[Word]:
        """Kept, struck out and final tokens in their order; or the draft as far as the view's step goes. At the end of a run
        its text alone: without colours what was struck out looked like a wrong answer."""
        index, partial = view.shown - 1, view.partial
        own = self._emitted(cycle, index)
        if partial is None and view.frame.over and view.shown == len(view.frame.cycles):
            return own
        drafted = [Word(alone(token, self._name), "drafted", index, i) for i, token in enumerate(cycle.drafted)]
        if partial is None or partial.final:
            dropped = [
                replace(word, kind=fate)
                for word, fate in zip(drafted, map(cycle.fate, range(len(drafted))), strict=True)
                if fate != "accepted"
            ]
            return [*own[: cycle.accepted], *dropped, *own[cycle.accepted :]]
        tested = cycle.tests[: partial.tested]
        shown = enumerate(drafted[: partial.drafted])
        return [replace(word, kind=cycle.fate(i)) if i in tested else word for i, word in shown]


@dataclass(frozen=True, slots=True)
class Hit:
    """A cycle in which a text that was looked for ends."""

    shown: int
    """Cycles to show, so that it ends the view."""
    number: int
    """Of those there are, from 1."""
    total: int


def containing(frame: Frame, name: Name, wanted: str, shown: int, direction: int) -> Hit | None:
    """The next (or last) cycle with this text, from the other end where there is no more this way; None if there is none at
    all."""
    decode, text, ends = StreamDecoder(name), "", list[int]()
    for token in frame.prompt:
        decode(token)
    for cycle in frame.cycles:
        text += "".join(decode(token) for token in cycle.emitted)
        ends.append(len(text))
    text, wanted = text.lower(), wanted.lower()
    places = [at + len(wanted) for at in range(len(text)) if text.startswith(wanted, at)]
    cycles = sorted({bisect_left(ends, place) + 1 for place in places})
    later = [c for c in cycles if (c > shown if direction > 0 else c < shown)] or cycles
    if not later:
        return None
    found = later[0] if direction > 0 else later[-1]
    return Hit(found, cycles.index(found) + 1, len(cycles))
