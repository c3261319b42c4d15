"""Plain decoding against speculation: two recorded runs of one prompt on one clock. Pure: time is an argument."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

from specdec_engine.record.events import TokenId, known_phases
from specdec_tui.frame import Frame, View


@dataclass(frozen=True, slots=True)
class Lane:
    """One of the runs."""

    title: str
    frame: Frame
    ends: tuple[float, ...]
    """On the clock: when each cycle was done."""

    @classmethod
    def of(cls, title: str, frame: Frame) -> Lane:
        return cls(title, frame, tuple(accumulate(known_phases(cycle).total_s for cycle in frame.cycles)))

    @classmethod
    def by_token(cls, title: str, frame: Frame) -> Lane:
        """On a clock that counts tokens instead of seconds."""
        return cls(title, frame, tuple(accumulate(float(len(cycle.emitted)) for cycle in frame.cycles)))

    @property
    def total_s(self) -> float:
        return self.ends[-1] if self.ends else 0.0

    def at(self, clock: float) -> View:
        """As it was after so many seconds."""
        return View(self.frame).to(bisect_right(self.ends, clock))

    @property
    def ids(self) -> list[TokenId]:
        return [token for cycle in self.frame.cycles for token in cycle.emitted]


@dataclass(frozen=True, slots=True)
class Race:
    """Both lanes, from the same start."""

    plain: Lane
    speculative: Lane

    @property
    def total_s(self) -> float:
        return max(self.plain.total_s, self.speculative.total_s)

    @property
    def speedup(self) -> float | None:
        """Of tokens a second: texts that were drawn may differ in length."""
        plain, ours = (lane.frame.summary().tokens_per_second for lane in (self.plain, self.speculative))
        return ours / plain if plain and ours else None

    @property
    def same_text(self) -> str:
        """Whether the texts are equal, and why they need not be."""
        if self.plain.ids == self.speculative.ids:
            return "same text ✓"
        if self.plain.frame.setting("temperature"):
            return "drawn texts differ; their distribution is the same"
        return "texts differ where two tokens were nearly equal: rounding, see --dtype float32"

    def verdict(self) -> str:
        """The result in a sentence."""
        plain, ours = self.plain.frame.summary(), self.speculative.frame.summary()
        if self.speedup is None:
            return "Nothing was decoded."
        return (
            f"Speculation is {self.speedup:.2f}× as fast as plain decoding: {ours.emitted} tokens in {ours.cycles} passes, "
            f"plain {plain.emitted} in {plain.cycles}. {self.same_text[0].upper()}{self.same_text[1:]}."
        )
