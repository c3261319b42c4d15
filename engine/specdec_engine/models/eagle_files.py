"""EAGLE-3 heads as their trainers publish them, read as ours (Li et al. 2025, arXiv:2503.01840).

Three dialects of one thing: SafeAILab's and SpecForge's (a flat Llama config), NVIDIA's (the same with `eagle_config`), and
that of the speculators library (`transformer_layer_config`, and the target's name). EAGLE-3.1 (arXiv:2605.09992) norms each
feature and the state that is fed back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor

from specdec_engine.errors import ModelUnavailable, SpecdecError, first_line
from specdec_engine.models.draft_folder import DraftFolder, TargetLayers
from specdec_engine.models.sources import weight_files
from specdec_engine.record.files import read_json
from specdec_engine.runtime.decoder import paired
from specdec_engine.runtime.head import HeadForm
from specdec_engine.runtime.shape import Unsupported, rope_of, rotary_of
from specdec_engine.runtime.weights import SafetensorsWeights


def eagle_folder(path: Path, config: Mapping[str, Any]) -> DraftFolder | None:
    """The head in this folder; None if its config is of another kind. Raises ModelUnavailable for a draft of a kind that is
    known and not run here, ValueError for a damaged one."""
    with _damage():
        return _eagle_folder(path, config)


@contextmanager
def _damage() -> Iterator[None]:
    """A stranger's config and tensors can be wrong in as many ways as there are lines that read them. Raises ValueError."""
    try:
        yield
    except (SpecdecError, MemoryError):
        raise
    except KeyError as error:
        raise ValueError(f"it has no {error.args[0]}") from error
    except Exception as error:
        raise ValueError(first_line(error)) from error


def _eagle_folder(path: Path, config: Mapping[str, Any]) -> DraftFolder | None:
    refuse_others(path, config)
    if not _is_eagle(config):
        return None
    weights = SafetensorsWeights(weight_files(path))
    names = frozenset(map(_plain, weights.names))
    if "fc.weight" not in names and "layers.0.hidden_norm.weight" not in names:
        return None
    if "layers.0.hidden_norm.weight" not in names:
        raise ModelUnavailable(
            f"{path} is a head of EAGLE-1 or EAGLE-2, which specdec does not draft with",
            "vLLM and SGLang serve it; an EAGLE-3 head of the same target drafts better",
        )
    if "mask_hidden" in names:
        raise ModelUnavailable(f"{path} is a P-EAGLE head, which specdec does not draft with", _VLLM)
    layer = dict(config.get("transformer_layer_config") or config)
    nested = config.get("eagle_config") or {}
    vocab = int(layer["vocab_size"])
    shifts = _tensor(weights, "d2t").long() if "d2t" in names else torch.zeros(vocab, dtype=torch.long)
    ids = torch.arange(len(shifts)) + shifts
    if shifts.dim() != 1 or config.get("draft_vocab_size") not in (None, len(ids)):
        raise ValueError(f"it has {len(ids)} ids where its config says {config.get('draft_vocab_size')}")
    if len(set(ids.tolist())) != len(ids) or int(ids.min()) < 0 or int(ids.max()) >= vocab:
        raise ValueError("its d2t gives a token twice, or one that there is none of")
    if min(int(layer[name]) for name in ("hidden_size", "intermediate_size", "num_attention_heads")) < 1:
        raise ValueError("its config has a size that is none")
    verifier = (config.get("speculators_config") or {}).get("verifier") or {}
    own = {"vocab_size": len(ids), "model_type": "eagle3", "target_hidden_size": config.get("target_hidden_size")}
    return DraftFolder(
        path=path,
        kind="head",
        config={**layer, **own, **_geometry(layer)},
        layers=_layers(config, nested),
        tokenizer="",
        ids=ids,
        form=HeadForm(
            final=nested.get("use_aux_hidden_state") is False,
            feature_norms=_feature_norms(config, nested),
            residual_normed=bool(config.get("norm_before_residual")),
            output_normed=bool(config.get("norm_output")),
        ),
        vocab=vocab,
        made_for=str(verifier.get("name_or_path") or ""),
    )


