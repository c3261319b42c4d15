"""How many tokens to draft where several texts are decoded at once: what is fastest, by trying."""

from __future__ import annotations

from dataclasses import dataclass, field

_TRIED = (0, 1, 2, 3)
"""Rows of a pass are shared out among texts: with eight of them even one drafted token a text doubles them."""
_FIRST = 6
"""Passes of each k before one is chosen; the first two of a width find everything cold, and are not counted."""
_COLD = 2
_AGAIN = 48
"""Passes after which another k is tried once more."""
_MEMORY = 0.97


@dataclass(slots=True)
class _Rate:
    """Discounted tokens and seconds of one k."""

    tokens: float = 0.0
    seconds: float = 0.0
    passes: int = 0

    def add(self, tokens: int, seconds: float) -> None:
        self.passes += 1
        if self.passes > _COLD:
            self.tokens, self.seconds = _MEMORY * self.tokens + tokens, _MEMORY * self.seconds + seconds

    @property
    def value(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class BestK:
    """Tokens a second of each k, for each number of texts: drafting, the wider pass and what is accepted are all in it."""

    _rates: dict[int, dict[int, _Rate]] = field(default_factory=dict)
    _passes: int = 0

    def choose(self, texts: int) -> int:
        """Choose for the next pass over so many texts."""
        rates = self._rates.setdefault(texts, {k: _Rate() for k in _TRIED})
        self._passes += 1
        if fresh := [k for k, rate in rates.items() if rate.passes < _FIRST]:
            return fresh[0]
        if self._passes % _AGAIN == 0:
            return _TRIED[self._passes // _AGAIN % len(_TRIED)]
        return max(rates, key=lambda k: rates[k].value)

    def saw(self, texts: int, k: int, tokens: int, seconds: float) -> None:
        """Learn what a pass brought, and took."""
        self._rates[texts][k].add(tokens, seconds)
