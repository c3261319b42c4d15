"""The transformers forward, as it comes: slowest, and right for every architecture that transformers can roll back."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from specdec_engine.errors import ModelUnavailable, PairIncompatible, first_line
from specdec_engine.runtime import step_by_step
from specdec_engine.runtime.context_limit import context_limit
from specdec_engine.runtime.transformers_cache import check_stateless, new_cache, truncate
from specdec_engine.system.memory import ran_out


class GenericRuntime:
    """A transformers causal LM with a `DynamicCache` of its own.

    Raises PairIncompatible if the model's state cannot be rolled back. Two runtimes may share one model.
    """

    name = "generic"

    def __init__(self, model: Any, label: str) -> None:
        self._cache = new_cache(model.config, label)
        check_stateless(model, model.config, label)
        self.model = model
        self.vocab = _logits_size(model)
        self.limit = context_limit(model.config)
        self.device = model.device
        self._keeps_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._try(f"{label} ({model.config.model_type})")

    def _try(self, label: str) -> None:
        """Two tokens after two, and all taken back: whether this forward takes them so, and counts them."""
        tokens = torch.zeros(2, dtype=torch.long, device=self.device)
        try:
            self.forward(tokens, 2)
            self.forward(tokens, 2)
            counted = self.cached
            self.rollback(0)
        except Exception as error:
            if ran_out(error):
                raise
            if self.device.type == "meta" and not isinstance(error, AssertionError | TypeError | ValueError):
                return  # it asks for numbers where there are only sizes: experts are chosen by them
            if getattr(self.model.config, "quantization_config", None) is not None:
                raise ModelUnavailable(
                    f"{label} is quantized, and does not run on {self.device}: {first_line(error)}",
                    "choose the checkpoint that it was made from, or a GGUF",
                ) from error
            raise PairIncompatible(
                f"{label} cannot be told several tokens after others: {first_line(error)}", _OTHER
            ) from error
        if counted != 4:
            raise PairIncompatible(f"{label} cannot be rolled back: its cache has {counted} rows for 4 tokens", _OTHER)

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


_OTHER = "choose a model with attention in every layer, such as Llama or Qwen"


def _logits_size(model: Any) -> int:
    head = model.get_output_embeddings()
    return int(head.weight.shape[0] if head is not None else model.config.get_text_config().vocab_size)
