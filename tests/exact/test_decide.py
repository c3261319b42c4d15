"""`decide` itself, draws included, exactly: distributions in eighths, uniform numbers on a grid of eighths.

The enumeration in test_lossless weighs thresholds and rows; here the comparison with u and the draw from the cumulative
row are run for every cell of the grid, so counting the outcomes gives exact probabilities.
"""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import product

import pytest
import torch

from specdec_engine.core.cycle_types import Draft
from specdec_engine.errors import GenerationFailed
from specdec_engine.verify.decide import decide as decide_on_device
from specdec_engine.verify.decide import decide_on_host
from specdec_engine.verify.evidence import Layout, Uniforms, unpack, verdict_of
from specdec_engine.verify.rules import RULES, TokenRule, VerifyInputs, apply_token_rule
from tests.fakes import ScriptedRandomness


def on_host(rule, draft, p, numbers):
    return decide_on_host(rule, p, draft.tokens, draft.probs, numbers)


def on_a_device(rule, draft, p, numbers):
    row = decide_on_device(rule, p, draft.tokens, draft.probs, numbers.tensor(p.device))
    return unpack(row.tolist(), Layout.of(len(draft), p.shape[1], None))


@pytest.fixture(params=[on_host, on_a_device], ids=["host", "device"])
def decide(request):
    """Both ways to a verdict."""

    def decided(rule, draft, p, random, position):
        numbers = Uniforms.drawn(random, position, len(draft))
        return verdict_of(request.param(rule, draft, p, numbers), draft.drafter, numbers)

    return decided


GRID = [(2 * i + 1) / 16 for i in range(8)]

PAIRS = [
    # q drawn from, p wanted; every ratio and every residual is a multiple of 1/8
    ((2, 4, 2), (1, 2, 5)),
    ((2, 2, 4), (4, 4, 0)),
    ((8, 0, 0), (4, 2, 2)),
    ((2, 4, 2), (2, 4, 2)),
    ((0, 4, 4), (8, 0, 0)),
]


def eighths(row):
    return torch.tensor([n / 8 for n in row])


@pytest.mark.parametrize(("q", "p"), PAIRS)
def test_one_sampled_token_over_the_whole_grid(q, p, decide):
    """First emitted token of a cycle with k = 1: must be p, counted in 512 equal cells."""
    p_rows, q_row = torch.stack([eighths(p), eighths(p)]), eighths(q)
    counts: Counter[int] = Counter()
    for token, n in enumerate(q):
        draft = Draft(torch.tensor([token]), q_row[None], "grid")
        for u, w in product(GRID, GRID):
            verdict = decide(TokenRule(), draft, p_rows, ScriptedRandomness(accept=[u], final=[w, w]), 0)
            counts[verdict.tokens[0]] += n
    assert [Fraction(counts[i], 512) for i in range(3)] == [Fraction(n, 8) for n in p]


@pytest.mark.parametrize("p", [(1, 2, 5), (4, 4, 0), (0, 8, 0)])
@pytest.mark.parametrize("token", range(3))
def test_one_deterministic_token_over_the_whole_grid(p, token, decide):
    """The residual of a one-hot draft is p without the token; its thirds and fifths need a finer grid for the draw."""
    p_rows = torch.stack([eighths(p), eighths(p)])
    left = 8 - p[token]
    fine = [(2 * i + 1) / (2 * left) for i in range(left)] if left else [0.5]
    total: dict[int, Fraction] = {}
    for u, w in product(GRID, fine):
        draft = Draft(torch.tensor([token]), None, "grid")
        verdict = decide(TokenRule(), draft, p_rows, ScriptedRandomness(accept=[u], final=[w, w]), 0)
        total[verdict.tokens[0]] = total.get(verdict.tokens[0], Fraction(0)) + Fraction(1, 8 * len(fine))
    assert [total.get(i, Fraction(0)) for i in range(3)] == [Fraction(n, 8) for n in p]


def test_the_verdict_carries_its_evidence(decide):
    p = torch.stack([eighths((1, 2, 5)), eighths((8, 0, 0)), eighths((0, 0, 8))])
    q = torch.stack([eighths((2, 4, 2)), eighths((2, 4, 2))])
    verdict = decide(
        TokenRule(),
        Draft(torch.tensor([1, 1]), q, "x"),
        p,
        ScriptedRandomness(accept=[0.3, 0.5], final=[0.1, 0.5, 0.9]),
        0,
    )
    assert (verdict.accepted, verdict.token, verdict.origin) == (1, 0, "recovered")
    assert verdict.drafted == (1, 1)
    assert verdict.p == (0.25, 0.0)
    assert verdict.q == (0.5, 0.5)
    assert verdict.u == (0.3, 0.5)
    assert verdict.overlap == (0.625, 0.25)
    assert verdict.residual == ((0, 1.0),)


def test_u_past_the_rejection_is_unknown_and_a_bonus_has_no_residual(decide):
    p = torch.stack([eighths((8, 0, 0))] * 3)
    rejected = decide(
        TokenRule(),
        Draft(torch.tensor([1, 0]), None, "x"),
        p,
        ScriptedRandomness(accept=[0.5, 0.5], final=[0.5] * 3),
        0,
    )
    assert rejected.u == (0.5, None)
    full = decide(
        TokenRule(),
        Draft(torch.tensor([0, 0]), None, "x"),
        p,
        ScriptedRandomness(accept=[0.5, 0.5], final=[0.5] * 3),
        0,
    )
    assert (full.origin, full.residual) == ("bonus", ())


