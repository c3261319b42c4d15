"""Mixtures of experts on our own forward: the same bits whatever stands beside a row, and from every kind of file."""

from __future__ import annotations

import json
import shutil
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from specdec_engine.errors import ModelUnavailable, SpecdecError
from specdec_engine.models.compatibility import check
from specdec_engine.models.forwards import lean_shape
from specdec_engine.models.loading import find_model, load_model
from specdec_engine.models.options import LoadOptions
from specdec_engine.pair import load_pair
from specdec_engine.runtime import native
from specdec_engine.runtime.lean import read_together
from specdec_engine.runtime.shape import Unsupported
from tests.fakes import CPU, byte_tokenizer, emitted, lean, save_gguf
from tests.models.test_architectures import build

QWEN = {
    "hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 3,
    "norm_topk_prob": True,
}  # fmt: skip
MIXTRAL = {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 4}
KINDS = {"qwen3_moe": ("Qwen3MoeConfig", QWEN), "mixtral": ("MixtralConfig", MIXTRAL)}


@pytest.fixture(scope="module")
def own():
    if native.kernels() is None:
        pytest.skip(native.why_none())
    return native.kernels()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_a_row_alone_is_the_row_among_others(kind, quantize, own):
    """To the bit: experts take other rows each time, and a token's text does not depend on its neighbours."""
    runtime = lean(build(*KINDS[kind]), quantize=quantize, kernels=own)
    tokens = torch.randint(0, 97, (40,), generator=torch.Generator().manual_seed(1))
    together = torch.cat([runtime.forward(part, len(part)) for part in tokens.split(9)])
    runtime.rollback(9)
    assert torch.equal(torch.cat([runtime.forward(token, 1) for token in tokens[9:].split(1)]), together[9:])


GPT_OSS = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2,
}  # fmt: skip
CODES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def in_four_bits(weights):
    """[experts, in, out] -> MXFP4's blocks and scales, as OpenAI stores them."""
    groups = weights.float().transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = (groups.abs().amax(-1) / 6).log2().floor() + 1
    codes = (groups / exponents.exp2()[..., None]).unsqueeze(-1).sub(CODES).abs().argmin(-1).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory):
    """GPT-OSS as it is published: experts in 4 bits, the rest in bfloat16."""
    folder = tmp_path_factory.mktemp("gpt-oss")
    model = build("GptOssConfig", GPT_OSS)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    model.to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = in_four_bits(stored.pop(name))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    apart = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    quantized = {"quantization_config": {"quant_method": "mxfp4", "modules_not_to_convert": apart}}
    config = json.loads((folder / "config.json").read_text()) | quantized
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("how", "weights", "most"), [
    ({"dtype": "float32"}, "float32", 1e-5),
    ({"dtype": "auto"}, "int8", 0.02),
    ({"dtype": "bfloat16", "quantize": "none"}, "bfloat16", 0.05),
])  # fmt: skip
def test_gpt_oss_in_four_bits_is_read_to_the_very_numbers(mxfp4, how, weights, most, own):
    """As transformers unpacks it; packed it is 8 bits, which hold each of the 16 codes."""
    plain = AutoModelForCausalLM.from_pretrained(mxfp4, dtype=torch.float32).eval()
    ids = torch.randint(5, 300, (30,), generator=torch.Generator().manual_seed(3))
    expected = plain(ids[None]).logits[0].detach()
    pair = load_pair(str(mxfp4), "ngram", LoadOptions(device="cpu", threads=1, **how)).asking(ignore_eos=True)
    assert pair.target.runtime.name == "lean"
    assert weights in pair.environment["weights"]
    assert not pair.notes
    assert torch.allclose(pair.target.runtime.forward(ids, 30).float(), expected, atol=most)
    if how == {"dtype": "float32"}:
        text = plain.generate(ids[None], do_sample=False, max_new_tokens=20, eos_token_id=None)[0, 30:].tolist()
        assert emitted(pair.decode(ids.tolist(), k=3, max_tokens=20)) == text


_SHAPES = [lambda t: t[:, :1], lambda t: t[..., :1], lambda t: t.flatten()]


@pytest.mark.parametrize(("part", "change"), [
    *product(("gate_up_proj_scales", "down_proj_blocks", "down_proj_bias"), _SHAPES),
    *product(("gate_up_proj_scales", "down_proj_blocks"), [lambda t: t.short()]),
])  # fmt: skip
def test_codes_and_scales_that_do_not_belong_together_are_refused(mxfp4, part, change, tmp_path):
    """Before a kernel reads as far as one of them says."""
    folder = shutil.copytree(mxfp4, tmp_path / "broken")
    stored = load_file(folder / "model.safetensors")
    name = f"model.layers.1.mlp.experts.{part}"
    changed = {**stored, name: change(stored[name]).contiguous()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SpecdecError):
        load_pair(str(folder), "none", LoadOptions(device="cpu", threads=1))


