"""The lesson's experiments: the rule on five tokens, and how fast speculation would be. Without torch."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

TOKENS = ("the", "a", "its", "one", "no")


@dataclass(frozen=True, slots=True)
class ToyPair:
    """The chances that target and draft give the five tokens; by default the draft is wrong about almost everything."""

    p: tuple[float, ...] = (0.40, 0.25, 0.20, 0.10, 0.05)
    q: tuple[float, ...] = (0.10, 0.50, 0.10, 0.05, 0.25)

    @classmethod
    def typed(cls, text: str) -> ToyPair:
        """Read a line for p and a line for q, five numbers each, which are made to add up to 1. Raises ValueError, with a
        sentence, for what is none."""
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) != 2:
            raise ValueError("there is one line for p and one for q")
        return cls(_shares("p", lines[0]), _shares("q", lines[1]))


def _shares(name: str, text: str) -> tuple[float, ...]:
    try:
        found = [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"{name} has something that is no number") from None
    if len(found) != len(TOKENS):
        raise ValueError(f"{name} has {len(found)} numbers, and there are {len(TOKENS)} tokens")
    if not math.isfinite(sum(found)) or min(found) < 0 or not sum(found):
        raise ValueError(f"{name} needs finite numbers from 0 on, of which one is above 0")
    return tuple(value / sum(found) for value in found)


def left(p: Sequence[float], q: Sequence[float]) -> list[float]:
    """The distribution after a rejection: max(0, p - q), normalised; p itself where the two are equal, and nothing is
    rejected."""
    rest = [max(0.0, a - b) for a, b in zip(p, q, strict=True)]
    return [r / sum(rest) for r in rest] if sum(rest) else list(p)


@dataclass(slots=True)
class Draws:
    """One token again and again, in three ways; counts by token."""

    pair: ToyPair = field(default_factory=ToyPair)
    chance: random.Random = field(default_factory=lambda: random.Random(1))
    target: list[int] = field(default_factory=lambda: [0] * len(TOKENS))
    """Drawn from the target alone."""
    kept: list[int] = field(default_factory=lambda: [0] * len(TOKENS))
    """Drawn from the draft, tested, and kept."""
    corrected: list[int] = field(default_factory=lambda: [0] * len(TOKENS))
    """Drawn from what is left where they were rejected."""
    careless: list[int] = field(default_factory=lambda: [0] * len(TOKENS))
    """The same, but drawn again from the target after a rejection: what is easily got wrong."""

    def more(self, n: int) -> None:
        p, q = self.pair.p, self.pair.q
        rest = left(p, q)
        for _ in range(n):
            self.target[self._draw(p)] += 1
            guess = self._draw(q)
            kept = self.chance.random() < p[guess] / q[guess]
            if kept:
                self.kept[guess] += 1
            else:
                self.corrected[self._draw(rest)] += 1
            self.careless[guess if kept else self._draw(p)] += 1

    @property
    def made(self) -> int:
        return sum(self.target)

    @property
    def speculative(self) -> list[int]:
        """Kept guesses and corrections together."""
        return [a + b for a, b in zip(self.kept, self.corrected, strict=True)]

    def distance(self, counts: Sequence[int]) -> float | None:
        """Between shares of the draws and p: total variation, half the sum of the differences. None before the first draw."""
        if not self.made:
            return None
        return sum(abs(count / self.made - p) for count, p in zip(counts, self.pair.p, strict=True)) / 2

    def _draw(self, probs: Sequence[float]) -> int:
        return self.chance.choices(range(len(probs)), probs)[0]


@dataclass(slots=True)
class Branches:
    """The same with two guesses for one place, the second another token than the first; counts by token."""

    pair: ToyPair = field(default_factory=ToyPair)
    chance: random.Random = field(default_factory=lambda: random.Random(2))
    first: list[int] = field(default_factory=lambda: [0] * len(TOKENS))
    """Kept at once."""
    second: list[int] = field(default_factory=lambda: [0] * len(TOKENS))
    """Kept after the first was rejected."""
    corrected: list[int] = field(default_factory=lambda: [0] * len(TOKENS))

    def more(self, n: int) -> None:
        p, q = self.pair.p, self.pair.q
        rest = left(p, q)
        for _ in range(n):
            guess = self._draw(q)
            if self.chance.random() < p[guess] / q[guess]:
                self.first[guess] += 1
                continue
            other = [0.0 if i == guess else value for i, value in enumerate(q)]
            if not sum(other):  # the draft knows no second guess
                self.corrected[self._draw(rest)] += 1
                continue
            other = [value / sum(other) for value in other]
            again = self._draw(other)
            if self.chance.random() < rest[again] / other[again]:
                self.second[again] += 1
            else:
                self.corrected[self._draw(left(rest, other))] += 1

    @property
    def made(self) -> int:
        return sum(map(sum, (self.first, self.second, self.corrected)))

    def _draw(self, probs: Sequence[float]) -> int:
        return self.chance.choices(range(len(probs)), probs)[0]


@dataclass(frozen=True, slots=True)
class WhatIf:
    """A draft and a k that the reader turns."""

    alpha: float = 0.8
    """Chance that a drafted token is accepted."""
    k: int = 2
    cost: float = 0.1
    """A draft step, in plain passes."""
    wider: float = 0.05
    """What each further token costs the pass that verifies, in plain passes."""

    def speedup(self, k: int | None = None) -> float:
        """Expected tokens over expected cost (Leviathan et al. 2023, theorem 3.8, with a pass that grows)."""
        n = self.k if k is None else k
        expected = sum(self.alpha**i for i in range(n + 1))
        return expected / (1 + n * (self.cost + self.wider))

    @property
    def best(self) -> int:
        return max(range(MOST + 1), key=self.speedup)


MOST = 8
"""Tokens a cycle on the lesson's curve."""
