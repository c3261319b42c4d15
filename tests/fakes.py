"""Stand-ins small enough to reason about: a table for a target, scripted drafters, a byte tokenizer, tiny real Llamas."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from specdec_engine.core.cycle_types import Draft, Sampling, Verdict
from specdec_engine.core.randomness import KeyedRandomness, Randomness
from specdec_engine.decoding.control import Controls
from specdec_engine.decoding.loop import decode
from specdec_engine.decoding.stopping import Stop
from specdec_engine.drafters.base import DraftSetup, LoadedDraft, empty_draft
from specdec_engine.record.events import Cycle, Event
from specdec_engine.runtime.decoder import Decoder
from specdec_engine.runtime.graphs import GraphRuntime, Recorder
from specdec_engine.runtime.lean import LeanRuntime
from specdec_engine.runtime.linear import Quantize
from specdec_engine.runtime.native import Kernels
from specdec_engine.runtime.ops import TORCH, Ops
from specdec_engine.runtime.shape import shape_of
from specdec_engine.runtime.unfused import SplitExperts
from specdec_engine.runtime.weights import Weights
from specdec_engine.verify.rules import AcceptanceRule
from specdec_engine.verify.sampling import draw, warp
from specdec_engine.verify.verifier import verifier_for
from tests.tape import TapeRecorder

CPU = torch.device("cpu")


def table_logits(context: Sequence[int], vocab: int, seed: int, sharpness: float = 1.5) -> Tensor:
    """[V] float64 logits that depend on the whole context: a language model as a hash."""
    digest = hashlib.sha256(repr((seed, tuple(context))).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return sharpness * torch.randn(vocab, generator=generator, dtype=torch.float64)


def table_probs(context: Sequence[int], vocab: int, seed: int) -> Tensor:
    """[V] float64, the distribution of a table model at temperature 1."""
    return table_logits(context, vocab, seed).softmax(0)


class TableTarget:
    """A target whose cache is the list of tokens it was fed, so that a wrong rollback gives wrong logits."""

    name = "table"
    limit: int | None = None
    device = CPU
    trees = True

    def __init__(self, vocab: int = 5, seed: int = 0, logits: Callable[[Sequence[int]], Tensor] | None = None) -> None:
        self.vocab = vocab
        self.logits = logits or (lambda context: table_logits(context, vocab, seed))
        self.tokens: list[int] = []
        self.passes = 0

    @property
    def cached(self) -> int:
        return len(self.tokens)

    def prefill(self, tokens: Sequence[int]) -> int:
        self.tokens = list(tokens)
        return 0

    def score(self, context: Sequence[int], draft: Draft) -> Tensor:
        self.passes += 1
        self.tokens.append(context[-1])
        before, tokens = list(self.tokens), draft.tokens.tolist()
        texts = [before]
        for i, token in enumerate(tokens):
            parent = i - 1 if draft.parents is None else draft.parents[i]
            texts.append([*texts[parent + 1], token])
        self.tokens += tokens
        self.tree = before, tokens
        return torch.stack([self.logits(text) for text in texts])

    def keep(self, path: Sequence[int]) -> None:
        before, tokens = self.tree
        self.tokens = [*before, *(tokens[place] for place in path)]

    def rollback(self, to: int) -> None:
        del self.tokens[to:]


class TableDrafter:
    """Draws from a table of its own: a sampled draft with a context-dependent q."""

    name = "table"

    def __init__(self, vocab: int = 5, seed: int = 1) -> None:
        self.vocab, self.seed = vocab, seed

    def begin(self, prompt: Sequence[int]) -> None:
        pass

    def propose(self, context: Sequence[int], k: int, sampling: Sampling, random: Randomness) -> Draft:
        grown, rows = list(context), []
        for u in random.uniforms(len(context), "draft", k):
            row = warp(table_logits(grown, self.vocab, self.seed)[None], sampling)[0]
            grown.append(int(draw(row, torch.tensor(u, dtype=torch.float64))))
            rows.append(row)
        tables = [table_logits(grown[: len(context) + i], self.vocab, self.seed).softmax(-1) for i in range(k)]
        raw = torch.stack(tables).float() if sampling.raw else None
        return Draft(torch.tensor(grown[len(context) :]), torch.stack(rows), self.name, raw)

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        pass


class ScriptedDrafter:
    """Proposes what a function of (context, k) says: always right, always wrong, too short, whatever."""

    name = "scripted"

    def __init__(self, script: Callable[[Sequence[int], int], Sequence[int]]) -> None:
        self.script = script

    def begin(self, prompt: Sequence[int]) -> None:
        pass

    def propose(self, context: Sequence[int], k: int, sampling: Sampling, random: Randomness) -> Draft:
        tokens = list(self.script(context, k))
        return Draft(torch.tensor(tokens), None, self.name) if tokens else empty_draft(CPU, self.name)

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        pass


class ScriptedRandomness:
    """Hands out the numbers it was given, by purpose."""

    seed = 0

    def __init__(self, **numbers: Sequence[float]) -> None:
        self.numbers = numbers

    def uniforms(self, position: int, purpose: str, n: int) -> list[float]:
        return list(self.numbers[purpose][:n])


class FakeClock:
    """One second later at every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def run(target: Any, drafter: Any, prompt: Sequence[int] = (1, 2), **options: Any) -> list[Event]:
    """All events of a run; k, sampling, max_tokens, stop_ids, stop, seed and decode's own options."""
    return list(events(target, drafter, prompt, **options))


