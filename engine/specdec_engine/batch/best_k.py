"""How many tokens to draft where several texts are decoded at once: what is fastest, by trying."""

from __future__ import annotations

from dataclasses import dataclass, field

_TRIED = (0, 1, 2, 3)
"""Rows of a pass are shared out among texts: with eight of them even one drafted token a text doubles them."""
_FIRST = 6
"""Passes of a k before it is judged; the first two of a width find everything cold, and are not counted."""
_COLD = 2
_AGAIN = 48
"""Passes after which a neighbour of the best k is tried once more."""
_MEMORY = 0.97
_LOST = 0.95
"""The share of the best rate below which no more tokens are tried: they cost more rows each, and are accepted less."""


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
class _Rates:
    """Rates of each k, with one number of texts."""

    of: dict[int, _Rate] = field(default_factory=lambda: {k: _Rate() for k in _TRIED})
    first: tuple[int, ...] = _TRIED
    """Tried at first: where nearly as many texts were decoded, what was best with those."""

    @property
    def best(self) -> int:
        return max(self.of, key=lambda k: self.of[k].value)

    @property
    def fresh(self) -> int | None:
        """A k that has yet to be tried, as long as more tokens lose nothing; None if there is none."""
        most = 0.0
        for k in self.first:
            if self.of[k].passes < _FIRST:
                return k
            most = max(most, self.of[k].value)
            if self.of[k].value < _LOST * most:
                return None
        return None


@dataclass(slots=True)
class BestK:
    """Tokens a second of each k, for each number of texts: drafting, the wider pass and what is accepted are all in it."""

    _rates: dict[int, _Rates] = field(default_factory=dict)
    _passes: int = 0

    def choose(self, texts: int) -> int:
        """Choose for the next pass over so many texts."""
        rates = self._known(texts)
        self._passes += 1
        if (fresh := rates.fresh) is not None:
            return fresh
        if self._passes % _AGAIN == 0:
            step = 1 if self._passes // _AGAIN % 2 else -1
            return min(max(rates.best + step, _TRIED[0]), _TRIED[-1])
        return rates.best

    def saw(self, texts: int, k: int, tokens: int, seconds: float) -> None:
        """Learn what a pass brought, and took."""
        self._known(texts).of[k].add(tokens, seconds)

    def _known(self, texts: int) -> _Rates:
        if texts not in self._rates:
            near = min(self._rates, key=lambda n: abs(n - texts), default=None)
            alike = near is not None and near < 2 * texts and texts < 2 * near
            self._rates[texts] = _Rates(first=(self._rates[near].best,)) if alike and near is not None else _Rates()
        return self._rates[texts]
