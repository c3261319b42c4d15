"""Two runs side by side on one clock: their texts, a line of figures above each, and a sentence below."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Vertical
from textual.screen import Screen
from textual.widgets import Static

from specdec_tui.frame import Frame, View
from specdec_tui.panels import Line
from specdec_tui.pieces import Name
from specdec_tui.theme import content
from specdec_tui.widgets.stream import Stream

TICK_S = 1 / 15
"""Between two draws."""


class LanesScreen(Screen[Frame | None]):
    """What a screen of two lanes has in common; the clock is in the units of the one that draws."""

    DEFAULT_CSS = """
    LanesScreen { background: $background; }
    LanesScreen #lanes { height: 1fr; layout: horizontal; }
    LanesScreen.-narrow #lanes { layout: vertical; }
    LanesScreen .lane { width: 1fr; height: 1fr; }
    LanesScreen .lane Stream { height: 1fr; border: round $border; padding: 0 1; }
    LanesScreen .lane Static, LanesScreen #lanes-title, LanesScreen #lanes-keys { height: 1; padding: 0 1; }
    LanesScreen #lanes-verdict { height: auto; min-height: 2; max-height: 5; padding: 0 1; background: $panel; }
    """
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-medium")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "play", "Pause or play", id="lanes.play", priority=True),
        Binding("home", "again", "From the start", id="lanes.again", priority=True),
        Binding("plus,equals_sign", "faster(1)", "Faster", id="lanes.faster"),
        Binding("minus", "faster(-1)", "Slower", id="lanes.slower"),
    ]
    KEYS: ClassVar[str] = ""
    """The line at the bottom."""
    SPEEDS: ClassVar[Sequence[float]] = (1.0,)
    """Units of the clock a second."""

    def __init__(self, names: tuple[Name, Name], speed: float) -> None:
        super().__init__()
        self._names = names
        self._clock, self._playing, self._speed, self._ticked = 0.0, True, speed, monotonic()

    def compose(self) -> ComposeResult:
        yield Static(id="lanes-title", markup=False)
        with Container(id="lanes"):
            for place, name in enumerate(self._names):
                with Vertical(classes="lane"):
                    yield Static(id=f"figures-{place}", markup=False)
                    yield Stream(name, id=f"stream-{place}")
        yield Static(id="lanes-verdict", markup=False)
        yield Static(self.KEYS, id="lanes-keys", markup=False)

    def _elapsed(self) -> float:
        """Seconds since it was last asked."""
        now = monotonic()
        elapsed, self._ticked = now - self._ticked, now
        return elapsed

    def _show(self, title: Line, lanes: Sequence[tuple[View, Line]], said: str) -> None:
        for place, (view, figures) in enumerate(lanes):
            self.query_one(f"#stream-{place}", Stream).show(view)
            self.query_one(f"#figures-{place}", Static).update(content([figures]), layout=False)
        self.query_one("#lanes-title", Static).update(content([title]), layout=False)
        self.query_one("#lanes-verdict", Static).update(content([[(said, "")]]))

    def action_play(self) -> None:
        """Pause, or play on; at the end from the start."""
        if self._ended:
            self.action_again()
        else:
            self._playing = not self._playing

    def _state(self, pace: str) -> str:
        return "■ finished" if self._ended else f"▶ {pace}" if self._playing else "‖ paused"

    @property
    def _ended(self) -> bool:
        """True when all of both runs is shown."""
        return False

    def action_again(self) -> None:
        self._clock, self._playing = 0.0, True

    def action_faster(self, by: int) -> None:
        self._speed = self.SPEEDS[max(0, min(len(self.SPEEDS) - 1, self.SPEEDS.index(self._speed) + by))]
