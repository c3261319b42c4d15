"""What is shown and when: a head that moves over the history, live or recorded. Pure: time is an argument.

A live engine is told how many cycles it may run (`allowed`); it waits between cycles, so that pausing, stepping and slow
speeds change no measured time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from specdec_engine.record.events import Event
from specdec_tui.frame import View

SPEEDS = (1 / 64, 1 / 16, 1 / 4, 1.0, 4.0, math.inf)
"""Of recorded time; the last is as fast as cycles come. A cycle of 12 ms lasts 0.8 s at the first."""
REPLAY_SPEED = 1 / 16
"""At which what is over is shown: a fifth of a second for such a cycle."""


PRESENTED_S = 0.7
"""Seconds that a step of a cycle is shown in presenter mode: long enough to say what it is."""


class Player:
    """The state of the screen, beside what is pointed at with the mouse."""

    def __init__(self, speed: float, *, live: bool) -> None:
        self.view = View()
        self.playing = True
        self.speed = speed
        self.live = live
        self.presenting = False
        """True while it plays step by step, and stops where a draft was decided."""
        self._due = 0.0  # recorded seconds that the head is behind its time
        # A cycle that a live engine is to run while paused, to be shown whole or from its first step on.
        self._awaiting: Literal["cycle", "step"] | None = None
        self._settling = False  # paused in full speed: cycles that were under way are still shown

    def feed(self, events: Iterable[Event]) -> None:
        """More is known; a new run begins at its beginning."""
        frame = self.view.frame.plus(events)
        if frame.run != self.view.frame.run:
            if self.view.frame.run:  # another run was asked for
                self.playing, self._awaiting = True, None
            self.view, self._due = View(unfolded=self.view.unfolded), 0.0
        more = len(frame.cycles) > len(self.view.frame.cycles)
        self.view = self.view.known(frame)
        if self._awaiting and more:
            self.view = self.view.to(self.view.shown + 1) if self._awaiting == "cycle" else self.view.forward()
            self._awaiting = None
        if self._settling and more:
            self.view = self.view.end()

    @property
    def allowed(self) -> int | None:
        """Cycles that a live engine may have run by now; None for any number."""
        if not self.playing:
            return self.view.shown + (self._awaiting is not None)
        return None if math.isinf(self.speed) and not self.presenting else self.view.shown + 1

    def tick(self, elapsed: float) -> bool:
        """Time goes by, in seconds; whether the view moved."""
        before = self.view
        if not self.playing:
            return False
        if self.presenting:
            self._present(elapsed)
        elif math.isinf(self.speed):
            self.view = before.end()
        else:
            self._due += elapsed * self.speed
            while not self.view.at_end and self._due >= (lasts := self._lasts()):
                self._due -= lasts
                self.view = self.view.to(self.view.shown + (self.view.step is None))
            if self.view.at_end:
                self._due = 0.0
        if self.view.at_end and self.view.frame.over:
            self.playing = False
        return self.view is not before

    def _present(self, elapsed: float) -> None:
        """Up to the end of the next cycle that had a draft."""
        self._due += elapsed
        while self.playing and not self.view.at_end and self._due >= PRESENTED_S:
            self._due -= PRESENTED_S
            self.view = self.view.forward()
            decided = self.view.step is None and self.view.cycle is not None and bool(self.view.cycle.drafted)
            self.playing = not decided
        if self.view.at_end or not self.playing:
            self._due = 0.0

    def _lasts(self) -> float:
        """Recorded seconds of the next cycle to be shown."""
        at = min(self.view.shown, len(self.view.frame.cycles) - 1)
        return self.view.frame.cycles[at].seconds or 0.01

    # -- commands ----------------------------------------------------------------------------------------------------

    def toggle(self) -> None:
        """Pause, or play on; at the end of what is over, from the beginning."""
        self.playing = not self.playing
        self._settling = self.live and not self.playing and math.isinf(self.speed)
        if self.playing and self.view.at_end and self.view.frame.over:
            self.view = self.view.to(0)
            self.speed = min(self.speed, REPLAY_SPEED)

    def cycle(self, by: int) -> None:
        """Pause and move by whole cycles; at the live end the engine runs one more."""
        self._pause()
        if by > 0 and self.view.at_end:
            self._await("cycle")
            return
        partial = self.view.step is not None  # its cycle is completed, or begun anew, first
        self.view = self.view.to(self.view.shown + by + (by < 0 and partial) - (by > 0 and partial))

    def step(self, by: int) -> None:
        """Pause and move by a step within a cycle; at the live end the engine runs one more."""
        self._pause()
        if by > 0 and self.view.at_end:
            self._await("step")
            return
        self.view = self.view.forward() if by > 0 else self.view.back()

    def to(self, shown: int) -> None:
        self._pause()
        self.view = self.view.to(shown)

    def end(self) -> None:
        """Where new cycles come in."""
        self.view = self.view.end()

    def point(self, cycle: int, position: int) -> None:
        """Look at a token of a cycle; a position past the draft is the target's own, whose test was the last one."""
        self.to(cycle + 1)
        self.view = replace(self.view, position=position if position >= 0 else None)

    def aim(self, by: int) -> None:
        """Look at the next or last token of the cycle."""
        if (at := self.view.inspected) is not None:
            self.view = replace(self.view, position=max(0, at + by))

    def present(self) -> None:
        """Presenter mode, or back; paused either way."""
        self._pause()
        self.presenting = not self.presenting

    def warp(self) -> None:
        """The inspector's other side."""
        self.view = replace(self.view, warping=not self.view.warping)

    def unfold(self) -> None:
        """The prompt, or fold it again."""
        self.view = replace(self.view, unfolded=not self.view.unfolded)

    def find(self, wanted: Literal["rejection", "acceptance"]) -> bool:
        """Whether there was one."""
        found = self.view.find(wanted)
        moved = found is not self.view
        self._pause()
        self.view = found
        return moved

    def _await(self, what: Literal["cycle", "step"]) -> None:
        self._awaiting = what if self.live and not self.view.frame.over else None

    def _pause(self) -> None:
        self.playing = self._settling = False
        self._awaiting = None

    def faster(self, by: int) -> None:
        at = min(range(len(SPEEDS)), key=lambda i: abs(math.log(min(SPEEDS[i], 64) / min(self.speed, 64))))
        self.speed = SPEEDS[max(0, min(len(SPEEDS) - 1, at + by))]

    @property
    def speed_name(self) -> str:
        if math.isinf(self.speed):
            return "max" if not self.live else "live"
        return f"{self.speed:g}×" if self.speed >= 1 else f"1/{1 / self.speed:g}×"