def test_what_gpt_oss_needs_is_reckoned_by_its_codes(mxfp4):
    stored = load_file(mxfp4 / "model.safetensors")
    codes = 2 * sum(tensor.numel() for name, tensor in stored.items() if name.endswith("_blocks"))
    four, packed, dense = (
        find_model(str(mxfp4), LoadOptions(device="cpu", threads=1, dtype="bfloat16", quantize=form)).need.weights
        for form in ("int4", "auto", "none")
    )
    assert dense - packed == pytest.approx(codes * (2 - 1.125), rel=0.01)
    assert four < packed - codes * (1.125 - 0.7)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_read_together_are_what_each_is_alone(kind, own):
    first = lean(build(*KINDS[kind]), quantize="int8", kernels=own)
    prompts = [torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(n)) for n in (30, 41, 5)]
    runtimes = [first, first.another(), first.another()]
    read_together(runtimes, prompts)
    for prompt, runtime in zip(prompts, runtimes, strict=True):
        alone = first.another()
        alone.forward(prompt, 1)
        assert torch.equal(alone.forward(torch.tensor([7]), 1), runtime.forward(torch.tensor([7]), 1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_runs_on_it_and_says_what_transformers_says(kind, tmp_path):
    name, options = KINDS[kind]
    model = build(name, options)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    prompt = [5, 6, 7, 8, 5, 6, 7]
    plain = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=30, eos_token_id=None)
    options = LoadOptions(device="cpu", dtype="float32", threads=1)
    pair = load_pair(str(tmp_path), "ngram", options).asking(ignore_eos=True)
    assert pair.target.runtime.name == "lean"
    assert emitted(pair.decode(prompt, k=3, max_tokens=30)) == plain[0, len(prompt) :].tolist()
    shape, sizes = pair.target.runtime.decoder.shape, [p.numel() for p in model.parameters()]
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    unread = experts * (1 - shape.mixture.taken / shape.mixture.count)
    assert shape.share_read == pytest.approx(1 - unread / (sum(sizes) - model.lm_head.weight.numel()))
    on_a_gpu = lean_shape(model.config, options, torch.device("cuda"))
    assert isinstance(on_a_gpu, Unsupported)
    assert "on a CPU alone" in str(on_a_gpu)


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_a_gguf_of_qwen3_with_experts_is_read(kind, tmp_path):
    """Its experts lie in three tensors a layer, and stay packed: as in the same file unpacked."""
    size = {"vocab_size": len(byte_tokenizer()), "hidden_size": 64, "intermediate_size": 96}
    model = build("Qwen3MoeConfig", QWEN | size)
    file = str(save_gguf(tmp_path / "m.gguf", kind, arch="qwen3moe", model=model))
    dense = load_model(file, LoadOptions(threads=1, dtype="float32", quantize="none"))
    loaded = dense if kind == "F32" else load_model(file, LoadOptions(threads=1))
    assert loaded.runtime.name == "lean"
    tokens = torch.randint(0, 97, (20,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(tokens[None]).logits[0] if kind == "F32" else dense.runtime.forward(tokens, 20)
    found = loaded.runtime.forward(tokens, 20).float()
    assert (found - expected).square().mean().sqrt() < (1e-4 if kind == "F32" else 0.03) * expected.std()
    assert loaded.weight_bytes <= loaded.parameters * {"F32": 4, "Q8_0": 2, "Q4_0": 1.5}[kind]
    assert loaded.runtime.device == CPU


@pytest.mark.parametrize(
    ("key", "value"), [("num_experts_per_tok", 0), ("num_experts_per_tok", 9), ("decoder_sparse_step", 0)]
)
@pytest.mark.parametrize("runtime", ["auto", "generic"])
def test_experts_that_cannot_be_taken_are_said(key, value, runtime, tmp_path):
    build("Qwen3MoeConfig", QWEN).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ModelUnavailable, match=f"says {key} = {value}, of 8 experts"):
        load_pair(str(tmp_path), "ngram", LoadOptions(device="cpu", dtype="float32", threads=1, runtime=runtime))


def test_what_a_token_reads_does_not_depend_on_the_runtime(tmp_path):
    """A draft's cost is reckoned by the experts that a token takes, on transformers' forward, too."""
    build("Qwen3MoeConfig", QWEN | {"num_experts": 16, "num_experts_per_tok": 2}).save_pretrained(tmp_path / "t")
    build("LlamaConfig", {}).save_pretrained(tmp_path / "d")
    for folder in ("t", "d"):
        byte_tokenizer().save_pretrained(tmp_path / folder)
    found = [
        check(
            str(tmp_path / "t"), str(tmp_path / "d"), LoadOptions(device="cpu", dtype="float32", runtime=runtime)
        ).figures["c"]
        for runtime in ("auto", "generic")
    ]
    assert found[0] == found[1]
