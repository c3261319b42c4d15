"""A smaller model as drafter (Leviathan et al. 2023; Chen et al. 2023), with a cache of its own.

The drafted tokens stay on the device: each step's token feeds the next step's forward, and the host reads them with the
verdict. The last drafted token is never fed, so after a full acceptance two tokens are pending, and both go into the next
draft's first pass; no extra pass closes the gap.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec_engine.drafters.base import DraftHost, nothing
from specdec_engine.errors import UsageError
from specdec_engine.randomness import Randomness
from specdec_engine.runtime import Runtime, prefill
from specdec_engine.sampling import best_of, draw, warp, wide
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
        device = self.runtime.device
        uniforms = [0.0] * k if sampling.greedy else random.uniforms(len(context), "draft", k)
        numbers = torch.tensor([*uniforms, sampling.temperature], dtype=wide(device)).to(device, non_blocking=True)
        tokens, rows = self.runtime.unroll(
            self._ids(context[self.runtime.cached :]), numbers[:k], numbers[k], _Choose(sampling, self._vocab)
        )
        if rows is not None:  # ids that the draft lacks: q is 0 there
            rows = torch.nn.functional.pad(rows, (0, self._target_vocab - self._vocab)).to(self._device)
        return Draft(tokens.to(self._device), rows, self.name)

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        """Forget what was fed for the rejected tokens; k - 1 of the drafted were fed."""
        self.runtime.rollback(to=self._drafted_from + min(verdict.accepted, len(draft) - 1))

    def _catch_up(self, context: Sequence[int], keep: int) -> None:
        """Cache the context but for its last `keep` tokens; usually there is nothing to do."""
        behind = context[self.runtime.cached : len(context) - keep]
        if behind:
            prefill(self.runtime, self._ids(behind))

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        # An id the draft has no embedding for is fed as its last one: any q is lossless, as long as it was drawn from.
        ids = torch.tensor([min(t, self.runtime.vocab - 1) for t in tokens])
        return ids.to(self.runtime.device, non_blocking=True)


_PENDING_IN_ONE_PASS = 64
"""Tokens behind that still go into the draft's own first pass instead of a prefill of their own."""


@dataclass(frozen=True, slots=True)
class _Choose:
    """The likeliest token at temperature 0; otherwise one drawn under the run's sampling settings."""

    sampling: Sampling
    vocab: int

    @property
    def key(self) -> Hashable:
        return (self.sampling.greedy, *self.sampling.filters, self.vocab)

    def __call__(self, logits: Tensor, u: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = logits[:, : self.vocab]
        if self.sampling.greedy:
            return best_of(logits)[1], None
        row = warp(logits, self.sampling, temperature)
        return draw(row[0], u)[None], row


def build(argument: str, host: DraftHost) -> ModelDrafter:
    """The argument is the model's name, as for --target."""
    if not argument:
        raise UsageError("the draft model has no name", "model:NAME, or simply NAME")
    return ModelDrafter(host.load_draft(argument), host, argument)
