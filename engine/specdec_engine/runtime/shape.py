"""Which models the lean forward computes exactly, and what it needs to know of their configs."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from specdec_engine.runtime.mixture import Mixture, mixture_of
from specdec_engine.runtime.tensors import Norms, norms_of, tensors_of

FAMILY = (
    "cohere", "cohere2", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt_oss", "granite", "llama",
    "ministral", "ministral3", "mistral", "mixtral", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3",
)  # fmt: skip
"""transformers' model types that `shape_of` knows."""


class Unsupported(Exception):
    """Why a model cannot run on the lean forward; the generic one takes it."""


@dataclass(frozen=True, slots=True)
class Scales:
    """Granite's and Gemma's multipliers, and Gemma 2's caps: x becomes cap · tanh(x / cap), where that is not 0."""

    embedding: float = 1.0
    residual: float = 1.0
    """On what attention and feed-forward network add."""
    scores: float = 1.0
    """On scores, beside 1 / sqrt(head_size)."""
    logits: float = 1.0
    cap_scores: float = 0.0
    cap_logits: float = 0.0

    def of_logits(self, logits: Tensor) -> Tensor:
        """Scale and cap what a head gives; may be the same memory."""
        logits = logits if self.logits == 1.0 else logits * self.logits
        return logits if self.cap_logits == 0.0 else (logits / self.cap_logits).tanh_().mul_(self.cap_logits)


@dataclass(frozen=True, slots=True)
class Rotation:
    """How queries and keys are turned by their positions."""

    frequencies: Tensor
    """[head_size / 2] float32, radians a position."""
    scale: float = 1.0
    """Factor on rotated queries and keys (YaRN's attention factor)."""


@dataclass(frozen=True, slots=True)
class Growth:
    """How queries grow with their position: by 1 + beta · ln(1 + ⌊position / length⌋) (Ministral 3, Llama 4)."""

    beta: float
    length: int
    """Positions up to which they do not."""


_PAIRED = ("cohere", "cohere2", "glm", "glm4")
_PARTLY_ROTATED = ("glm", "glm4", "phi3")


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
    rotations: tuple[Rotation, ...]
    rotation_of_layer: tuple[int, ...] = ()
    """The number of each layer's rotation; empty where there is one. Gemma 3 and OLMo 3 have one for layers with a
    window and one for those without; SmolLM3 and EXAONE 4 leave some layers as they are, by frequencies of 0."""
    rotary: int = 0
    """Numbers of each head that are rotated, the first; 0 for all. The frequencies of the rest are 0."""
    norms: Norms = field(default_factory=lambda: Norms())
    unit_norms: bool = False
    """The checkpoint keeps norms' weights less one (Gemma)."""
    gelu: bool = False
    """The feed-forward network's gate is a gelu, by tanh (Gemma), not a silu."""
    wide_norms: bool = False
    """Norms of queries and keys are over all heads at once (OLMo 2 and 3), not over each (Qwen 3)."""
    fused: bool = False
    """The checkpoint has one matrix for gate and up (GLM), and maybe one for queries, keys and values (Phi-3)."""
    paired: bool = False
    """What is rotated of a head lies in pairs in the checkpoint already (GLM, Cohere), not in halves."""
    parallel: bool = False
    """The feed-forward network reads what attention reads (Cohere), not the stream after it."""
    centred: bool = False
    """A norm takes the mean away first (Cohere): it is torch's layer norm."""
    sinks: bool = False
    """Each head gives a part of its attention to nothing, by a score of its own (GPT-OSS; Xiao et al. 2023, "attention
    sinks")."""
    growth: Growth | None = None
    mixture: Mixture | None = None
    """Experts in the place of feed-forward networks."""
    scales: Scales = field(default_factory=lambda: Scales())

    @property
    def plain(self) -> bool:
        """Whether a layer is as Llama's or Qwen's, which kernels of our own do in one call."""
        other = self.wide_norms or self.gelu or self.parallel or self.centred or self.sinks
        return self.norms == Norms() and not other and self.scales == Scales()

    @property
    def kv_values(self) -> int:
        """Numbers cached a token, keys and values, all layers."""
        return self.layers * 2 * self.kv_heads * self.head_size

    @property
    def share_read(self) -> float:
        """The share of its weights that a pass over one token reads."""
        if self.mixture is None:
            return 1.0
        return 1.0 - self.mixture.unread(self.hidden) / sum(map(math.prod, self.tensors.values()))


