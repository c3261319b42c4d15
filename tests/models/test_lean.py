"""The lean forward against transformers' own: same logits, same greedy tokens, for every member of its family."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from specdec_engine.drafters.on_runtime import RuntimeDrafter
from specdec_engine.errors import OutOfMemory, UsageError
from specdec_engine.models.loading import load_model
from specdec_engine.models.options import LoadOptions
from specdec_engine.runtime import native
from specdec_engine.runtime.cpu import whole
from specdec_engine.runtime.decoder import Decoder, paired
from specdec_engine.runtime.lean import read_together
from specdec_engine.runtime.linear import Joined, project
from specdec_engine.runtime.native import Reading
from specdec_engine.runtime.ops import TORCH
from specdec_engine.runtime.shape import Unsupported, shape_of
from specdec_engine.runtime.target import ModelTarget
from specdec_engine.runtime.torch_forms import torch_packs
from tests.fakes import CPU, VOCAB, ScriptedDrafter, StateWeights, emitted, events, graph, host, lean, run, tiny_llama
from tests.models.test_architectures import build

WINDOWED = ["sliding_attention", "full_attention"] * 2
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "long_factor": [4.0] * 4, "short_factor": [1.5] * 4}
GROWING = YARN | {
    "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3, "original_max_position_embeddings": 60,
}  # fmt: skip
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
FAMILY = {
    "llama": ("LlamaConfig", {}),
    "llama, tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama with biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama, every head its own keys": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama3's rotation": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "yarn": ("LlamaConfig", {"rope_parameters": YARN}),
    "linear scaling": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ),
    "mistral with a window": ("MistralConfig", {"sliding_window": 5}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2 with windows": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 5, "layer_types": WINDOWED}),
    "llama with a window that its own model ignores": ("LlamaConfig", {"sliding_window": 5}),
    "qwen3": ("Qwen3Config", {}),
    "qwen3 with biases": ("Qwen3Config", {"attention_bias": True}),
    "qwen3, wide heads": ("Qwen3Config", {"head_dim": 16}),
    "ministral": ("MinistralConfig", {"sliding_window": 5, "layer_types": WINDOWED}),
    "phi3": ("Phi3Config", {"sliding_window": None}),
    "phi3 with a window": ("Phi3Config", {"sliding_window": 5}),
    "phi3, half of each head rotated": ("Phi3Config", {"rope_parameters": PARTIAL}),
    "granite": (
        "GraniteConfig",
        {
            "embedding_multiplier": 3.0, "residual_multiplier": 0.3, "attention_multiplier": 0.2, "logits_scaling": 2.5,
            "attention_bias": True, "mlp_bias": True,
        },
    ),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 2}),
    "smollm3, tied, all layers rotated": ("SmolLM3Config", {"no_rope_layers": [1] * 4, "tie_word_embeddings": True}),
    "olmo2": ("Olmo2Config", {}),
    "exaone4": ("Exaone4Config", {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
    "gemma": ("GemmaConfig", {}),
    "gemma2": ("Gemma2Config", {"sliding_window": 5, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 5, "layer_types": WINDOWED, "query_pre_attn_scalar": 12}),
    "gemma3, stretched without a window": (
        "Gemma3TextConfig",
        {
            "sliding_window": 5, "layer_types": WINDOWED, "final_logit_softcapping": 4.0, "attention_bias": True,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
            },
        },
    ),
    "glm": ("GlmConfig", {"attention_bias": True, "head_dim": 16}),
    "glm4": ("Glm4Config", {"head_dim": 16}),
    "cohere": ("CohereConfig", {"attention_bias": True, "logit_scale": 0.3}),
    "cohere2": ("Cohere2Config", {"sliding_window": 5, "layer_types": WINDOWED, "tie_word_embeddings": False}),
    "ministral3": ("Ministral3Config", {"head_dim": 16, "rope_parameters": GROWING}),
    "ministral3 with a window": ("Ministral3Config", {"sliding_window": 5, "head_dim": 16, "rope_parameters": GROWING}),
    "olmo3": ("Olmo3Config", {"sliding_window": 5}),
    "olmo3, stretched without a window": (
        "Olmo3Config",
        {
            "sliding_window": 5,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
                "full_attention": {
                    "rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0, "original_max_position_embeddings": 64,
                },
            },
        },
    ),
    "exaone4 with windows": ("Exaone4Config", {"sliding_window": 5, "layer_types": WINDOWED}),
    "gpt_oss": (
        "GptOssConfig",
        {"head_dim": 16, "sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 0.5},
    ),
    "mixtral": ("MixtralConfig", {"sliding_window": 5, "num_local_experts": 4}),
    "qwen3 with experts": (
        "Qwen3MoeConfig",
        {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True},
    ),
    "qwen3 with experts in some layers": (
        "Qwen3MoeConfig",
        {
            "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2,
            "norm_topk_prob": False, "mlp_only_layers": [1], "decoder_sparse_step": 2,
        },
    ),
}  # fmt: skip
OTHERWISE = ("cohere", "granite", "olmo", "exaone4", "gemma", "glm4", "gpt_oss", "mixtral", "qwen3 with experts")
PLAIN = [name for name in FAMILY if not name.startswith(OTHERWISE)]
"""What kernels of our own do a layer of in one call."""


def made(name):
    """Random norms and biases too: transformers would begin with ones and zeros, which hide mistakes."""
    model = build(*FAMILY[name])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def test_float32_stays_float32_where_wide_passes_are_faster_in_bfloat16():
    """As with AMX: a narrower cache may be read so, and no other."""
    model = made("llama")
    tokens = torch.randint(0, 97, (300,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        scratch = model(tokens[None], use_cache=False).logits[0]
    runtime = lean(model, capacity=16, ops=replace(TORCH, few=0, wide_dtype=torch.bfloat16))
    for start, end in ((0, 100), (100, 300)):
        assert torch.allclose(runtime.forward(tokens[start:end], end - start), scratch[start:end], atol=1e-3)


@pytest.mark.parametrize("ops", [None, TORCH], ids=["", "as on a GPU"])
@pytest.mark.parametrize("name", FAMILY)
def test_logits_equal_transformers_through_rollbacks_and_cache_growth(name, ops):
    """The cache begins with 16 places, and each pass is followed by junk that is rolled back; attention is worked out in
    parts of 128 places."""
    model = made(name)
    tokens = torch.randint(0, 97, (803,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        scratch = model(tokens[None], use_cache=False).logits[0]
    runtime = lean(model, capacity=16, ops=ops)
    ends, junks = (9, 14, 15, 24, 60, 380, 383, 386, 387, 797, 800, 801, 803), (6, 3, 8, 1, 2, 2, 1, 4, 2, 1, 2, 9, 3)
    for start, end, junk in zip((0, *ends), ends, junks, strict=False):
        logits = runtime.forward(tokens[start:end], end - start)
        assert torch.allclose(logits, scratch[start:end], atol=1e-3), f"tokens {start} to {end}"
        runtime.forward(torch.arange(junk), 1)
        runtime.rollback(end)
    assert runtime.capacity >= 803


@pytest.fixture(scope="module")
def own():
    if native.kernels() is None:
        pytest.skip(native.why_none())
    return native.kernels()


@pytest.mark.parametrize("name", PLAIN)
def test_a_layer_in_one_call_is_the_same_operation_by_operation(name, own):
    """To the bit, on matrices packed in 4 and 8 bits and dense ones, biases, windows and norms of heads; and a row alone is
    the row among others."""
    model = build(FAMILY[name][0], FAMILY[name][1] | {"hidden_size": 64, "intermediate_size": 96})
    tokens = torch.randint(0, 97, (203,), generator=torch.Generator().manual_seed(1))
    for quantize in ("none", "int8", "int4"):
        whole = lean(model, quantize=quantize, kernels=own)
        assert all(layer.fields is not None for layer in whole.decoder.layers)
        apart = lean(model, quantize=quantize, kernels=own)
        apart.decoder.layers = [replace(layer, fields=None) for layer in apart.decoder.layers]
        logits = [
            torch.cat([runtime.forward(part, len(part)) for part in tokens.split(29)]) for runtime in (whole, apart)
        ]
        assert torch.equal(*logits)
        whole.rollback(20)
        assert torch.equal(torch.cat([whole.forward(token, 1) for token in tokens[20:60].split(1)]), logits[0][20:60])


@pytest.mark.parametrize("reading", ["alike", "tiles"])
def test_two_threads_say_what_one_says(reading, own):
    """To the bit: how the work is shared out changes no sum."""
    model, threads = build(FAMILY["qwen3"][0], FAMILY["qwen3"][1] | {"hidden_size": 64}), torch.get_num_threads()
    tokens, found = torch.randint(0, 97, (190,), generator=torch.Generator().manual_seed(3)), []
    try:
        for threads_now in (1, 2, 3):
            torch.set_num_threads(threads_now)
            runtime = lean(model, quantize="int8", kernels=own.reading_as(reading if own.tiled else "alike"))
            runtime.forward(tokens[:100], 1)
            found.append(torch.cat([runtime.forward(part, len(part)) for part in tokens[100:].split(29)]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("reading", get_args(Reading))
@pytest.mark.parametrize("name", PLAIN)
def test_a_prompt_is_the_same_alone_and_together(name, reading, own):
    """One call and operation by operation give the same bits: too short for tiles, for our own attention,
    and for torch's. What is verified after it is not read so, nor is a draft's pass that asks for more than its last row."""
    if reading == "tiles" and not own.tiled:
        pytest.skip("no tiles of bfloat16 (AMX)")
    model = build(FAMILY[name][0], FAMILY[name][1] | {"hidden_size": 64, "intermediate_size": 96})
    first = lean(model, quantize="int8", kernels=own.reading_as(reading))
    first.tap((0,))
    seed = torch.Generator().manual_seed(2)
    for lengths in ((10, 300), (40, 70, 100)):
        prompts = [torch.randint(0, 97, (n,), generator=seed) for n in lengths]
        together = [first.another() for _ in prompts]
        read_together(together, prompts)
        for prompt, found in zip(prompts, together, strict=True):
            alone, n = first.another(), len(prompt)
            alone.forward(prompt, 1)
            assert torch.equal(alone.features(0, n), found.features(0, n))
            assert torch.equal(alone._cache[:, :, :n], found._cache[:, :, :n])
            rows = alone.forward(prompt[:30], len(prompt[:30]))
            assert torch.equal(torch.cat([found.forward(token, 1) for token in prompt[:30].split(1)]), rows)
            alone.rollback(n)
            assert torch.equal(alone.forward(prompt[:30], len(rows) - 2), rows[2:])


def test_matrices_that_lie_beside_each_other_are_multiplied_in_one_call(own):
    """Where a file packs queries, keys and values in different ways."""
    model = tiny_llama(hidden=64)
    plain, joined = (lean(model, quantize="int8", kernels=own) for _ in range(2))
    decoder, shape = joined.decoder, joined.decoder.shape
    attention = model.model.layers[0].self_attn
    stored = {
        "q": attention.q_proj.weight[paired(shape.heads, shape.head_size)],
        "k": attention.k_proj.weight[paired(shape.kv_heads, shape.head_size)],
        "v": attention.v_proj.weight,
    }
    parts = [project([matrix.detach()], None, torch.float32, CPU, "int8", own) for matrix in stored.values()]
    first, *rest = decoder.layers
    decoder.layers = [whole(replace(first, qkv=Joined(parts), fields=None), shape), *rest]
    assert tuple(decoder.layers[0].fields.many) == (3, 1, 1, 1)
    assert torch.equal(*(runtime.forward(torch.arange(9), 9) for runtime in (plain, joined)))


@pytest.mark.parametrize(
    "name", [name for name in FAMILY if "ignores" not in name]
)  # `generate`'s cache does not ignore it
def test_greedy_output_equals_transformers_generate(name):
    model = made(name)
    prompt = [5, 6, 7, 8]
    plain = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=30, eos_token_id=None)
    plain = plain[0, 4:].tolist()
    half_right = ScriptedDrafter(
        lambda c, k: [t if (len(c) + i) % 3 else 1 for i, t in enumerate(plain[len(c) - 4 :][:k])]
    )
    found = run(ModelTarget(lean(model), name), half_right, prompt, k=4, max_tokens=30)
    assert emitted(found) == plain


@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        ("StableLmConfig", {}, "stablelm is not one of"),
        ("CohereConfig", {"use_qk_norm": True}, "norms queries and keys by a matrix"),
        ("Ministral3Config", {"rope_parameters": YARN}, "how its queries grow"),
        ("LlamaConfig", {"hidden_act": "gelu"}, "activation is gelu"),
        (
            "LlamaConfig",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
            "type dynamic",
        ),
        (
            "LlamaConfig",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
            "part of each head",
        ),
    ],
)
def test_what_it_would_not_compute_exactly_is_left_to_the_generic_runtime(config, options, reason):
    with pytest.raises(Unsupported, match=reason):
        shape_of(build(config, options).config)


def test_a_head_of_its_own_is_used_where_the_config_says_tied():
    """As transformers does: it ties only what is missing or the same."""
    model = tiny_llama(tie_word_embeddings=True)
    weights = StateWeights(model)
    weights._state = {**weights._state, "lm_head.weight": 2 * model.lm_head.weight.detach()}
    doubled = Decoder(shape_of(model.config), weights, torch.float32, CPU, "none")
    tokens, plain = torch.arange(5), lean(model)
    found = type(plain)(doubled, "doubled", 64, 16).forward(tokens, 5)
    assert torch.allclose(found, 2 * plain.forward(tokens, 5), atol=1e-4)


@pytest.mark.parametrize("make", [lean, graph])
def test_a_run_after_one_that_outgrew_the_cache(make):
    """The new cache was made in the middle of a draft; the next run clears it."""
    model = tiny_llama(max_position_embeddings=1024)
    target = ModelTarget(lean(model), "tiny")
    drafter = RuntimeDrafter(make(model, capacity=16), host(VOCAB), "itself")
    prompt = list(range(5, 200))
    first, second = (emitted(run(target, drafter, prompt, k=4, max_tokens=120)) for _ in range(2))
    assert first == second
    assert drafter.runtime.capacity > 256


@pytest.mark.parametrize("make", [lean, graph])
def test_a_run_that_broke_leaves_nothing_to_the_next(make):
    """A token whose embedding is not a number: its keys and values are behind the mask of the next run, or gone."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    runtime, clean = make(model), make(model)
    runtime.forward(torch.tensor([1, 7, 7]), 1)
    runtime.rollback(0)
    found, expected = (each.forward(torch.tensor([4]), 1) for each in (runtime, clean))
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_checkpoint_with_other_tensors_is_not_guessed_at():
    """A fine-tune with further tensors under a known model type must not run without them."""
    model = tiny_llama()
    extra, short = StateWeights(model), StateWeights(model)
    extra._state["model.layers.0.self_attn.sinks"] = torch.zeros(4)
    del short._state["model.layers.1.mlp.up_proj.weight"]
    silent = StateWeights(
        tiny_llama(attention_bias=True)
    )  # biases where the config has none: transformers ignores them
    with pytest.raises(Unsupported, match=r"8 tensors .* model.layers.0.self_attn.k_proj.bias"):
        Decoder(shape_of(model.config), silent, torch.float32, CPU, "none")
    unknown, missing = "1 tensors .* model.layers.0.self_attn.sinks", "no model.layers.1.mlp.up_proj.weight"
    for weights, reason in ((extra, unknown), (short, missing)):
        with pytest.raises(Unsupported, match=reason):
            Decoder(shape_of(model.config), weights, torch.float32, CPU, "none")


