"""The noise that couples draft and target: reproducible to the bit, and Gumbel."""

from __future__ import annotations

import math

import pytest
import torch

from specdec_engine.verify.coupling import gumbel_noise, random_bits
from tests.fakes import CPU


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]),
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]),
    ],
)
def test_random_bits_are_splitmix64(key, expected):
    """Its published numbers: what integers say, every device says."""
    found = random_bits(torch.tensor([7, key]), len(expected))[1]
    assert [value % 2**64 for value in found.tolist()] == expected


def test_noise_is_a_function_of_seed_and_position():
    whole = gumbel_noise(5, 40, 3, 1000, CPU)
    assert torch.equal(whole[1:], gumbel_noise(5, 41, 2, 1000, CPU))
    assert torch.equal(whole[:, :300], gumbel_noise(5, 40, 3, 300, CPU))
    assert not torch.equal(whole, gumbel_noise(6, 40, 3, 1000, CPU))
    assert whole.unique().numel() > 2990


def test_noise_is_gumbel():
    """Mean γ, variance π²/6, the distribution e^(-e^(-x)); nothing shared by neighbours in either direction."""
    noise = gumbel_noise(1, 0, 40, 5000, CPU).double()
    n = noise.numel()
    assert noise.mean().item() == pytest.approx(0.5772157, abs=5 * math.pi / math.sqrt(6 * n))
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.03)
    levels = torch.exp(-torch.exp(-noise.flatten())).sort().values
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert (levels - steps).abs().max().item() < 2.0 / math.sqrt(n)  # Kolmogorov-Smirnov: p of 0.0007
    for a, b in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1])):
        shared = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()
        assert abs(shared) < 5 / math.sqrt(n)
