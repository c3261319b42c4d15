"""What colour the terminal's background is, by asking it (OSC 11, of xterm; most answer)."""

from __future__ import annotations

import os
import re
import select
from contextlib import suppress
from time import monotonic

_ASK = b"\x1b]11;?\x1b\\" + b"\x1b[c"
"""The colour, and then what every terminal answers (DA1): one that knows no colours is not waited for."""
_ANSWER = re.compile(rb"\x1b\]11;rgb:([0-9a-fA-F]+)/([0-9a-fA-F]+)/([0-9a-fA-F]+)")
_DONE = re.compile(rb"\x1b\[\?[0-9;]*c")
_PATIENCE_S = 0.3


def is_light() -> bool | None:
    """Of the terminal that this process has; None where it does not tell, or there is none."""
    with suppress(OSError):
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
        try:
            return asked(terminal)
        finally:
            os.close(terminal)
    return None


def asked(terminal: int) -> bool | None:
    """The same, of an open terminal, whose modes are left as they were."""
    try:
        import termios  # not on Windows
        import tty
    except ImportError:
        return None
    with suppress(OSError, termios.error):
        modes = termios.tcgetattr(terminal)
        try:
            tty.setcbreak(terminal, termios.TCSANOW)
            os.write(terminal, _ASK)
            return _light(_heard(terminal))
        finally:
            termios.tcsetattr(terminal, termios.TCSANOW, modes)
    return None


def _heard(terminal: int) -> bytes:
    """What it says, until it has answered or is slow to."""
    heard, until = b"", monotonic() + _PATIENCE_S
    while not _DONE.search(heard) and (left := until - monotonic()) > 0:
        if not select.select([terminal], [], [], left)[0]:
            break
        heard += os.read(terminal, 256)
    return heard


def _light(heard: bytes) -> bool | None:
    if (found := _ANSWER.search(heard)) is None:
        return None
    red, green, blue = (int(part, 16) / (16 ** len(part) - 1) for part in found.groups())
    luminance: float = 0.2126 * red + 0.7152 * green + 0.0722 * blue  # of the sRGB values as they are
    return luminance > 0.5
