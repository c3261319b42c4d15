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

from specdec_engine.transfer import upload


def gumbel_noise(seed: int, position: int, rows: int, vocab: int, device: torch.device) -> Tensor:
    """[rows, vocab] float32 standard Gumbel numbers for the tokens at `position` and after it."""
    made = [_uniforms(seed, position + i, vocab) for i in range(rows)]
    return upload(torch.stack(made).log_().neg_().log_().neg_().float(), device)


@lru_cache(maxsize=64)
def _uniforms(seed: int, position: int, vocab: int) -> Tensor:
    """[vocab] float64 strictly between 0 and 1; made on the host, so that every device gets the same.

    Kept: draft and target ask for the same positions.
    """
    key = blake2b(struct.pack("<QQ", seed % 2**64, position), digest_size=8, person=b"specdec.gumbel").digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
    return torch.rand(vocab, generator=generator, dtype=torch.float64).clamp_(2.0**-53, 1 - 2.0**-53)


def choice(probs: Tensor, noise: Tensor) -> Tensor:  # [n, V], [n, V] -> [n]
    """An exact draw from each row. A row that is not made of numbers stays so: its token is the first such place."""
    return (probs.log() + noise).argmax(-1)


def coupled(probs: Tensor, noise: Tensor) -> Tensor:  # [n, V], [n, V] -> [n, V]
    """What is left to decide once the noise is known: all mass on one token. NaN rows stay NaN."""
    chosen = one_hot(choice(probs, noise), probs.shape[-1]).to(probs)
    return chosen + probs.sum(-1, keepdim=True) * 0
