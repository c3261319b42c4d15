"""How a transformers model goes back to fewer tokens, and the caches that it does so with.

The one file that knows how transformers' versions and classes differ here: `crop(positive)` meant an absolute length until
5.22 and raises since; a negative count means "remove that many" in all of them.
"""

from __future__ import annotations

import inspect
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import transformers
from transformers import cache_utils
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


@dataclass(frozen=True, slots=True)
class Rollback:
    """What it takes to forget a model's last tokens."""

    how: Literal["crop", "checkpoint", "reread"]
    """Cut keys and values; go back to a checkpoint of the recurrent states, and feed again what was accepted since; or keep
    nothing, and read the whole text at each pass."""
    plain_only: str = ""
    """Why no draft can be tested by it; empty where one can."""

    @property
    def remark(self) -> str:
        """What a curious user may want to know; empty for a cache that is cut, and where nothing is rejected."""
        if self.plain_only:
            return ""
        return {
            "crop": "",
            "checkpoint": "after a rejection its accepted tokens are fed again, for its recurrent state cannot be cut",
            "reread": "it reads the whole text at each pass, for it keeps its state in a way of its own",
        }[self.how]


def rollback_of(config: Any, kind: Any, name: str) -> Rollback:
    """By the config, and by the class or the model that is made from it, without its weights."""
    text = config.get_text_config().model_type
    if not cache_argument(kind) or text in _OWN_CACHES:
        return Rollback("reread")
    layers = new_cache(config).layers
    if all(map(_is_attention, layers)):
        return Rollback("crop")
    if not all(_is_attention(layer) or isinstance(layer, _Recurrent) for layer in layers):
        return Rollback("reread")
    return Rollback("checkpoint", one_by_one(name, text) if text in _ONE_BY_ONE else "")


def one_by_one(name: str, model_type: str) -> str:
    """Why such a model is decoded without a draft alone."""
    return (
        f"{name} ({model_type}) cannot test drafts: transformers {transformers.__version__} computes its next tokens "
        "right one at a time only"
    )


_ONE_BY_ONE = frozenset({"falcon_mamba", "jamba", "mamba", "zamba"})
"""Their forward takes several tokens as the beginning of a text, whatever went before."""
_OWN_CACHES = frozenset({"minimax", "recurrent_gemma", "xlstm"})
"""They refuse a DynamicCache, look for what it lacks, or keep their states in the model's layers."""


def cache_argument(kind: Any) -> str:
    """What the forward of a model, or of its class, calls its cache; empty if it takes none."""
    taken = inspect.signature(kind.forward).parameters
    return next((name for name in ("past_key_values", "cache_params") if name in taken), "")


def new_cache(config: Any) -> DynamicCache:
    """An empty cache for a model with this config.

    Sliding-window layers keep all their keys, and the attention mask alone does the windowing: what a window has dropped
    could not be rolled back. That costs the memory of full attention on those layers.
    """
    cache = DynamicCache(config=config)
    cache.layers = [_windowless(layer) for layer in cache.layers]
    return cache


def mtp_cache(config: Any) -> DynamicCache:
    """As `new_cache`, for an MTP module, whose slot t reads token t + 1."""
    cache: DynamicCache = cache_utils.MtpCache(config=config)
    cache.layers = [_windowless(layer) for layer in cache.layers]
    return cache


def _windowless(layer: Any) -> Any:
    if type(layer) is DynamicSlidingWindowLayer:
        return DynamicLayer()
    if isinstance(layer, DynamicSlidingWindowLayer) and isinstance(layer, _Recurrent):
        return cache_utils.LinearAttentionAndFullAttentionLayer(number_of_states=layer.number_of_states)
    return layer


def cut(cache: DynamicCache, surplus: int) -> None:
    """Remove the last `surplus` positions from all layers that keep keys and values."""
    if surplus > 0:
        for layer in cache.layers:
            if not isinstance(layer, _Recurrent):
                layer.crop(-surplus)  # negative on purpose: see above
            elif isinstance(layer, DynamicLayer):
                DynamicLayer.crop(layer, -surplus)


States = list[dict[str, Any]]
"""Of each recurrent layer: everything that it holds but keys and values."""


def copied_states(cache: DynamicCache) -> States:
    """The recurrent and convolution states as they are now."""
    return [
        {name: deepcopy(value) for name, value in vars(layer).items() if name not in _KEYS_AND_VALUES}
        for layer in cache.layers
        if isinstance(layer, _Recurrent)
    ]


def restore_states(cache: DynamicCache, states: States) -> None:
    """Make the recurrent and convolution states what they were; the copies stay good."""
    layers = [layer for layer in cache.layers if isinstance(layer, _Recurrent)]
    for layer, state in zip(layers, states, strict=True):
        vars(layer).update(deepcopy(state))


_Recurrent = cache_utils.LinearAttentionCacheLayerMixin
_KEYS_AND_VALUES = frozenset({"keys", "values", "is_initialized"})


def _is_attention(layer: Any) -> bool:
    """Whether it keeps keys and values and nothing else, or nothing at all."""
    return type(layer) is DynamicLayer or type(layer).__name__ in ("DummyLayer", "DynamicIndexedLayer")
