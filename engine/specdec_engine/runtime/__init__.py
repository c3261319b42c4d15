"""How a model's forward pass is run: the layer under target and draft.

A runtime scores tokens that follow what it has cached, and forgets back to a length. The loop does not know which runs.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Runtime(Protocol):
    """**Protocol:** one model with one cache."""

    name: str
    vocab: int
    """Size of the logits' last dimension, padding included."""
    limit: int | None
    """Positions the model was made for; None where its config does not say."""
    device: torch.device

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are kept."""
        ...

    def forward(self, tokens: Tensor, rows: int) -> Tensor:
        """[n] tokens that follow the cached ones -> [rows, V] logits after the last `rows` of them; caches all n."""
        ...

    def rollback(self, to: int) -> None:
        """Forget all but the first `to` tokens; idempotent, and nothing happens if fewer are cached."""
        ...


PREFILL_CHUNK = 512
"""Tokens a prefill pass takes: at 512 the passes are compute-bound everywhere, and activations stay small."""


def prefill(runtime: Runtime, tokens: Tensor) -> None:
    """Cache [n] tokens in chunks, and keep no logits."""
    for chunk in torch.split(tokens, PREFILL_CHUNK):
        runtime.forward(chunk, 1)
