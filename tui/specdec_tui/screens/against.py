"""Two recorded runs of one prompt, token by token: where they part, and which of their cycles differ."""

from __future__ import annotations

from typing import ClassVar

from textual.binding import Binding, BindingType

from specdec_engine.record.text import counted
from specdec_tui.against import Against
from specdec_tui.frame import View
from specdec_tui.panels import Line, number
from specdec_tui.pieces import Name
from specdec_tui.screens.lanes import TICK_S, LanesScreen


class AgainstScreen(LanesScreen):
    """The clock counts tokens, so that both lanes stand at the same place of the text."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("right", "step(1)", "To the next end of a cycle", id="against.forward", priority=True),
        Binding("left", "step(-1)", "To the one before", id="against.back", priority=True),
        Binding("n", "other", "To A's next cycle that B does not have", id="against.other"),
        Binding("end", "part", "To where they part", id="against.part", priority=True),
    ]
    KEYS: ClassVar[str] = "space play · ← → cycles · n other cycle · end parting · home again · q leaves"
    SPEEDS: ClassVar[tuple[float, ...]] = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)

    def __init__(self, against: Against, names: tuple[Name, Name]) -> None:
        super().__init__(names, 16.0)
        self._against = against

    def on_mount(self) -> None:
        self.set_interval(TICK_S, self.tick)

    def tick(self) -> None:
        """Let time go by, hold where they part, and draw."""
        elapsed, before, parts = self._elapsed(), self._clock, self._against.parts_at
        if self._playing:
            self._clock = min(float(self._against.tokens), before + elapsed * self._speed)
            if before < parts <= self._clock and not self._against.same:
                self._clock, self._playing = float(parts), False
        self._draw()

    def _draw(self) -> None:
        against, place = self._against, int(self._clock)
        shown = list[tuple[View, Line]]()
        for letter, lane in zip("AB", against.lanes, strict=True):
            view = lane.at(place)
            s = view.past.summary()
            figures: Line = [
                (f"{letter} ", "brand"),
                (f"{lane.title}  ", "strong"),
                (
                    f"{counted(s.emitted, 'token')}, {counted(s.cycles, 'cycle')}, {number(s.tokens_per_second, 0)} tok/s",
                    "",
                ),
            ]
            shown.append((view, figures))
        state = self._state(f"{self._speed:g} tokens a second")
        title: Line = [(" against ", "brand"), (f" token {place} of {against.tokens}  ", "strong"), (state, "key")]
        self._show(title, shown, against.said(place))

    @property
    def _ended(self) -> bool:
        return self._clock >= self._against.tokens

    def _go(self, place: int) -> None:
        self._clock, self._playing = float(place), False

    def action_step(self, by: int) -> None:
        self._go(self._against.border(int(self._clock), by))

    def action_other(self) -> None:
        self._go(self._against.next_other(int(self._clock)))

    def action_part(self) -> None:
        self._go(self._against.parts_at)
