"""Leaving the terminal: at a signal, when it is gone or nobody reads it, at an error of a screen; soon, and with a code that
says why.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import sys
from contextlib import suppress
from threading import Event, Thread
from time import sleep
from typing import Any, TextIO, TypeVar

from textual.app import App

from specdec_tui.pieces import one_line
from specdec_tui.theme import DARK, LIGHT

SOON_S = 1.0
"""A screen that cannot be left by then is left as it is."""
_HUNG_UP = 128 + signal.SIGHUP if hasattr(signal, "SIGHUP") else 1
T = TypeVar("T")


class TerminalApp(App[T]):
    """An app that is left in a second, whatever happens; `show` runs it."""

    def __init__(self) -> None:
        super().__init__()
        for theme in (DARK, LIGHT):
            self.register_theme(theme)
        self.theme = DARK.name
        self.left = Event()
        """Set when the terminal is whole again."""

    def on_mount(self) -> None:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            with suppress(NotImplementedError, RuntimeError, ValueError):  # not the main thread, or not this platform
                asyncio.get_running_loop().add_signal_handler(number, self.end, 128 + number)
        Thread(target=leave_with_terminal, args=(sys.__stdin__,), daemon=True).start()

    def end(self, code: int) -> None:
        """Leave with this exit code, and without the screen's consent if it does not."""
        self._leave_soon(code)
        self.exit(return_code=code)

    def notify(self, message: str, **how: Any) -> None:
        """In plain words: what is in them may be anybody's."""
        super().notify(one_line(message), **{**how, "markup": False})

    @property
    def failure(self) -> Exception | None:
        """What broke a screen."""
        return self._exception

    def _fatal_error(self) -> None:
        """Textual's own prints all that the frames hold, and ends with 0: `show` raises it instead."""
        self._leave_soon(1)
        self._close_messages_no_wait()

    def _leave_soon(self, code: int) -> None:
        if not self.is_headless:
            Thread(target=_leave, args=(self.left, code), daemon=True).start()


def show(app: TerminalApp[T]) -> T | None:
    """What it returns, once it is left. Raises what broke a screen, and SystemExit with a code where there was a signal."""
    result = app.run()
    app.left.set()
    if app.failure is not None:
        raise app.failure
    if app.return_code:
        raise SystemExit(app.return_code)
    return result


def _leave(left: Event, code: int) -> None:
    """A terminal that nobody reads keeps whoever writes to it waiting, at the first byte or at the last."""
    sleep(SOON_S)
    if not left.is_set():
        with suppress(OSError, ValueError, AttributeError):
            os.set_blocking(1, False)
            os.write(1, b"\x1b[?1049l\x1b[?25h\x1b[?1000l\x1b[?1003l\x1b[?1006l\x1b[?2004l")
        os._exit(code)


def leave_with_terminal(stream: TextIO | None) -> None:
    """End the process when the terminal it began on is gone.

    It may go without SIGHUP, where the shell is not its session's leader. Textual then reads its end for ever, at a whole
    core, and waits for a writer that has died: only a thread of our own still runs, and there is no screen to restore.
    """
    with suppress(AttributeError, OSError, ValueError):  # a platform without poll, or a stream that was closed
        if stream is None or not stream.isatty():
            return
        poll = select.poll()
        poll.register(stream, 0)
        while True:
            if any(event & (select.POLLHUP | select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0)):
                os._exit(_HUNG_UP)
            sleep(SOON_S / 2)
