"""A pass of models beside the Llama family: our own forward against transformers', and what rows cost a hybrid.

`python benchmarks/kinds.py [--rounds N] [--only NAME,NAME]` writes JSON. Random weights of small but real proportions (100 to
160 million, and 500 with experts),
saved and loaded as a checkpoint would be. Forwards of one kind take turns; times are medians over the rounds, after 200
tokens. Of hybrids it shows what each further row costs: tokens fed again after a rejection are such rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

from specdec_engine.models.loading import load_model
from specdec_engine.models.options import LoadOptions
from specdec_engine.runtime import Runtime
from specdec_engine.system.machine import cpu_flags, cpu_name, usable_cores
from tests.fakes import byte_tokenizer

SIZE = {
    "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 2048, "pad_token_id": 0,
}  # fmt: skip
LEAN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "phi3": ("Phi3Config", {"sliding_window": None}),
    "smollm3": ("SmolLM3Config", {}),
    "granite": ("GraniteConfig", {"residual_multiplier": 0.22, "attention_multiplier": 0.015625}),
    "olmo2": ("Olmo2Config", {}),
    "exaone4": ("Exaone4Config", {"sliding_window": None, "layer_types": ["full_attention"] * 12}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 512, "query_pre_attn_scalar": 64}),
    "olmo3": ("Olmo3Config", {}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 768}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 8, "intermediate_size": 1024}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 64, "moe_intermediate_size": 256, "num_experts_per_tok": 8}),
}
MIXED = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 3
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5_text": ("Qwen3_5TextConfig", {"layer_types": MIXED}),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "conv", "full_attention"] * 4}),
}
ROWS = (1, 2, 4, 8, 12)


def load(folder: Path, kind: str, given: dict[str, Any], **options: Any) -> Runtime:
    """The model of that kind on the runtime that the options name; saved at the first call."""
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        config = getattr(transformers, kind)(**{**SIZE, **given})
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    return load_model(str(folder), LoadOptions(device="cpu", tokens=512, **options)).runtime


def seconds(runtime: Runtime, rows: int, times: int = 4) -> float:
    """A pass over so many tokens after 200, the fastest of a few."""
    tokens, found = torch.arange(1, rows + 1), list[float]()
    for _ in range(times):
        began = time.perf_counter()
        runtime.forward(tokens, rows)
        found.append(time.perf_counter() - began)
        runtime.rollback(200)
        runtime.forward(tokens[:1], 1)  # what a rollback leaves to be read again is read outside the clock
        runtime.rollback(200)
    return min(found)


def measured(arms: dict[str, Runtime], rounds: int) -> dict[str, dict[int, float]]:
    """Milliseconds by forward and rows, medians over rounds in which they take turns."""
    for runtime in arms.values():
        runtime.rollback(0)
        runtime.forward(torch.arange(1, 201), 1)
    found: dict[str, dict[int, list[float]]] = {name: {rows: [] for rows in ROWS} for name in arms}
    for _ in range(rounds):
        for rows in ROWS:
            for name, runtime in arms.items():
                found[name][rows].append(1e3 * seconds(runtime, rows))
    return {name: {rows: round(median(times), 2) for rows, times in by.items()} for name, by in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", help="kinds, joined by commas")
    asked = parser.parse_args()
    rounds, results = asked.rounds, dict[str, Any]()
    wanted = asked.only.split(",") if asked.only else [*LEAN, *HYBRIDS]
    torch.set_num_threads(usable_cores())
    with tempfile.TemporaryDirectory() as scratch:
        for name, (kind, given) in ((name, LEAN[name]) for name in wanted if name in LEAN):
            folder = Path(scratch) / name
            arms = {
                "transformers, bfloat16": load(folder, kind, given, runtime="generic", dtype="bfloat16"),
                "ours, bfloat16": load(folder, kind, given, dtype="bfloat16", quantize="none"),
                "ours, int8": load(folder, kind, given, quantize="int8"),
                "ours, int4": load(folder, kind, given, quantize="int4"),
            }
            results[name] = measured(arms, rounds)
            print(name, results[name], file=sys.stderr)
        for name, (kind, given) in ((name, HYBRIDS[name]) for name in wanted if name in HYBRIDS):
            arm = load(Path(scratch) / name, kind, given, dtype="bfloat16")
            results[name] = measured({"transformers, bfloat16": arm}, rounds)
            print(name, results[name], file=sys.stderr)
    conditions = {
        "cores": usable_cores(), "torch": torch.__version__, "transformers": transformers.__version__,
        "processor": cpu_name(), "instructions": cpu_flags(), "rounds": rounds, "after": 200,
    }  # fmt: skip
    print(json.dumps({"conditions": conditions, "ms by rows": results}, indent=1))


if __name__ == "__main__":
    main()
