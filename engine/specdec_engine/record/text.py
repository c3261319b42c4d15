"""Between token ids and text a person can see: whole characters only, nothing hostile.

Three jobs, kept apart. `TextStream` turns emitted ids into exactly the text that decoding them all at once would give,
as soon as it is certain. `printable` makes any text safe to put on a terminal. `TokenText` gives one token's own bytes,
for traces and for drafts that may be rejected. A tokenizer is anything with transformers' `decode`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any, Protocol

from specdec_engine.record.events import TokenId

REPLACEMENT = "\ufffd"
_JOINERS = "\u200c\u200d"  # they shape Persian, Indic and emoji text, and cannot reorder or hide anything


class Tokenizer(Protocol):
    """**Protocol:** the part of a transformers tokenizer that text needs."""

    def decode(self, token_ids: Any, **kwargs: Any) -> Any: ...


class Detokenizer:
    """Decodes one token at a time and holds back what may still be part of a character.

    The concatenation of all pieces is `tokenizer.decode(all ids, skip_special_tokens=True)`, wherever decoding more tokens
    takes back no text (SentencePiece's byte fallback does, for a run of bytes that turns out not to be UTF-8). Each step
    decodes a short window twice, with and without the new tokens, because a token's text can depend on its neighbours (a
    leading space, half a character); only the window's growth is new.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._settled = 0  # tokens of the window whose text is already out

    def feed(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        self._window.append(token)
        known, text = self._decode(self._window[: self._settled]), self._decode(self._window)
        # Half a character, or rubbish, or a token without text: only what follows can tell.
        if text.endswith(REPLACEMENT) or text == known:
            return ""
        self._window = self._window[self._settled :]
        self._settled = len(self._window)
        return text[len(known) :]

    def flush(self) -> str:
        """What was held back: an unfinished character, as the replacement character."""
        known, text = self._decode(self._window[: self._settled]), self._decode(self._window)
        self._window, self._settled = [], 0
        return text[len(known) :]

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class TextStream:
    """A `Detokenizer` that also ends at a stop string, wherever token borders fall.

    Text that could be the beginning of a stop string is held back until it is certain; the stop string itself and all
    after it never come out. With no stop strings this is the plain detokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False
        """True once a stop string has been seen; nothing comes out any more."""

    def feed(self, token: TokenId) -> str:
        """An unknown token is U+FFFD, as bytes are that make no character."""
        if self.stopped:
            return ""
        return self._release(
            self._detokenizer.flush() + REPLACEMENT if token is None else self._detokenizer.feed(token)
        )

    def flush(self) -> str:
        if self.stopped:
            return ""
        text = self._release(self._detokenizer.flush())
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, piece: str) -> str:
        text = self._held + piece
        found = [at for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def printable(text: str) -> str:
    """The text with every character that could steer a terminal made visible, one for one.

    C0 controls and DEL become their Unicode pictures; C1 controls, bidirectional and zero-width marks, tags, line and
    paragraph separators and lone surrogates become `·`. Newline and tab stay. One for one, so that spans computed
    before still fit, and character by character, because an escape sequence can straddle two tokens.
    """
    return "".join(map(_visible, text))


def _visible(char: str) -> str:
    if " " <= char <= "~" or char in "\n\t" or char in _JOINERS:
        return char
    if char < " ":
        return chr(0x2400 + ord(char))
    if char == "\x7f":
        return "\u2421"
    return "·" if unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zl", "Zp"} else char


def counted(n: int, what: str) -> str:
    """So many of these, in English: 1 token, 2 tokens, 2 passes, 2 branches."""
    return f"{n} {what}" if n == 1 else f"{n} {what}{'es' if what.endswith(('s', 'ch')) else 's'}"


def as_markdown(line: str) -> str:
    """Markdown that shows the line as it is: HTML, links, images, emphasis and columns in it stay text."""
    return re.sub(r"([\\`*_\[\]<>|&~])", r"\\\1", line)


class TokenText:
    """One token's own bytes as text; bytes that are no UTF-8 by themselves become lone surrogates (PEP 383).

    `TokenText(tokenizer)(token).encode("utf-8", "surrogateescape")` gives the bytes back: half a character survives.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._byte_level = "ByteLevel" in repr(getattr(backend, "decoder", None))
        self._special = set(tokenizer.all_special_ids)

    def __call__(self, token: int) -> str:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # an id of the padded part of the vocabulary: it has no text
            return ""
        return str(piece) if token in self._special else spelled(str(piece), self._byte_level)


def spelled(piece: str, byte_level: bool) -> str:
    """The text of a token as its vocabulary spells it: a byte-level one by stand-ins for bytes, SentencePiece's with a mark
    for a space."""
    if byte_level and all(char in _BYTE_OF for char in piece):
        return bytes(_BYTE_OF[char] for char in piece).decode("utf-8", "surrogateescape")
    if _SENTENCEPIECE_BYTE.fullmatch(piece):
        return bytes([int(piece[3:5], 16)]).decode("utf-8", "surrogateescape")
    return piece.replace("\u2581", " ")


_SENTENCEPIECE_BYTE = re.compile("<0x[0-9A-F]{2}>")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, inverted: printable Latin-1 is itself, the rest starts at U+0100."""
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in itself]
    return {chr(b): b for b in itself} | {chr(0x100 + i): b for i, b in enumerate(rest)}


_BYTE_OF = _byte_level_alphabet()
