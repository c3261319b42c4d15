"""GGUF files, written here as llama.cpp writes them, on every runtime and against transformers' own reading."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from specdec_engine.errors import ModelUnavailable
from specdec_engine.models.gguf_files import beside
from specdec_engine.models.loading import find_model, load_model
from specdec_engine.models.options import LoadOptions
from specdec_engine.models.progress import silent
from specdec_engine.runtime.target import ModelTarget
from tests.fakes import ScriptedDrafter, byte_tokenizer, emitted, run, save_gguf, tiny_llama
from tests.models import llama_cpp

TOKENS = torch.arange(4, 40)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path_factory.getbasetemp() / "specdec-cache"))


@pytest.fixture(scope="module", params=["Q4_0", "Q4_1", "Q8_0", "F16"])
def file(request, tmp_path_factory):
    return save_gguf(tmp_path_factory.mktemp("gguf") / f"tiny.{request.param}.gguf", request.param)


@pytest.fixture(scope="module")
def theirs(file):
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with torch.inference_mode():
        return model(TOKENS[None]).logits[0]


@pytest.mark.parametrize("runtime", ["generic", "lean"])
def test_float32_logits_are_those_of_transformers(file, theirs, runtime):
    loaded = load_model(str(file), LoadOptions(dtype="float32", runtime=runtime))
    assert loaded.runtime.name == runtime
    assert torch.allclose(loaded.runtime.forward(TOKENS, len(TOKENS)), theirs, atol=1e-3)


def test_packed_logits_are_near(file, theirs):
    """To bfloat16's rounding; a wrong scale, nibble or row order is off by the logits' own spread."""
    loaded = load_model(str(file), LoadOptions())
    assert loaded.weights == ("bfloat16" if "F16" in file.name else "int8" if "Q8" in file.name else "int4")
    found = loaded.runtime.forward(TOKENS, len(TOKENS)).float()
    assert (found - theirs).pow(2).mean().sqrt() < 0.05 * theirs.std()


def test_it_decodes_like_any_other_target(file):
    loaded = load_model(str(file), LoadOptions(dtype="float32"))
    generic = load_model(str(file), LoadOptions(dtype="float32", runtime="generic"))
    nothing = ScriptedDrafter(lambda c, k: [])
    repeated = ScriptedDrafter(lambda c, k: [c[-1]] * k)
    plain, ours, drafted = (
        emitted(run(ModelTarget(model.runtime, "gguf"), drafter, [5, 6, 7], max_tokens=40))
        for model, drafter in ((generic, nothing), (loaded, nothing), (loaded, repeated))
    )
    assert plain == ours == drafted


def test_its_header_is_read_once_and_again_if_the_file_changes(file, tmp_path, monkeypatch):
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(file.read_bytes())
    first = beside(copy, "copy", silent)
    with monkeypatch.context() as patched:
        patched.setattr("specdec_engine.models.gguf_files._make", None)
        assert beside(copy, "copy", silent) == first
    save_gguf(copy, "F16", seed=3)
    assert beside(copy, "copy", silent) != first


def test_an_architecture_whose_names_we_do_not_know_is_left_to_transformers(file, theirs, monkeypatch):
    monkeypatch.setattr("specdec_engine.models.gguf_files._MEMBERS", ())
    monkeypatch.setattr("specdec_engine.models.gguf_files.LAYOUT", "unknown")
    loaded = load_model(str(file), LoadOptions(dtype="float32"))
    assert loaded.runtime.name == "generic"
    assert "known to transformers only" in loaded.remark
    assert torch.allclose(loaded.runtime.forward(TOKENS, len(TOKENS)), theirs, atol=1e-3)


@pytest.mark.parametrize("runtime", ["generic", "lean"])
@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_a_stretched_rotation_is_read(kind, runtime, tmp_path):
    """transformers drops it from the config, and would rotate every position wrongly."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    model = tiny_llama(hidden=64, vocab=len(byte_tokenizer()), tie_word_embeddings=True, rope_parameters=rope)
    file = save_gguf(tmp_path / "stretched.gguf", "F16", scaling=(kind, 4.0, 16), model=model)
    loaded = load_model(str(file), LoadOptions(dtype="float32", runtime=runtime))
    with torch.inference_mode():
        expected = model(TOKENS[None]).logits[0]
    found = loaded.runtime.forward(TOKENS, len(TOKENS))
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_a_rotation_of_a_part_of_each_head_is_refused(tmp_path, monkeypatch):
    def part(writer, size):
        writer.add_key_length(size)
        writer.add_uint32("llama.rope.dimension_count", size // 2)

    monkeypatch.setattr("gguf.GGUFWriter.add_rope_dimension_count", part)
    with pytest.raises(ModelUnavailable, match=r"says llama.rope.dimension_count = 8, which is not read"):
        load_model(str(save_gguf(tmp_path / "part.gguf", "F16")), LoadOptions())


def test_a_rotation_that_is_stretched_otherwise_is_refused_and_not_left_out(tmp_path):
    file = save_gguf(tmp_path / "scaled.gguf", "F16", scaling=("longrope", 4.0, 16))
    with pytest.raises(ModelUnavailable, match=r"says llama.rope.scaling.type = longrope, which is not read"):
        load_model(str(file), LoadOptions())


_SMALL = {
    "vocab_size": len(byte_tokenizer()), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
    "pad_token_id": 0,
}  # fmt: skip
_LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "long_factor": [4.0] * 8, "short_factor": [1.1 + i / 8 for i in range(8)],
    "original_max_position_embeddings": 64,
}  # fmt: skip
_OTHERS = {
    "gemma2": ("Gemma2Config", {"head_dim": 32, "sliding_window": 5, "query_pre_attn_scalar": 32}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 32, "sliding_window": 5, "query_pre_attn_scalar": 32}),
    "phi3": ("Phi3Config", {"tie_word_embeddings": False, "sliding_window": 8}),
    "phi3, 128k": ("Phi3Config", {"tie_word_embeddings": False, "sliding_window": None, "rope_parameters": _LONG}),
    "granite": (
        "GraniteConfig",
        {
            "embedding_multiplier": 3.0, "residual_multiplier": 0.3, "attention_multiplier": 0.2, "logits_scaling": 2.5,
        },
    ),
    "smollm3": ("SmolLM3Config", {}),
    "olmo2": ("Olmo2Config", {}),
    "olmo2, version 3": ("Olmo3Config", {"sliding_window": 5}),
    "exaone4": ("Exaone4Config", {"sliding_window": None, "layer_types": ["full_attention"] * 6}),
    "exaone4, 32B": ("Exaone4Config", {"sliding_window": 5}),
    "glm4": ("Glm4Config", {"head_dim": 16}),
    "command-r": ("CohereConfig", {"logit_scale": 0.3}),
    "cohere2": ("Cohere2Config", {"sliding_window": 5, "logit_scale": 0.3}),
}  # fmt: skip


