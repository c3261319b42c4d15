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

from specdec_tui.background import is_light
from specdec_tui.pieces import one_line
from specdec_tui.theme import THEMES, theme_of

SOON_S = 1.0
"""A screen that cannot be left by then is left as it is."""
_HUNG_UP = 128 + signal.SIGHUP if hasattr(signal, "SIGHUP") else 1
T = TypeVar("T")


class TerminalApp(App[T]):
    """An app that is left in a second, whatever happens; `show` runs it."""

    def __init__(self) -> None:
        super().__init__()
        for theme in THEMES.values():
            self.register_theme(theme)
        self.theme = theme_of(lambda: None).name
        self.left = Event()
        """Set when the app has ended: its writer may wait for a reader until then."""
        self.modes = _modes()
        """Of the terminal, as they were before."""

    def on_mount(self) -> None:
        for name in ("SIGTERM", "SIGHUP", "SIGINT"):
            # Not the main thread, or not this platform.
            with suppress(AttributeError, NotImplementedError, RuntimeError, ValueError):
                number = getattr(signal, name)
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
            Thread(target=_leave, args=(self.left, code, self.modes), daemon=True).start()


def show(app: TerminalApp[T]) -> T | None:
    """What it returns, once it is left. Raises what broke a screen, and SystemExit with a code where there was a signal."""
    app.theme = theme_of(is_light).name
    heeded = signal.getsignal(signal.SIGTERM)  # the loop's end sets it back to the system's own way
    try:
        result = app.run()
    finally:
        with suppress(TypeError, ValueError):  # not the main thread, or not set by Python
            signal.signal(signal.SIGTERM, heeded)
    app.left.set()
    if app.failure is not None:
        raise app.failure
    if app.return_code:
        raise SystemExit(app.return_code)
    return result


def _modes() -> Any:
    """None where there is no terminal, or it has none."""
    with suppress(Exception):  # termios' own error, or there is no termios here
        import termios  # not on Windows

        return termios.tcgetattr(0)
    return None


def _restore(modes: Any) -> None:
    """What can be without waiting for a reader."""
    with suppress(Exception):  # termios' own error, or there is no termios here
        import termios

        if modes is not None:
            termios.tcsetattr(0, termios.TCSANOW, modes)
        os.set_blocking(1, False)
        switches = "".join(f"\x1b[?{mode}l" for mode in (1000, 1003, 1004, 1006, 1015, 2004, 2048))
        os.write(1, f"\x1b[<u\x1b[?1049l\x1b[?25h\x1b[?7h{switches}".encode())


def _leave(left: Event, code: int, modes: Any) -> None:
    """A terminal that nobody reads keeps whoever writes to it waiting, at the first byte or at the last."""
    sleep(SOON_S)
    if not left.is_set():
        _restore(modes)
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
