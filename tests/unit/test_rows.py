"""Our own kernels do with rows of logits and of probabilities what torch does."""

import pytest
import torch

from specdec_engine.core.cycle_types import Sampling
from specdec_engine.runtime import native
from specdec_engine.verify import sampling as of

KERNELS = native.kernels()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="no kernels of our own")
SIZES = [1, 2, 7, 8, 15, 16, 17, 255, 256, 257, 6401, 49_152]


def drawn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("values", [3, 10**6])
@pytest.mark.parametrize("n", SIZES)
def test_the_best_is_the_first_of_the_largest(n, values):
    rows = torch.randint(-values, values, (5, n), generator=torch.Generator().manual_seed(n)).float()
    assert KERNELS.best(rows) == rows.argmax(-1).tolist()
    assert KERNELS.best(rows[:1]) == rows[:1].argmax(-1).tolist()
    for at in {0, n // 2, n - 1}:
        for bad in (float("nan"), float("inf")):
            broken = rows.clone()
            broken[3, at] = bad
            assert KERNELS.best(broken) is None
    assert KERNELS.best(torch.full((2, n), -torch.inf)) is None
    assert KERNELS.best(rows[:0]) == []


@pytest.mark.parametrize("temperature", [0.05, 0.8, 1.0, 3.0])
@pytest.mark.parametrize("n", SIZES)
def test_warped_rows_are_softmaxes(n, temperature):
    logits = drawn(3, n) * 8
    rows = KERNELS.warp(logits, temperature)
    assert torch.allclose(rows, (logits.double() / temperature).softmax(-1).float(), rtol=2e-5, atol=1e-9)
    alone = torch.cat([KERNELS.warp(row[None], temperature) for row in logits])
    assert torch.equal(rows, alone)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 16, 39])
def test_a_row_that_is_no_distribution_is_not_a_number(bad, at):
    logits = drawn(2, 40)
    logits[1, at] = bad
    if bad < 0:
        logits[1] = bad
    rows = KERNELS.warp(logits, 1.0)
    assert rows[0].isfinite().all()
    assert rows[1].isnan().any()


def test_what_a_mask_leaves_out_has_no_probability():
    logits = drawn(1, 100).masked_fill(torch.arange(100) % 3 > 0, -torch.inf)
    row = KERNELS.warp(logits, 0.7)[0]
    assert (row > 0).tolist() == [i % 3 == 0 for i in range(100)]


def test_a_temperature_next_to_nothing_leaves_the_likeliest():
    assert KERNELS.warp(torch.tensor([[1.0, 3.0, 2.0]]), 1e-30).tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("n", SIZES)
def test_a_place_is_where_the_sum_exceeds_u(n):
    row = torch.rand(n, generator=torch.Generator().manual_seed(n)).double() ** 4
    row = row.masked_fill(torch.arange(n) % 5 == 4, 0.0).float()
    ends = row.double().cumsum(0)
    for u in [0.0, *torch.rand(200, generator=torch.Generator().manual_seed(1)).tolist(), 1 - 2**-53]:
        found, level = KERNELS.place(row, u), u * float(ends[-1])
        assert row[found] > 0
        assert ends[found] > level * (1 - 1e-12)
        assert found == 0 or ends[found - 1] <= level * (1 + 1e-12)


def test_what_stands_behind_the_mass_is_not_drawn_where_sums_round():
    """The sum of a block rounds otherwise than the running sum over it."""
    for seed in range(400):
        row = torch.zeros(512)
        row[:256] = torch.rand(256, generator=torch.Generator().manual_seed(seed)) ** 4
        assert KERNELS.place(row, 1 - 2**-53) < 256


def test_zeros_before_and_behind_are_never_drawn():
    row = torch.zeros(1000)
    row[300], row[301] = 0.25, 0.75
    assert [KERNELS.place(row, u) for u in (0.0, 0.2499, 0.25, 0.999999)] == [300, 300, 301, 301]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("many", [1, 5, 10])
def test_the_largest_are_torchs(n, many):
    for seed in range(5):
        row, many = drawn(n, seed=seed), min(many, n)
        values, places = row.topk(many)
        assert KERNELS.top(row, many) == list(zip(places.tolist(), values.tolist(), strict=True))


@pytest.mark.parametrize("n", SIZES)
def test_a_residual_is_what_q_leaves_of_p(n):
    p, q = drawn(n).softmax(-1), drawn(n, seed=1).softmax(-1)
    left = (p - q).clamp(min=0)
    found = KERNELS.residual(p, q, 0)
    assert (found is None) == (n == 1)
    if found is not None:
        assert torch.allclose(found, left / left.sum(), rtol=1e-4, atol=1e-7)
    for token in {0, n // 2, n - 1}:
        rest = p.clone()
        rest[token] = 0.0
        found = KERNELS.residual(p, None, token)
        assert found is None or torch.allclose(found, rest / rest.sum(), rtol=1e-4, atol=1e-7)


def test_nothing_left_is_told_as_nothing():
    p = drawn(50).softmax(-1)
    assert KERNELS.residual(p, p, 0) is None
    assert KERNELS.residual(torch.tensor([0.0, 1.0]), None, 1) is None


def test_rows_over_some_ids_are_widened():
    rows, ids = drawn(3, 7), torch.tensor([40, 2, 11, 0, 49, 7, 8])
    expected = torch.zeros(3, 50).index_copy_(1, ids, rows)
    assert torch.equal(KERNELS.widen(rows, ids, 50), expected)


@pytest.mark.parametrize("sampling", [Sampling(0.8), Sampling(0.8, top_k=5), Sampling(0.8, top_p=0.9)])
def test_rows_are_warped_alike_with_kernels_and_without(sampling, monkeypatch):
    logits = drawn(4, 300) * 3
    mine = of.warp(logits, sampling)
    monkeypatch.setattr(native, "of_rows", lambda row: None)
    assert torch.allclose(mine, of.warp(logits, sampling), rtol=2e-5, atol=1e-9)


def test_kernels_are_taken_for_float32_on_a_cpu_alone():
    assert native.of_rows(torch.zeros(3)) is native.kernels()
    assert native.of_rows(torch.zeros(3, dtype=torch.float64)) is None
