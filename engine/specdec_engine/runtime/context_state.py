"""What a transformers model knows of the text so far, and what it takes to go back in it: three ways, one face.

Keys and values of tokens can be cut off. A recurrent state cannot: it is one sum over all tokens. So a checkpoint of it is
kept from before a pass; after a rejection the checkpoint is restored, and what was accepted is fed again together with the
next pass, which is wider by that and no pass more (Wang et al. 2024, "The Mamba in the Llama", do so in one kernel). A model
that keeps its state elsewhere reads the whole text at each pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from specdec_engine.runtime import PREFILL_CHUNK
from specdec_engine.runtime.transformers_cache import (
    Rollback,
    States,
    cache_argument,
    copied_states,
    cut,
    new_cache,
    restore_states,
)

Inputs = dict[str, Any]
"""Of one call of a transformers model."""
FED_AGAIN = 8
"""Tokens that wait for the next pass at most. On two cores with AVX2 a row more costs a hybrid 4 to 27 % of a pass, at every
pass until one is accepted whole, and next to nothing on a GPU; a pass of their own costs one, once."""


class ContextState(Protocol):
    """**Protocol:** a text of `cached` tokens, all of which count for the next pass."""

    @property
    def cached(self) -> int: ...

    @property
    def ready(self) -> int:
        """Of these, the first so many are not read again by the next pass."""
        ...

    def inputs(self, tokens: Tensor) -> Iterator[Inputs]:
        """For the passes that read [n] tokens more, each to be run before the next is asked for. The last rows of all are
        those of the tokens."""
        ...

    def rollback(self, to: int) -> None:
        """As `Runtime.rollback`."""
        ...


def context_state(model: Any, rollback: Rollback) -> ContextState:
    """An empty one for the model."""
    if rollback.how == "crop":
        return KeysAndValues(model)
    return RecurrentState(model, bool(rollback.plain_only)) if rollback.how == "checkpoint" else WholeText(model)


class KeysAndValues:
    """Attention in every layer."""

    def __init__(self, model: Any) -> None:
        self._cache, self._argument = new_cache(model.config), cache_argument(model)

    @property
    def cached(self) -> int:
        return int(self._cache.get_seq_length())

    @property
    def ready(self) -> int:
        return self.cached

    def inputs(self, tokens: Tensor) -> Iterator[Inputs]:
        yield {"input_ids": tokens[None], self._argument: self._cache, "use_cache": True}

    def of_layer(self, layer: int, to: int) -> tuple[Tensor, Tensor]:
        """Keys and values, [1, heads, to, size] each, of the first `to` tokens; a view."""
        kept = self._cache.layers[layer]
        return kept.keys[:, :, :to], kept.values[:, :, :to]

    def rollback(self, to: int) -> None:
        cut(self._cache, self.cached - to)


class RecurrentState:
    """Recurrent, convolution or linear-attention layers, among others or alone.

    Of the `cached` tokens the first `_fed` are in the states; the rest waits for the next pass.
    """

    def __init__(self, model: Any, one_by_one: bool) -> None:
        """one_by_one: several tokens are right only as the beginning of a text."""
        self._config, self._argument = model.config, cache_argument(model)
        self.one_by_one = one_by_one
        self._text = torch.empty(0, dtype=torch.long, device=model.device)
        self._forget()

    def _forget(self) -> None:
        self._cache, self._fed = new_cache(self._config), 0
        self._checkpoint: States | None = None
        self._checkpoint_at = 0

    @property
    def cached(self) -> int:
        return len(self._text)

    @property
    def ready(self) -> int:
        return self._fed

    def inputs(self, tokens: Tensor) -> Iterator[Inputs]:
        begin = self.cached
        self._text = torch.cat([self._text, tokens])
        for end in self._ends(begin):
            self._keep_checkpoint(end)
            positions = torch.arange(self._fed, end, device=self._text.device)
            read = self._text[None, self._fed : end]
            self._fed = end
            yield {"input_ids": read, "position_ids": positions[None], self._argument: self._cache, "use_cache": True}

    def _ends(self, begin: int) -> list[int]:
        """Where passes end that read all tokens, those from `begin` on for the first time."""
        if self.one_by_one and self._fed:
            return list(range(self._fed + 1, self.cached + 1))
        if self.one_by_one or begin - self._fed <= FED_AGAIN:
            return [self.cached]
        return [*range(self._fed + PREFILL_CHUNK, begin, PREFILL_CHUNK), begin, self.cached]

    def _keep_checkpoint(self, end: int) -> None:
        """Before a pass that may be rolled back. Single tokens are kept, or few to feed again: plain decoding takes a
        checkpoint in `FED_AGAIN` tokens."""
        alone = end - self._fed == 1 and end - self._checkpoint_at <= FED_AGAIN
        if not alone and self._fed > self._checkpoint_at:
            self._checkpoint, self._checkpoint_at = copied_states(self._cache), self._fed

    def rollback(self, to: int) -> None:
        self._text = self._text[:to]
        if self._fed <= to:
            return
        if self._checkpoint is None or to < self._checkpoint_at:
            self._forget()
        else:
            cut(self._cache, self._fed - self._checkpoint_at)
            restore_states(self._cache, self._checkpoint)
            self._fed = self._checkpoint_at


class WholeText:
    """Nothing is kept but the text."""

    def __init__(self, model: Any) -> None:
        self._text = torch.empty(0, dtype=torch.long, device=model.device)

    @property
    def cached(self) -> int:
        return len(self._text)

    @property
    def ready(self) -> int:
        return 0

    def inputs(self, tokens: Tensor) -> Iterator[Inputs]:
        self._text = torch.cat([self._text, tokens])
        yield {"input_ids": self._text[None], "use_cache": False}

    def rollback(self, to: int) -> None:
        self._text = self._text[:to]