def test_growing_asks_before_it_takes(monkeypatch):
    """A CPU's memory is granted when it is written to: twice the room, else just enough, else a clean end."""
    runtime = lean(tiny_llama(), capacity=64)
    token = runtime.decoder.shape.kv_values * 4  # in float32
    for free, capacity in ((200 * token, 128), (100 * token, 80)):
        monkeypatch.setattr("specdec_engine.runtime.lean.free_bytes", lambda device, free=free: free)
        runtime = lean(tiny_llama(), capacity=64)
        runtime.forward(torch.arange(70), 1)
        assert runtime.capacity == capacity
    with pytest.raises(OutOfMemory, match="for 112 tokens needs"):
        runtime.forward(torch.arange(40), 1)
    assert runtime.cached == 70


def test_memory_that_runs_out_while_the_cache_grows_is_a_clean_end(monkeypatch):
    """What was emitted stands, and the message says what fitted."""
    runtime = lean(tiny_llama(), capacity=16)

    def refuse(capacity):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99999999999 bytes")

    monkeypatch.setattr(runtime.decoder, "new_cache", refuse)
    found = events(ModelTarget(runtime, "tiny"), ScriptedDrafter(lambda c, k: []), list(range(10)), max_tokens=30)
    seen = []
    with pytest.raises(OutOfMemory, match="cache of lean for 32 tokens") as caught:
        seen.extend(found)
    assert "16 tokens fit" in caught.value.hint
    assert len(emitted(seen)) == 7  # 9 of the prompt and 7 more are cached; the next pass needs a 17th place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", ["none", "int8", "int4", "light"])
