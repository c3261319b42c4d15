"""Verdicts at temperature 0 without tensors are those with tensors, for any rule, right or wrong."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch

from specdec_engine.core.cycle_types import Sampling
from specdec_engine.core.randomness import KeyedRandomness
from specdec_engine.runtime import native
from specdec_engine.verify.decide import decide
from specdec_engine.verify.evidence import Layout, Uniforms, unpack, verdict_of
from specdec_engine.verify.greedy import RememberedRule
from specdec_engine.verify.rules import RULES, SyntheticRule, TokenRule
from specdec_engine.verify.sampling import best_where_sure, warp


class TooKind(TokenRule):
    """Accepts half of what it should reject, and draws from what is not one-hot."""

    def thresholds(self, case):
        return (super().thresholds(case) + 0.5).clamp(max=1.0)

    def final(self, case, accepted):
        return (case.p[0] + case.p[-1]) / 2


@pytest.mark.parametrize("rule", [*RULES.values(), SyntheticRule(0.5), TooKind()], ids=lambda rule: type(rule).__name__)
def test_a_pattern_that_is_remembered_gives_the_verdict_of_the_rule(rule):
    """Few tokens, so that patterns come again."""
    rng, remembered = random.Random(3), RememberedRule(rule)
    for position in range(400):
        k, vocab = rng.randint(0, 4), 5
        p = torch.eye(vocab)[torch.tensor([rng.randrange(vocab) for _ in range(k + 1)])]
        drafted = [rng.randrange(vocab) for _ in range(k)]
        numbers, best = Uniforms.drawn(KeyedRandomness(1), position, k), p.argmax(-1).tolist()
        found = verdict_of(remembered.decide(best, drafted, numbers, vocab), "x", numbers)
        tokens = torch.tensor(drafted, dtype=torch.long)
        row = decide(rule, p, tokens, None, numbers.tensor(p.device)).tolist()
        asked = verdict_of(unpack(row, Layout.of(k, vocab, None)), "x", numbers)
        assert replace(found, residual=()) == replace(asked, residual=())
        assert dict(found.residual) == dict(asked.residual)  # equal masses in any order


def test_the_rule_is_asked_once_a_pattern():
    asked = []

    class Counted(TokenRule):
        def thresholds(self, case):
            asked.append(case)
            return super().thresholds(case)

    remembered, numbers = RememberedRule(Counted()), Uniforms(0, [0.5, 0.5], [0.5] * 3)
    for base in (0, 100, 7):
        found = remembered.decide([base, base + 1, base + 2], [base, base + 3], numbers, 1000)
        assert (found.accepted, found.token) == (1, base + 1)
    assert len(asked) == 1

    for low, high in itertools.combinations(range(10, 14), 2):  # of what comes after a rejection any order is the same
        remembered.decide([5, low, 9], [5, high], numbers, 1000)
        remembered.decide([high, 5, low], [high, 2], numbers, 1000)
    assert len(asked) == 1


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_the_mass_is(dtype, own, monkeypatch):
    """The first of several; nothing where a row is not made of numbers, which `warp` then shows."""
    if own and native.kernels() is None:
        pytest.skip(native.why_none())
    if not own:
        monkeypatch.setattr(native, "of_rows", lambda row: None)
    logits = torch.randint(0, 5, (200, 1000), generator=torch.Generator().manual_seed(1)).to(dtype)
    assert best_where_sure(logits) == warp(logits, Sampling()).argmax(-1).tolist()
    for broken in (float("nan"), float("inf")):
        logits[7, 3] = broken
        assert best_where_sure(logits) is None
        assert warp(logits, Sampling())[7].isnan().any()
    assert best_where_sure(torch.full((1, 4), -torch.inf)) is None
