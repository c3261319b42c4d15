"""The text part of a vision-language checkpoint, which is a causal model of its own once it is called by that one's names.

Text alone has the same position along all axes of a rotation for images, and no image's rows: what is left is Llama's, Qwen's
or Mistral's forward, lean where theirs is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from specdec_engine.runtime.weights import SafetensorsWeights


def text_part(config: Any) -> Any | None:
    """The causal model's config in a vision-language one; None for another config, and for a text part that transformers has
    no causal model of."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return None
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and config.model_type not in _CALLED_CAUSAL:
        return None
    text = config.get_text_config()
    if config.model_type in _READ_BOTH_WAYS or text is config:
        return None
    if (kind := _CAUSAL_KINDS.get(text.model_type)) is not None:
        fields = text.to_dict() | {"rope_parameters": _along_one_axis(text.rope_parameters), "model_type": kind}
        text = CONFIG_MAPPING[kind].from_dict(fields)
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    text.tie_word_embeddings = bool(config.tie_word_embeddings)
    return text


_CAUSAL_KINDS = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
"""Text parts that differ from a causal model by their rotation for images alone."""
_CALLED_CAUSAL = frozenset({"gemma3"})
"""transformers gives the whole of them as a causal model, whose text part our own forward computes."""
_READ_BOTH_WAYS = frozenset({"colpali", "paligemma"})
"""Their prompt's tokens see each other both ways."""


def _along_one_axis(rope: dict[str, Any]) -> dict[str, Any]:
    """Without what an image's rows and columns add."""
    kept = {key: value for key, value in rope.items() if not key.startswith("mrope") and key != "type"}
    return kept | {"rope_type": "default" if kept.get("rope_type") in (None, "mrope") else kept["rope_type"]}


class TextWeights(SafetensorsWeights):
    """A vision-language checkpoint's text tensors, by the causal model's names."""

    def __init__(self, files: Sequence[Path]) -> None:
        super().__init__(files)
        self._stored = {causal: name for name in super().names if (causal := causal_name(name))}

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._stored)

    @property
    def unused(self) -> tuple[str, ...]:
        """The other parts' tensors, as they are stored."""
        return tuple(sorted(super().names - set(self._stored.values())))

    def size(self, name: str) -> tuple[int, ...]:
        return super().size(self._stored[name])

    def dense(self, name: str) -> Tensor:
        return super().dense(self._stored[name])

    stored = dense


def causal_name(stored: str) -> str:
    """What the causal model calls a tensor of the checkpoint; empty for another part's."""
    plain = re.sub(r"^(model\.)?(language_model|text_model)\.(model\.)?", "", stored)
    if plain == stored and not stored.startswith(("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")):
        return ""
    plain = plain.removeprefix("model.")
    return plain if plain.startswith("lm_head.") else f"model.{plain}"