def test_two_runtimes_share_a_decoder_and_not_a_cache(dtype, quantize):
    if quantize != "none" and dtype == torch.float32:
        pytest.skip("packed weights compute in bfloat16")
    model = tiny_llama(hidden=64, max_position_embeddings=64)
    first = lean(model, dtype=dtype, quantize=quantize)
    second = type(first)(first.decoder, "second", 64, 16)
    first.forward(torch.arange(9), 1)
    alone = second.forward(torch.arange(5, 9), 4)
    first.rollback(0)
    assert torch.equal(first.forward(torch.arange(5, 9), 4), alone)


@pytest.mark.parametrize(("quantize", "closeness"), [("none", 0.02), ("int8", 0.04), ("light", 0.04), ("int4", 0.35)])
@pytest.mark.parametrize("n", [20, 90])
def test_quantized_logits_stay_near(quantize, closeness, n):
    """Relative to the logits' spread; half as much again as was measured. A wrong scale is off by 1 and more. Wide passes
    unpack weights, and their attention may be in bfloat16."""
    model = tiny_llama(hidden=64, initializer_range=0.1)
    tokens = torch.arange(n)
    with torch.inference_mode():
        expected = model(tokens[None], use_cache=False).logits[0]
    found = lean(model, dtype=torch.bfloat16, quantize=quantize).forward(tokens, n).float()
    assert (found - expected).pow(2).mean().sqrt() < closeness * expected.std()


