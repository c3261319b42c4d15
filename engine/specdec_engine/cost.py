"""What a cycle is worth and what it costs: the sums behind `-k auto`. Plain numbers, no torch.

Notation: reach[j] is the probability that at least j + 1 drafted tokens are accepted (its survival), v(n) the seconds of a
target pass over n tokens, which is a staircase: kernels work on tiles of rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


def expected_emitted(reach: Sequence[float]) -> float:
    """Tokens of a cycle that drafts len(reach): the accepted ones, and the target's own."""
    return 1.0 + sum(reach)


class Times:
    """Recent durations of one thing. The least of the last few: noise only ever adds."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=_KEPT)

    def add(self, seconds: float) -> None:
        self._last.append(seconds)

    @property
    def known(self) -> bool:
        return bool(self._last)

    @property
    def seconds(self) -> float:
        return min(self._last)


_KEPT = 6


class Staircase:
    """Seconds of a pass by its tokens, as measured on the way; between measured widths on a line, beyond them flat."""

    def __init__(self) -> None:
        self._by_width: dict[int, Times] = {}

    def add(self, tokens: int, seconds: float) -> None:
        self._by_width.setdefault(tokens, Times()).add(seconds)

    def __call__(self, tokens: int) -> float:
        """Never falls with more tokens. Raises ValueError while nothing is measured."""
        if not self._by_width:
            raise ValueError("no pass was measured")
        widths = sorted(self._by_width)
        heights = [self._by_width[width].seconds for width in widths]
        for i in range(len(heights) - 2, -1, -1):  # noise only adds: no pass takes longer than a wider one
            heights[i] = min(heights[i], heights[i + 1])
        for i, width in enumerate(widths):
            if tokens <= width:
                if i == 0:
                    return heights[0]
                share = (tokens - widths[i - 1]) / (width - widths[i - 1])
                return heights[i - 1] + share * (heights[i] - heights[i - 1])
        return heights[-1]

    def measured(self, tokens: int) -> bool:
        return tokens in self._by_width


@dataclass(frozen=True, slots=True)
class Choice:
    """A k, and what is expected of it."""

    k: int
    emitted: float
    """Expected tokens a cycle."""
    seconds: float
    """Expected seconds a cycle."""

    @property
    def rate(self) -> float:
        return self.emitted / self.seconds


def cycle_of(reach: Sequence[float], draft_s: float, passes: Staircase, other_s: float) -> Choice:
    """A cycle that drafts len(reach) tokens, at draft_s seconds each."""
    k = len(reach)
    return Choice(k, expected_emitted(reach), k * draft_s + passes(k + 1) + other_s)


def best_k(reach: Sequence[float], draft_s: float, passes: Staircase, other_s: float) -> Choice:
    """Of 0 to len(reach), the k with the most expected tokens a second."""
    choices = (cycle_of(reach[:k], draft_s, passes, other_s) for k in range(len(reach) + 1))
    return max(choices, key=lambda choice: choice.rate)
