"""Which models the lean forward computes exactly, and what it needs to know of their configs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FAMILY = ("llama", "mistral", "qwen2", "qwen3")
"""transformers' model types that `shape_of` knows."""


class Unsupported(Exception):
    """Why a model cannot run on the lean forward; the generic one takes it."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the forward needs to know of a config."""

    layers: int
    heads: int
    kv_heads: int
    head_size: int
    hidden: int
    vocab: int
    eps: float
    tied: bool
    tensors: Mapping[str, tuple[int, ...]]
    """What a checkpoint must have, and of which sizes: all of it and nothing else, but for an untied head."""
    windows: tuple[int | None, ...]
    """Per layer: how many positions back it sees; None for all."""
    frequencies: Tensor
    """[head_size / 2] float32, radians a position."""
    rope_scale: float
    """Factor on rotated queries and keys (YaRN's attention factor)."""

    @property
    def kv_values(self) -> int:
        """Numbers cached a token, keys and values, all layers."""
        return self.layers * 2 * self.kv_heads * self.head_size


def shape_of(config: Any) -> Shape:
    """Raises Unsupported, with the reason, for a model that this forward would not compute exactly."""
    if config.model_type not in FAMILY:
        raise Unsupported(f"{config.model_type} is not one of {', '.join(FAMILY)}")
    if getattr(config, "quantization_config", None) is not None:
        raise Unsupported("its weights are quantized")
    if config.hidden_act != "silu":
        raise Unsupported(f"its activation is {config.hidden_act}")
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    frequencies, scale = rope_of(config, head_size)
    return Shape(
        layers=layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=head_size,
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        eps=config.rms_norm_eps,
        tied=config.tie_word_embeddings,
        tensors=_tensors(config, head_size),
        windows=_windows(config, layers),
        frequencies=frequencies,
        rope_scale=scale,
    )


def rope_of(config: Any, head_size: int) -> tuple[Tensor, float]:
    """[head_size / 2] radians a position, and the factor on rotated queries and keys. Raises Unsupported for a rotation of
    part of a head, and for one that changes with the length."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise Unsupported("it rotates only part of each head")
    if kind == "default":
        steps = torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size
        return 1.0 / (rope["rope_theta"] ** steps), 1.0
    if kind not in ("linear", "llama3", "yarn"):  # the others depend on the length, or on the model
        raise Unsupported(f"its rotary embedding is of type {kind}")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies, float(scale)


def _windows(config: Any, layers: int) -> tuple[int | None, ...]:
    """As transformers' own model of each type reads its config: Llama ignores a window, Mistral has it in all layers."""
    window = getattr(config, "sliding_window", None)
    if config.model_type == "llama":
        return (None,) * layers
    if config.model_type == "mistral":
        return (window,) * layers
    if set(config.layer_types) - {"full_attention", "sliding_attention"}:
        raise Unsupported(f"it has layers of the kinds {', '.join(sorted(set(config.layer_types)))}")
    return tuple(window if kind == "sliding_attention" else None for kind in config.layer_types)


def _tensors(config: Any, head_size: int) -> dict[str, tuple[int, ...]]:
    """Names and sizes of all tensors that transformers' model of this config has, but for an untied head's."""
    biased = getattr(config, "attention_bias", False)
    of_queries, of_out, of_mlp = {
        "llama": (biased, biased, getattr(config, "mlp_bias", False)),
        "mistral": (False, False, False),
        "qwen2": (True, False, False),
        "qwen3": (biased, biased, False),
    }[config.model_type]
    hidden, inner, queries = config.hidden_size, config.intermediate_size, config.num_attention_heads * head_size
    keys = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_size
    matrices = {
        "self_attn.q_proj": (queries, hidden, of_queries),
        "self_attn.k_proj": (keys, hidden, of_queries),
        "self_attn.v_proj": (keys, hidden, of_queries),
        "self_attn.o_proj": (hidden, queries, of_out),
        "mlp.gate_proj": (inner, hidden, of_mlp),
        "mlp.up_proj": (inner, hidden, of_mlp),
        "mlp.down_proj": (hidden, inner, of_mlp),
    }
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    for name, (rows, columns, has_bias) in matrices.items():
        layer[f"{name}.weight"] = (rows, columns)
        if has_bias:
            layer[f"{name}.bias"] = (rows,)
    if config.model_type == "qwen3":
        layer |= {"self_attn.q_norm.weight": (head_size,), "self_attn.k_norm.weight": (head_size,)}
    sizes = {f"model.layers.{i}.{name}": size for i in range(config.num_hidden_layers) for name, size in layer.items()}
    return sizes | {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