def events(
    target: Any,
    drafter: Any,
    prompt: Sequence[int] = (1, 2),
    *,
    k: int = 3,
    sampling: Sampling | None = None,
    max_tokens: int = 12,
    stop_ids: Sequence[int] = (),
    stop: Sequence[str] = (),
    seed: int = 0,
    controls: Controls | None = None,
    rule: AcceptanceRule | None = None,
    **options: Any,
) -> Iterator[Event]:
    if rule is not None:
        options["verifier"] = verifier_for(rule, CPU)
    return decode(
        target,
        drafter,
        prompt,
        controls=controls or Controls(k, sampling),
        stop=Stop(max_tokens, frozenset(stop_ids), tuple(stop)),
        random=KeyedRandomness(seed),
        **options,
    )


def cycles(events: Sequence[Event]) -> list[Cycle]:
    return [event for event in events if isinstance(event, Cycle)]


def emitted(events: Sequence[Event]) -> list[int]:
    return [token for cycle in cycles(events) for token in cycle.emitted]


def greedy(target: TableTarget, prompt: Sequence[int], n: int) -> list[int]:
    """Plain greedy decoding, written without the engine."""
    context = list(prompt)
    for _ in range(n):
        context.append(int(target.logits(context).argmax()))
    return context[len(prompt) :]


# -- real models, without any download ---------------------------------------------------------------------------------

VOCAB = 300


