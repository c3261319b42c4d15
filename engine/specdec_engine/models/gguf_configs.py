"""Configs of GGUF architectures that transformers makes none of, by what llama.cpp's converter writes in their headers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from specdec_engine.errors import ModelUnavailable


@dataclass(slots=True)
class Keys:
    """An architecture's own keys in a header, and which of them were read."""

    arch: str
    value: Callable[[str, Any], Any]
    """A field of the header by its whole name, and what is given where there is none."""
    tensors: frozenset[str]
    taken: set[str] = field(default_factory=set)

    def __call__(self, key: str, otherwise: Any = None) -> Any:
        """Raises ModelUnavailable for a key that is not there and has no substitute."""
        self.taken.add(key)
        found = self.value(f"{self.arch}.{key}", otherwise)
        if found is None:
            raise ModelUnavailable(f"its header has no {self.arch}.{key}", "get the file again, or a newer one")
        return found


def made_here(keys: Keys) -> Any:
    """The config; None for an architecture that is transformers' business. Raises ModelUnavailable for a header that lacks
    what is needed."""
    if keys.arch not in _MADE:
        return None
    from transformers import AutoConfig

    own = _MADE[keys.arch](keys)
    return AutoConfig.for_model(own.pop("model_type"), **{**_common(keys), **own})


def _common(keys: Keys) -> dict[str, Any]:
    heads = int(keys("attention.head_count"))
    return {
        "vocab_size": len(keys.value("tokenizer.ggml.tokens", ())),
        "hidden_size": int(keys("embedding_length")),
        "intermediate_size": int(keys("feed_forward_length")),
        "num_hidden_layers": int(keys("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(keys("attention.head_count_kv", heads)),
        "max_position_embeddings": int(keys("context_length")),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(keys("rope.freq_base", 10000.0))},
        "tie_word_embeddings": "output.weight" not in keys.tensors,
        "attention_bias": "blk.0.attn_q.bias" in keys.tensors,
        **{name: keys.value(f"tokenizer.ggml.{key}", None) for name, key in _TOKENS.items()},
    }


_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}


def _rms(keys: Keys) -> dict[str, Any]:
    return {"rms_norm_eps": float(keys("attention.layer_norm_rms_epsilon"))}


def _granite(keys: Keys) -> dict[str, Any]:
    head = int(keys("embedding_length")) // int(keys("attention.head_count"))
    return {
        "model_type": "granite",
        "attention_multiplier": float(keys("attention.scale", head**-0.5)),
        "embedding_multiplier": float(keys("embedding_scale", 1.0)),
        "residual_multiplier": float(keys("residual_scale", 1.0)),
        "logits_scaling": float(keys("logit_scale", 1.0)),
        **_rms(keys),
    }


def _smollm3(keys: Keys) -> dict[str, Any]:
    """Every fourth layer is not rotated; no key says so."""
    return {"model_type": "smollm3", "no_rope_layer_interval": 4, "use_sliding_window": False, **_rms(keys)}


def _olmo(keys: Keys) -> dict[str, Any]:
    """OLMo 3 is OLMo 2 with windows, whose layers are not stretched."""
    window = int(keys("attention.sliding_window", 0))
    if not window:
        return {"model_type": "olmo2", **_rms(keys)}
    kinds = _windowed(keys)
    theta = float(keys("rope.freq_base", 10000.0))
    rotations = {kind: {"rope_type": "default", "rope_theta": theta} for kind in sorted(set(kinds))}
    return {
        "model_type": "olmo3",
        "sliding_window": window,
        "layer_types": kinds,
        "rope_parameters": rotations,
        **_rms(keys),
    }


def _exaone4(keys: Keys) -> dict[str, Any]:
    """With windows, layers without one are not rotated."""
    window = int(keys("attention.sliding_window", 0)) or None
    full = ["full_attention"] * int(keys("block_count"))
    return {
        "model_type": "exaone4",
        "sliding_window": window,
        "layer_types": full if window is None else _windowed(keys),
        **_rms(keys),
    }


def _glm4(keys: Keys) -> dict[str, Any]:
    size = int(keys("attention.key_length", int(keys("embedding_length")) // int(keys("attention.head_count"))))
    part = int(keys("rope.dimension_count", size)) / size
    theta = float(keys("rope.freq_base", 10000.0))
    rotation = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": part}
    return {"model_type": "glm4", "head_dim": size, "rope_parameters": rotation, **_rms(keys)}


def _cohere(keys: Keys) -> dict[str, Any]:
    """Raises ModelUnavailable for Command R+, whose norms of queries and keys are a matrix."""
    if "blk.0.attn_q_norm.weight" in keys.tensors:
        raise ModelUnavailable(
            "it norms queries and keys by a matrix (Command R+), which is not read from GGUF files",
            "use the model's safetensors checkpoint",
        )
    return {"model_type": "cohere", **_logits(keys)}


def _cohere2(keys: Keys) -> dict[str, Any]:
    return {
        "model_type": "cohere2",
        "sliding_window": int(keys("attention.sliding_window")),
        "layer_types": _windowed(keys),
        **_logits(keys),
    }


def _qwen3_moe(keys: Keys) -> dict[str, Any]:
    """llama.cpp has the weights of the experts that are taken add up to 1; no key says so."""
    return {
        "model_type": "qwen3_moe",
        "head_dim": int(keys("attention.key_length")),
        "num_experts": int(keys("expert_count")),
        "num_experts_per_tok": int(keys("expert_used_count")),
        "moe_intermediate_size": int(keys("expert_feed_forward_length")),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        **_rms(keys),
    }


def _gpt_oss(keys: Keys) -> dict[str, Any]:
    """Every other layer has a window, and the rotation's bounds are not rounded; no key says either."""
    rope = {"rope_type": "default", "rope_theta": float(keys("rope.freq_base", 150000.0)), "truncate": False}
    layers = range(int(keys("block_count")))
    return {
        "model_type": "gpt_oss",
        "head_dim": int(keys("attention.key_length")),
        "num_local_experts": int(keys("expert_count")),
        "num_experts_per_tok": int(keys("expert_used_count")),
        "intermediate_size": int(keys("expert_feed_forward_length")),
        "sliding_window": int(keys("attention.sliding_window")),
        "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in layers],
        "rope_parameters": rope,
        **_rms(keys),
    }


def _logits(keys: Keys) -> dict[str, Any]:
    """Command R's own: norms that take the mean away, and scaled logits."""
    return {"logit_scale": float(keys("logit_scale")), "layer_norm_eps": float(keys("attention.layer_norm_epsilon"))}


def _windowed(keys: Keys) -> list[str]:
    """The kinds of layers: three with a window and one without, or as the header says."""
    layers, pattern = int(keys("block_count")), keys("attention.sliding_window_pattern", 4)
    slides = pattern if isinstance(pattern, list) else [bool((i + 1) % int(pattern)) for i in range(layers)]
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


_MADE: Mapping[str, Callable[[Keys], dict[str, Any]]] = {
    "cohere2": _cohere2,
    "command-r": _cohere,
    "exaone4": _exaone4,
    "glm4": _glm4,
    "gpt-oss": _gpt_oss,
    "granite": _granite,
    "olmo2": _olmo,
    "qwen3moe": _qwen3_moe,
    "smollm3": _smollm3,
}