@pytest.mark.parametrize("name", ["mistral with a window", "qwen3", "llama"])
def test_attention_of_a_wide_pass_may_be_in_bfloat16(monkeypatch, name):
    """As on a CPU with AMX, against the same passes without: a window, norms of heads, 203 cached."""
    model = build(*FAMILY[name]).eval()
    tokens = torch.arange(400) % 90
    logits = []
    for tiled in (False, True):
        monkeypatch.setattr("specdec_engine.runtime.cpu._tiled", lambda tiled=tiled: tiled)
        runtime = lean(model, dtype=torch.bfloat16)
        runtime.forward(tokens[:203], 1)
        logits.append(runtime.forward(tokens[203:], 197).float())
    assert not torch.equal(*logits)
    assert (logits[0] - logits[1]).pow(2).mean().sqrt() < 0.05 * logits[0].std()


def test_auto_takes_the_lean_runtime_and_says_so(checkpoint):
    loaded = load_model(str(checkpoint), LoadOptions(dtype="float32"))
    assert (loaded.runtime.name, loaded.weights, loaded.remark) == ("lean", "float32", "")
    forced = load_model(str(checkpoint), LoadOptions(dtype="float32", runtime="generic"))
    assert (forced.runtime.name, forced.remark) == ("generic", "--runtime generic was asked for")
    assert forced.parameters == loaded.parameters