def test_a_token_the_target_forbids_is_never_accepted_and_never_drawn(decide):
    """p = 0 must reject for every u (transformers accepts it when u comes out 0)."""
    p = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    q = torch.tensor([[1.0, 0.0, 0.0]])
    for u, w in product([2.0**-53, 0.5, 1 - 2.0**-53], repeat=2):
        verdict = decide(
            TokenRule(), Draft(torch.tensor([0]), q, "x"), p, ScriptedRandomness(accept=[u], final=[w, w]), 0
        )
        assert verdict.tokens == (1,)


def test_equal_distributions_accept_for_the_largest_u(decide):
    """p/q = 1 and u one step below 1: in float32 that u would be 1.0 and reject."""
    row = torch.full((3,), 1 / 3)
    verdict = decide(
        TokenRule(),
        Draft(torch.tensor([2]), row[None], "x"),
        torch.stack([row, row]),
        ScriptedRandomness(accept=[1 - 2.0**-53], final=[0.5, 0.5]),
        0,
    )
    assert verdict.accepted == 1


def test_numbers_of_a_dead_prefix_may_be_none(decide):
    """NaN past the rejection is no failure, and no NaN in JSON."""
    p = torch.stack([eighths((8, 0, 0)), torch.full((3,), float("nan")), torch.full((3,), float("nan"))])
    randomness = ScriptedRandomness(accept=[0.5, 0.5], final=[0.5] * 3)
    verdict = decide(TokenRule(), Draft(torch.tensor([1, 1]), None, "x"), p, randomness, 0)
    assert (verdict.tokens, verdict.p, verdict.overlap) == ((0,), (0.0, None), (0.0, None))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 1])
def test_numbers_that_are_none_are_reported_with_their_position(bad, at, decide):
    p = torch.full((2, 3), 1 / 3)
    p[at, 1] = bad
    with pytest.raises(GenerationFailed, match=f"target.*position {40 + at}"):
        decide(
            TokenRule(),
            Draft(torch.tensor([1]), None, "x"),
            p / p.sum(-1, keepdim=True),
            ScriptedRandomness(accept=[0.1], final=[0.5, 0.5]),
            40,
        )


def test_a_broken_draft_is_named(decide):
    q = torch.full((1, 3), float("nan"))
    with pytest.raises(GenerationFailed, match="draft tiny"):
        decide(
            TokenRule(),
            Draft(torch.tensor([1]), q, "tiny"),
            torch.full((2, 3), 1 / 3),
            ScriptedRandomness(accept=[0.1], final=[0.5, 0.5]),
            0,
        )


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_row_that_mattered_and_is_no_distribution_is_an_error(rule, deterministic, bad, row, decide):
    """With every drafted token sure to be accepted, each row matters."""
    p = torch.full((3, 4), 0.0, dtype=torch.float64)
    p[:, 1] = 1.0
    p[row] = bad * 0
    probs = None if deterministic else torch.full((2, 4), 0.25, dtype=torch.float64)
    draft = Draft(torch.tensor([1, 1]), probs, "x")
    with pytest.raises(GenerationFailed):
        decide(rule, draft, p, ScriptedRandomness(accept=[0.1, 0.1], final=[0.5, 0.5, 0.5]), 0)


def test_rows_after_a_token_that_the_target_never_says_do_not_matter(decide):
    p = torch.tensor([[0.0, 1.0], [float("nan"), float("nan")], [0.5, 0.5]], dtype=torch.float64)
    for rule in RULES.values():
        verdict = decide(
            rule, Draft(torch.tensor([0, 0]), None, "x"), p, ScriptedRandomness(accept=[0.5, 0.5], final=[0.5] * 3), 0
        )
        assert (verdict.accepted, verdict.token) == (0, 1)


def rows_of(n, generator):
    """Distributions over 6 tokens, some of whose entries are 0."""
    rows = torch.rand(n, 6, generator=generator) * (torch.rand(n, 6, generator=generator) < 0.7)
    rows[:, 0] += 1e-3
    return rows / rows.sum(-1, keepdim=True)


def near(threshold):
    """Uniform numbers on either side of a threshold, and far from it."""
    return [u for u in (threshold * (1 - 1e-12), threshold, threshold * (1 + 1e-12), 0.01, 0.99) if 0 < u < 1]


@pytest.mark.parametrize("drawn", ["sampled", "one-hot", "equal", "broken q", "broken p"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_token_rule_on_the_host_is_the_token_rule(k, drawn):
    """As many accepted, and the same row to draw from; numbers are held just above and just below each threshold."""
    rule, generator = TokenRule(), torch.Generator().manual_seed(k)
    for _ in range(20):
        p, q = rows_of(k + 1, generator), rows_of(k, generator)
        tokens = torch.randint(0, 6, (k,), generator=generator)
        if drawn == "equal":
            q = p[:k].clone()
        if drawn.startswith("broken"):
            (q if drawn == "broken q" else p)[k - 1] = torch.nan
        inputs = VerifyInputs.of(p, tokens, None if drawn == "one-hot" else q)
        thresholds = rule.thresholds(inputs)
        for u in product(*map(near, torch.nan_to_num(thresholds, 0.5).tolist())):
            accepted = rule.count(torch.tensor(u, dtype=torch.float64) < thresholds)
            outcome = apply_token_rule(inputs, u)
            assert outcome.accepted == int(accepted)
            assert torch.allclose(outcome.final, rule.final(inputs, accepted), atol=1e-6, equal_nan=True)
