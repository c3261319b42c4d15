"""Names and sizes of the tensors of a checkpoint, by its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from specdec_engine.runtime.mixture import Mixture


@dataclass(frozen=True, slots=True)
class Norms:
    """The names of a layer's norms, by where they stand; None where there is none."""

    attention: str | None = "input_layernorm"
    """The norm of what attention reads."""
    attention_after: str | None = None
    """The norm of what it gives, before that is added."""
    mlp: str | None = "post_attention_layernorm"
    mlp_after: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of those that there are."""
        return tuple(n for n in (self.attention, self.attention_after, self.mlp, self.mlp_after) if n is not None)


NORMS_AFTER = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
"""OLMo 2 and 3, EXAONE 4."""
NORMS_AROUND = Norms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
"""Gemma 2 and 3."""
_NORMS = {
    "cohere": Norms(mlp=None),
    "cohere2": Norms(mlp=None),
    "exaone4": NORMS_AFTER,
    "gemma2": NORMS_AROUND,
    "gemma3_text": NORMS_AROUND,
    "glm4": Norms("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    "olmo2": NORMS_AFTER,
    "olmo3": NORMS_AFTER,
}
"""By model type, where they are not as Llama's."""


def norms_of(model_type: str) -> Norms:
    """Where the layers of models of this type have norms."""
    return _NORMS.get(model_type, Norms())


def tensors_of(config: Any, head_size: int, mixture: Mixture | None) -> dict[str, tuple[int, ...]]:
    """Names and sizes of all tensors that transformers' model of this config has, but for an untied head's."""
    biased = getattr(config, "attention_bias", False)
    of_queries, of_out, of_mlp = {
        "cohere": (biased, biased, False),
        "cohere2": (biased, biased, False),
        "gemma": (biased, biased, False),
        "gemma2": (biased, biased, False),
        "gemma3_text": (biased, biased, False),
        "glm": (biased, False, False),
        "glm4": (biased, False, False),
        "gpt_oss": (biased, biased, False),
        "granite": (biased, biased, getattr(config, "mlp_bias", False)),
        "llama": (biased, biased, getattr(config, "mlp_bias", False)),
        "olmo2": (biased, biased, False),
        "olmo3": (biased, biased, False),
        "qwen2": (True, False, False),
        "qwen3": (biased, biased, False),
        "qwen3_moe": (biased, biased, False),
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
    elif config.model_type in ("glm", "glm4"):
        del matrices["mlp.gate_proj"], matrices["mlp.up_proj"]
        matrices["mlp.gate_up_proj"] = (2 * inner, hidden, False)
    norms = norms_of(config.model_type)
    layer: dict[str, tuple[int, ...]] = {f"{norm}.weight": (hidden,) for norm in norms.names}
    for name, (rows, columns, has_bias) in matrices.items():
        layer[f"{name}.weight"] = (rows, columns)
        if has_bias:
            layer[f"{name}.bias"] = (rows,)
    if config.model_type in ("exaone4", "gemma3_text", "olmo2", "olmo3", "qwen3", "qwen3_moe"):
        wide = config.model_type in ("olmo2", "olmo3")
        layer["self_attn.q_norm.weight"] = (queries if wide else head_size,)
        layer["self_attn.k_norm.weight"] = (keys if wide else head_size,)
    if config.model_type == "gpt_oss":
        layer["self_attn.sinks"] = (config.num_attention_heads,)
    sizes = _of_layers(layer, config.num_hidden_layers, mixture, hidden)
    return sizes | {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}


def _of_layers(
    layer: Mapping[str, tuple[int, ...]], layers: int, mixture: Mixture | None, hidden: int
) -> dict[str, tuple[int, ...]]:
    """A dense layer's tensors as those of all layers, with experts in the place of a feed-forward network where they are."""
    mixed = {name: size for name, size in layer.items() if not name.startswith("mlp.")}
    mixed |= {} if mixture is None else mixture.tensors(hidden)
    found = dict[str, tuple[int, ...]]()
    for i in range(layers):
        own = mixed if mixture is not None and i in mixture.layers else layer
        found |= {f"model.layers.{i}.{name}": size for name, size in own.items()}
    return found