def test_a_drafts_dense_weights_are_packed_where_they_can_be(checkpoint):
    """Not in float32, and not where the draft's own form is asked for."""
    if not torch_packs():
        pytest.skip("no packed kernels on this CPU")
    for options, weights in [
        (LoadOptions(dtype="bfloat16"), "int8"),
        (LoadOptions(dtype="bfloat16", quantize="int4"), "int8"),
        (LoadOptions(dtype="bfloat16", draft_quantize="none"), "bfloat16"),
        (LoadOptions(dtype="bfloat16", draft_quantize="int4"), "int4"),
        (LoadOptions(), "int8"),
        (LoadOptions(draft_quantize="int4"), "int4"),
        (LoadOptions(dtype="float32"), "float32"),
        (LoadOptions(dtype="bfloat16", runtime="generic"), "bfloat16"),
    ]:
        loaded = load_model(str(checkpoint), options.for_draft())
        assert loaded.weights == weights
        assert (loaded.weight_bytes < 2 * loaded.parameters) == weights.startswith("int")


def test_quantize_is_refused_where_it_cannot_be_done(checkpoint):
    with pytest.raises(UsageError, match="cannot be packed to int8 on cpu in dtype float32"):
        load_model(str(checkpoint), LoadOptions(dtype="float32", quantize="int8"))
    with pytest.raises(UsageError, match="that needs the lean runtime, and --runtime generic was asked for"):
        load_model(str(checkpoint), LoadOptions(runtime="generic", quantize="int8"))
    with pytest.raises(UsageError, match="cannot run on the graph runtime: graphs are recorded on a CUDA device"):
        load_model(str(checkpoint), LoadOptions(runtime="graph"))