@contextmanager
def read_by_index(draft: DraftFolder, layers: int) -> Iterator[tuple[Path, tuple[int, ...]]]:
    """A folder with the same head of a target of so many layers, whose config says that it reads the layers 2, n / 2 and
    n - 3 themselves, and not what stands before them; and what it says. For a head that does not."""
    said = (3, layers // 2 + 1, layers - 2)  # at the top level of a config the layers that were read before are counted
    with TemporaryDirectory(prefix="specdec-") as scratch:
        for file in draft.path.iterdir():
            if file.name != "config.json":
                (Path(scratch) / file.name).symlink_to(file.resolve())
        config = read_json(draft.path / "config.json") | {"eagle_aux_hidden_state_layer_ids": list(said)}
        (Path(scratch) / "config.json").write_text(json.dumps(config), "utf-8")
        yield Path(scratch), said


def eagle_weights(draft: DraftFolder) -> dict[str, Tensor]:
    """Its tensors by our names; query and key rows in our order. Raises ValueError for one that this forward does not know,
    for one that is missing, and for sizes that do not belong together."""
    with _damage():
        return _eagle_weights(draft)


def _eagle_weights(draft: DraftFolder) -> dict[str, Tensor]:
    weights = SafetensorsWeights(weight_files(draft.path))
    stored = {_plain(name): name for name in weights.names}
    left = {name for name in stored if name not in ("d2t", "t2d") and not name.startswith(("verifier_", "rotary_emb."))}

    def take(name: str) -> Tensor:
        left.discard(name)
        return weights.dense(stored[name])

    found = {ours: take(theirs) for theirs, ours in _NAMES.items() if theirs in stored}
    norms = sorted(name for name in stored if name.startswith("fc_norm."))
    if norms:
        found["feature_norm"] = torch.stack([take(name) for name in norms])
    heads = tuple(int(draft.config[key]) for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    for i in range(int(draft.config.get("num_hidden_layers") or 1)):
        norm = "input_layernorm" if i else "hidden_norm"
        found |= layer_weights(take, stored, heads, f"layers.{i}.", f"{i}." if i else "", norm)
    if left:
        raise ValueError(f"it has {len(left)} tensors that this forward does not know, the first {min(left)}")
    return found


def layer_weights(
    take: Callable[[str], Tensor], stored: Container[str], heads: tuple[int, ...], at: str, to: str, norm: str
) -> dict[str, Tensor]:
    """One layer's tensors, stored after the prefix `at`, by our names after `to`; heads: of queries, of keys, and their size;
    norm: what its maker calls that of the state."""
    queries, keys, size = heads
    orders = {"q_proj": paired(queries, size), "k_proj": paired(keys, size), "v_proj": torch.arange(keys * size)}

    def qkv(part: str) -> Tensor:
        return torch.cat([take(f"{at}self_attn.{name}.{part}")[order] for name, order in orders.items()])

    found = {
        f"{to}qkv.weight": qkv("weight"),
        f"{to}out.weight": take(f"{at}self_attn.o_proj.weight"),
        f"{to}gate_up.weight": torch.cat([take(f"{at}mlp.{part}_proj.weight") for part in ("gate", "up")]),
        f"{to}down.weight": take(f"{at}mlp.down_proj.weight"),
        f"{to}mlp_norm": take(f"{at}post_attention_layernorm.weight"),
        f"{to}state_norm": take(f"{at}{norm}.weight"),
    }
    if f"{at}self_attn.q_proj.bias" in stored:
        found[f"{to}qkv.bias"] = qkv("bias")
    if f"{at}self_attn.o_proj.bias" in stored:
        found[f"{to}out.bias"] = take(f"{at}self_attn.o_proj.bias")
    for name in ("q_norm", "k_norm"):
        if f"{at}self_attn.{name}.weight" in stored:
            found[f"{to}{name}"] = take(f"{at}self_attn.{name}.weight")[paired(1, size)]
    return found


_NAMES = {
    "fc.weight": "fuse.weight",
    "fc.bias": "fuse.bias",
    "input_norm.weight": "feature_norm",
    "layers.0.input_layernorm.weight": "embedding_norm",
    "norm.weight": "final_norm",
    "lm_head.weight": "head.weight",
    "embed_tokens.weight": "embedding.weight",
}
"""Their names of tensors and ours, but for those of each layer."""
_VLLM = "vLLM serves it: vllm serve TARGET --speculative-config"


def _plain(name: str) -> str:
    """A tensor's name without what the dialects differ in."""
    name = name.removeprefix("model.").replace("midlayer.", "layers.0.", 1)
    for i, old in enumerate(("aux_norm_low", "aux_norm_mid", "aux_norm_high")):
        name = name.replace(old, f"fc_norm.{i}")
    return name


def _tensor(weights: SafetensorsWeights, plain: str) -> Tensor:
    return weights.dense(next(name for name in weights.names if _plain(name) == plain))


def _is_eagle(config: Mapping[str, Any]) -> bool:
    said = [config.get("speculators_model_type"), config.get("model_type"), *(config.get("architectures") or ())]
    return "draft_vocab_size" in config or any("eagle" in str(word).lower() for word in said)


def _layers(config: Mapping[str, Any], nested: Mapping[str, Any]) -> TargetLayers:
    """At the top level ids count the layers read before; in NVIDIA's section they are layers' indices."""
    if nested.get("use_aux_hidden_state") is False:
        return TargetLayers(())
    if ids := config.get("eagle_aux_hidden_state_layer_ids"):
        return TargetLayers(tuple(map(int, ids)), "before")
    if ids := nested.get("eagle_aux_hidden_state_layer_ids"):
        return TargetLayers(tuple(map(int, ids)), "nvidia")
    return TargetLayers((), "guessed")


def _feature_norms(config: Mapping[str, Any], nested: Mapping[str, Any]) -> Literal["each", "whole", "none"]:
    if config.get("fc_norm") or config.get("use_aux_norm"):
        return "each"
    return "whole" if config.get("norm_before_fc") or nested.get("norm_before_fc") else "none"


def _geometry(layer: Mapping[str, Any]) -> dict[str, Any]:
    """What the config's class says of heads and rotation, whatever its file leaves out."""
    from transformers import LlamaConfig, Qwen3Config

    kind = Qwen3Config if layer.get("model_type") == "qwen3" else LlamaConfig
    known = {key: value for key, value in layer.items() if key not in ("model_type", "architectures", "dtype")}
    made: Any = kind(**known)
    size = int(getattr(made, "head_dim", None) or made.hidden_size // made.num_attention_heads)
    try:
        rotation = rope_of(made, rotary_of(made, size))
    except Unsupported as reason:
        raise ValueError(str(reason)) from reason
    return {
        "head_dim": size,
        "num_key_value_heads": int(made.num_key_value_heads or made.num_attention_heads),
        "rms_norm_eps": made.rms_norm_eps,
        "rotation": rotation,
    }


def refuse_others(path: Path, config: Mapping[str, Any]) -> None:
    """Name a draft of a kind that is not built here, with what would run it. Raises ModelUnavailable."""
    kind = str(config.get("speculators_model_type") or config.get("model_type") or "")
    said = f"{kind} {' '.join(map(str, config.get('architectures') or ()))}".lower()
    for word, name in _OTHERS.items():
        if word in said or any(key.startswith(word) for key in config):
            raise ModelUnavailable(f"{path} is {name}, which specdec does not draft with", _VLLM)


_OTHERS = {
    "medusa": "a set of Medusa heads",
    "hydra": "a set of Hydra heads",
    "mlp_speculator": "an MLP speculator",
    "dspark": "a DSpark draft",
    "dflash": "a DFlash draft",
    "p_eagle": "a P-EAGLE head",
    "peagle": "a P-EAGLE head",
}
"""By a word of the type, the class, or a key of the config."""
