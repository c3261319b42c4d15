"""When a run ends: stop ids, stop strings, the token budget. Clips what a cycle emits; knows nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from specdec_engine.errors import UsageError
from specdec_engine.record.text import TextStream, Tokenizer


@dataclass(frozen=True, slots=True)
class Stop:
    """What ends a run. `ids` are all of the target's end-of-sequence ids; `strings` need a tokenizer."""

    max_tokens: int = 256
    ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    """Special tokens that were asked for by their text, and are among the ids."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UsageError(f"max-tokens {self.max_tokens} is not at least 1", "256 is the default")
        if "" in self.strings:
            raise UsageError("a stop text is empty", "leave out --stop, or give it a text")


@dataclass(frozen=True, slots=True)
class Clipped:
    """What is left of a cycle's tokens, and whether the run ends here."""

    emitted: tuple[int, ...]
    reason: Literal["stop", "length"] | None


class Clipper:
    """Clips the tokens of cycle after cycle against one `Stop`.

    The token that stops a run is emitted: it is the target's own, as in transformers' `generate`.
    """

    def __init__(self, stop: Stop, room: int, tokenizer: Tokenizer | None = None) -> None:
        if stop.strings and tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        self._ids = stop.ids
        self._stream = TextStream(tokenizer, stop.strings) if tokenizer is not None and stop.strings else None
        self.room = room
        """Tokens that may still be emitted."""

    def clip(self, tokens: Sequence[int]) -> Clipped:
        for n, token in enumerate(tokens, start=1):
            self.room -= 1
            if token in self._ids or self._completes_a_string(token):
                return Clipped(tuple(tokens[:n]), "stop")
            if self.room == 0:
                return Clipped(tuple(tokens[:n]), "length")
        return Clipped(tuple(tokens), None)

    def _completes_a_string(self, token: int) -> bool:
        if self._stream is None:
            return False
        self._stream.feed(token)
        return self._stream.stopped
