"""The transformers forward, as it comes: slowest, and right for every architecture that transformers can roll back."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from specdec_engine.cache import new_cache, truncate
from specdec_engine.context import context_limit
from specdec_engine.errors import PairIncompatible
from specdec_engine.runtime import step_by_step


class GenericRuntime:
    """A transformers causal LM with a `DynamicCache` of its own.

    Raises PairIncompatible if the model's state cannot be rolled back. Two runtimes may share one model.
    """

    name = "generic"

    def __init__(self, model: Any, label: str) -> None:
        self._cache = new_cache(model.config, label)
        accepts = inspect.signature(model.forward).parameters
        if "past_key_values" not in accepts or getattr(model, "_is_stateful", False):
            raise PairIncompatible(
                f"{label} ({model.config.model_type}) cannot be rolled back: it keeps state outside a key-value cache",
                "choose a model with attention in every layer",
            )
        self.model = model
        self.vocab = _logits_size(model)
        self.limit = context_limit(model.config)
        self.device = model.device
        self._keeps_rows = "logits_to_keep" in accepts

    @property
    def cached(self) -> int:
        return int(self._cache.get_seq_length())

    @torch.inference_mode()
    def forward(self, tokens: Tensor, rows: int, seldom: bool = False) -> Tensor:
        keep = {"logits_to_keep": rows} if self._keeps_rows else {}
        output = self.model(input_ids=tokens[None], past_key_values=self._cache, use_cache=True, **keep)
        logits: Tensor = output.logits[0, -rows:]
        return logits.to(self.device)  # with a device_map, the last layer may live elsewhere

    def rollback(self, to: int) -> None:
        truncate(self._cache, to)

    unroll = step_by_step


def _logits_size(model: Any) -> int:
    head = model.get_output_embeddings()
    return int(head.weight.shape[0] if head is not None else model.config.get_text_config().vocab_size)
