"""How a model's forward pass is run: the layer under target and draft.

A runtime scores tokens that follow what it has cached, and forgets back to a length. The loop does not know which runs.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

import torch
from torch import Tensor


class Choose(Protocol):
    """**Protocol:** how a draft's next token follows from its logits; a pure function of tensors, so that it can be
    recorded."""

    @property
    def key(self) -> Hashable:
        """Equal keys do the same with the same tensors."""
        ...

    def __call__(self, logits: Tensor, u: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor | None]:
        """[1, V] logits, [] uniform number, [] temperature -> [1] token and the [1, V] row it was drawn from, if it was
        drawn."""
        ...


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

    def unroll(self, pending: Tensor, u: Tensor, temperature: Tensor, choose: Choose) -> tuple[Tensor, Tensor | None]:
        """[m] pending tokens and [k] uniform numbers -> [k] tokens, each chosen after the one before; [k, V] their rows.

        Caches the pending tokens and all chosen ones but the last.
        """
        ...


PREFILL_CHUNK = 512
"""Tokens a prefill pass takes: at 512 the passes are compute-bound everywhere, and activations stay small."""


def prefill(runtime: Runtime, tokens: Tensor) -> None:
    """Cache [n] tokens in chunks, and keep no logits."""
    for chunk in torch.split(tokens, PREFILL_CHUNK):
        runtime.forward(chunk, 1)


@torch.inference_mode()
def step_by_step(
    runtime: Runtime, pending: Tensor, u: Tensor, temperature: Tensor, choose: Choose
) -> tuple[Tensor, Tensor | None]:
    """`Runtime.unroll` by one forward a token."""
    tokens, rows = [], []
    for number in u:
        pending, row = choose(runtime.forward(pending, 1), number, temperature)
        tokens.append(pending)
        rows += [] if row is None else [row]
    return torch.cat(tokens), torch.cat(rows) if rows else None
