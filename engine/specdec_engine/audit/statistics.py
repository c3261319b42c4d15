"""Tests of counts against a distribution, how surely they would find a fault, and several of them as one.

A draw is one of V tokens. Pearson's statistic over the tokens that are expected five times or more, the rest as one, follows
a chi-squared distribution where the draws are of p. The chance to find a fault is found by trying: draws of the faulty
distribution, tested in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

_LEAST_EXPECTED = 5.0
"""Of a cell, below which the statistic is not chi-squared."""
SIGNIFICANT = 1e-3
"""A p-value from which on a bias is called one: one sound audit in a thousand is not believed."""
_TRIALS = 200


def tail(x: float, freedom: int) -> float:
    """The chance that a chi-squared variable of so many degrees of freedom is x or more."""
    if freedom < 1:
        return 1.0
    found = torch.special.gammaincc(
        torch.tensor(freedom / 2, dtype=torch.float64), torch.tensor(x / 2, dtype=torch.float64)
    )
    return float(found)


@dataclass(frozen=True, slots=True)
class Cells:
    """Tokens that are looked at one by one; all others are one cell, the last."""

    tokens: tuple[int, ...]
    p: np.ndarray
    """[cells] that sum to 1."""

    @classmethod
    def of(cls, p: np.ndarray, n: int) -> Cells:
        """For n draws of p [V]."""
        order = np.argsort(-p)[: max(1, int(n / _LEAST_EXPECTED))]
        kept = [int(token) for token in order if p[token] * n >= _LEAST_EXPECTED]
        rest = max(0.0, 1.0 - float(p[kept].sum()))
        while kept and 0 < rest * n < _LEAST_EXPECTED:  # the rest is too little by itself
            rest += float(p[kept.pop()])
        shares = np.array([*p[kept], rest], np.float64)
        return cls(tuple(kept), shares / shares.sum())

    def counts(self, draws: Sequence[int]) -> np.ndarray:
        """[cells]"""
        place = {token: i for i, token in enumerate(self.tokens)}
        return np.bincount([place.get(token, len(self.tokens)) for token in draws], minlength=len(self.p))


def p_value(counts: np.ndarray, p: np.ndarray) -> float:
    """Of Pearson's test that these counts [cells] are of p [cells]. Draws of what cannot be drawn have 0."""
    expected = p * counts.sum()
    if (counts[expected == 0] > 0).any():
        return 0.0
    possible = expected > 0
    statistic = float((((counts - expected) ** 2)[possible] / expected[possible]).sum())
    return tail(statistic, int(possible.sum()) - 1)


def p_value_of_two(a: np.ndarray, b: np.ndarray) -> float:
    """The same, that two sets of counts are of one distribution."""
    both = a + b
    keep = both >= 2 * _LEAST_EXPECTED
    a, b = (np.array([*counts[keep], counts[~keep].sum()], np.float64) for counts in (a, b))
    shared = (a + b) / (a + b).sum()
    statistic, used = 0.0, shared > 0
    for counts in (a, b):
        expected = shared * counts.sum()
        statistic += float((((counts - expected) ** 2)[used] / expected[used]).sum())
    return tail(statistic, int(used.sum()) - 1)


def combined(p_values: Sequence[float]) -> float:
    """Of independent tests as one (Fisher's method)."""
    if not p_values:
        return 1.0
    if min(p_values) <= 0.0:
        return 0.0
    return tail(-2.0 * sum(math.log(p) for p in p_values), 2 * len(p_values))


def toward(p: np.ndarray, token: int, share: float) -> np.ndarray:
    """The distribution with this share of its mass moved to one token."""
    moved = p * (1.0 - share)
    moved[token] += share
    return moved


def power_of(faults: Sequence[tuple[Cells, np.ndarray, int]], seed: int = 0) -> float:
    """How often tests of these places, together, find a fault. faults: for each place its cells, the distribution [cells]
    that a faulty engine would have, and how many draws there were."""
    if not faults:
        return 0.0
    chance, found = np.random.default_rng(seed), 0
    for _ in range(_TRIALS):
        values = [p_value(chance.multinomial(n, faulty / faulty.sum()), cells.p) for cells, faulty, n in faults]
        found += combined(values) < SIGNIFICANT
    return found / _TRIALS
