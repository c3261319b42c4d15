"""The race: plain decoding is recorded, then speculation, and both are played side by side on one clock."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

from textual.binding import Binding, BindingType

from specdec_tui.frame import Frame, View
from specdec_tui.live import LiveStream, Request
from specdec_tui.panels import Line, number
from specdec_tui.pieces import one_line
from specdec_tui.race import Lane, Race
from specdec_tui.screens.lanes import TICK_S, LanesScreen

_RECORDING_S = 1.0


class RaceScreen(LanesScreen):
    """Returns the speculative run."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,b", "back", "Back to the run", id="race.back"),
    ]

    KEYS: ClassVar[str] = "space play · home again · + - speed · escape back"
    SPEEDS: ClassVar[tuple[float, ...]] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)

    def __init__(self, stream: LiveStream) -> None:
        super().__init__((stream.name, stream.name), 1 / 4)
        self._stream, self._frames = stream, [Frame(), Frame()]
        self._before = before = stream.turned
        seed = before.seed if before.seed is not None else secrets.randbits(32)
        alone = replace(before.sampling, raw=False)  # 1 to 3 % of a cycle, which plain ones do not pay
        self._request = replace(before, seed=seed, sampling=alone)
        self._waiting: Iterator[Request] = iter([replace(self._request, k=0), self._request])
        self._recording, self._race = -1, None
        self._drawn_at = 0.0

    _race: Race | None

    def on_mount(self) -> None:
        self._next()
        self.set_interval(TICK_S, self.tick)

    def tick(self) -> None:
        """Record, or let time go by, and draw."""
        elapsed = self._elapsed()
        if self._race is None:
            self._record()
            if (
                self._race is None and self._ticked - self._drawn_at < _RECORDING_S
            ):  # drawing would slow what is measured
                return
            self._drawn_at = self._ticked
        elif self._playing:
            self._clock = min(self._race.total_s, self._clock + elapsed * self._speed)
        self._draw()

    def _next(self) -> None:
        self._recording += 1
        if (request := next(self._waiting, None)) is not None:
            self._stream.again(request)
            return
        self._race = Race(Lane.of("plain", self._frames[0]), Lane.of("speculative", self._frames[1]))

    def _record(self) -> None:
        self._stream.allow(None)
        for event in self._stream.drain():
            frame = self._frames[self._recording]
            if event.kind != "started" and not frame.run:
                continue  # of the run that was given up
            self._frames[self._recording] = frame = frame.plus([event])
            if (
                frame.finished is not None and frame.finished.reason == "cancelled"
            ):  # one that this race took the place of
                self._frames[self._recording] = Frame()
            elif frame.over:
                self._next()
                return

    def _draw(self) -> None:
        race, shown = self._race, list[tuple[View, Line]]()
        for key, frame in zip(("plain", "speculative"), self._frames, strict=True):
            lane = Lane.of(key, frame)
            view = lane.at(self._clock) if race is not None else lane.at(lane.total_s)
            s = view.past.summary()
            done = "✓ done  " if race is not None and view.shown == len(lane.ends) else ""
            # Of its own text where that is known, else of as many as were asked for.
            of = self._request.max_tokens if race is None else frame.summary().emitted
            figures: Line = [
                (f"{key}  ", "strong"),
                (done, "key"),
                (f"{s.emitted} of {of} tokens · {s.cycles} passes · {number(s.tokens_per_second, 1)} tok/s", ""),
            ]
            shown.append((replace(view, step=None), figures))
        over = race is not None and self._clock >= race.total_s
        said = (
            race.verdict() if race is not None and over else "Recorded back to back on this machine, replayed together."
        )
        stage = self._stream.stage
        if stage is not None and stage.failed:
            said = one_line(f"× {stage.text}. {stage.hint}")
        elif (broken := next((f.failed for f in self._frames if f.failed is not None), None)) is not None:
            said = one_line(f"× {broken.message}. {broken.hint}")
        self._show(self._title(), shown, said)

    def _title(self) -> Line:
        if self._race is None:
            stage = self._stream.stage
            what = (
                one_line(stage.text)
                if stage is not None and not stage.failed
                else f"recording {('plain', 'speculative')[min(self._recording, 1)]}"
            )
            return [(" race ", "brand"), (f" {what}", "strong")]
        state = self._state(f"1/{1 / self._speed:g}×")
        how = f"  k {self._request.k}  T {self._request.sampling.temperature:g}"
        return [
            (" race ", "brand"),
            (f" {self._clock:.2f} s of {self._race.total_s:.2f} s  ", "strong"),
            (state, "key"),
            (how, "muted"),
        ]

    @property
    def _ended(self) -> bool:
        return self._race is not None and self._clock >= self._race.total_s

    def action_back(self) -> None:
        """With the speculative run; before both are recorded, with none."""
        self._stream.request = self._before
        self.dismiss(self._frames[1] if self._race is not None else None)
