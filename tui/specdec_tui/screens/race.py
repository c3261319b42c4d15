"""The race: plain decoding is recorded, then speculation, and both are played side by side on one clock."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import replace
from time import monotonic
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Vertical
from textual.screen import Screen
from textual.widgets import Static

from specdec_tui.frame import Frame
from specdec_tui.live import LiveStream, Request
from specdec_tui.panels import Line, number
from specdec_tui.pieces import one_line
from specdec_tui.race import Lane, Race
from specdec_tui.theme import content
from specdec_tui.widgets.stream import Stream

_TICK_S = 1 / 15
_RECORDING_S = 1.0
_SPEEDS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


class RaceScreen(Screen[Frame | None]):
    """Returns the speculative run."""

    DEFAULT_CSS = """
    RaceScreen { background: $background; }
    RaceScreen #lanes { height: 1fr; layout: horizontal; }
    RaceScreen.-narrow #lanes { layout: vertical; }
    RaceScreen .lane { width: 1fr; height: 1fr; }
    RaceScreen .lane Stream { height: 1fr; border: round $border; padding: 0 1; }
    RaceScreen .lane Static, RaceScreen #race-title, RaceScreen #race-keys { height: 1; padding: 0 1; }
    RaceScreen #race-verdict { height: 2; padding: 0 1; background: $panel; }
    """
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-medium")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "play", "Pause or play", id="race.play", priority=True),
        Binding("home", "again", "From the start", id="race.again", priority=True),
        Binding("plus,equals_sign", "faster(1)", "Faster", id="race.faster"),
        Binding("minus", "faster(-1)", "Slower", id="race.slower"),
        Binding("escape,b", "back", "Back to the run", id="race.back"),
    ]

    def __init__(self, stream: LiveStream) -> None:
        super().__init__()
        self._stream, self._frames = stream, [Frame(), Frame()]
        self._before = before = stream.turned
        seed = before.seed if before.seed is not None else secrets.randbits(32)
        alone = replace(before.sampling, raw=False)  # 1 to 3 % of a cycle, which plain ones do not pay
        self._request = replace(before, seed=seed, sampling=alone)
        self._waiting: Iterator[Request] = iter([replace(self._request, k=0), self._request])
        self._recording, self._race = -1, None
        self._clock, self._playing, self._speed, self._ticked = 0.0, True, 1 / 4, monotonic()
        self._drawn_at = 0.0

    _race: Race | None

    def compose(self) -> ComposeResult:
        yield Static(id="race-title", markup=False)
        with Container(id="lanes"):
            for key in ("plain", "speculative"):
                with Vertical(classes="lane"):
                    yield Static(id=f"{key}-figures", markup=False)
                    yield Stream(self._stream.name, id=f"{key}-stream")
        yield Static(id="race-verdict", markup=False)
        yield Static("space play · home again · + - speed · escape back", id="race-keys", markup=False)

    def on_mount(self) -> None:
        self._next()
        self.set_interval(_TICK_S, self.tick)

    def tick(self) -> None:
        """Record, or let time go by, and draw."""
        now = monotonic()
        elapsed, self._ticked = now - self._ticked, now
        if self._race is None:
            self._record()
            if self._race is None and now - self._drawn_at < _RECORDING_S:  # drawing would slow what is measured
                return
            self._drawn_at = now
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
        race = self._race
        for i, key in enumerate(("plain", "speculative")):
            lane = Lane.of(key, self._frames[i])
            view = lane.at(self._clock) if race is not None else lane.at(lane.total_s)
            self.query_one(f"#{key}-stream", Stream).show(replace(view, step=None))
            s = view.past.summary()
            done = "✓ done  " if race is not None and view.shown == len(lane.ends) else ""
            figures: Line = [
                (f"{key}  ", "strong"),
                (done, "key"),
                (f"{s.emitted} tokens · {s.cycles} passes · {number(s.tokens_per_second, 1)} tok/s", ""),
            ]
            self.query_one(f"#{key}-figures", Static).update(content([figures]), layout=False)
        self.query_one("#race-title", Static).update(content([self._title()]), layout=False)
        over = race is not None and self._clock >= race.total_s
        said = (
            race.verdict() if race is not None and over else "Recorded back to back on this machine, replayed together."
        )
        stage = self._stream.stage
        if stage is not None and stage.failed:
            said = one_line(f"× {stage.text}. {stage.hint}")
        elif (broken := next((f.failed for f in self._frames if f.failed is not None), None)) is not None:
            said = one_line(f"× {broken.message}. {broken.hint}")
        self.query_one("#race-verdict", Static).update(content([[(said, "")]]), layout=False)

    def _title(self) -> Line:
        if self._race is None:
            stage = self._stream.stage
            what = (
                one_line(stage.text)
                if stage is not None and not stage.failed
                else f"recording {('plain', 'speculative')[min(self._recording, 1)]}"
            )
            return [(" race ", "brand"), (f" {what}", "strong")]
        state = f"▶ 1/{1 / self._speed:g}×" if self._playing else "‖ paused"
        how = f"  k {self._request.k}  T {self._request.sampling.temperature:g}"
        return [
            (" race ", "brand"),
            (f" {self._clock:.2f} s of {self._race.total_s:.2f} s  ", "strong"),
            (state, "key"),
            (how, "muted"),
        ]

    def action_play(self) -> None:
        self._playing = not self._playing

    def action_again(self) -> None:
        self._clock, self._playing = 0.0, True

    def action_faster(self, by: int) -> None:
        self._speed = _SPEEDS[max(0, min(len(_SPEEDS) - 1, _SPEEDS.index(self._speed) + by))]

    def action_back(self) -> None:
        """With the speculative run; before both are recorded, with none."""
        self._stream.request = self._before
        self.dismiss(self._frames[1] if self._race is not None else None)
