"""Tiny targets with a module for multi-token prediction in their checkpoint, random, as their makers store them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from specdec_engine.record.files import read_json
from tests.fakes import VOCAB, byte_tokenizer
from tests.gemma import spread

_ALIKE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_LINEAR: dict[str, Any] = {
    "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "num_hidden_layers": 4,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
JOINS = (".fc.weight", ".eh_proj.weight", ".input_proj.weight")
KINDS = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "glm4_moe", "deepseek_v3", "mellum", "mimo")


def save_mtp_target(folder: Path, kind: str, std: float = 0.3, seed: int = 0, **sizes: int) -> Path:
    """Save a target of this kind with a module; std: of its weights, which are flat with a small one; sizes: others than
    those of its config."""
    torch.manual_seed(seed)
    model = spread(_model(kind, sizes), std)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    layers = model.config.num_hidden_layers
    last = {
        name.split(f"layers.{layers - 1}.")[1]: torch.randn_like(tensor.float()).mul(std) + ("norm" in name)
        for name, tensor in stored.items()
        if f"layers.{layers - 1}." in name
    }
    d = model.config.hidden_size
    norms = [torch.ones(d) + 0.3 * torch.randn(d) for _ in range(3)]
    names, at = NAMES[kind]
    at = at.format(layers)
    more = {f"{at}{name}": tensor for name, tensor in last.items()}
    more |= dict(zip((name.format(layers) for name in names), [*norms, std * torch.randn(d, 2 * d)], strict=True))
    save_file({**stored, **more}, folder / "model.safetensors", metadata={"format": "pt"})
    if kind == "mimo":
        config = read_json(folder / "config.json") | {
            "model_type": "mimo", "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1,
            "auto_map": {"AutoConfig": "configuration_mimo.MiMoConfig"},
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


_BEHIND = ["enorm", "hnorm", "shared_head.norm", "eh_proj"]
_QWEN = ["mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm", "mtp.fc"]
_MIMO = ["token_layernorm", "hidden_layernorm", "final_layernorm", "input_proj"]
NAMES: dict[str, tuple[list[str], str]] = {
    "qwen3_5_text": ([f"{name}.weight" for name in _QWEN], "mtp.layers.0."),
    "qwen3_next": ([f"{name}.weight" for name in _QWEN], "mtp.layers.0."),
    "qwen3_5_moe_text": ([f"{name}.weight" for name in _QWEN], "mtp.layers.0."),
    "mellum": ([f"{name}.weight" for name in _QWEN], "mtp.layers.0."),
    "glm4_moe": ([f"model.layers.{{}}.{name}.weight" for name in _BEHIND], "model.layers.{}."),
    "deepseek_v3": ([f"model.layers.{{}}.{name}.weight" for name in _BEHIND], "model.layers.{}."),
    "mimo": ([f"model.mtp_layers.0.{name}.weight" for name in _MIMO], "model.mtp_layers.0."),
}
"""What each calls the norms of embedding, state and output, and the matrix; and where the layer stands."""


def _model(kind: str, sizes: dict[str, int]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    more: dict[str, Any] = {
        "qwen3_5_text": {**_LINEAR, "mtp_num_hidden_layers": 1, "layer_types": None},
        "qwen3_5_moe_text": {**_LINEAR, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16,
                             "mtp_num_hidden_layers": 1},
        "mellum": {**_EXPERTS, "num_hidden_layers": 4, "head_dim": 16, "num_experts": 4, "sliding_window": 8,
                   "num_mtp_layers": 1, "layer_types": ["full_attention", "sliding_attention"] * 2,
                   "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE)},
        "qwen3_next": {**_LINEAR, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
        "glm4_moe": {**_EXPERTS, "num_hidden_layers": 2, "head_dim": 16, "n_routed_experts": 4, "n_shared_experts": 1,
                     "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
        "deepseek_v3": {**_EXPERTS, "num_hidden_layers": 2, "n_routed_experts": 4, "n_shared_experts": 1,
                        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
                        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4},
        "mimo": {"num_hidden_layers": 2, "head_dim": 16},
    }[kind]  # fmt: skip
    config = AutoConfig.for_model("qwen2" if kind == "mimo" else kind, **{**_ALIKE, **more, **sizes})
    made: Any = AutoModelForCausalLM
    return made.from_config(config)
