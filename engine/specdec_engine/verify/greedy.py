"""Decisions at temperature 0, on the host: the rule is asked once about each pattern, and remembered.

With one-hot rows and a deterministic draft, what a rule does depends on which of a few ids are equal, and on the uniform
numbers only by how they compare with its thresholds. Asking it takes some 60 small tensor operations, each 5 to 10 µs after a
pass has filled the caches: 0.5 ms of a cycle of 12. Patterns number ids as they occur, so that few are met.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from specdec_engine.verify.evidence import RESIDUAL_TOP, Evidence, Uniforms
from specdec_engine.verify.rules import AcceptanceRule, VerifyInputs

Pattern = tuple[tuple[int, ...], tuple[int, ...]]
"""The likeliest tokens [k + 1] and the drafted ones [k], as places among the ids that occur."""


@dataclass(slots=True)
class _Asked:
    """What a rule says of one pattern."""

    inputs: VerifyInputs
    thresholds: list[float]
    ends: dict[tuple[bool, ...], tuple[int, list[float]]] = field(default_factory=dict)
    """By which positions passed: how many are accepted, and the weights of the token that ends the cycle."""


class RememberedRule:
    """`decide` of one rule, for rows whose mass is all on one token, and drafts without probabilities."""

    def __init__(self, rule: AcceptanceRule) -> None:
        self._rule = rule
        self._asked: dict[Pattern, _Asked] = {}

    def decide(self, best: Sequence[int], drafted: Sequence[int], numbers: Uniforms, vocab: int) -> Evidence:
        """best [k + 1]: where each row's mass is."""
        if not drafted:
            return Evidence(0, best[0], 1.0)
        # By first occurrence: by size there are thousands of orders of what comes after a rejection, and each is asked about.
        places = dict[int, int]()
        pattern = _placed(best, places), _placed(drafted, places)
        asked = self._asked.get(pattern) or self._ask(pattern, len(places))
        passed = tuple(u < threshold for u, threshold in zip(numbers.accept, asked.thresholds, strict=True))
        n, weights = asked.ends.get(passed) or self._end(asked, passed)
        ends = sorted(zip(places, weights, strict=True))  # as in a vocabulary, so that a uniform number draws the same
        mass = sum(weights)
        level = numbers.final[n] * mass
        sums = accumulate(weight for _, weight in ends)
        token = next((id for (id, _), so_far in zip(ends, sums, strict=True) if so_far > level), ends[0][0])
        p = [1.0 if token == at else 0.0 for token, at in zip(drafted, best, strict=False)]
        largest = sorted(ends, key=lambda entry: -entry[1])[: min(RESIDUAL_TOP, vocab)]
        return Evidence(n, token, mass, drafted, p, [1.0] * len(drafted), p, largest)

    def _ask(self, pattern: Pattern, m: int) -> _Asked:
        best, drafted = pattern
        inputs = VerifyInputs.of(torch.eye(m)[list(best)], torch.tensor(drafted), None)
        if len(self._asked) >= _REMEMBERED:
            self._asked.clear()
        asked = self._asked[pattern] = _Asked(inputs, self._rule.thresholds(inputs).tolist())
        return asked

    def _end(self, asked: _Asked, passed: tuple[bool, ...]) -> tuple[int, list[float]]:
        accepted = self._rule.count(torch.tensor(passed))
        end = asked.ends[passed] = int(accepted), self._rule.final(asked.inputs, accepted).tolist()
        return end


def _placed(ids: Sequence[int], places: dict[int, int]) -> tuple[int, ...]:
    """Each id's place among those that occur, which new ones join at the end."""
    return tuple(places.setdefault(id, len(places)) for id in ids)


_REMEMBERED = 4096
