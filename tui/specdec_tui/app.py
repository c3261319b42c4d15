"""The Textual app: which screen, Ctrl-C, help. What is on screen is in `screens/`, how it is left in `leaving.py`."""

from __future__ import annotations

from time import monotonic
from typing import Any, ClassVar

from textual.binding import Binding, BindingType
from textual.screen import Screen

from specdec_tui.leaving import TerminalApp
from specdec_tui.lesson import Lesson
from specdec_tui.player import Player
from specdec_tui.screens.help import HelpScreen
from specdec_tui.screens.lesson import LessonScreen
from specdec_tui.screens.watch import Guide, WatchScreen
from specdec_tui.streams import EventStream

INTERRUPTED = 130
"""As a shell has it."""
_TWICE_S = 2.0
"""Within which a second Ctrl-C leaves."""


class SpecdecApp(TerminalApp[None]):
    """Watches one source, or teaches on it."""

    TITLE = "specdec"
    ENABLE_COMMAND_PALETTE = True
    CSS = "ToastRack { dock: top; align: right top; margin-top: 2; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q,ctrl+q", "quit", "Quit", id="quit", priority=True),
        Binding("ctrl+c", "stop", "Pause; twice: quit", id="stop", priority=True),
        Binding("question_mark,f1", "help", "Help", id="help"),
    ]

    def __init__(
        self,
        stream: EventStream,
        *,
        speed: float,
        lesson: Lesson | None = None,
        instead: Screen[Any] | None = None,
        guide: Guide | None = None,
    ) -> None:
        """instead: the screen to show in place of the run's own; guide: what is said before it and after it, and then the run
        waits for a key."""
        super().__init__()
        self._lesson, self._instead, self._guide = lesson, instead, guide
        self.stream = stream
        self._stopped = -_TWICE_S
        self.player = Player(speed, live=stream.live)
        self.player.playing = guide is None

    def on_mount(self) -> None:
        lesson = self._lesson
        if self._instead is not None:
            self.push_screen(self._instead)
        elif lesson is None:
            self.push_screen(WatchScreen(self.stream, self.player, self._guide))
        else:
            self.push_screen(LessonScreen(self.stream, self.player, lesson))
        self.stream.start()

    def on_unmount(self) -> None:
        self.stream.close()

    def action_stop(self) -> None:
        """Hold the engine; leave when it comes again at once."""
        now = monotonic()
        if now - self._stopped < _TWICE_S:
            self.end(INTERRUPTED)
        self._stopped, self.player.playing = now, False
        self.notify("paused; once more quits", timeout=_TWICE_S)

    def action_help(self) -> None:
        self.push_screen(HelpScreen(self.screen))
