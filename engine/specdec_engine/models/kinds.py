"""Which kinds of model can be a target or a draft, by their config and class alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec_engine.errors import ModelUnavailable
from specdec_engine.models.sources import raw_config, weight_files
from specdec_engine.runtime.shape import FAMILY
from specdec_engine.runtime.weights import SafetensorsWeights

if TYPE_CHECKING:
    from specdec_engine.runtime.transformers_cache import Rollback

MOST = 10_000
"""Layers, heads or experts of which no model has as many: transformers would make a list of each before it is looked at."""
_COUNTED = re.compile(r"(n|num)_(\w+_)?(layers?|heads?|experts?|blocks?)|(encoder|decoder)_layers")
WIDEST = 1_000_000
"""A layer's width, of which no model has as much: tables are made by it before weights are looked at."""
_WIDTHS = re.compile(r"(\w+_)?(hidden|intermediate)_size|head_dim|n_embd|d_model")


def check_sizes(folder: Path) -> None:
    """Look for absurd counts in config.json, before memory is taken for them. Raises ModelUnavailable."""
    for name, value in _numbers(raw_config(folder)):
        least = 1 if name in ("num_hidden_layers", "n_layer", "num_layers") else 0
        if (_COUNTED.fullmatch(name) and not least <= value <= MOST) or (_WIDTHS.fullmatch(name) and value > WIDEST):
            raise ModelUnavailable(
                f"{folder / 'config.json'} says {name} = {value}", "get that one file again: it is small"
            )


def check_experts(text: Any, name: str) -> None:
    """Look whether tokens can take as many experts as a text config says. Raises ModelUnavailable."""
    known = ("num_experts", "num_local_experts", "n_routed_experts")
    count = next((value for key in known if isinstance(value := getattr(text, key, None), int)), 0)
    taken, every = getattr(text, "num_experts_per_tok", None), getattr(text, "decoder_sparse_step", 1)
    wrong = {"num_experts_per_tok": taken} if isinstance(taken, int) and not 1 <= taken <= count else {}
    wrong |= {"decoder_sparse_step": every} if isinstance(every, int) and every < 1 else {}
    for key, value in wrong.items() if count else ():
        raise ModelUnavailable(
            f"config.json of {name} says {key} = {value}, of {count} experts", "get that one file again: it is small"
        )


def check_plain(folder: Path, name: str) -> None:
    """Look whether weights are stored as numbers, and not as codes that a config of quantization would explain: the codes
    would be multiplied as they are. Raises ModelUnavailable."""
    if coded := SafetensorsWeights(weight_files(folder)).coded:
        raise ModelUnavailable(
            f"{name} stores {coded}, and its config.json has no quantization_config that says how",
            "choose the checkpoint that it was made from, or a GGUF",
        )


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield name, value


def check_kind(config: Any, name: str, own_code: bool = False) -> None:
    """Look whether it is a causal decoder: transformers runs others too, on text without meaning, and a draft would change
    what they say. own_code: the checkpoint brings its class along. Raises ModelUnavailable."""
    if isinstance(getattr(config, "quantization", None), dict):
        raise ModelUnavailable(
            f"{name} is a checkpoint for MLX, whose quantized weights transformers does not read",
            "choose the checkpoint that it was made from, or a GGUF",
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelUnavailable(
            f"{name} is an encoder-decoder ({config.model_type})", "choose a decoder alone, such as Llama or Qwen"
        )
    if config.model_type not in FAMILY and not own_code and causal_class(config) is None:
        kind, hint = _kind_of(config.model_type)
        raise ModelUnavailable(
            f"{name} is {kind} ({config.model_type}), and transformers has no text model of that type", hint
        )
    text = config.get_text_config()
    check_experts(text, name)
    both_ways = (
        False in (getattr(text, "is_causal", True), getattr(text, "causal", True))
        or getattr(text, "use_bidirectional_attention", None) in (True, "all")
    )  # fmt: skip
    if both_ways or (config.model_type in _BIDIRECTIONAL and not getattr(config, "is_decoder", False)):
        raise ModelUnavailable(
            f"{name} is a bidirectional model ({config.model_type}): each token sees those after it",
            "choose a causal model; one of this kind that was trained as a decoder has is_decoder in its config",
        )


def causal_class(config: Any) -> Any:
    """transformers' class for text of such a config; None where there is none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


def _kind_of(model_type: str) -> tuple[str, str]:
    """What such a model is for, and what to do instead."""
    from transformers.models.auto import modeling_auto

    for tables, kind, hint in _KINDS:
        if any(model_type in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", ()) for table in tables):
            return kind, hint
    return "no language model", "choose a causal language model, such as Llama or Qwen"


_KINDS = (
    (
        ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"),
        "a vision-language model",
        "the text part runs of LLaVA, Qwen-VL, Mistral 3, SmolVLM, InternVL and others with a causal model inside",
    ),
    (("SPEECH_SEQ_2_SEQ", "CTC"), "a speech model", "choose a causal language model, such as Llama or Qwen"),
    (("SEQ_TO_SEQ_CAUSAL_LM",), "an encoder-decoder", "choose a decoder alone, such as Llama or Qwen"),
    (("MASKED_LM",), "a bidirectional model", "choose a causal model, such as Llama or Qwen"),
)


def rollback_by_kind(config: Any, name: str) -> Rollback | None:
    """How a model of this config goes back on the generic forward; None where the class comes with the checkpoint."""
    from specdec_engine.runtime.transformers_cache import (
        rollback_of,
    )  # 0.5 s of imports that the lean forward does without

    made = causal_class(config)
    return None if made is None else rollback_of(config, made, name)


def mask_of(config: Any, name: str) -> int | None:
    """Find the token that masks places, of a model that fills them in (PARD). Raises ModelUnavailable for no token."""
    text = config.get_text_config()
    found: int | None = getattr(text, "pard_token", None)
    if found is not None and (not isinstance(found, int) or not 0 <= found < text.vocab_size):
        raise ModelUnavailable(f"config.json of {name} says pard_token = {found!r}", "it is a token's number")
    return found


_BIDIRECTIONAL = frozenset(
    [
        "bert",
        "bert-generation",
        "big_bird",
        "camembert",
        "cpmant",
        "data2vec-text",
        "electra",
        "ernie",
        "megatron-bert",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xlnet",
        "xmod",
    ]
)
"""Those of transformers' causal models whose class attends both ways unless the config says otherwise."""
