"""Two recorded runs of one prompt, at the same place of the text. Pure: the place is an argument."""

from __future__ import annotations

from dataclasses import dataclass

from specdec_engine.record.comparison import Comparison, RecordedRun
from specdec_tui.frame import Frame
from specdec_tui.pieces import one_line, plain
from specdec_tui.race import Lane


@dataclass(frozen=True, slots=True)
class Against:
    """Both lanes, and what `compare` says of them."""

    found: Comparison
    lanes: tuple[Lane, Lane]
    """By tokens."""

    @classmethod
    def of(cls, found: Comparison, frames: tuple[Frame, Frame]) -> Against:
        a, b = (Lane.by_token(_title(frame), frame) for frame in frames)
        return cls(found, (a, b))

    @property
    def same(self) -> bool:
        return self.found.same

    @property
    def tokens(self) -> int:
        """Of the longer one."""
        return max(len(self.found.a.tokens), len(self.found.b.tokens))

    @property
    def parts_at(self) -> int:
        """Tokens shown where the first that differs is shown, too, in both."""
        if self.same:
            return self.tokens
        ends = [next((int(e) for e in lane.ends if e > self.found.common), 0) for lane in self.lanes]
        return max(ends)

    def border(self, place: int, by: int) -> int:
        """The next end of a cycle in either run, in this direction."""
        ends = sorted({0, self.tokens, *(int(end) for lane in self.lanes for end in lane.ends)})
        beyond = [end for end in ends if (end > place if by > 0 else end < place)]
        return place if not beyond else beyond[0] if by > 0 else beyond[-1]

    def next_other(self, place: int) -> int:
        """The end of A's next cycle that B does not have; the place itself where there is none."""
        others = set(self.found.other_cycles)
        ends = (begin + len(c.emitted) for begin, c in self.found.a.begins() if c.index in others)
        return next((end for end in ends if end > place), place)

    def said(self, place: int) -> str:
        """The state at this place, in sentences."""
        found = self.found
        if not found.same and place > found.common:
            a, b = (_says(run, found.common) for run in (found.a, found.b))
            return f"They part after {found.common} tokens: A says {a}, B {b}. {found.why[:1].upper()}{found.why[1:]}."
        cycles = found.same_cycles + len(found.other_cycles)
        said = [] if place < self.tokens else ["The same text."]
        until = "" if found.same else " before they part"
        said.append(f"{found.same_cycles} of A's {cycles} cycles{until} are B's, too.")
        now = next((c for begin, c in found.a.begins() if begin < place <= begin + len(c.emitted)), None)
        if now is not None:
            whose = "A's alone" if now.index in found.other_cycles else "B's, too"
            said.append(f"Cycle {now.index + 1} is {whose}.")
        return " ".join(said)


def _title(frame: Frame) -> str:
    k = "auto" if frame.settings.get("adaptive") else frame.settings.get("k")
    return one_line(f"draft {plain(frame.settings.get('draft', '–'))}{'' if k is None else f' k {plain(k)}'}")


def _says(run: RecordedRun, place: int) -> str:
    """Its token at this place, to be read."""
    return one_line(repr(run.name(run.tokens[place]))) if place < len(run.tokens) else "no more"
