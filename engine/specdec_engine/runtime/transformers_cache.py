"""Rollback of a transformers cache: to an absolute length, idempotent, and only where it leaves no trace.

The one file that knows how transformers' versions differ here: `crop(positive)` meant an absolute length until 5.22 and
raises since; a negative count means "remove that many" in all of them.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from specdec_engine.errors import PairIncompatible


def new_cache(config: Any, name: str) -> DynamicCache:
    """An empty cache that can be rolled back, for a model with this config.

    Sliding-window layers keep all their keys, and the attention mask alone does the windowing: what a window has dropped
    could not be rolled back. That costs the memory of full attention on those layers.

    Raises PairIncompatible, naming the layers, for a model whose state cannot be rolled back: recurrent, linear
    attention, convolution.
    """
    cache = DynamicCache(config=config)
    cache.layers = [DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in cache.layers]
    stuck = [i for i, layer in enumerate(cache.layers) if not getattr(layer, "is_croppable", _is_attention(layer))]
    if stuck:
        kinds = ", ".join(sorted({type(cache.layers[i]).__name__ for i in stuck}))
        which = f"layer {stuck[0]} is a" if len(stuck) == 1 else f"layers {_ranges(stuck)} are"
        raise PairIncompatible(
            f"{name} ({config.model_type}) cannot be rolled back: {which} {kinds}",
            "choose a model with full or sliding-window attention in every layer; no other runs yet, with a draft or without",
        )
    return cache


def check_stateless(model: Any, config: Any, name: str) -> None:
    """Look whether a model, or its class, keeps all its state in a key-value cache. Raises PairIncompatible."""
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ())
    stateful = getattr(model, "_is_stateful", False) and not (kinds and kinds <= _ATTENTION)
    if stateful or "past_key_values" not in inspect.signature(model.forward).parameters:
        raise PairIncompatible(
            f"{name} ({config.model_type}) cannot be rolled back: it keeps state outside a key-value cache",
            "choose a model with attention in every layer",
        )


_ATTENTION = frozenset({"attention", "full_attention", "sliding_attention"})
"""Kinds of layers that keep keys and values and nothing else, in a hybrid's words."""


def truncate(cache: DynamicCache, to: int) -> None:
    """Keep the first `to` positions; nothing happens if it is that short already."""
    surplus = cache.get_seq_length() - to
    if surplus > 0:
        cache.crop(-surplus)  # negative on purpose: see above


def _is_attention(layer: Any) -> bool:
    """Versions before `is_croppable` existed: plain attention layers, and layers that store nothing."""
    return type(layer) is DynamicLayer or type(layer).__name__ == "DummyLayer"


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
