"""The Textual app: theme, signals, leaving. What is on screen is in `screens/`."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import sys
from contextlib import suppress
from threading import Event, Thread
from time import monotonic
from typing import ClassVar, TextIO

from textual.app import App
from textual.binding import Binding, BindingType

from specdec_tui.lesson import Lesson
from specdec_tui.player import Player
from specdec_tui.screens.help import HelpScreen
from specdec_tui.screens.lesson import LessonScreen
from specdec_tui.screens.watch import WatchScreen
from specdec_tui.source import Source
from specdec_tui.theme import DARK, LIGHT

_TWICE_S = 2.0
"""Within which a second Ctrl-C leaves."""


class SpecdecApp(App[None]):
    """Watches one source, or teaches on it."""

    TITLE = "specdec"
    ENABLE_COMMAND_PALETTE = True
    CSS = "ToastRack { dock: top; align: right top; margin-top: 2; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q,ctrl+q", "quit", "Quit", id="quit", priority=True),
        Binding("ctrl+c", "stop", "Pause; twice: quit", id="stop", priority=True),
        Binding("question_mark,f1", "help", "Help", id="help"),
    ]

    def __init__(self, source: Source, *, speed: float, lesson: Lesson | None = None) -> None:
        super().__init__()
        self._lesson = lesson
        self.source = source
        self._stopped, self._left = -_TWICE_S, Event()
        self.player = Player(speed, live=source.live)
        for theme in (DARK, LIGHT):
            self.register_theme(theme)
        self.theme = DARK.name

    def on_mount(self) -> None:
        # Textual restores the terminal after SIGINT only.
        for number in (signal.SIGTERM, signal.SIGHUP):
            with suppress(NotImplementedError, RuntimeError, ValueError):  # not the main thread, or not this platform
                asyncio.get_running_loop().add_signal_handler(number, self.exit)
        Thread(target=leave_with_terminal, args=(sys.__stdin__, self._left), daemon=True).start()
        lesson = self._lesson
        if lesson is None:
            self.push_screen(WatchScreen(self.source, self.player))
        else:
            self.push_screen(LessonScreen(self.source, self.player, lesson))
        self.source.start()

    def on_unmount(self) -> None:
        self._left.set()
        self.source.close()

    def action_stop(self) -> None:
        """Hold the engine; leave when it comes again at once."""
        now = monotonic()
        if now - self._stopped < _TWICE_S:
            self.exit()
        self._stopped, self.player.playing = now, False
        self.notify("paused; once more quits", timeout=_TWICE_S)

    def action_help(self) -> None:
        self.push_screen(HelpScreen(self.screen))


def leave_with_terminal(stream: TextIO | None, left: Event) -> None:
    """End the process when the terminal it began on is gone, until `left` is set.

    It may go without SIGHUP, where the shell is not its session's leader. Textual then reads its end for ever, at a whole
    core, and waits for a writer that has died: only a thread of our own still runs, and there is no screen to restore.
    """
    with suppress(AttributeError, OSError, ValueError):  # a platform without poll, or a stream that was closed
        if stream is None or not stream.isatty():
            return
        poll = select.poll()
        poll.register(stream, 0)
        while not left.wait(1.0):
            if any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0)):
                os._exit(128 + signal.SIGHUP)
