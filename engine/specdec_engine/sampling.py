"""From logits to probabilities, and from probabilities and a uniform number to a token.

The warpers are transformers' own, so "the target's distribution" means what `generate` means by it. Temperature 0 is
made here, as a one-hot row, so that the acceptance rule needs no greedy branch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec_engine.types import Sampling


def warp(logits: Tensor, sampling: Sampling) -> Tensor:  # [n, V] -> [n, V] float32
    """Each row's distribution after temperature, top-k, top-p and min-p.

    A row whose largest logit is not finite (NaN, +inf, or all -inf) becomes a row of NaN, for the rule to report:
    checking here would cost a device synchronisation.
    """
    logits = logits.float()
    if sampling.greedy:
        finite = logits.amax(-1, keepdim=True).isfinite()
        best = torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        return torch.where(finite, best, torch.nan)
    # Shifted, which changes no distribution, so that a tiny temperature overflows to -inf and never to NaN.
    warped: Tensor = _warpers(sampling)(None, logits - logits.amax(-1, keepdim=True))
    return warped.softmax(-1)


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if sampling.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers


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
