"""A smaller model as drafter (Leviathan et al. 2023; Chen et al. 2023), with a cache of its own.

The drafted tokens stay on the device: each step's token feeds the next step's forward, and the host reads them with the
verdict. The last drafted token is never fed, so after a full acceptance two tokens are pending, and both go into the next
draft's first pass; no extra pass closes the gap.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec_engine.drafters.base import DraftHost, nothing
from specdec_engine.errors import UsageError
from specdec_engine.randomness import Randomness
from specdec_engine.runtime import Runtime, prefill
from specdec_engine.sampling import draw, warp, wide
from specdec_engine.types import Draft, Sampling, Verdict


class ModelDrafter:
    """Any causal LM on a runtime. Greedy at temperature 0; otherwise drawn under the run's own sampling settings."""

    def __init__(self, runtime: Runtime, host: DraftHost, name: str) -> None:
        self.name = name
        self.runtime = runtime
        self._device = host.device
        self._target_vocab = host.vocab
        self._vocab = min(
            runtime.vocab, host.vocab
        )  # ids that both have; padding rows differ between sizes of a family
        self._drafted_from = 0  # length of the context that the last draft followed

    def begin(self, prompt: Sequence[int]) -> None:
        self.runtime.rollback(0)
        if self.runtime.limit is None or len(prompt) <= self.runtime.limit:
            self._catch_up(prompt, keep=1)

    def propose(self, context: Sequence[int], k: int, sampling: Sampling, random: Randomness) -> Draft:
        """Fewer than k where the draft's own context ends: its last fed position is len(context) + k - 2."""
        limit = self.runtime.limit
        k = k if limit is None else min(k, limit - len(context) + 1)
        if k < 1:
            return nothing(self._device, self.name)
        self._drafted_from = len(context)
        self._catch_up(context, keep=_PENDING_IN_ONE_PASS)
        pending = self._ids(context[self.runtime.cached :])
        return self._greedy(pending, k) if sampling.greedy else self._drawn(pending, k, sampling, random, len(context))

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        """Forget what was fed for the rejected tokens; k - 1 of the drafted were fed."""
        self.runtime.rollback(to=self._drafted_from + min(verdict.accepted, len(draft) - 1))

    @torch.inference_mode()
    def _greedy(self, pending: Tensor, k: int) -> Draft:
        tokens: list[Tensor] = []
        for _ in range(k):
            pending = self._logits(pending).argmax(-1)
            tokens.append(pending)
        return Draft(torch.cat(tokens).to(self._device), None, self.name)

    @torch.inference_mode()
    def _drawn(self, pending: Tensor, k: int, sampling: Sampling, random: Randomness, position: int) -> Draft:
        u = torch.tensor(random.uniforms(position, "draft", k), dtype=wide(pending.device)).to(pending.device)
        tokens, rows = [], []
        for i in range(k):
            row = warp(self._logits(pending), sampling)
            pending = draw(row[0], u[i])[None]
            tokens.append(pending)
            rows.append(row)
        unseen = self._target_vocab - self._vocab  # the target's ids that the draft lacks: q is 0 there
        probs = torch.nn.functional.pad(torch.cat(rows), (0, unseen))
        return Draft(torch.cat(tokens).to(self._device), probs.to(self._device), self.name)

    def _logits(self, pending: Tensor) -> Tensor:
        return self.runtime.forward(pending, 1)[:, : self._vocab]  # [1, min(V_draft, V)]

    def _catch_up(self, context: Sequence[int], keep: int) -> None:
        """Cache the context but for its last `keep` tokens; usually there is nothing to do."""
        behind = context[self.runtime.cached : len(context) - keep]
        if behind:
            prefill(self.runtime, self._ids(behind))

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        # An id the draft has no embedding for is fed as its last one: any q is lossless, as long as it was drawn from.
        return torch.tensor([min(t, self.runtime.vocab - 1) for t in tokens], device=self.runtime.device)


_PENDING_IN_ONE_PASS = 64
"""Tokens behind that still go into the draft's own first pass instead of a prefill of their own."""


def build(argument: str, host: DraftHost) -> ModelDrafter:
    """The argument is the model's name, as for --target."""
    if not argument:
        raise UsageError("the draft model has no name", "model:NAME, or simply NAME")
    return ModelDrafter(host.load_draft(argument), host, argument)