@pytest.fixture(scope="module", params=_OTHERS)
def other(request, tmp_path_factory):
    """A GGUF of another architecture, and the model that it is of. Norms are no ones, which would hide mistakes."""
    name, more = _OTHERS[request.param]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**_SMALL, **more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
    arch = request.param.partition(",")[0]
    folder = tmp_path_factory.mktemp(arch)
    return [save_gguf(folder / f"{kind}.gguf", kind, arch=arch, model=model) for kind in ("F16", "Q4_0")], model


@pytest.mark.parametrize("kind", ["F16", "MXFP4"])
def test_gpt_oss_computes_what_its_model_does(kind, tmp_path):
    """Stretched, by bounds that are not rounded, with sinks, biases of experts and every other layer in a window; packed in
    the 4 bits in which it is published, to the very numbers."""
    rope = {
        "rope_type": "yarn", "factor": 8.0, "rope_theta": 150000.0, "original_max_position_embeddings": 16,
        "truncate": False, "beta_fast": 32.0, "beta_slow": 1.0,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        **_SMALL, head_dim=32, sliding_window=5, num_local_experts=4, num_experts_per_tok=2, rope_parameters=rope
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, std=0.2)
            if name.endswith("norm.weight"):
                parameter += 1
            elif kind == "MXFP4" and parameter.dim() > 1:  # numbers that it has
                codes = torch.tensor([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 16
                parameter.copy_(codes[(parameter[..., None] - codes).abs().argmin(-1)])
    file = save_gguf(tmp_path / "gpt-oss.gguf", kind, arch="gpt-oss", model=model, scaling=("yarn", 8.0, 16))
    loaded = load_model(str(file), LoadOptions(dtype="float32"))
    assert loaded.runtime.name == "lean"
    with torch.inference_mode():
        expected = model(TOKENS[None]).logits[0]
    found = loaded.runtime.forward(TOKENS, len(TOKENS))
    assert (found - expected).abs().max() < (1e-4 if kind == "MXFP4" else 0.03) * expected.abs().max()
    with pytest.raises(ModelUnavailable, match="which only the lean runtime reads"):
        load_model(str(file), LoadOptions(dtype="float32", runtime="generic"))


@pytest.mark.parametrize("runtime", ["generic", "lean"])
def test_other_architectures_compute_what_their_models_do(other, runtime):
    (file, _), model = other
    loaded = load_model(str(file), LoadOptions(dtype="float32", runtime=runtime))
    assert loaded.runtime.name == runtime
    with torch.inference_mode():
        expected = model(TOKENS[None]).logits[0]
    found = loaded.runtime.forward(TOKENS, len(TOKENS))
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()  # what rounding to float16 may do


@pytest.mark.parametrize("case", llama_cpp.CASES)
def test_llama_cpp_computes_the_same(case, tmp_path):
    """To the 16 bits in which it keeps keys and values; what it said is recorded."""
    runtime = load_model(str(llama_cpp.save(case, tmp_path)), LoadOptions(dtype="float32")).runtime
    record = json.loads(llama_cpp.RECORD.read_text("utf-8"))[case]
    window = llama_cpp.CASES[case][2].get("sliding_window") or min(map(int, record)) + 1
    assert min(map(int, record)) < window < max(map(int, record)), "both sides of it are looked at"
    for length, told in record.items():
        runtime.rollback(0)
        found = runtime.forward(torch.tensor(llama_cpp.PROMPT[: int(length)]), 1)[-1].log_softmax(-1)
        assert all(found[int(token)].item() == pytest.approx(expected, abs=0.05) for token, expected in told.items())


def test_other_architectures_stay_packed(other):
    (_, file), _ = other
    packed = load_model(str(file), LoadOptions())
    assert packed.weights == "int4"
    dense = load_model(str(file), LoadOptions(dtype="float32", runtime="generic")).runtime.forward(TOKENS, len(TOKENS))
    found = packed.runtime.forward(TOKENS, len(TOKENS)).float()
    assert (found - dense).pow(2).mean().sqrt() < 0.05 * dense.std()


@pytest.mark.parametrize("given", ["first", "last", "folder"])
@pytest.mark.parametrize("runtime", ["generic", "lean"])
def test_a_file_in_parts_is_read_by_any_of_them(given, runtime, tmp_path):
    whole = save_gguf(tmp_path / "whole.gguf", "Q4_0")
    (tmp_path / "cut").mkdir()
    save_gguf(tmp_path / "cut" / "cut.gguf", "Q4_0", tensors_a_part=8)
    parts = sorted((tmp_path / "cut").iterdir())
    assert len(parts) == 3
    name = {"first": parts[0], "last": parts[-1], "folder": tmp_path / "cut"}[given]
    options = LoadOptions(dtype="float32", runtime=runtime)
    found, expected = (load_model(str(path), options).runtime.forward(TOKENS, 4) for path in (name, whole))
    assert torch.equal(found, expected)


def test_a_part_without_the_others_names_the_missing_one(tmp_path):
    save_gguf(tmp_path / "cut.gguf", "F16", tensors_a_part=8)
    (tmp_path / "cut-00002-of-00003.gguf").unlink()
    with pytest.raises(
        ModelUnavailable, match=r"one of 3 files of a GGUF, of which cut-00002-of-00003.gguf is not beside"
    ):
        load_model(str(tmp_path / "cut-00001-of-00003.gguf"), LoadOptions())
    alone = (tmp_path / "cut-00001-of-00003.gguf").rename(tmp_path / "alone.gguf")
    with pytest.raises(ModelUnavailable, match="one of 3 files of a GGUF, and its name does not say so"):
        load_model(str(alone), LoadOptions())


def test_a_download_that_was_cut_short_says_so(file, tmp_path):
    short = tmp_path / "short.gguf"
    short.write_bytes(file.read_bytes()[:-20_000])
    with pytest.raises(ModelUnavailable, match=r"short.gguf is damaged or cut short"):
        load_model(str(short), LoadOptions())


def test_memory_is_reckoned_packed(file):
    """An 8B model in 4 bits must not be refused for what it would need in 16."""
    packed, dense = (find_model(str(file), LoadOptions(quantize=q)).need.weights for q in ("auto", "none"))
    bits = {"Q4_0": 4.5, "Q4_1": 5.0, "Q8_0": 8.5, "F16": 16.0}[file.name.split(".")[1]]
    assert packed / dense == pytest.approx(bits / 16, rel=0.3)  # norms are not packed


def test_a_gguf_with_tensors_that_its_config_does_not_have_is_refused(tmp_path):
    """Command R+ norms queries and keys: without that it would compute another function."""
    config = transformers.CohereConfig(**_SMALL, logit_scale=0.3, use_qk_norm=True)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ModelUnavailable, match=r"norms queries and keys by a matrix"):
        load_model(str(save_gguf(tmp_path / "plus.gguf", "F16", arch="command-r", model=model)), LoadOptions())