def test_longrope_is_computed_up_to_where_it_would_change():
    """Below the original length it rotates by one set of factors; a context ends there."""
    options = {"rope_parameters": LONG, "original_max_position_embeddings": 32, "sliding_window": None}
    model = build("Phi3Config", options)
    tokens = torch.randint(0, 97, (32,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        scratch = model(tokens[None], use_cache=False).logits[0]
    assert torch.allclose(lean(model, capacity=16).forward(tokens, 32), scratch, atol=1e-3)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "granite", "olmo2", "olmo3", "phi3", "smollm3"])
def test_a_model_of_the_kin_drafts_with_its_first_layers_and_packed(name, own):
    """`self:N` cuts what is said of each layer, too; packed weights are those of a checkpoint that fuses matrices."""
    model = build(FAMILY[name][0], FAMILY[name][1] | {"hidden_size": 64, "intermediate_size": 96})
    tokens = torch.randint(0, 97, (20,), generator=torch.Generator().manual_seed(1))
    whole = lean(model)
    cut = whole.first(2)
    assert cut.forward(tokens, 20).shape == (20, 97)
    packed = lean(model, quantize="int8", kernels=own)
    with torch.inference_mode():
        exact, near = whole.forward(tokens, 20), packed.forward(tokens, 20)
    assert (exact - near).square().mean().sqrt() < 0.1 * exact.std()
