"""How likely emitted tokens were, and which others would have been: for those who ask."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from specdec_engine.core.cycle_types import Sampling
from specdec_engine.core.transfer import upload
from specdec_engine.record.events import Logprob, TokenLogprobs
from specdec_engine.verify.sampling import warp


def logprobs_of(logits: Tensor, shaped: Tensor, sampling: Sampling, tokens: Sequence[int]) -> tuple[TokenLogprobs, ...]:
    """Of n emitted tokens. logits: [m, V], m at least n, as the target gives them: row i is what token i follows; shaped:
    after penalties and a grammar. As many of the likeliest as `sampling` asks for are told beside each, by the target's own
    logits."""
    n, many = len(tokens), min(sampling.logprobs or 0, logits.shape[-1])
    own, warped = logits[:n].float().log_softmax(-1), warp(shaped[:n], sampling).log()
    emitted = upload(torch.tensor(tokens), own.device)[:, None]
    ids = torch.cat([emitted, own.topk(many).indices], 1)
    rows = zip(ids.tolist(), own.gather(1, ids).tolist(), warped.gather(1, ids).tolist(), strict=True)
    told = [[Logprob(i, _finite(a), _finite(b)) for i, a, b in zip(*row, strict=True)] for row in rows]
    return tuple(TokenLogprobs(first, tuple(rest)) for first, *rest in told)


def _finite(logarithm: float) -> float | None:
    """Of a probability of 0 there is none."""
    return logarithm if math.isfinite(logarithm) else None