def tiny_llama(seed: int = 0, layers: int = 2, hidden: int = 32, vocab: int = VOCAB, **config: Any) -> Any:
    """A randomly initialised Llama in float32; weights large enough that its distributions are not flat."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **config,
    }
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def _as_stored(model: Any) -> dict[str, Tensor]:
    """Name tensors as a checkpoint does, in which each expert is by itself."""
    state: dict[str, Tensor] = dict(model.state_dict())
    if all(tensor.dim() < 3 for tensor in state.values()):
        return state
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        stored = load_file(Path(folder) / "model.safetensors")
        return {name: tensor.clone() for name, tensor in stored.items()}


class StateWeights:
    """A model's state dict as a checkpoint."""

    def __init__(self, model: Any) -> None:
        self._state = _as_stored(model)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._state)

    def size(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def dense(self, name: str) -> Tensor:
        return self._state[name]

    stored = dense


def lean(
    model: Any,
    capacity: int = 64,
    dtype: torch.dtype = torch.float32,
    quantize: Quantize = "none",
    ops: Ops | None = None,
    kernels: Kernels | None = None,
) -> LeanRuntime:
    """The lean runtime over a transformers model's weights; with `ops` as on a GPU, with `kernels` on those."""
    stored: Weights = StateWeights(model)
    weights = SplitExperts(stored) if model.config.model_type == "gpt_oss" else stored
    decoder = Decoder(shape_of(model.config), weights, dtype, CPU, quantize, ops, kernels)
    return LeanRuntime(decoder, "lean", model.config.max_position_embeddings, capacity)


def graph(model: Any, capacity: int = 64, recorder: Recorder | None = None, ops: Ops | None = TORCH) -> GraphRuntime:
    """The graph runtime's bookkeeping over a transformers model's weights, in the way that a GPU goes."""
    decoder = Decoder(shape_of(model.config), StateWeights(model), torch.float32, CPU, "none", ops)
    return GraphRuntime(decoder, "graph", model.config.max_position_embeddings, capacity, recorder or TapeRecorder())


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MERGES = ["t h", "th e", "i n", "a n", "e r", "o n", "Ġ the", "Ġ a", "Ġ t", "l i", "g h", "li gh", "ligh t"]


def byte_tokenizer(chat: bool = True, merges: Sequence[str] = _MERGES) -> Any:
    """Byte-level BPE: 4 special tokens, 256 bytes and a few merges. Characters split into bytes, as in real ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|pad|>"]
    pieces = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    vocab = {piece: i for i, piece in enumerate([*pieces, *(a + b for a, b in pairs if a + b not in pieces)])}
    model = Tokenizer(models.BPE(vocab=vocab, merges=[pair for pair in pairs if set(pair) <= vocab.keys()]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken(s, special=True) for s in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<|im_end|>", bos_token="<|endoftext|>", pad_token="<|pad|>"
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_checkpoint(folder: Path, seed: int = 0, tokenizer: Any = None, endless: bool = False, **llama: Any) -> Path:
    """A checkpoint folder as save_pretrained writes it: safetensors, config, tokenizer.

    endless: greedy text never ends by itself, because the logits of the stop ids are 0 and some other one is above.
    """
    model = tiny_llama(seed=seed, **llama)
    model.generation_config.eos_token_id = [1, 3]
    if endless:
        model.lm_head.weight.data[[1, 3]] = 0.0
    model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


def host(vocab: int = VOCAB, load_draft: Callable[[str], Any] | None = None, **more: Any) -> DraftSetup:
    def refuse(*_: Any) -> Any:
        raise AssertionError("nothing should be loaded")

    load = refuse if load_draft is None else lambda name: LoadedDraft(load_draft(name))
    settings = {"tokenizer": None, "target": refuse, "output_rows": refuse, **more}
    return DraftSetup(name="target", vocab=vocab, device=CPU, load_draft=load, **settings)


def save_head_draft(folder: Path, target: Any, tokenizer: Any, taps: Sequence[int] = (0,), ids: int = 120) -> Path:
    """A draft head with random weights for a small target, as `specdec distill` would leave it."""
    from specdec_engine.distill.export import save_head
    from specdec_engine.distill.head import Head, HeadShape

    torch.manual_seed(9)
    config = target.config
    size = config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads, config.num_key_value_heads
    head = Head(HeadShape(config.hidden_size, len(taps) + 1, *heads, size, 48, config.rms_norm_eps, 10000.0, True))
    for weight in (head.out.weight, head.down.weight):
        torch.nn.init.normal_(weight, std=0.3)
    save_head(folder, head, torch.arange(1, 2 * ids, 2), tuple(taps), tokenizer, {"target": "tiny"})
    return folder


def save_eagle_head(folder: Path, target: Any, vocab: int, ids: int = 60, says: bool = True) -> Path:
    """An EAGLE-3 head with random weights for a small target, as its authors publish one; it drafts every other id. says:
    which two layers it reads; else it reads three, and does not say."""
    from safetensors.torch import save_file

    torch.manual_seed(9)
    config, layers = target.config, target.config.num_hidden_layers
    d, size, inner = config.hidden_size, config.hidden_size // config.num_attention_heads, 48
    kv = config.num_key_value_heads * size
    sizes = {
        "fc": (d, (2 if says else 3) * d), "midlayer.self_attn.q_proj": (d, 2 * d), "midlayer.self_attn.k_proj": (kv, 2 * d),
        "midlayer.self_attn.v_proj": (kv, 2 * d), "midlayer.self_attn.o_proj": (d, d), "midlayer.mlp.gate_proj": (inner, d),
        "midlayer.mlp.up_proj": (inner, d), "midlayer.mlp.down_proj": (d, inner), "lm_head": (ids, d),
    }  # fmt: skip
    tensors = {f"{name}.weight": torch.randn(rows, columns) * 0.3 for name, (rows, columns) in sizes.items()}
    for norm in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
        tensors[f"midlayer.{norm}.weight"] = torch.rand(d) + 0.5
    tensors |= {"norm.weight": torch.rand(d) + 0.5, "d2t": torch.arange(1, 2 * ids, 2) - torch.arange(ids)}
    about = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "draft_vocab_size": ids,
        "hidden_size": d, "intermediate_size": inner, "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads, "num_hidden_layers": 1, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }  # fmt: skip
    about |= {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, layers - 1]}} if says else {"eagle": 3}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(about))
    return folder


def _stacked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split gates and ways up of experts into tensors of their own, with names that end as a matrix's do."""
    found = dict[str, Tensor]()
    turned = any(name.endswith("self_attn.sinks") for name in state)  # GPT-OSS's stand on their side, gates between ups
    for name, tensor in state.items():
        if turned and ".experts." in name:
            stem, _, part = name.rpartition(".")
            kind = "bias" if part.endswith("_bias") else "weight"
            upright = tensor if kind == "bias" else tensor.transpose(1, 2)
            if part.startswith("down_proj"):
                found[f"{stem}.down_proj.{kind}"] = upright
            else:
                found |= {f"{stem}.{p}_proj.{kind}": upright[:, i::2] for i, p in enumerate(("gate", "up"))}
        elif name.endswith("self_attn.sinks"):
            found[f"{name}.weight"] = tensor
        elif name.endswith("experts.gate_up_proj"):
            gates, ups = tensor.chunk(2, 1)
            stem = name.removesuffix("gate_up_proj")
            found |= {f"{stem}gate_proj.weight": gates, f"{stem}up_proj.weight": ups}
        else:
            found[f"{name}.weight" if name.endswith("experts.down_proj") else name] = tensor
    return found


def is_matrix(name: str, tensor: Tensor) -> bool:
    """Say whether llama.cpp packs it: routers and the biases of experts it does not."""
    return tensor.dim() > 1 and name.endswith("weight") and ".gate." not in name and ".router." not in name


def save_gguf(
    file: Path,
    kind: str = "Q4_0",
    seed: int = 0,
    scaling: tuple[str, float, int] | None = None,
    arch: str = "llama",
    model: Any = None,
    tensors_a_part: int = 0,
) -> Path:
    """A small model, by default a Llama, as llama.cpp would store it: packed matrices, a Llama's query and key rows in its
    own order, Gemma's norms whole, vocabulary inside. scaling: of the rotation: type, factor, original length.
    tensors_a_part: not 0 for a file in parts, of which the path of none is given back."""
    import gguf

    tokenizer = byte_tokenizer()
    if model is None:
        model = tiny_llama(seed, hidden=64, vocab=len(tokenizer), tie_word_embeddings=True)
    config, state = model.config, _stacked(model.state_dict())
    rope = config.rope_parameters
    writer = gguf.GGUFWriter(file, arch, split_max_tensors=tensors_a_part)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(int(head_size * (rope.get("partial_rotary_factor") or 1)))
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if arch in ("cohere2", "command-r"):
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_logit_scale(config.logit_scale)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if arch == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if arch in ("cohere2", "exaone4", "olmo2") and getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
        if arch != "cohere2":
            writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    if arch.startswith(("gemma", "glm4", "gpt-oss", "qwen3")):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if arch.startswith("gemma") and "sliding_attention" in config.layer_types:
        writer.add_sliding_window(config.sliding_window)
    if arch in ("gpt-oss", "qwen3moe"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        inner = config.intermediate_size if arch == "gpt-oss" else config.moe_intermediate_size
        writer.add_expert_feed_forward_length(inner)
    if arch in ("gpt-oss", "phi3"):
        writer.add_sliding_window(config.sliding_window or 0)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling[0]))
        writer.add_rope_scaling_factor(scaling[1])
        writer.add_rope_scaling_orig_ctx_len(scaling[2])
        if scaling[0] == "yarn":  # as the converter does where a config has them
            writer.add_rope_scaling_yarn_beta_fast(rope.get("full_attention", rope).get("beta_fast", 32.0))
            writer.add_rope_scaling_yarn_beta_slow(rope.get("full_attention", rope).get("beta_slow", 1.0))
    writer.add_vocab_size(config.vocab_size)
    pieces = tokenizer.get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(sorted(pieces, key=pieces.__getitem__))
    writer.add_token_types([3 if i < 4 else 1 for i in range(len(pieces))])
    writer.add_token_merges(_MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
    if rope.get("rope_type") == "longrope":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for length in ("long", "short"):
            factors = torch.tensor(rope[f"{length}_factor"]).numpy()
            writer.add_tensor(f"rope_factors_{length}.weight", factors)
    known = gguf.MODEL_ARCH[arch.upper().replace("-", "_")]
    names = gguf.get_tensor_name_map(known, config.num_hidden_layers)
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name and arch in ("granite", "llama", "smollm3"):
                tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        if name.endswith("norm.weight") and arch.startswith("gemma"):
            tensor = tensor + 1
        packed = gguf.GGMLQuantizationType[kind if is_matrix(name, tensor) else "F32"]
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(stored, gguf.quantize(tensor.float().numpy(), packed), raw_dtype=packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
