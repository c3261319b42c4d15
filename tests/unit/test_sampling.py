"""Warping equals transformers' own pipeline; drawing inverts the cumulative distribution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import TopPLogitsWarper

from specdec_engine.core.cycle_types import Sampling
from specdec_engine.core.randomness import KeyedRandomness
from specdec_engine.errors import UsageError
from specdec_engine.verify.sampling import best_of, draw, draw_on_host, top, warp
from tests.fakes import tiny_llama

LOGITS = 3 * torch.randn(6, 50, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 0.9, "min_p": 0.1},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_the_distribution_is_what_transformers_samples_from(settings):
    """`generate(do_sample=True, output_scores=True)` with the same settings, on a real model."""
    model = tiny_llama(seed=4)
    prompt = torch.tensor([[5, 6, 7]])
    torch.manual_seed(0)
    made = model.generate(
        prompt,
        do_sample=True,
        max_new_tokens=1,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        pad_token_id=0,
        **{"top_k": 0, **settings},
    )
    assert torch.allclose(warp(made.logits[0], Sampling(**settings)), made.scores[0].softmax(-1), atol=1e-6)


def test_temperature_zero_is_the_largest_logit():
    assert torch.equal(warp(LOGITS, Sampling()).argmax(-1), LOGITS.argmax(-1))
    assert warp(LOGITS, Sampling()).sum(-1).tolist() == [1.0] * 6


@given(st.integers(0, 2**32), st.floats(1e-12, 1 - 1e-12))
def test_draw_inverts_the_cumulative_distribution(seed, u):
    row = torch.randn(9, generator=torch.Generator().manual_seed(seed)).softmax(0)
    row[seed % 9] = 0.0
    row = row / row.sum()
    token = int(draw(row, torch.tensor(u, dtype=torch.float64)))
    below = float(row[:token].double().sum() / row.double().sum())
    assert row[token] > 0
    assert below <= u + 1e-12
    assert u < below + float(row[token].double() / row.double().sum()) + 1e-12


@pytest.mark.parametrize("u", [2.0**-53, 1 - 2.0**-53])
def test_the_extremes_draw_tokens_that_have_mass(u):
    row = torch.tensor([0.0, 0.5, 0.5, 0.0])
    assert int(draw(row, torch.tensor(u, dtype=torch.float64))) in (1, 2)


def test_a_device_without_float64_draws_no_token_without_mass(monkeypatch):
    """In float32 the largest u is 1.0, and u times the total the total: past the end there is no token."""
    monkeypatch.setattr("specdec_engine.verify.sampling.wide", lambda device: torch.float32)
    row = torch.zeros(10)
    row[3] = 1.0
    assert int(draw(row, torch.tensor(1 - 2.0**-53, dtype=torch.float64))) == 3


@pytest.mark.parametrize("temperature", [1e-38, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature):
    assert torch.equal(warp(LOGITS, Sampling(temperature)).argmax(-1), LOGITS.argmax(-1))
    assert torch.allclose(warp(LOGITS, Sampling(temperature)).sum(-1), torch.ones(6))


@given(st.integers(0, 2**64 - 1), st.integers(0, 10**6), st.integers(0, 40))
def test_uniforms_are_strictly_inside_and_prefixes_agree(seed, position, n):
    random = KeyedRandomness(seed)
    numbers = random.uniforms(position, "draft", n)
    assert len(numbers) == n
    assert all(0.0 < u < 1.0 for u in numbers)
    assert random.uniforms(position, "draft", n + 3)[:n] == numbers


def test_uniforms_differ_by_seed_position_purpose_and_index_and_are_uniform():
    numbers = [
        u
        for seed in range(5)
        for position in range(50)
        for purpose in ("draft", "accept", "final")
        for u in KeyedRandomness(seed).uniforms(position, purpose, 12)
    ]
    assert len(set(numbers)) == len(numbers)
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.015


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"min_p": -0.1},
        {"min_p": 1.5},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_with_the_value(bad):
    (value,) = bad.values()
    with pytest.raises(UsageError, match=str(value).replace(".", r"\.")):
        Sampling(**bad)


@pytest.mark.parametrize("vocab", [5, 255, 256, 257, 1000, 1024])
def test_searching_by_blocks_finds_what_searching_all_finds(vocab):
    """Largest entry, its first place among ties, the top few, and the token of a uniform number."""
    generator = torch.Generator().manual_seed(vocab)
    rows = torch.randint(0, 40, (8, vocab), generator=generator).float()  # many ties
    best, at = best_of(rows)
    assert torch.equal(at, torch.from_numpy(rows.numpy().argmax(-1)))
    assert torch.equal(best, rows.amax(-1))
    values, places = top(rows, 4)
    assert torch.equal(values, rows.topk(4).values)
    assert torch.equal(rows.gather(1, places), values)
    probs = rows / rows.sum(-1, keepdim=True)
    for row in probs:
        cumulative = row.double().cumsum(0)
        for u in (1e-12, 0.1, 0.5, 0.9, 1 - 1e-12):
            token = int(draw(row, torch.tensor(u, dtype=torch.float64)))
            assert draw_on_host(row, u) == token
            before = float(cumulative[token] - row[token].double())
            assert row[token] > 0
            assert before - 1e-9 <= u * float(cumulative[-1]) <= float(cumulative[token]) + 1e-9


@pytest.mark.parametrize("at", [0, 300, 600])
def test_a_nan_is_found_in_any_block(at):
    row = torch.zeros(1, 700)
    row[0, at] = torch.nan
    best, place = best_of(row)
    assert best.isnan().all()
    assert int(place) == at
    assert warp(row, Sampling()).isnan().any()


def test_a_block_that_begins_without_mass_is_entered_at_its_first_token():
    """At the very edge between two blocks rounding must not pick an entry of probability 0."""
    probs = torch.zeros(512)
    probs[10], probs[300] = 0.5, 0.5
    for u in (0.5 - 2**-53, 0.5, 0.5 + 2**-53):
        assert int(draw(probs, torch.tensor(u, dtype=torch.float64))) in (10, 300)


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_top_p_is_transformers_own_where_few_candidates_do_not_suffice(spread):
    """Flat rows need more than 256 and more than 4,096 of the vocabulary."""
    rows = spread * torch.randn(3, 6000, generator=torch.Generator().manual_seed(1))
    expected = TopPLogitsWarper(0.9)(None, rows).softmax(-1)
    found = warp(rows, Sampling(1.0, top_p=0.9))
    assert ((found > 0) != (expected > 0)).sum() <= 3  # a token at the edge, by rounding
    assert torch.allclose(found, expected, atol=1e-4)
