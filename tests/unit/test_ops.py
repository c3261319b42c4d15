"""What a pass does between its matrices, on kernels of our own for a CPU: as torch does it, and a row by itself."""

from __future__ import annotations

import pytest
import torch

from specdec_engine.runtime import native
from specdec_engine.runtime.attention import attend_in_groups, causal_mask
from specdec_engine.runtime.ops import TORCH, HeadNorms

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def own():
    if native.kernels() is None:
        pytest.skip(native.why_none())
    return native.kernels()


def numbers(*size, dtype=torch.float32, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(found, expected, dtype):
    assert (found.float() - expected.float()).abs().max() <= CLOSE[dtype] * expected.float().abs().max()
    assert found.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 24, 576, 601])
@pytest.mark.parametrize("n", [1, 5, 40])
def test_norms_and_gates_are_torchs(own, n, size, dtype):
    x, weight = numbers(n, size), numbers(size, seed=1)
    for more in (None, numbers(n, size, dtype=dtype, seed=2)):
        streams = x.clone(), x.clone()
        found, expected = (
            ops.add_norm(stream, more, weight, 1e-5, dtype) for ops, stream in zip((own, TORCH), streams, strict=True)
        )
        assert_close(found, expected, dtype)
        assert torch.equal(*streams)
    both = 9 * numbers(n, 2 * size, dtype=dtype)
    assert_close(own.gate(both), TORCH.gate(both.float()), dtype)


def test_a_gate_takes_every_number(own):
    """Where an exponential is 0 or too large for float32, and what is no number stays none."""
    gates = torch.tensor([[-200.0, -89.0, -87.5, 0.0, 88.0, 200.0, torch.nan, torch.inf]])
    found = own.gate(torch.cat([gates, torch.ones_like(gates)], 1))
    assert torch.allclose(found, torch.nn.functional.silu(gates), atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 2, 8), (9, 3, 64), (2, 2, 20)])
@pytest.mark.parametrize("n", [1, 20])
def test_heads_are_rotated_as_torch_rotates_them(own, n, heads, groups, size, dtype, normed):
    qkv, positions = numbers(n, (heads + 2 * groups) * size, dtype=dtype), torch.arange(7, 7 + n)
    turns = torch.polar(torch.full((n, size // 2), 1.2), numbers(n, size // 2))
    norms = HeadNorms(numbers(size, seed=1), numbers(size, seed=2), 1e-5) if normed else None
    caches = [torch.zeros(2 * groups, 32, size, dtype=dtype) for _ in range(2)]
    found, expected = (
        ops.rotate(qkv.clone(), turns, positions, kept, norms) for ops, kept in zip((own, TORCH), caches, strict=True)
    )
    assert_close(found, expected.float(), torch.float32) if dtype == torch.float32 else assert_close(
        found.bfloat16(), expected, dtype
    )
    assert_close(caches[0], caches[1], dtype)


def heads_at(n, end, heads, groups, size, dtype):
    """Queries of the last n of `end` positions, and a cache with junk behind them, which is no number."""
    kept = numbers(2 * groups, end + 40, size, dtype=dtype, seed=3)
    kept[:, end:] = torch.nan
    return numbers(n, heads, size), kept, torch.arange(end - n, end)


@pytest.mark.parametrize("window", [None, 5, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32 cached", "bfloat16 cached"])
@pytest.mark.parametrize(
    ("heads", "groups", "size"), [(4, 2, 8), (9, 3, 64), (2, 2, 20), (71, 1, 16), (4, 2, 80), (4, 2, 112)]
)
@pytest.mark.parametrize(("n", "end"), [(1, 1), (1, 128), (3, 129), (17, 300), (200, 300), (65, 6000)])
def test_attention_is_torchs(own, n, end, heads, groups, size, dtype, window):
    queries, kept, positions = heads_at(n, end, heads, groups, size, dtype)
    expected = attend_in_groups(queries, kept[:, :end].float(), causal_mask(positions, end, window, torch.float32))
    for to in DTYPES:
        assert_close(own.attend(to, queries, kept, positions, window), expected, to)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32 cached", "bfloat16 cached"])
@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("end", [66, 127, 193, 390, 1000])
def test_a_row_sees_the_same_bits_alone_and_among_others(own, end, window, dtype):
    """And whatever the number of threads."""
    queries, kept, positions = heads_at(65, end, 9, 3, 64, dtype)
    together = own.attend(torch.float32, queries, kept, positions, window)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 5, 8, 17):
            torch.set_num_threads(1 if n == 5 else 2)
            parts = zip(queries.split(n), positions.split(n), strict=True)
            apart = torch.cat([own.attend(torch.float32, q, kept, at, window) for q, at in parts])
            assert torch.equal(apart, together), f"in passes of {n}"
    finally:
        torch.set_num_threads(threads)


def test_a_row_that_is_no_number_sees_none(own):
    queries, kept, positions = heads_at(3, 140, 9, 3, 64, torch.float32)
    queries[1, 4] = torch.nan
    seen = own.attend(torch.float32, queries, kept, positions, None).view(3, 9, 64)
    assert seen[1, 4].isnan().all()
    assert not seen[[0, 2]].isnan().any()
