"""A tiny Gemma 4 and an assistant for it, random, as Google's are built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.fakes import VOCAB

_ALIKE: dict[str, Any] = {
    "vocab_size": VOCAB, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32,
    "intermediate_size": 64, "sliding_window": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "use_double_wide_mlp": False,
}  # fmt: skip


def tiny_gemma(shared: int = 0, seed: int = 0, std: float = 0.3, **more: Any) -> Any:
    """A target of four layers, of which the last `shared` read keys and values of those before."""
    from transformers import Gemma4ForCausalLM
    from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig

    torch.manual_seed(seed)
    kinds = ["sliding_attention", "full_attention"] * 2
    config = Gemma4TextConfig(
        **{**_ALIKE, **more}, hidden_size=32, num_hidden_layers=4, layer_types=kinds, num_kv_shared_layers=shared,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB,
    )  # fmt: skip
    return spread(Gemma4ForCausalLM(config), std)


def tiny_assistant(seed: int = 1, centroids: bool = False, std: float = 0.3, reads: int = 32) -> Any:
    """Two layers, all of which read the target's keys and values. std: of its weights; with a small one it is sure of
    nothing. reads: how wide its target is."""
    from transformers import Gemma4AssistantConfig, Gemma4AssistantForCausalLM
    from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig

    from specdec_engine.models.assistant_files import every_layer_shared

    torch.manual_seed(seed)
    text = Gemma4TextConfig(
        **_ALIKE, hidden_size=16, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"],
        num_kv_shared_layers=2, hidden_size_per_layer_input=0, vocab_size_per_layer_input=0,
    )  # fmt: skip
    text.__class__ = every_layer_shared(type(text))
    more = {"use_ordered_embeddings": True, "num_centroids": 10, "centroid_intermediate_top_k": 3} if centroids else {}
    config = Gemma4AssistantConfig(text_config=text, backbone_hidden_size=reads, **more)
    model = spread(Gemma4AssistantForCausalLM(config), std)
    if centroids:
        model.masked_embedding.token_ordering.copy_(torch.randperm(VOCAB))
    return model


def save_assistant(folder: Path, **how: Any) -> Path:
    """Save one as it is published."""
    tiny_assistant(**how).save_pretrained(folder)
    return folder


def spread(model: Any, std: float = 0.3) -> Any:
    """Make its weights so large that its rows differ."""
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=std)
    return model.eval()
