"""A draft head with its cache: the runtime that a drafter feeds, and asks for drafts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specdec_engine.runtime import DraftTokens, SampledToken, StopDrafting, TokenSampler
from specdec_engine.runtime.head import Features, HeadForward, State
from specdec_engine.runtime.head_steps import HeadSteps
from specdec_engine.runtime.known_text import KnownText


class HeadRuntime:
    """A head and its cache, which grows. Its slots are counted as `Runtime` counts tokens."""

    def __init__(self, forward: HeadForward, capacity: int) -> None:
        """capacity: slots to make room for at first."""
        self.device = forward.device
        self._forward = forward
        self.known = KnownText()
        """The text whose tokens slots have read: slot i has read the tokens up to i + 1."""
        self._cached = self._written = 0
        self._cache = forward.new_cache(_rounded(capacity))
        self._steps: HeadSteps | None = None

    def another(self) -> HeadRuntime:
        """The same head on a cache of its own, for another text."""
        return HeadRuntime(self._forward, 16)

    @property
    def cached(self) -> int:
        return self._cached

    @torch.inference_mode()
    def forward(self, features: Tensor, tokens: Tensor) -> None:
        """Cache slots: [n, F, hidden] features and the [n] tokens that follow them."""
        self._step(Features(features), tokens, rows=0)

    @torch.inference_mode()  # a cache that grew in a pass is an inference tensor
    def rollback(self, to: int) -> None:
        """Forget all but the first `to` slots; idempotent."""
        self.known.cut(to + 1)
        if to == 0:  # as in `LeanRuntime`: what a broken run left would come through the mask
            self._cache[:, :, : self._written].zero_()
            self._written = 0
        self._cached = min(self._cached, to)

    @torch.inference_mode()
    def unroll(
        self,
        features: Tensor,
        tokens: Tensor,
        u: Tensor,
        temperature: Tensor,
        sampler: TokenSampler,
        ids: Tensor,
        stop: StopDrafting | None = None,
        more: Tensor | None = None,
    ) -> DraftTokens:
        """Pending slots and [k] uniform numbers -> at most [k] tokens, the target's ids, and their distributions
        [k, V' + m]. more [m, hidden]: output rows besides its own; ids: of all columns."""
        if sampler.plain is not None and (steps := self._steps_for(len(tokens), len(ids))) is not None:
            k = len(u)
            assert k > 0
            start = self._take(len(tokens) + k - 1)
            read = self._forward.read(Features(features), tokens, start, k, self._cache, ids, more)
            drawn = steps.drawn(read, k, u, sampler.plain, stop)
            self._cached -= k - len(drawn.tokens)
            return drawn

        def step(state: Tensor | None, tokens: Tensor) -> tuple[Tensor, Tensor]:
            return self._step(Features(features) if state is None else State(state), tokens, more)

        return unrolled(step, tokens, u, temperature, sampler, ids, stop)

    def _step(
        self, before: Features | State, tokens: Tensor, more: Tensor | None = None, rows: int = 1
    ) -> tuple[Tensor, Tensor]:
        start = self._take(tokens.shape[0])
        return self._forward(before, tokens, start, self._cache, self._cached, more, rows)

    def _steps_for(self, slots: int, columns: int) -> HeadSteps | None:
        """Steps with room for that; None where our own kernels do not do all of a step."""
        if not self._forward.goes_by_steps(slots, self._cached):
            return None
        made = self._steps
        if made is None or slots > made.slots or columns > made.columns:
            made = self._steps = self._forward.steps(max(slots, _SLOTS), 2 * columns)  # twice: the context brings more
        return made

    def _take(self, slots: int) -> int:
        """Make so many more slots the cached ones, and give the first of them."""
        start, end = self._cached, self._cached + slots
        if end > self._cache.shape[2]:
            wider = self._forward.new_cache(_rounded(2 * end))
            wider[:, :, :start] = self._cache[:, :, :start]
            self._cache = wider
        self._cached, self._written = end, max(self._written, end)
        return start


def unrolled(
    step: Callable[[Tensor | None, Tensor], tuple[Tensor, Tensor]],
    tokens: Tensor,
    u: Tensor,
    temperature: Tensor,
    sampler: TokenSampler,
    ids: Tensor,
    stop: StopDrafting | None,
) -> DraftTokens:
    """Draft from pending slots' tokens, token by token; step: gives logits, and the state that follows, of the state before,
    or, at first, of what the target has left to these slots."""
    sampled, said, state = list[SampledToken](), list[Tensor](), None
    for number in u:
        logits, state = step(state, tokens)
        sampled.append(sampler(logits, number, temperature))
        tokens = ids.index_select(0, sampled[-1].token)
        said.append(tokens)
        if stop is not None and stop(sampled[-1].sure):
            break
    return DraftTokens.of(sampled, said)


_SLOTS = 8
"""Slots that a draft begins with, mostly fewer: those since the last draft, and the newest."""


def _rounded(slots: int) -> int:
    return -(-slots // 16) * 16
