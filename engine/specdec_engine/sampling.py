"""From logits to probabilities, and from probabilities and a uniform number to a token.

The warpers are transformers' own, so "the target's distribution" means what `generate` means by it. Temperature 0 is
made here, as a one-hot row, so that the acceptance rule needs no greedy branch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec_engine.types import Sampling


def warp(logits: Tensor, sampling: Sampling, temperature: Tensor | None = None) -> Tensor:  # [n, V] -> [n, V] float32
    """Each row's distribution after temperature, top-k, top-p and min-p.

    A row whose largest logit is not finite (NaN, +inf, or all -inf) gets a NaN, for the rule to report: checking here would
    cost a device synchronisation. `temperature` [] takes the place of sampling's own where the work is recorded and
    replayed.
    """
    if sampling.greedy:
        best, at = logits.max(-1, keepdim=True)
        one = torch.where(best.isfinite(), 1.0, torch.nan)
        return torch.zeros(logits.shape, device=logits.device).scatter_(-1, at, one.float())
    logits = logits.float()
    # Shifted, which changes no distribution, so that a tiny temperature overflows to -inf and never to NaN.
    shifted = logits - logits.amax(-1, keepdim=True)
    scores = shifted / (sampling.temperature if temperature is None else temperature.float())
    for warper in _warpers(sampling):
        scores = warper(None, scores)
    return scores.softmax(-1)


def _warpers(sampling: Sampling) -> Iterator[Callable[[None, Tensor], Tensor]]:
    if sampling.top_k:
        yield TopKLogitsWarper(sampling.top_k)
    if sampling.top_p < 1.0:
        yield TopPLogitsWarper(sampling.top_p)
    if sampling.min_p:
        yield MinPLogitsWarper(sampling.min_p)


def draw(probs: Tensor, u: Tensor) -> Tensor:  # [V], [] -> []
    """The token at which the cumulative distribution first exceeds u (inverse transform sampling)."""
    # float64: over 49,152 float32 terms the running sum is off by up to 1e-5, which is more than many a token's mass.
    cumulative = probs.to(wide(probs.device)).cumsum(0)
    # Kept below the total, which u · total can reach by rounding: past it there is no token.
    total = cumulative[-1]
    at = torch.minimum(u.to(cumulative) * total, total * (1 - torch.finfo(cumulative.dtype).eps))
    return torch.searchsorted(cumulative, at[None], right=True)[0].clamp(max=probs.shape[0] - 1)


def wide(device: torch.device) -> torch.dtype:
    """float64, but for Apple's MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64