def shape_of(config: Any) -> Shape:
    """Raises Unsupported, with the reason, for a model that this forward would not compute exactly."""
    if config.model_type not in FAMILY:
        raise Unsupported(f"{config.model_type} is not one of the kinds that our own forward computes")
    if getattr(config, "quantization_config", None) is not None and not is_mxfp4(config):
        raise Unsupported("its weights are quantized")
    gemma, cohere = (config.model_type.startswith(name) for name in ("gemma", "cohere"))
    if getattr(config, "use_qk_norm", False):
        raise Unsupported("it norms queries and keys by a matrix")  # Command R+
    activation = config.hidden_activation if config.model_type in ("gemma2", "gemma3_text") else config.hidden_act
    if activation != ("gelu_pytorch_tanh" if gemma else "silu"):
        raise Unsupported(f"its activation is {activation}")
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    rotary = rotary_of(config, head_size)
    mixture = mixture_of(config)
    rotations, rotation_of_layer = _rotations(config, rotary, (head_size - rotary) // 2)
    return Shape(
        layers=layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=head_size,
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        eps=config.layer_norm_eps if cohere else config.rms_norm_eps,
        tied=config.tie_word_embeddings,
        tensors=tensors_of(config, head_size, mixture),
        windows=_windows(config, layers),
        rotations=rotations,
        rotation_of_layer=rotation_of_layer,
        rotary=0 if rotary == head_size else rotary,
        norms=norms_of(config.model_type),
        unit_norms=gemma,
        gelu=gemma,
        wide_norms=config.model_type in ("olmo2", "olmo3"),
        fused=config.model_type in ("glm", "glm4", "phi3"),
        paired=config.model_type in _PAIRED,
        parallel=cohere,
        centred=cohere,
        sinks=config.model_type == "gpt_oss",
        growth=_growth(config),
        mixture=mixture,
        scales=_scales(config, head_size),
    )


def is_mxfp4(config: Any) -> bool:
    """Say whether experts are stored as GPT-OSS's are, in 4 bits."""
    said = getattr(config, "quantization_config", None)
    method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
    return config.model_type == "gpt_oss" and str(getattr(method, "value", method)) == "mxfp4"


def _growth(config: Any) -> Growth | None:
    if config.model_type != "ministral3":
        return None
    rope = config.rope_parameters
    beta, length = rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
    if beta is None or not length:
        raise Unsupported("its config does not say how its queries grow")
    return Growth(float(beta), int(length))


def _rotations(config: Any, rotary: int, still: int) -> tuple[tuple[Rotation, ...], tuple[int, ...]]:
    """The rotations of a config, and the number of each layer's; still: pairs of a head that stay as they are."""
    if config.model_type in ("gemma3_text", "olmo3"):
        kinds = sorted(set(config.layer_types))
        found = tuple(rope_of(config, rotary, kind) for kind in kinds)
        return found, tuple(kinds.index(kind) for kind in config.layer_types)
    rotation = rope_of(config, rotary)
    rotation = replace(rotation, frequencies=torch.cat([rotation.frequencies, torch.zeros(still)]))
    if config.model_type == "smollm3":
        turned = tuple(map(bool, config.no_rope_layers))
    elif config.model_type in ("cohere2", "exaone4") and config.sliding_window is not None:
        turned = tuple(kind == "sliding_attention" for kind in config.layer_types)
    else:
        return (rotation,), ()
    return (rotation, Rotation(torch.zeros_like(rotation.frequencies))), tuple(int(not turn) for turn in turned)


def _scales(config: Any, head_size: int) -> Scales:
    if config.model_type == "gemma":
        return Scales(embedding=config.hidden_size**0.5)
    if config.model_type in ("gemma2", "gemma3_text"):
        return Scales(
            embedding=config.hidden_size
            ** 0.5,  # exact, as llama.cpp has it; transformers rounds it to the model's dtype
            scores=(head_size / config.query_pre_attn_scalar) ** 0.5,
            cap_scores=(config.model_type == "gemma2" and config.attn_logit_softcapping)
            or 0.0,  # Gemma 3 reads no such cap
            cap_logits=config.final_logit_softcapping or 0.0,
        )
    if config.model_type.startswith("cohere"):
        return Scales(logits=float(config.logit_scale))
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
    kinds = [rope for rope in config.rope_parameters.values() if isinstance(rope, dict)] or [config.rope_parameters]
    part = max((rope.get("partial_rotary_factor") or 1.0 for rope in kinds), key=lambda part: abs(1.0 - part))
    if part != 1.0 and config.model_type not in _PARTLY_ROTATED:
        raise Unsupported("it rotates only part of each head")
    return int(head_size * part)


def rope_of(config: Any, rotary: int, layers: str | None = None) -> Rotation:
    """The rotation of `rotary` numbers. layers: their kind, in a config that has a rotation for each.

    Raises Unsupported for a rotation that changes with the length, but for LongRoPE's below its original length, where a
    context ends (`context_limit`).
    """
    rope = config.rope_parameters if layers is None else config.rope_parameters[layers]
    if rope is None:
        raise Unsupported(f"its config has no rotation for {layers}")
    kind = rope.get("rope_type", "default")
    if kind in ("default", "linear"):
        steps = torch.arange(0, rotary, 2, dtype=torch.int64).float() / rotary
        return Rotation(1.0 / (rope["rope_theta"] ** steps) / (rope["factor"] if kind == "linear" else 1.0))
    if kind not in ("llama3", "yarn", "longrope"):  # the others depend on the length, or on the model
        raise Unsupported(f"its rotary embedding is of type {kind}")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if layers is not None:
        config = copy.copy(config)
        config.rope_parameters = (
            rope  # by itself: a GGUF's config has no others by kind of layer, which transformers asks for
        )
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    if len(frequencies) != rotary // 2:
        raise Unsupported(f"its rotary embedding has {len(frequencies)} frequencies for {rotary} numbers")
    return Rotation(frequencies, float(scale))


def _windows(config: Any, layers: int) -> tuple[int | None, ...]:
    """As transformers' own model of each type reads its config: Llama ignores a window, Mistral has it in all layers."""
    window = getattr(config, "sliding_window", None)
    if config.model_type in ("cohere", "gemma", "glm", "glm4", "granite", "llama", "olmo2"):
        return (None,) * layers
    if config.model_type in ("ministral3", "mistral", "mixtral", "phi3", "qwen3_moe"):
        return (window,) * layers
    if config.model_type == "smollm3" and not config.use_sliding_window:
        return (None,) * layers
    if set(config.layer_types) - {"full_attention", "sliding_attention"}:
        raise Unsupported(f"it has layers of the kinds {', '.join(sorted(set(config.layer_types)))}")
    return tuple(window if kind == "sliding_attention" else None for kind in config.layer_types)
