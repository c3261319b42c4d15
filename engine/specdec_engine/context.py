"""How long a context a model was made for."""

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
