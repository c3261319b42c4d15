"""`check` and `generate` end alike on every kind of checkpoint; greedy text is the model's own; docs/models.md is true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests.models import checkpoints

DOCS = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.mark.parametrize("name", checkpoints.kinds())
def test_check_and_generate_end_alike(name, tmp_path):
    model = checkpoints.save(name, tmp_path)
    checked, generated = checkpoints.checked(tmp_path), checkpoints.generated(tmp_path)
    assert (checked.runtime, checked.why) == (generated.runtime, generated.why)
    assert checkpoints.row(name, model, checked) in DOCS.read_text("utf-8").splitlines()
    if generated.tokens is not None:
        auto = AutoModelForImageTextToText if name.endswith("ConditionalGeneration") else AutoModelForCausalLM
        model = auto.from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert list(generated.tokens) == greedy(model, len(generated.tokens))


@torch.inference_mode()
def greedy(model, count):
    """By forward passes over all tokens, without a cache. transformers' `generate` numbers the positions of RoBERTa and its
    kin from 0 instead of from the padding's id, and forces BART's last token."""
    tokens = torch.tensor([checkpoints.PROMPT])
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], -1)
    return tokens[0, len(checkpoints.PROMPT) :].tolist()


QUANTIZED = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nobody's": {},
}
CONFIGS = {
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
    "less than no layers": ({"num_hidden_layers": -1}, "num_hidden_layers = -1"),
    "a word for a number": ({"num_hidden_layers": "two"}, "expected int, got str"),
    "nothing for a number": ({"num_attention_heads": None}, "expected int, got NoneType"),
    "heads that do not fit": ({"num_attention_heads": 3}, "not a multiple"),
    "a huge width": ({"hidden_size": 10**12}, "config.json says hidden_size = 1000000000000"),
    "a huge vocabulary": ({"vocab_size": 10**12}, "has the size (320, 64)"),
    "another width": ({"intermediate_size": 96}, "has the size (64, 64), and its config asks for (64, 96)"),
    "an unknown activation": ({"hidden_act": "nope"}, "there is no 'nope'"),
    "an unknown rotation": ({"rope_parameters": {"rope_type": "nope"}}, "there is no 'nope'"),
    "an unknown type": ({"model_type": "nope"}, "'nope', which transformers"),
    "a list for a type": ({"model_type": ["llama"]}, "unhashable"),
    "MLX": ({"quantization": {"group_size": 64, "bits": 4}}, "a checkpoint for MLX"),
    **{name: ({"quantization_config": config}, "quantiz") for name, config in QUANTIZED.items()},
}


@pytest.mark.filterwarnings("ignore")  # transformers' own, of what it then refuses
@pytest.mark.parametrize(("damage", "said"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_cannot_be_followed_is_refused_alike(damage, said, tmp_path):
    checkpoints.save("llama", tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | damage))
    checked = checkpoints.checked(tmp_path)
    assert checked == checkpoints.generated(tmp_path)
    assert checked.why.startswith("ModelUnavailable")
    assert said in checked.why


def test_an_old_mask_beside_the_weights_is_no_code(tmp_path):
    """transformers once saved GPT-2's and GPT-NeoX's causal masks, in bytes."""
    checkpoints.save("gpt2", tmp_path)
    file = tmp_path / "model.safetensors"
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 9, 9, dtype=torch.uint8)}
    save_file(load_file(file) | mask, file, {"format": "pt"})
    assert checkpoints.checked(tmp_path).runtime == checkpoints.generated(tmp_path).runtime == "generic"
    weight = "transformer.h.0.attn.c_attn.weight"
    save_file(load_file(file) | {weight: load_file(file)[weight].to(torch.int8)}, file, {"format": "pt"})
    assert "in I8" in checkpoints.checked(tmp_path).why
