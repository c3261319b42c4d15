"""Which kinds of model can be a target or a draft, by their config alone."""

from __future__ import annotations

from typing import Any

from specdec_engine.errors import ModelUnavailable


def check_kind(config: Any, name: str) -> None:
    """Look whether it is a causal decoder: transformers runs others too, on text without meaning, and a draft would change
    what they say. Raises ModelUnavailable."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelUnavailable(
            f"{name} is an encoder-decoder ({config.model_type})", "choose a decoder alone, such as Llama or Qwen"
        )
    if config.model_type in _BIDIRECTIONAL and not getattr(config, "is_decoder", False):
        raise ModelUnavailable(
            f"{name} is a bidirectional model ({config.model_type}): each token sees those after it",
            "choose a causal model; one of this kind that was trained as a decoder has is_decoder in its config",
        )


_BIDIRECTIONAL = frozenset(
    [
        "bert",
        "bert-generation",
        "big_bird",
        "camembert",
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
        "xmod",
    ]
)
"""Those of transformers' causal models whose class attends both ways unless the config says otherwise."""


def check_rollback(config: Any, name: str) -> None:
    """Look whether its cache can go back. Raises PairIncompatible, before the weights are read."""
    from specdec_engine.cache import new_cache  # 0.5 s of imports that the lean forward does without

    new_cache(config, name)
