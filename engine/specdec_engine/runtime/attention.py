"""Attention by torch's operations, for what no kernel of our own takes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def causal_mask(positions: Tensor, span: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[n, span]: 0 where a position may look, else -inf."""
    columns = torch.arange(span, device=positions.device)
    seen = columns <= positions[:, None]
    if window is not None:
        seen &= columns > positions[:, None] - window
    return torch.zeros(seen.shape, dtype=dtype, device=positions.device).masked_fill_(~seen, float("-inf"))


def attend_grouped(queries: Tensor, kept: Tensor, mask: Tensor) -> Tensor:
    """[n, heads, head_size] queries, [2 · kv_heads, span, head_size] keys and values -> [n, heads · head_size].

    mask: [n · heads a group, span], for heads that share keys are rows of one.
    """
    n, _, size = queries.shape
    keys, values = kept.chunk(2)
    groups = keys.shape[0]
    rows = queries.view(n, groups, -1, size).transpose(0, 1).reshape(1, groups, -1, size)
    attended: Tensor = scaled_dot_product_attention(rows, keys[None], values[None], mask, scale=size**-0.5)
    return attended.view(groups, n, -1, size).transpose(0, 1).reshape(n, -1)


def attend_in_groups(queries: Tensor, kept: Tensor, mask: Tensor | Literal["causal"] | None) -> Tensor:
    """The same for many rows; mask: [n, span], what torch takes for one, or `causal` for a span of n.

    Groups are a batch, and a group's keys are repeated without a copy: not all of torch's kernels know of heads that share
    keys, and the one that is left works in float32.
    """
    n, heads, size = queries.shape
    keys, values = kept.chunk(2)
    groups = keys.shape[0]
    grouped = queries.view(n, groups, -1, size).permute(1, 2, 0, 3)
    shared = (-1, heads // groups, -1, -1)
    attended: Tensor = scaled_dot_product_attention(
        grouped,
        keys[:, None].expand(shared),
        values[:, None].expand(shared),
        None if mask == "causal" else mask,
        is_causal=mask == "causal",
        scale=size**-0.5,
    )
    return attended.permute(2, 0, 1, 3).reshape(n, -1)


def attend_scored(queries: Tensor, kept: Tensor, mask: Tensor, cap: float, sinks: Tensor | None) -> Tensor:
    """The same, with scores of cap · tanh(score / cap) (Gemma 2), or beside one more score of each head, for nothing
    (GPT-OSS), neither of which torch's kernels know; mask: [n, span], cap: 0 for none, sinks: [heads].

    Some rows at a time: a score of each row and head for each position takes 1 GB at 4,096 rows of 16 heads.
    """
    keys, values = kept.chunk(2)
    attended = []
    for rows, seen in zip(torch.split(queries, _ROWS_AT_ONCE), torch.split(mask, _ROWS_AT_ONCE), strict=True):
        n, _, size = rows.shape
        grouped = rows.view(n, len(keys), -1, size).transpose(0, 1).reshape(len(keys), -1, size)
        scores = (grouped @ keys.mT).float().mul_(size**-0.5)
        if cap:
            scores = scores.div_(cap).tanh_().mul_(cap)
        scores = scores.view(len(keys), n, -1, keys.shape[1]).add_(seen[:, None])
        if sinks is None:
            shares = scores.softmax(-1)
        else:
            nothing = sinks.view(len(keys), 1, -1, 1).expand(-1, n, -1, -1)
            shares = torch.cat([scores, nothing], -1).softmax(-1)[..., :-1]
        found = shares.to(values.dtype).flatten(1, 2) @ values
        attended.append(found.view(len(keys), n, -1, size).transpose(0, 1).reshape(n, -1))
    return torch.cat(attended)


_ROWS_AT_ONCE = 128


def causal_of(n: int, end: int, device: torch.device) -> Tensor | Literal["causal"] | None:
    """What makes each of the last n rows look at all before it, without a mask; None where that needs one."""
    if n == end:
        return "causal"
    if device.type == "cpu":  # where torch would make a mask of it, and its import takes 1.4 s
        return None
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(n, end)
