"""From logits to probabilities, and from probabilities and a uniform number to a token.

The filters are those of transformers, so "the target's distribution" means what `generate` means by it. Temperature 0 is
made here, as a one-hot row, so that the acceptance rule needs no greedy branch.
"""

from __future__ import annotations

from math import isfinite

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper

from specdec_engine.core.cycle_types import Sampling
from specdec_engine.runtime import native


def warp(logits: Tensor, sampling: Sampling, temperature: Tensor | None = None) -> Tensor:  # [n, V] -> [n, V] float32
    """Each row's distribution after temperature, top-k, top-p and min-p.

    A row whose largest logit is not finite (NaN, +inf, or all -inf) gets a NaN, for the rule to report: checking here would
    cost a device synchronisation. `temperature` [] takes the place of sampling's own where the work is recorded and
    replayed.
    """
    if sampling.greedy:
        best, at = best_of(logits)
        one = best.float() * 0 + 1  # NaN where the best is not finite
        return torch.zeros(logits.shape, device=logits.device).scatter_(-1, at[:, None], one[:, None])
    if temperature is None and not sampling.filtered and (kernels := native.of_rows(logits)) is not None:
        return kernels.warp(logits, max(sampling.temperature, LOWEST))
    scores = logits.float() / (
        max(sampling.temperature, LOWEST) if temperature is None else temperature.float().clamp(LOWEST)
    )
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1.0:
        scores = _top_p(scores, sampling.top_p)
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)
    return scores.softmax(-1)


LOWEST = 1e-30
"""No temperature is taken for less: it gives what any such does, and divides no logit below 3e8 into an overflow."""


_LIKELIEST = (256, 4096)


def _top_p(scores: Tensor, top_p: float) -> Tensor:  # [n, V] -> [n, V]
    """-inf wherever the likelier tokens already hold the mass top_p, as transformers' TopPLogitsWarper has it.

    That one sorts the whole vocabulary: 9 ms for 4 rows of 49,152 on two cores. Here, on a CPU, the likeliest 256 nearly
    always suffice; elsewhere looking whether they do would cost a synchronisation.
    """
    probs, vocab = scores.softmax(-1), scores.shape[-1]
    tries = _LIKELIEST if scores.device.type == "cpu" else ()
    for m in (*(m for m in tries if m < vocab), vocab):
        likeliest, at = probs.topk(m)
        before = likeliest.cumsum(-1) - likeliest
        if m == vocab or bool((before[:, -1] >= top_p).all()):
            break
    kept = scores.gather(-1, at).masked_fill_((before >= top_p) & (before > 0), -torch.inf)
    return torch.full_like(scores, -torch.inf).scatter_(-1, at, kept)


_BLOCK = 256
"""Entries summed or compared before blocks are: for 49,152 entries a search in two steps takes a quarter of the time of
one."""


def _blocks(rows: Tensor, fill: float) -> Tensor:  # [n, V] -> [n, ceil(V / 256), 256]
    surplus = -rows.shape[-1] % _BLOCK
    return (pad(rows, (0, surplus), value=fill) if surplus else rows).view(rows.shape[0], -1, _BLOCK)


def best_where_sure(logits: Tensor) -> list[int] | None:  # [n, V] -> [n]
    """On the host, where `warp` puts each row's mass at temperature 0; None if a row's largest logit is not finite."""
    if (kernels := native.of_rows(logits)) is not None:
        return kernels.best(logits)
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        rows = logits.detach().numpy()  # whose argmax takes 15 µs for 4 rows of 49,152, torch's max 170
        best = rows.argmax(-1)
        return best.tolist() if np.isfinite(rows[np.arange(len(rows)), best]).all() else None
    # In one step: after a pass has filled the caches, the five of `best_of` cost half as much again.
    largest, at = logits.max(-1)
    return at.tolist() if all(map(isfinite, largest.tolist())) else None


def best_of(rows: Tensor) -> tuple[Tensor, Tensor]:  # [n, V] -> [n], [n]
    """The largest entry of each row and its first place; a NaN counts as the largest."""
    blocks = _blocks(rows, -torch.inf)
    best, block = blocks.amax(-1).max(-1)
    inside = blocks.gather(1, block[:, None, None].expand(-1, 1, _BLOCK)).argmax(-1)[:, 0]
    return best, block * _BLOCK + inside


def top_of_row(row: Tensor, n: int) -> list[tuple[int, float]]:  # [V]
    """On the host, the n largest entries of a row, and where they are."""
    if (kernels := native.of_rows(row)) is not None:
        return kernels.top(row, n)
    values, at = top(row[None], n)
    return list(zip(at[0].tolist(), values[0].tolist(), strict=True))


def top(rows: Tensor, n: int) -> tuple[Tensor, Tensor]:  # [m, V] -> [m, n], [m, n]
    """Each row's n largest entries and where they are: all in the n blocks whose largest entries are largest."""
    blocks = _blocks(rows, -torch.inf)
    where = blocks.amax(-1).topk(min(n, blocks.shape[1])).indices
    values, at = blocks.gather(1, where[:, :, None].expand(-1, -1, _BLOCK)).flatten(1).topk(n)
    return values, where.gather(1, at // _BLOCK) * _BLOCK + at % _BLOCK


def draw(probs: Tensor, u: Tensor) -> Tensor:  # [V], [] -> []
    """The token at which the cumulative distribution first exceeds u (inverse transform sampling)."""
    # float64: over 49,152 float32 terms the running sum is off by up to 1e-5, which is more than many a token's mass.
    blocks = _blocks(probs[None], 0.0)[0]
    ends = blocks.sum(-1, dtype=wide(probs.device)).cumsum(0)
    block = _exceeds(ends, u.to(ends) * ends[-1])
    rest = blocks.index_select(0, block[None])[0].to(ends.dtype).cumsum(0)
    inside = _exceeds(rest, u.to(ends) * ends[-1] - (ends.index_select(0, block[None])[0] - rest[-1]))
    return (block * _BLOCK + inside).clamp(max=probs.shape[0] - 1)


def draw_on_host(probs: Tensor, u: float) -> int:
    """`draw` where looking costs nothing: its 35 small operations take 0.1 ms there, and numpy's a third of that, and
    our own kernels' a tenth."""
    if (kernels := native.of_rows(probs)) is not None:
        return kernels.place(probs, u)
    blocks = _blocks(probs[None], 0.0)[0]
    ends = blocks.numpy().sum(-1, dtype=np.float64).cumsum()
    total = float(ends[-1])

    def place(cumulative: NDArray[np.float64], level: float) -> int:
        """As `_exceeds`."""
        level = max(0.0, min(level, float(cumulative[-1]) * (1 - _EPS)))
        return min(int(cumulative.searchsorted(level, side="right")), len(cumulative) - 1)

    block = place(ends, u * total)
    rest = blocks[block].numpy().cumsum(dtype=np.float64)
    inside = place(rest, u * total - float(ends[block] - rest[-1]))
    return min(block * _BLOCK + inside, probs.shape[0] - 1)


_EPS = float(np.finfo(np.float64).eps)


def _exceeds(cumulative: Tensor, level: Tensor) -> Tensor:
    """The first place above the level; kept from 0 to below the total, which rounding can leave, and where no token is."""
    total = cumulative[-1]
    level = torch.minimum(level, total * (1 - torch.finfo(cumulative.dtype).eps)).clamp(min=0)
    return torch.searchsorted(cumulative, level[None], right=True)[0].clamp(max=cumulative.shape[0] - 1)


def wide(device: torch.device) -> torch.dtype:
    """float64, but for Apple's MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64
