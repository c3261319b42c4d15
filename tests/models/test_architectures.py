"""Which transformers architectures run, and which are refused: real classes with random weights, float32, no download."""

from __future__ import annotations

import pytest
import torch
import transformers

from specdec_engine.core.cycle_types import Draft
from specdec_engine.drafters.on_runtime import RuntimeDrafter
from specdec_engine.errors import ModelUnavailable, PairIncompatible
from specdec_engine.models.loading import find_model
from specdec_engine.models.options import LoadOptions
from specdec_engine.pair import load_pair
from specdec_engine.runtime.generic import GenericRuntime
from specdec_engine.runtime.graphs import GraphRuntime
from specdec_engine.runtime.shape import Unsupported
from specdec_engine.runtime.static import StaticForward
from specdec_engine.runtime.target import ModelTarget
from tests.fakes import CPU, ScriptedDrafter, byte_tokenizer, cycles, emitted, host, run
from tests.models import checkpoints
from tests.tape import TapeRecorder

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
MIXED = ["sliding_attention", "full_attention"] * 2
CONFIGS = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "phi3": ("Phi3Config", {}),
    "olmo2": ("Olmo2Config", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "mistral with a window": ("MistralConfig", {"sliding_window": 5}),
    "qwen2 with a window": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "gemma2": ("Gemma2Config", {"sliding_window": 5}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 5, "layer_types": MIXED}),
    "gpt-oss": (
        "GptOssConfig",
        {
            "sliding_window": 5,
            "layer_types": MIXED,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}


def build(name, options):
    config = getattr(transformers, name)(**{**COMMON, **options})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_after_rollback_are_those_from_scratch(name):
    """Past sliding windows of 5, too: the cache must give back what a window would have dropped."""
    model = build(*CONFIGS[name])
    tokens = torch.randint(0, 97, (24,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        scratch = model(tokens[None], use_cache=False).logits[0]
    runtime = GenericRuntime(model, name)
    for start, end, junk in ((0, 9, 6), (9, 14, 3), (14, 15, 8), (15, 24, 1)):
        logits = runtime.forward(tokens[start:end], end - start)
        assert torch.allclose(logits, scratch[start:end], atol=1e-3), f"tokens {start} to {end}"
        runtime.forward(torch.arange(junk), 1)
        runtime.rollback(end)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_output_equals_transformers_generate(name):
    model = build(*CONFIGS[name])
    prompt = [5, 6, 7, 8]
    plain = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=30, eos_token_id=None)[
        0, 4:
    ].tolist()
    half_right = ScriptedDrafter(
        lambda c, k: [t if (len(c) + i) % 3 else 1 for i, t in enumerate(plain[len(c) - 4 :][:k])]
    )
    found = run(ModelTarget(GenericRuntime(model, name), name), half_right, prompt, k=4, max_tokens=30)
    assert emitted(found) == plain


HYBRIDS = (
    "qwen3_next",
    "qwen3_5_text",
    "granitemoehybrid",
    "lfm2",
    "falcon_h1",
    "mamba2",
    "nemotron_h",
    "recurrent_gemma",
)


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_says_what_transformers_generate_does(name):
    """With drafts that are wrong at each place in turn."""
    model = checkpoints.build(name)
    prompt = [5, 6, 7, 8]
    made = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=30, eos_token_id=None)
    plain = made[0, 4:].tolist()
    drafter = ScriptedDrafter(
        lambda c, k: [t if (len(c) + i) % 3 else 1 for i, t in enumerate(plain[len(c) - 4 :][:k])]
    )
    found = run(ModelTarget(GenericRuntime(model, name), name), drafter, prompt, k=4, max_tokens=30)
    assert emitted(found) == plain
    assert any(c.rejected for c in cycles(found))


@pytest.mark.parametrize("name", ["qwen3_next", "lfm2"])
def test_a_hybrid_drafts(name):
    """As itself: after each cycle its states are where the accepted text ends, or its draft would be another."""
    model = checkpoints.build(name)
    runtimes = [GenericRuntime(model, name) for _ in range(2)]
    drafter = RuntimeDrafter(runtimes[1], host(runtimes[0].vocab), "itself")
    found = run(ModelTarget(runtimes[0], name), drafter, [5, 6, 7, 8], k=3, max_tokens=20)
    assert all(c.accepted == len(c.drafted) for c in cycles(found))


def test_what_computes_tokens_one_at_a_time_is_decoded_plainly(tmp_path):
    checkpoints.save("jamba", tmp_path)
    plain = load_pair(str(tmp_path), None, checkpoints.OPTIONS)
    assert any("decoded without a draft" in note for note in plain.notes)
    for draft in ("ngram", "none,ngram", str(tmp_path)):
        with pytest.raises(PairIncompatible, match="one at a time only"):
            load_pair(str(tmp_path), draft, checkpoints.OPTIONS)


def test_a_function_of_the_split_into_passes_is_refused(monkeypatch):
    """A class that reads no state before several tokens would change what a target says, without a word."""
    monkeypatch.setattr("specdec_engine.runtime.transformers_cache._ONE_BY_ONE", frozenset())
    with pytest.raises(PairIncompatible, match="computes other logits"):
        GenericRuntime(checkpoints.build("jamba"), "that model")


def test_longrope_ends_where_it_would_become_another_function():
    """Past the original length LongRoPE rotates all positions anew: until there every draft gives the plain tokens."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "long_factor": [4.0] * 4, "short_factor": [1.0] * 4}
    options = {"rope_parameters": rope, "original_max_position_embeddings": 32}
    model = build("Phi3Config", options)
    prompt = list(range(5, 15))
    target = ModelTarget(GenericRuntime(model, "phi3"), "phi3")
    assert target.limit == 32
    plain = run(target, ScriptedDrafter(lambda c, k: []), prompt, max_tokens=60)
    assert (len(emitted(plain)), plain[-1].reason) == (22, "length")
    made = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=22, eos_token_id=None)
    assert emitted(plain) == made[0, 10:].tolist()
    for k in (2, 4, 8):
        drafter = ScriptedDrafter(lambda c, k: (emitted(plain)[len(c) - 10 :] + [1] * 8)[:k])
        assert emitted(run(target, drafter, prompt, k=k, max_tokens=60)) == emitted(plain)


def test_a_long_prompt_is_read_in_chunks(monkeypatch):
    """Same logits as in one pass, and no chunk above the limit."""
    model = build(*CONFIGS["llama"])
    monkeypatch.setattr("specdec_engine.runtime.PREFILL_CHUNK", 16)
    runtime, sizes = GenericRuntime(model, "llama"), []
    forward = runtime.forward
    runtime.forward = lambda tokens, *rest, **more: (sizes.append(len(tokens)), forward(tokens, *rest, **more))[1]
    prompt = torch.randint(0, 97, (50,), generator=torch.Generator().manual_seed(2))
    target = ModelTarget(runtime, "llama")
    target.prefill(prompt[:-1].tolist())
    row = target.score(prompt.tolist(), Draft(torch.empty(0, dtype=torch.long, device=CPU), None, "none"))
    with torch.inference_mode():
        assert torch.allclose(row[0], model(prompt[None], use_cache=False).logits[0, -1], atol=1e-3)
    assert sizes == [16, 16, 16, 1, 1]


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "gpt2"])
def test_the_recorded_transformers_forward_is_the_same_function(name):
    """Padded passes, rollback without a trace, a cache made anew on the way; recorded on a tape."""
    model = build(*CONFIGS[name])
    runtime = GraphRuntime(StaticForward(model), name, None, 16, TapeRecorder())
    tokens = torch.randint(0, 97, (24,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        scratch = model(tokens[None], use_cache=False).logits[0]
    for start, end, junk in ((0, 9, 6), (9, 14, 3), (14, 15, 8), (15, 24, 1)):
        logits = runtime.forward(tokens[start:end], end - start)
        assert torch.allclose(logits, scratch[start:end], atol=1e-3), f"tokens {start} to {end}"
        runtime.forward(torch.arange(junk), 1)
        runtime.rollback(end)
    drafter = RuntimeDrafter(GraphRuntime(StaticForward(model), name, None, 16, TapeRecorder()), host(97), "itself")
    found = run(ModelTarget(runtime, name), drafter, [5, 6, 7, 8], k=3, max_tokens=20)
    assert all(c.accepted == len(c.drafted) for c in cycles(found))


def test_what_cannot_be_recorded_says_why():
    with pytest.raises(Unsupported, match="laid out in a way of its own"):
        StaticForward(build(*CONFIGS["gpt2"]))  # this config names two key heads, which GPT-2 ignores
    model = build(*CONFIGS["llama"])
    model._can_compile_fullgraph = False
    with pytest.raises(Unsupported, match="cannot compile llama"):
        StaticForward(model)


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("T5", {}, "an encoder-decoder"),
        ("Bart", {"encoder_layers": 2, "decoder_layers": 2}, "an encoder-decoder"),
        ("Bert", {}, "a bidirectional model"),
        ("XLMRoberta", {}, "a bidirectional model"),
        ("Llama", {"is_causal": False}, "a bidirectional model"),
        ("Gemma3Text", {"use_bidirectional_attention": True}, "a bidirectional model"),
    ],
)
def test_what_is_no_causal_decoder_is_refused_by_kind(kind, more, said, tmp_path):
    """transformers runs them: with a draft they say something else than without."""
    (tmp_path / "model.safetensors").touch()
    getattr(transformers, f"{kind}Config")(**more).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelUnavailable, match=said):
        find_model(str(tmp_path), LoadOptions())
