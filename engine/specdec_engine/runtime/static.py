"""A transformers model over a cache that stays in place, behind the face of a `Decoder`, so that it can be recorded.

What transformers' StaticCache is for; ours is told the positions with each pass instead of counting them, so that rollback
costs nothing and surplus rows of a padded pass leave no trace.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from specdec_engine.runtime.context_limit import kv_size, layer_configs
from specdec_engine.runtime.shape import Unsupported


class StaticForward:
    """Any causal LM that transformers can compile in one graph, with full or sliding-window attention in every layer.

    Raises Unsupported for another one.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if not getattr(model, "_can_compile_fullgraph", False):
            raise Unsupported(f"transformers cannot compile {config.model_type} in one graph")
        if kinds - {"full_attention", "sliding_attention"}:
            raise Unsupported(f"it has layers of the kinds {', '.join(sorted(kinds))}")
        if (getattr(config, "rope_parameters", None) or {}).get("rope_type") in ("dynamic", "longrope"):
            raise Unsupported("its rotary embedding changes with the length")
        self._model = model
        self._by_kind = hasattr(config, "layer_types")
        self._window = getattr(config, "sliding_window", None)
        layers = layer_configs(model.config)
        sizes = {kv_size(layer) for layer in layers}
        if len(sizes) > 1:
            raise Unsupported(f"its layers keep keys of different sizes: {', '.join(map(str, sorted(sizes)))}")
        (self._kv_heads, self._head_size), self._layers = sizes.pop(), len(layers)
        self.device, self.cache_dtype = model.device, model.dtype
        self.vocab = int(model.get_output_embeddings().weight.shape[0])
        self._try()

    def _try(self) -> None:
        """One pass over one token: whether keys and values are laid out as the config says."""
        zero = torch.zeros(1, dtype=torch.long, device=self.device)
        try:
            self(zero, zero, self.new_cache(1), 1, 1)
        except Exception as error:  # whatever it is, the generic runtime takes such a model
            raise Unsupported(f"its keys and values are laid out in a way of its own ({error})") from error

    @property
    def kv_values(self) -> int:
        """Numbers cached a token, keys and values, all layers."""
        return int(self._layers * 2 * self._kv_heads * self._head_size)

    def new_cache(self, capacity: int) -> Tensor:
        """[layers, 2 · kv_heads, capacity, head_size], zeros."""
        size = (self._layers, 2 * self._kv_heads, capacity, self._head_size)
        return torch.zeros(size, dtype=self.cache_dtype, device=self.device)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, positions: Tensor, cache: Tensor, span: int, rows: int) -> Tensor:
        """As `Decoder.__call__`."""
        layers = [_InPlace(kept, positions, span, self._kv_heads) for kept in cache]
        output = self._model(
            input_ids=tokens[None],
            position_ids=positions[None],
            attention_mask=self._masks(positions, span),
            past_key_values=Cache(layers=layers),
            use_cache=True,
        )
        logits: Tensor = output.logits[0, -rows:]
        return logits

    def _masks(self, positions: Tensor, span: int) -> Tensor | dict[str, Tensor]:
        columns = torch.arange(span, device=self.device)
        seen = columns <= positions[:, None]
        near = seen if self._window is None else seen & (columns > positions[:, None] - self._window)
        if self._by_kind:
            return {"full_attention": self._mask(seen), "sliding_attention": self._mask(near)}
        return self._mask(near)

    def _mask(self, seen: Tensor) -> Tensor:
        mask = torch.zeros(seen.shape, dtype=self.cache_dtype, device=self.device)
        return mask.masked_fill_(~seen, torch.finfo(self.cache_dtype).min)[None, None]


class _InPlace(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, written at this pass's positions."""

    is_compileable = True
    is_sliding = False

    def __init__(self, kept: Tensor, positions: Tensor, span: int, kv_heads: int) -> None:
        super().__init__()
        self._kept, self._positions, self._span, self._kv_heads = kept, positions, span, kv_heads
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._kept.index_copy_(1, self._positions, torch.cat([key_states, value_states], 1)[0])
        seen = self._kept[None, :, : self._span]
        return seen[:, : self._kv_heads], seen[:, self._kv_heads :]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing left to do."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._span, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self._span

    def get_max_cache_shape(self) -> int:
        return self._span
