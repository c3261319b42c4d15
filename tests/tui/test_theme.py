"""Which colours a screen has: those that are wanted, or those that go with the terminal's background."""

from __future__ import annotations

import os
import pty
import termios
import threading
import time

import pytest

from specdec_tui import background, theme
from specdec_tui.app import SpecdecApp
from specdec_tui.leaving import TerminalApp
from specdec_tui.streams import DEMO, FrameStream, read_frame


@pytest.fixture(autouse=True)
def unwanted():
    yield
    theme.want("auto")


class Terminal:
    """One end of it is the program's; the other answers."""

    def __init__(self, answer: bytes) -> None:
        self.ours, self.theirs = pty.openpty()
        self.asked = b""
        self._thread = threading.Thread(target=self._answer, args=(answer,), daemon=True)
        self._thread.start()

    def _answer(self, answer: bytes) -> None:
        while b"\x1b[c" not in self.asked:
            self.asked += os.read(self.ours, 99)
        os.write(self.ours, answer)


@pytest.mark.parametrize(
    ("answer", "light"),
    [
        (b"\x1b]11;rgb:1010/1212/1414\x1b\\\x1b[?62;4c", False),
        (b"\x1b]11;rgb:ffff/ffff/f0f0\x07\x1b[?1;2c", True),
        (b"\x1b]11;rgb:fb/fb/f9\x1b\\\x1b[?6c", True),
        (b"\x1b[?6c", None),
        (b"\x1b]11;nonsense\x07\x1b[?6c", None),
    ],
)
def test_the_terminal_is_asked_and_left_as_it_was(answer, light):
    terminal = Terminal(answer)
    before = termios.tcgetattr(terminal.theirs)
    assert background.asked(terminal.theirs) is light
    assert termios.tcgetattr(terminal.theirs) == before
    assert terminal.asked.startswith(b"\x1b]11;?")


def test_one_that_says_nothing_is_not_waited_for():
    ours, theirs = pty.openpty()
    began = time.monotonic()
    assert background.asked(theirs) is None
    assert time.monotonic() - began < 2
    os.close(ours)
    reading, _ = os.pipe()
    assert background.asked(reading) is None  # no terminal at all


def test_what_is_wanted_goes_before_what_the_terminal_says(monkeypatch):
    assert theme.theme_of(lambda: True) is theme.LIGHT
    assert theme.theme_of(lambda: None) is theme.DARK
    for name, chosen in theme.THEMES.items():
        theme.want(name)
        assert theme.theme_of(lambda: True) is chosen
        assert TerminalApp().theme == chosen.name


@pytest.mark.parametrize("name", theme.THEMES)
def test_each_theme_draws_every_style(name):
    import asyncio

    theme.want(name)

    async def act():
        app = SpecdecApp(FrameStream(*read_frame(DEMO)), speed=1.0)
        async with app.run_test(size=(120, 40)) as pilot:
            await pilot.pause(0.1)
            found = theme.styles(app.get_css_variables())
            assert found.keys() == theme.STYLES.keys()
            return found["strong"].foreground, app.get_css_variables()["background"]

    ink, paper = asyncio.run(act())
    assert ink is not None
    assert paper == {"dark": "#101214", "light": "#FBFBF9", "high-contrast": "#000000"}[name]
