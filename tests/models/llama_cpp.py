"""The record of what llama.cpp computes with GGUF files of each architecture that is read here, made by `python -m
tests.models.llama_cpp` where `pip install xllamacpp` has been run. `test_gguf.py` compares our reading of the same files.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch
import transformers
from transformers import AutoModelForCausalLM

from benchmarks.runtimes import SERVE
from tests.fakes import byte_tokenizer, save_gguf

RECORD = Path(__file__).with_name("llama_cpp.json")
"""Log-probabilities of the ten likeliest next tokens, by case and by number of tokens of the prompt."""
PROMPT = [5, 9, 17, 30, 22, 40, 11, 8, 60, 33, 21, 70, 14, 90, 100, 7, 5, 66, 44, 31, 28, 19, 50, 61, 23, 4, 9, 88]
LENGTHS = (6, 7, 19, 20, 27, 28)
COMMON = {
    "vocab_size": len(byte_tokenizer()), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
GEMMA = {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32}
PLAIN = {
    "rope_type": "default",
    "rope_theta": 150000.0,
}  # stretched, llama.cpp rounds YaRN's bounds, and OpenAI does not
LOCAL = {"rope_type": "default", "rope_theta": 10000.0}


def stretched(kind: str, theta: float = 10000.0) -> dict[str, Any]:
    """By 8, of a text of 16 tokens."""
    begin = {"original_max_position_embeddings": 16} if kind == "yarn" else {}
    return {"rope_type": kind, "factor": 8.0, "rope_theta": theta, **begin}


CASES = {
    "llama": ("llama", "LlamaConfig", {}),
    "llama, linear": ("llama", "LlamaConfig", {"rope_parameters": stretched("linear")}),
    "llama, yarn": ("llama", "LlamaConfig", {"rope_parameters": stretched("yarn")}),
    "qwen3, yarn": ("qwen3", "Qwen3Config", {"head_dim": 32, "rope_parameters": stretched("yarn")}),
    "qwen3 with experts": (
        "qwen3moe",
        "Qwen3MoeConfig",
        {
            "head_dim": 32,
            "moe_intermediate_size": 64,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
        },
    ),
    "gpt-oss": (
        "gpt-oss",
        "GptOssConfig",
        {
            "head_dim": 32,
            "sliding_window": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "rope_parameters": PLAIN,
        },
    ),
    "gemma2": ("gemma2", "Gemma2Config", GEMMA),
    "gemma3": ("gemma3", "Gemma3TextConfig", GEMMA),
    "gemma3, linear": (
        "gemma3",
        "Gemma3TextConfig",
        GEMMA | {"rope_parameters": {"sliding_attention": LOCAL, "full_attention": stretched("linear", 1e6)}},
    ),
    "gemma3, yarn": (
        "gemma3",
        "Gemma3TextConfig",
        GEMMA | {"rope_parameters": {"sliding_attention": LOCAL, "full_attention": stretched("yarn", 1e6)}},
    ),
    "gemma3, no window": ("gemma3", "Gemma3TextConfig", GEMMA | {"layer_types": ["full_attention"] * 7}),
    "granite": (
        "granite",
        "GraniteConfig",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.2,
            "logits_scaling": 0.5,
        },
    ),
    "smollm3": ("smollm3", "SmolLM3Config", {"tie_word_embeddings": True}),
    "olmo2": ("olmo2", "Olmo2Config", {}),
    "olmo3": ("olmo2", "Olmo3Config", {"sliding_window": 16}),
    "exaone4": ("exaone4", "Exaone4Config", {"sliding_window": None, "layer_types": ["full_attention"] * 7}),
    "glm4": ("glm4", "Glm4Config", {"head_dim": 32}),
    "command-r": ("command-r", "CohereConfig", {"logit_scale": 0.3}),
    "cohere2": ("cohere2", "Cohere2Config", {"sliding_window": 16, "logit_scale": 0.3}),
    "phi3": ("phi3", "Phi3Config", {"tie_word_embeddings": False, "sliding_window": None}),
}


def save(case: str, folder: Path) -> Path:
    """The case's file, with the same numbers on every machine."""
    arch, config, more = CASES[case]
    model: Any = AutoModelForCausalLM.from_config(getattr(transformers, config)(**COMMON, **more)).eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            numbers = torch.randn(parameter.shape, generator=random)
            one = 0.0 if arch.startswith("gemma") else 1.0
            parameter.copy_(0.2 * numbers if parameter.dim() > 1 else one + 0.3 * numbers)
    rope = model.config.rope_parameters
    rope = rope.get("full_attention", rope)
    scaling = (rope["rope_type"], 8.0, 16) if "factor" in rope else None
    return save_gguf(folder / f"{case.replace(', ', '-')}.gguf", "F16", arch=arch, model=model, scaling=scaling)


def answers(file: Path) -> dict[str, dict[str, float]]:
    """Log-probabilities by token, for each length of the prompt."""
    command = [sys.executable, "-c", SERVE, str(file), "1"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        address = next(line.split()[1] for line in server.stdout if line.startswith("serving"))
        told = {str(length): _likeliest(address, PROMPT[:length]) for length in LENGTHS}
        return {length: found for length, found in told.items() if found}
    finally:
        server.kill()


def _likeliest(address: str, prompt: list[int]) -> dict[str, float]:
    """Empty where the next token is half a character, of which the server says nothing."""
    wanted = {"prompt": prompt, "n_predict": 1, "n_probs": 10, "temperature": 0.0, "ignore_eos": True}
    with urlopen(Request(f"{address}/completion", json.dumps(wanted).encode()), timeout=60) as response:
        told = json.load(response).get("completion_probabilities")
    return {str(one["id"]): round(one["logprob"], 4) for one in told[0]["top_logprobs"]} if told else {}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        record = {case: answers(save(case, Path(folder))) for case in CASES}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
