"""Losslessness by exact enumeration: every draft, every pattern of accepts, every final token, several cycles deep.

No sampling: the rule's pure functions (`thresholds`, `count`, `final`) are weighed with the probability of each way
through them, in float64, and the resulting joint distribution of emitted tokens must be the target's own to 1e-12.
Mutants that are wrong in the ways that published implementations have been wrong must fail.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise, product
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from specdec_engine.verify.rules import RULES, AcceptanceRule, BlockRule, TokenRule, VerifyInputs, accept_prob
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


def cycle_outcomes(
    rule: AcceptanceRule,
    p,
    q,
    k: int,
    *,
    deterministic: bool = False,
    argmax_but_soft_q: bool = False,
    stops_after_unlikely: bool = False,
    drops_unlikely: bool = False,
):
    """A function of the context: (emitted, weight) of each way through one cycle of k drafted tokens."""

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
            inputs = VerifyInputs.of(p_rows, ids, probs)
            passing = rule.thresholds(inputs).tolist() if k else []
            final = cache(lambda n: rule.final(inputs, torch.tensor(n)).tolist())  # noqa: B023
            for pattern in product((True, False), repeat=k):
                chance = weight
                for passed, threshold in zip(pattern, passing, strict=True):
                    chance *= threshold if passed else 1 - threshold
                if chance:
                    n = int(rule.count(torch.tensor(pattern)))
                    for token, mass in enumerate(final(n)):
                        yield (*tokens[:n], token), chance * mass

    return outcomes


def mean_accepted(rule: AcceptanceRule, p, q, k: int, **how) -> float:
    """Drafted tokens kept in a first cycle, on average."""
    return sum((len(tokens) - 1) * weight for tokens, weight in cycle_outcomes(rule, p, q, k, **how)(()))


def enumerate_emitted(rule: AcceptanceRule, p, q, k: int, length: int, **how) -> dict[tuple[int, ...], float]:
    """The exact distribution of the first `length` emitted tokens, over cycles of k drafted tokens."""
    outcomes = cycle_outcomes(rule, p, q, k, **how)

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
@pytest.mark.parametrize("corner", ["identical", "one_hot", "disjoint"])
def test_the_corners_are_exact_too(rule, deterministic, corner):
    """p equal to q (no residual is left), a greedy target, and a draft that misses the target's favourite."""
    p, q = toy(5, **{corner: True})
    assert deviation(enumerate_emitted(rule, p, q, 2, LENGTH, deterministic=deterministic), p, LENGTH) < 1e-12


@pytest.mark.parametrize("rule", LOSSLESS, ids=lambda rule: rule.name)
def test_a_drafter_may_stop_after_an_unlikely_token(rule):
    """Stopping by what was drawn is unbiased as long as the token itself stays in the draft."""
    p, q = toy(1)
    assert deviation(enumerate_emitted(rule, p, q, 3, LENGTH, stops_after_unlikely=True), p, LENGTH) < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_the_block_rule_never_accepts_fewer(seed):
    """More tokens a cycle from a sampled draft than the token rule has, and as many from a deterministic one."""
    p, q = toy(seed)
    token, block = (mean_accepted(rule, p, q, 3) for rule in (TokenRule(), BlockRule()))
    assert block > token + 1e-3
    token, block = (mean_accepted(rule, p, q, 3, deterministic=True) for rule in (TokenRule(), BlockRule()))
    assert block == pytest.approx(token, abs=1e-12)


def test_no_draft_is_plain_sampling():
    p, q = toy(7)
    assert deviation(enumerate_emitted(TokenRule(), p, q, 0, 3), p, 3) < 1e-12


# -- negative controls -------------------------------------------------------------------------------------------------


class SwappedRatio(TokenRule):
    """Accepts with min(1, q/p)."""

    lossless: ClassVar[bool] = False

    def thresholds(self, inputs):
        return accept_prob(inputs.q_drafted, inputs.p_drafted)


class NoResidual(TokenRule):
    """Draws the recovered token from p itself."""

    lossless: ClassVar[bool] = False

    def final(self, inputs, accepted):
        return inputs.p[int(accepted)]


class BonusFromTheWrongRow(TokenRule):
    """After a full acceptance takes the row before the last."""

    lossless: ClassVar[bool] = False

    def final(self, inputs, accepted):
        k = inputs.tokens.shape[0]
        return inputs.p[k - 1] if int(accepted) == k else super().final(inputs, accepted)


