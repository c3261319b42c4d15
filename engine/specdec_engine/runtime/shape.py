"""Which models the lean forward computes exactly, and what it needs to know of their configs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

FAMILY = ("exaone4", "granite", "llama", "ministral", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
"""transformers' model types that `shape_of` knows."""


class Unsupported(Exception):
    """Why a model cannot run on the lean forward; the generic one takes it."""


@dataclass(frozen=True, slots=True)
class Scales:
    """Granite's multipliers."""

    embedding: float = 1.0
    residual: float = 1.0
    """On what attention and feed-forward network add."""
    scores: float = 1.0
    """On scores, beside 1 / sqrt(head_size)."""
    logits: float = 1.0


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
    rotary: int = 0
    """Numbers of each head that are rotated, the first; 0 for all. The frequencies of the rest are 0."""
    rotated: tuple[bool, ...] = ()
    """Per layer: whether it rotates at all; empty where all do (SmolLM3 and EXAONE 4 leave it out in some)."""
    norms: Literal["before", "after"] = "before"
    """Whether attention and feed-forward network read a normed stream, or what they give is normed (OLMo 2, EXAONE 4)."""
    wide_norms: bool = False
    """Norms of queries and keys are over all heads at once (OLMo 2), not over each (Qwen 3)."""
    fused: bool = False
    """The checkpoint has one matrix for queries, keys and values, and one for gate and up (Phi-3)."""
    scales: Scales = field(default_factory=lambda: Scales())

    @property
    def plain(self) -> bool:
        """Whether a layer is as Llama's or Qwen's, which kernels of our own do in one call."""
        return self.norms == "before" and not self.wide_norms and self.scales == Scales()

    @property
    def kv_values(self) -> int:
        """Numbers cached a token, keys and values, all layers."""
        return self.layers * 2 * self.kv_heads * self.head_size


def shape_of(config: Any) -> Shape:
    """Raises Unsupported, with the reason, for a model that this forward would not compute exactly."""
    if config.model_type not in FAMILY:
        raise Unsupported(f"{config.model_type} is not one of the kinds that our own forward computes")
    if getattr(config, "quantization_config", None) is not None:
        raise Unsupported("its weights are quantized")
    if config.hidden_act != "silu":
        raise Unsupported(f"its activation is {config.hidden_act}")
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    rotary = rotary_of(config, head_size)
    frequencies, scale = rope_of(config, rotary)
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
        frequencies=torch.cat([frequencies, torch.zeros((head_size - rotary) // 2)]),
        rope_scale=scale,
        rotary=0 if rotary == head_size else rotary,
        rotated=_rotated(config),
        norms="after" if config.model_type in ("exaone4", "olmo2") else "before",
        wide_norms=config.model_type == "olmo2",
        fused=config.model_type == "phi3",
        scales=_scales(config, head_size),
    )


def _rotated(config: Any) -> tuple[bool, ...]:
    """Empty where all layers rotate."""
    if config.model_type == "smollm3":
        found = tuple(map(bool, config.no_rope_layers))
    elif config.model_type == "exaone4" and config.sliding_window is not None:
        found = tuple(kind == "sliding_attention" for kind in config.layer_types)
    else:
        return ()
    return () if all(found) else found


def _scales(config: Any, head_size: int) -> Scales:
    if config.model_type != "granite":
        return Scales()
    return Scales(
        embedding=float(config.embedding_multiplier),
        residual=float(config.residual_multiplier),
        scores=float(config.attention_multiplier) * head_size**0.5,
        logits=1.0 / float(config.logits_scaling),
    )


def rotary_of(config: Any, head_size: int) -> int:
    """Numbers of each head that are rotated. Raises Unsupported for a part of them in a kind that may ignore it."""
    part = config.rope_parameters.get("partial_rotary_factor") or 1.0
    if part != 1.0 and config.model_type != "phi3":
        raise Unsupported("it rotates only part of each head")
    return int(head_size * part)


def rope_of(config: Any, rotary: int) -> tuple[Tensor, float]:
    """[rotary / 2] radians a position, and the factor on rotated queries and keys. Raises Unsupported for a rotation that
    changes with the length, but for LongRoPE's below its original length, where a context ends (`context_limit`)."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":
        steps = torch.arange(0, rotary, 2, dtype=torch.int64).float() / rotary
        return 1.0 / (rope["rope_theta"] ** steps), 1.0
    if kind not in ("linear", "llama3", "yarn", "longrope"):  # the others depend on the length, or on the model
        raise Unsupported(f"its rotary embedding is of type {kind}")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    if len(frequencies) != rotary // 2:
        raise Unsupported(f"its rotary embedding has {len(frequencies)} frequencies for {rotary} numbers")
    return frequencies, float(scale)


def _windows(config: Any, layers: int) -> tuple[int | None, ...]:
    """As transformers' own model of each type reads its config: Llama ignores a window, Mistral has it in all layers."""
    window = getattr(config, "sliding_window", None)
    if config.model_type in ("granite", "llama", "olmo2"):
        return (None,) * layers
    if config.model_type in ("mistral", "phi3"):
        return (window,) * layers
    if config.model_type == "smollm3" and not config.use_sliding_window:
        return (None,) * layers
    if set(config.layer_types) - {"full_attention", "sliding_attention"}:
        raise Unsupported(f"it has layers of the kinds {', '.join(sorted(set(config.layer_types)))}")
    return tuple(window if kind == "sliding_attention" else None for kind in config.layer_types)


def _tensors(config: Any, head_size: int) -> dict[str, tuple[int, ...]]:
    """Names and sizes of all tensors that transformers' model of this config has, but for an untied head's."""
    biased = getattr(config, "attention_bias", False)
    of_queries, of_out, of_mlp = {
        "granite": (biased, biased, getattr(config, "mlp_bias", False)),
        "llama": (biased, biased, getattr(config, "mlp_bias", False)),
        "olmo2": (biased, biased, False),
        "qwen2": (True, False, False),
        "qwen3": (biased, biased, False),
        "smollm3": (biased, biased, getattr(config, "mlp_bias", False)),
    }.get(config.model_type, (False, False, False))
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
    if config.model_type == "phi3":
        matrices = {
            "self_attn.qkv_proj": (queries + 2 * keys, hidden, False),
            "self_attn.o_proj": (hidden, queries, False),
            "mlp.gate_up_proj": (2 * inner, hidden, False),
            "mlp.down_proj": (hidden, inner, False),
        }
    after = config.model_type in ("exaone4", "olmo2")
    norms = ("post_attention_layernorm", "post_feedforward_layernorm" if after else "input_layernorm")
    layer: dict[str, tuple[int, ...]] = {f"{norm}.weight": (hidden,) for norm in norms}
    for name, (rows, columns, has_bias) in matrices.items():
        layer[f"{name}.weight"] = (rows, columns)
        if has_bias:
            layer[f"{name}.bias"] = (rows,)
    if config.model_type in ("exaone4", "olmo2", "qwen3"):
        wide = config.model_type == "olmo2"
        layer["self_attn.q_norm.weight"] = (queries if wide else head_size,)
        layer["self_attn.k_norm.weight"] = (keys if wide else head_size,)
    sizes = {f"model.layers.{i}.{name}": size for i in range(config.num_hidden_layers) for name, size in layer.items()}
    return sizes | {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
