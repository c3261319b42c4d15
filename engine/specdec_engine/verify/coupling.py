"""Gumbel coupling: the same seed gives the same text with any draft and any k (Gumbel-max trick; Daliri et al. 2025).

Every absolute position has its own noise, a function of the seed alone. Target and draft both take the token at which their
log-probabilities plus that noise are largest: each is an exact draw from its own distribution, and like distributions mostly
agree. What is emitted is always the target's own choice, so a draft changes the speed and nothing else.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from hashlib import blake2b

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from specdec_engine.core.transfer import upload


def gumbel_noise(seed: int, position: int, rows: int, vocab: int, device: torch.device) -> Tensor:
    """[rows, vocab] float32 standard Gumbel numbers for the tokens at `position` and after it.

    Every device works out the same integers; two logarithms in float64 may differ in the last place. On a CPU five rows of
    128,000 take 6 ms, as long as a pass of an 8B model on a fast GPU, which makes its own.
    """
    if device.type == "cuda":
        keys = [_key(seed, position + i) for i in range(rows)]
        return _gumbel(upload(torch.tensor(keys), device), vocab)
    return upload(torch.stack([_row(seed, position + i, vocab) for i in range(rows)]), device)


@lru_cache(maxsize=64)
def _row(seed: int, position: int, vocab: int) -> Tensor:
    """[vocab], kept: draft and target ask for the same positions."""
    return _gumbel(torch.tensor([_key(seed, position)]), vocab)[0]


def _key(seed: int, position: int) -> int:
    """64 bits, signed."""
    key = blake2b(struct.pack("<QQ", seed % 2**64, position), digest_size=8, person=b"specdec.gumbel").digest()
    return int.from_bytes(key, "little", signed=True)


def _gumbel(keys: Tensor, vocab: int) -> Tensor:  # [n] -> [n, vocab]
    uniforms = (_unsigned_shift(random_bits(keys, vocab), 12).double() + 0.5) * 2.0**-52  # strictly between 0 and 1
    return uniforms.log_().neg_().log_().neg_().float()


def random_bits(keys: Tensor, n: int) -> Tensor:  # [m] int64 -> [m, n] int64
    """The first n numbers of SplitMix64 from each key (Steele, Lea and Flood 2014): a counter and a mixing function, so that
    all are worked out at once, and on any device alike. As fast on a CPU as torch's own generator."""
    bits = keys[:, None] + torch.arange(1, n + 1, device=keys.device) * _signed(0x9E3779B97F4A7C15)
    bits = (bits ^ _unsigned_shift(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _unsigned_shift(bits, 27)) * _signed(0x94D049BB133111EB)
    return bits ^ _unsigned_shift(bits, 31)


def _unsigned_shift(bits: Tensor, by: int) -> Tensor:
    """Shift to the right, with zeros from the left: torch's own shift keeps the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _signed(bits: int) -> int:
    """64 bits as torch takes them."""
    return bits - (bits >> 63 << 64)


def choice(probs: Tensor, noise: Tensor) -> Tensor:  # [n, V], [n, V] -> [n]
    """An exact draw from each row. A row that is not made of numbers stays so: its token is the first such place."""
    return (probs.log() + noise).argmax(-1)


def coupled(probs: Tensor, noise: Tensor) -> Tensor:  # [n, V], [n, V] -> [n, V]
    """What is left to decide once the noise is known: all mass on one token. NaN rows stay NaN."""
    chosen = one_hot(choice(probs, noise), probs.shape[-1]).to(probs)
    return chosen + probs.sum(-1, keepdim=True) * 0
