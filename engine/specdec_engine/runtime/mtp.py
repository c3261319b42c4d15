"""A module for multi-token prediction beside its target on the generic runtime, and its cache.

One layer of the target's own kind: slot t takes the target's last state of token t, or, past what the target has read, the
module's own state of the slot before; and the embedding of token t + 1. It predicts token t + 2 (DeepSeek-V3,
arXiv:2412.19437, section 2.2). Layer, embedding and output rows are transformers' and the target's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdec_engine.runtime import DraftTokens, StopDrafting, TokenSampler
from specdec_engine.runtime.head_runtime import unrolled
from specdec_engine.runtime.known_text import KnownText
from specdec_engine.runtime.transformers_cache import cut, mtp_cache


class MtpRuntime:
    """transformers' `MtpModel` of one module. Its slots are counted as `HeadRuntime` counts them."""

    def __init__(self, model: Any) -> None:
        self.device = model.device
        self.known = KnownText()
        """The text whose tokens slots have read: slot i has read the tokens up to i + 1."""
        self._model, self._cache = model, mtp_cache(model.config)

    def another(self) -> MtpRuntime:
        """The same module on a cache of its own, for another text."""
        return MtpRuntime(self._model)

    @property
    def cached(self) -> int:
        return int(self._cache.get_seq_length())

    @torch.inference_mode()
    def forward(self, features: Tensor, tokens: Tensor) -> None:
        """Cache slots: the target's [n, 1, hidden] states and the [n] tokens that follow them."""
        self._passed(features[:, 0], tokens)

    def rollback(self, to: int) -> None:
        """Forget all but the first `to` slots; idempotent."""
        self.known.cut(to + 1)
        cut(self._cache, self.cached - to)

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
        """As `HeadRuntime.unroll`; all of the target's ids are its own, so there is no more."""
        assert more is None
        return unrolled(
            lambda state, tokens: self._step(features[:, 0] if state is None else state, tokens),
            tokens,
            u,
            temperature,
            sampler,
            ids,
            stop,
        )

    def _step(self, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        last = self._passed(states, tokens)
        logits: Tensor = self._model._project_to_logits(last)  # noqa: SLF001 - scales and cuts as its target does
        return logits.to(self.device), last

    def _passed(self, states: Tensor, tokens: Tensor) -> Tensor:
        """[1, hidden]: the state of the last slot."""
        start = self.cached
        positions = torch.arange(start + 1, start + 1 + tokens.shape[0], device=self.device)
        given = states.to(self.device, self._model.dtype)[None]
        found: Tensor = self._model.forward_layer(0, given, positions[None], self._cache, input_ids=tokens[None])
        return found[0, -1:]
