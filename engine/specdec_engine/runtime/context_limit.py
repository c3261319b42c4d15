"""Contexts and layers as a config has them, in whatever way its kind of model says it."""

from __future__ import annotations

from typing import Any


def context_limit(config: Any) -> int | None:
    """Positions at which the model still computes one and the same function of the tokens before.

    LongRoPE (Phi-3 and its kin) changes the rotation of *all* positions once one passes the original length: rows of one
    pass, and keys cached before, would then belong to another function, so the context ends there.
    """
    text = config.get_text_config()
    limit: int | None = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    for kind in [rope, *(value for value in rope.values() if isinstance(value, dict))]:  # some have one a layer type
        if kind.get("rope_type") == "longrope":
            original = kind.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            limit = min(filter(None, (limit, original)), default=None)
    return limit


def layer_configs(config: Any) -> list[Any]:
    """One a layer of the text model: its own where layers differ (Gemma 4's heads), else the config itself."""
    text = config.get_text_config()
    layers = int(getattr(text, "num_hidden_layers", 0) or 0)
    views = getattr(text, "per_layer_config", None)
    return [text] * layers if views is None else [views[i] for i in range(layers)]


def kv_size(layer: Any) -> tuple[int, int]:
    """Key-value heads, and numbers in each, of one of the `layer_configs`."""
    heads = getattr(layer, "num_attention_heads", 0) or 1
    kv_heads = getattr(layer, "num_key_value_heads", None) or heads
    return kv_heads, getattr(layer, "head_dim", None) or getattr(layer, "hidden_size", 0) // heads
