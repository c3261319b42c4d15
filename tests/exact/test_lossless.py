"""Losslessness by exact enumeration: every draft, every pattern of accepts, every final token, several cycles deep.

No sampling: the rule's pure functions (`thresholds`, `count`, `final`) are weighed with the probability of each way
through them, in float64, and the resulting joint distribution of emitted tokens must be the target's own to 1e-12.
Mutants that are wrong in the ways that published implementations have been wrong must fail.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from specdec_engine.acceptance import RULES, AcceptanceRule, TokenRule
from tests.fakes import table_probs

VOCAB, LENGTH = 3, 4


def toy(seed: int, identical: bool = False, one_hot: bool = False, disjoint: bool = False):
    """p and q as functions of the context."""

    def p(context: tuple[int, ...]) -> Tensor:
        row = table_probs(context, VOCAB, 2 * seed)
        return torch.nn.functional.one_hot(row.argmax(), VOCAB).double() if one_hot else row

    def q(context: tuple[int, ...]) -> Tensor:
        if identical:
            return p(context)
        row = table_probs(context, VOCAB, 2 * seed + 1)
        if disjoint:  # the draft never proposes the target's favourite
            row = row.index_fill(0, p(context).argmax(), 0.0)
        return row / row.sum()

    return p, q


def enumerate_emitted(
    rule: AcceptanceRule,
    p,
    q,
    k: int,
    length: int,
    *,
    deterministic: bool = False,
    argmax_but_soft_q: bool = False,
    stops_after_unlikely: bool = False,
    drops_unlikely: bool = False,
) -> dict[tuple[int, ...], float]:
    """The exact distribution of the first `length` emitted tokens, over cycles of k drafted tokens."""

    def drafts(context):
        """(tokens, weight, probs): all that the draft may propose after this context."""
        if deterministic or argmax_but_soft_q:
            tokens: tuple[int, ...] = ()
            for _ in range(k):
                tokens += (int(q(context + tokens).argmax()),)
            soft = torch.stack([q(context + tokens[:i]) for i in range(k)])
            yield tokens, 1.0, soft if argmax_but_soft_q else None
            return
        for tokens in product(range(VOCAB), repeat=k):
            probs = torch.stack([q(context + tokens[:i]) for i in range(k)]) if k else torch.empty(0, VOCAB)
            ids = torch.tensor(tokens, dtype=torch.long)
            weight = float(probs[torch.arange(k), ids].prod())
            if weight:
                kept = until_unlikely(probs[torch.arange(k), ids].tolist())
                yield tokens[:kept], weight, probs[:kept]

    def until_unlikely(mass):
        """Length of the draft if the drafter stops at its first token below 0.3, with it or without."""
        first = next((i for i, m in enumerate(mass) if m < 0.3), len(mass))
        return min(first + 1, len(mass)) if stops_after_unlikely else first if drops_unlikely else len(mass)

    def outcomes(context):
        """(emitted, weight) of one cycle."""
        for tokens, weight, probs in drafts(context):
            ids, k = torch.tensor(tokens, dtype=torch.long), len(tokens)
            p_rows = torch.stack([p(context + tokens[:i]) for i in range(k + 1)])
            p_drafted = p_rows[torch.arange(k), ids]
            q_drafted = torch.ones_like(p_drafted) if probs is None else probs[torch.arange(k), ids]
            passing = rule.thresholds(p_drafted, q_drafted).tolist()
            final = cache(lambda n: rule.final(p_rows, ids, probs, torch.tensor(n)).tolist())  # noqa: B023
            for pattern in product((True, False), repeat=k):
                chance = weight
                for passed, threshold in zip(pattern, passing, strict=True):
                    chance *= threshold if passed else 1 - threshold
                if chance:
                    n = int(rule.count(torch.tensor(pattern)))
                    for token, mass in enumerate(final(n)):
                        yield (*tokens[:n], token), chance * mass

    @cache
    def emitted_after(context: tuple[int, ...], left: int) -> dict[tuple[int, ...], float]:
        if left == 0:
            return {(): 1.0}
        total: dict[tuple[int, ...], float] = {}
        for tokens, weight in outcomes(context):
            kept = tokens[:left]
            for rest, chance in emitted_after(context + kept, left - len(kept)).items():
                total[kept + rest] = total.get(kept + rest, 0.0) + weight * chance
        return total

    return emitted_after((), length)


def deviation(found: dict[tuple[int, ...], float], p, length: int) -> float:
    """Largest difference from the target's own joint distribution."""
    worst = 0.0
    for tokens in product(range(VOCAB), repeat=length):
        exact = 1.0
        for i, token in enumerate(tokens):
            exact *= float(p(tokens[:i])[token])
        worst = max(worst, abs(found.get(tokens, 0.0) - exact))
    return worst


