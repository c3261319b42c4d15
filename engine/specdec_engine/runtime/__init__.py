"""How a model's forward pass is run: the layer under target and draft.

A runtime scores tokens that follow what it has cached, and forgets back to a length. The loop does not know which runs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Chosen(NamedTuple):
    """A draft's next token. A tuple, since recordings return tuples of tensors."""

    token: Tensor
    """[1]"""
    row: Tensor | None
    """[1, V], what it was drawn from; None if it was not drawn."""
    confidence: Tensor
    """[]: the largest probability of the draft's distribution."""


Enough = Callable[[float], bool]
"""Given how sure the draft was of the token it has just chosen: whether to end the draft with it. It must not look at the
token itself: see `Drafter`."""


class Choose(Protocol):
    """**Protocol:** how a draft's next token follows from its logits; a pure function of tensors, so that it can be
    recorded."""

    @property
    def key(self) -> Hashable:
        """Equal keys do the same with the same tensors."""
        ...

    def __call__(self, logits: Tensor, u: Tensor, temperature: Tensor) -> Chosen:
        """[1, V] logits, [] uniform number, [] temperature."""
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

    def unroll(
        self, pending: Tensor, u: Tensor, temperature: Tensor, choose: Choose, enough: Enough | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[m] pending tokens and [k] uniform numbers -> [k] tokens, each chosen after the one before; [k, V] their rows.

        Fewer than k where `enough` says so; it is not asked where looking would wait for a device. Caches the pending
        tokens and all chosen ones but the last.
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
    runtime: Runtime,
    pending: Tensor,
    u: Tensor,
    temperature: Tensor,
    choose: Choose,
    enough: Enough | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`Runtime.unroll` by one forward a token."""
    tokens, rows = [], []
    for number in u:
        chosen = choose(runtime.forward(pending, 1), number, temperature)
        pending = chosen.token
        tokens.append(pending)
        rows += [] if chosen.row is None else [chosen.row]
        if enough is not None and runtime.device.type == "cpu" and enough(float(chosen.confidence)):
            break
    return torch.cat(tokens), torch.cat(rows) if rows else None