class QFromAnotherTemperature(TokenRule):
    """Tests with a q that is not the one the token was drawn from."""

    lossless: ClassVar[bool] = False

    def thresholds(self, inputs):
        return super().thresholds(replace(inputs, q_drafted=inputs.q_drafted**0.7))


class BlockWithTheTokensResidual(BlockRule):
    """Draws the recovered token as if nothing had been forgiven before it."""

    lossless: ClassVar[bool] = False

    def final(self, inputs, accepted):
        return TokenRule().final(inputs, accepted)


class BlockOfJointRatios(BlockRule):
    """Tests each prefix with its joint ratio alone, and forgets what the residual still holds."""

    lossless: ClassVar[bool] = False

    def thresholds(self, inputs):
        return (inputs.p_drafted / inputs.q_drafted).cumprod(0).clamp(max=1.0)


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
    (BlockWithTheTokensResidual(), {}),
    (BlockOfJointRatios(), {}),
    (BlockRule(), {"argmax_but_soft_q": True}),
    (BlockRule(), {"drops_unlikely": True}),
]


@pytest.mark.parametrize(
    ("rule", "how"), MUTANTS, ids=lambda x: type(x).__name__ if not isinstance(x, dict) else "-".join(x) or "sampled"
)
def test_a_wrong_rule_is_caught(rule, how):
    """A proof that cannot fail proves nothing: each of these kinds of wrong is a bug that somebody shipped."""
    # With three tokens a residual often has but one entry: of two toys, 36 is one that tells the residuals apart.
    found = [deviation(enumerate_emitted(rule, p, q, 2, 3, **how), p, 3) for p, q in map(toy, (0, 36))]
    assert max(found) > 1e-2


# -- a grammar: the target is another one, which says only what may come ---------------------------------------------------


def may_come(context: tuple[int, ...]) -> list[bool] | None:
    """A toy grammar: after a 0 must come a 1, and no token comes twice in a row. None outside of it."""
    for before, token in pairwise(context):
        if not may_follow(before, token):
            return None
    return [may_follow(context[-1], token) if context else True for token in range(VOCAB)]


def may_follow(before: int, token: int) -> bool:
    return token == 1 if before == 0 else token != before


def restricted(row_of, *, normalised: bool = True, first_row_only: bool = False):
    """p or q by the grammar; rows after a token that may not come are as they were, and are not reached."""

    def row(context: tuple[int, ...]) -> Tensor:
        found, allowed = row_of(context), may_come(context)
        if allowed is None or (first_row_only and len(context) % 2):
            return found
        found = found * torch.tensor(allowed)
        return found / found.sum() if normalised else found

    return row


@pytest.mark.parametrize("rule", LOSSLESS, ids=lambda rule: rule.name)
@pytest.mark.parametrize("draft", ["free", "by the grammar", "deterministic", "forced"])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_under_a_grammar_the_text_has_the_restricted_targets_distribution(rule, draft, k, seed):
    """Whether the draft knows of it, or not; and where it is what must come, as far as anything must."""
    free_p, free_q = toy(seed)
    p, q = restricted(free_p), free_q if draft == "free" else restricted(free_q)
    if draft == "forced":
        q = restricted(lambda context: torch.ones(VOCAB, dtype=torch.float64))
    found = enumerate_emitted(rule, p, q, k, LENGTH, deterministic=draft in ("deterministic", "forced"))
    assert deviation(found, p, LENGTH) < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_wrong_masks_are_caught(seed):
    """Masks that come a row too late, as those of an engine that looks at the grammar once a pass; and a q that was drawn by
    the grammar and told as it was before."""
    free_p, free_q = toy(seed)
    p = restricted(free_p)
    late = enumerate_emitted(TokenRule(), restricted(free_p, first_row_only=True), free_q, 2, LENGTH)
    assert deviation(late, p, LENGTH) > 1e-3

    class ToldAsBefore(TokenRule):
        """Holds drafts that were drawn from the restricted q against the free one, which has less for what may come."""

        def thresholds(self, inputs):
            share = 1.0 if inputs.probs is None else (inputs.probs > 0).double().mean(-1)
            return super().thresholds(replace(inputs, q_drafted=inputs.q_drafted * share))

    biased = enumerate_emitted(ToldAsBefore(), p, restricted(free_q), 2, LENGTH)
    assert deviation(biased, p, LENGTH) > 1e-3
