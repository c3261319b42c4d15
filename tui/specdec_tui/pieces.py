"""Token ids as text that is safe to show: whole characters, and no character that could steer a terminal.

Emitted tokens are decoded one after another, so that half a character waits for the token that completes it. A drafted
token that was rejected has no successor: its unfinished bytes are shown as such, ⟨e2⟩.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable

from specdec_engine.record.events import TokenId
from specdec_engine.record.text import printable

Name = Callable[[int], str]
"""Token id -> its own text, with bytes that are no UTF-8 as lone surrogates (`TokenText`, `read_pieces`)."""


UNKNOWN = "⟨?⟩"
"""A token that its observer does not tell."""


class StreamDecoder:
    """Tokens one after another: the printable text that each completes."""

    def __init__(self, name: Name) -> None:
        self._name = name
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, token: TokenId) -> str:
        if token is None:
            return _shown(self._decoder.decode(b"", final=True)) + UNKNOWN
        return _shown(self._decoder.decode(as_bytes(self._name(token))))


def alone(token: TokenId, name: Name) -> str:
    """One token by itself, on one line: printable, newlines as ⏎, bytes without a character as ⟨hex⟩."""
    if token is None:
        return UNKNOWN
    text = "".join(f"⟨{ord(c) - 0xDC00:02x}⟩" if "\udc80" <= c <= "\udcff" else c for c in name(token))
    return _shown(text).replace("\n", "⏎").replace("\t", "⇥") or f"⟨id {token}⟩"


def as_bytes(piece: str) -> bytes:
    """A token's own bytes."""
    return piece.encode("utf-8", "surrogateescape" if _escaped(piece) else "replace")


def _escaped(piece: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" and not "\udc80" <= c <= "\udcff" for c in piece)


def one_line(text: str) -> str:
    """Any text that is not ours, on one line: the door before every panel."""
    if text.isascii() and text.isprintable():
        return text
    return _shown(text).replace("\n", "⏎").replace("\t", " ")


def _shown(text: str) -> str:
    """Printable, and of a width that all terminals agree on: they do not about variation selectors, skin tones, keycaps,
    joined emoji and flags, and a border would stand elsewhere than it is drawn."""
    plain = _UNSTEADY.sub("", text)
    return printable(_FLAG.sub(lambda match: chr(ord(match[0]) - 0x1F1E6 + ord("A")), plain))


_UNSTEADY = re.compile("[\ufe0e\ufe0f\u20e3\U0001f3fb-\U0001f3ff]|\u200d(?=[\u2190-\u2bff\U0001f000-\U0001faff])")
_FLAG = re.compile("[\U0001f1e6-\U0001f1ff]")


def plain(value: object) -> str:
    """A setting's value: fractions short, anything else as text, nothing as a dash."""
    if isinstance(value, float):
        return f"{value:g}"
    return "–" if value is None else one_line(str(value))
