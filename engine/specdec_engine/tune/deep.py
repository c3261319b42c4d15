"""`check --deep`: both models loaded, and what the draft is worth on a few prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specdec_engine.core.cycle_types import Sampling
from specdec_engine.errors import UsageError
from specdec_engine.pair import Pair
from specdec_engine.tune.passes import looked_at, unit_costs, written
from specdec_engine.tune.whatif import Member, best_of, curves

PROMPTS = (
    "Explain in a few sentences how a lighthouse works.",
    "Write a Python function that returns the n-th Fibonacci number, with a docstring.",
    "List five things to check before a long bicycle tour, one line each.",
)
"""Prose, code and a list."""
MOST_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Worth:
    """Of a draft for a target, measured."""

    alpha: float
    """The share of its first tokens that are accepted."""
    c: float
    """A draft of one token, in plain cycles."""
    k: int
    """The best one, as predicted."""
    tokens_per_cycle: float
    speedup: float
    """Predicted at that k."""
    tokens: int
    """Of the answers that it was measured on."""


def worth(pair: Pair, prompts: Sequence[str] = PROMPTS, max_tokens: int = MOST_TOKENS) -> Worth | None:
    """Measured at temperature 0 along the target's own answers; None where it says nothing, or the draft proposes nothing.
    Raises UsageError for several drafts, which `tune` knows how to measure."""
    if "," in pair.drafter.name:
        raise UsageError(
            f"--deep measures one draft, and {pair.drafter.name} are several", "specdec tune -d measures them together"
        )
    sampling = Sampling()
    answers = list(written(pair, map(pair.encode, prompts), sampling, max_tokens, 0))
    if not answers:
        return None
    chances, times = looked_at(pair, answers, sampling, lambda number, total: None)
    first = [row[0] for answer in chances for row in answer.accept if row]
    if not first:
        return None
    costs = unit_costs(pair, answers, sampling, 0)
    costs = costs.drafting(times) if times else costs
    best = best_of(next(iter(curves([[Member(pair.drafter.name, chances, costs)]], 16).values())))
    return Worth(
        alpha=sum(first) / len(first),
        c=costs.draft[min(costs.draft)],
        k=best.k,
        tokens_per_cycle=best.emitted,
        speedup=best.speedup.mean,
        tokens=sum(len(answer.context) - answer.begin for answer in answers),
    )
