"""Tiny random EAGLE-3 heads as the speculators library saves them, and what its own forward drafts with them.

Written by `python tests/models/eagle/record.py`, in an environment with `pip install speculators==0.9.0`; the tests read what
it has left. Each draft step is fed the text's own token, as in training, so that one wrong token does not hide the next.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from speculators.config import SpeculatorsConfig, VerifierConfig
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from speculators.proposals.greedy import GreedyTokenProposalConfig
from transformers import LlamaConfig, Qwen3Config

V, DRAFT_V, WIDTH, TAPS, TOKENS, STEPS = 128, 48, 32, 3, 12, 3
COMMON = {
    "vocab_size": V, "hidden_size": WIDTH, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 256,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
HEADS = {
    "plain": (LlamaConfig(**COMMON, num_hidden_layers=1, rope_parameters=LLAMA3), {}),
    "normed": (
        Qwen3Config(**COMMON, num_hidden_layers=1),
        {"norm_before_residual": True, "norm_output": True, "fc_norm": True},
    ),
    "two_layers": (
        LlamaConfig(**COMMON, num_hidden_layers=2, attention_bias=True),
        {"norm_before_fc": True, "norm_before_residual": True},
    ),
}


def record(folder: Path, layer: LlamaConfig | Qwen3Config, flags: dict[str, bool]) -> None:
    """One head, and its drafts."""
    torch.manual_seed(len(folder.name))
    layer._attn_implementation = "eager"
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=DRAFT_V,
        eagle_aux_hidden_state_layer_ids=[1, 2, 3],
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=STEPS)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"]),
        ),
        **flags,
    )
    head = Eagle3DraftModel(config)
    chosen = torch.randperm(V)[:DRAFT_V].sort().values
    with torch.no_grad():
        for name, tensor in head.named_parameters():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if "norm" in name else torch.randn_like(tensor) * 0.3)
        head.d2t.copy_(chosen - torch.arange(DRAFT_V))
        head.t2d.copy_(torch.isin(torch.arange(V), chosen))
    features = torch.randn(1, TOKENS, TAPS * WIDTH)
    tokens = torch.randint(0, V, (1, TOKENS))
    with torch.no_grad():
        drafted = head.eval()(features, tokens, torch.zeros_like(tokens), ttt_steps=STEPS)
    head.save_pretrained(folder)
    (folder / "config.py").unlink()  # the library's own code
    file = folder / "config.json"
    said = {key: value for key, value in json.loads(file.read_text("utf-8")).items() if key != "auto_map"}
    file.write_text(json.dumps(said, indent=1) + "\n", "utf-8")
    (folder / "model.safetensors").chmod(0o644)
    said = {
        "features": features.view(TOKENS, TAPS, WIDTH).tolist(),
        "tokens": tokens[0].tolist(),
        "drafted": [chosen[step[0]].tolist() for step in drafted],
    }
    (folder / "said.json").write_text(json.dumps(said) + "\n", "utf-8")


if __name__ == "__main__":
    for name, (layer, flags) in HEADS.items():
        record(Path(sys.argv[0]).parent / name, layer, flags)