LOSSLESS = [rule for rule in RULES.values() if rule.lossless]


@pytest.mark.parametrize("rule", LOSSLESS, ids=lambda rule: rule.name)
@pytest.mark.parametrize("deterministic", [False, True], ids=["sampled", "deterministic"])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_emitted_text_has_exactly_the_targets_distribution(rule, deterministic, k, seed):
    p, q = toy(seed)
    assert deviation(enumerate_emitted(rule, p, q, k, LENGTH, deterministic=deterministic), p, LENGTH) < 1e-12


@pytest.mark.parametrize("rule", LOSSLESS, ids=lambda rule: rule.name)
@pytest.mark.parametrize("deterministic", [False, True], ids=["sampled", "deterministic"])
@pytest.mark.parametrize("case", ["identical", "one_hot", "disjoint"])
def test_the_corners_are_exact_too(rule, deterministic, case):
    """p equal to q (no residual is left), a greedy target, and a draft that misses the target's favourite."""
    p, q = toy(5, **{case: True})
    assert deviation(enumerate_emitted(rule, p, q, 2, LENGTH, deterministic=deterministic), p, LENGTH) < 1e-12


@pytest.mark.parametrize("rule", LOSSLESS, ids=lambda rule: rule.name)
def test_a_drafter_may_stop_after_an_unlikely_token(rule):
    """Stopping by what was drawn is unbiased as long as the token itself stays in the draft."""
    p, q = toy(1)
    assert deviation(enumerate_emitted(rule, p, q, 3, LENGTH, stops_after_unlikely=True), p, LENGTH) < 1e-12


def test_no_draft_is_plain_sampling():
    p, q = toy(7)
    assert deviation(enumerate_emitted(TokenRule(), p, q, 0, 3), p, 3) < 1e-12


# -- negative controls -------------------------------------------------------------------------------------------------


class SwappedRatio(TokenRule):
    """Accepts with min(1, q/p)."""

    lossless: ClassVar[bool] = False

    def thresholds(self, p_drafted, q_drafted):
        return super().thresholds(q_drafted, p_drafted)


class NoResidual(TokenRule):
    """Draws the recovered token from p itself."""

    lossless: ClassVar[bool] = False

    def final(self, p, tokens, probs, accepted):
        return p[int(accepted)]


class BonusFromTheWrongRow(TokenRule):
    """After a full acceptance takes the row before the last."""

    lossless: ClassVar[bool] = False

    def final(self, p, tokens, probs, accepted):
        k = tokens.shape[0]
        return p[k - 1] if int(accepted) == k else super().final(p, tokens, probs, accepted)


class QFromAnotherTemperature(TokenRule):
    """Tests with a q that is not the one the token was drawn from."""

    lossless: ClassVar[bool] = False

    def thresholds(self, p_drafted, q_drafted):
        return super().thresholds(p_drafted, q_drafted**0.7)


MUTANTS = [
    (SwappedRatio(), {}),
    (SwappedRatio(), {"deterministic": True}),
    (NoResidual(), {}),
    (NoResidual(), {"deterministic": True}),
    (BonusFromTheWrongRow(), {}),
    (BonusFromTheWrongRow(), {"deterministic": True}),
    (QFromAnotherTemperature(), {}),
    (TokenRule(), {"argmax_but_soft_q": True}),
    (TokenRule(), {"drops_unlikely": True}),
]


@pytest.mark.parametrize(
    ("rule", "how"), MUTANTS, ids=lambda x: type(x).__name__ if isinstance(x, TokenRule) else "-".join(x) or "sampled"
)
def test_a_wrong_rule_is_caught(rule, how):
    """A proof that cannot fail proves nothing: each of these six kinds of wrong is a bug that somebody shipped."""
    p, q = toy(1)
    assert deviation(enumerate_emitted(rule, p, q, 2, 3, **how), p, 3) > 1e-3
