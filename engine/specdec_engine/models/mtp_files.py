"""Modules for multi-token prediction (MTP) in a target's own checkpoint: a layer more, which predicts the token after next.

Three ways to store them: under `mtp.` (Qwen 3.5, Qwen3-Next, Mellum), as layers behind the last (DeepSeek-V3, GLM-4.5), and
MiMo's `mtp_layers`. transformers reads the first two beside a model of its own; MiMo's runs as a form of our draft head.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from specdec_engine.errors import ModelUnavailable, PairIncompatible
from specdec_engine.models.damage import explained
from specdec_engine.models.eagle_files import layer_weights
from specdec_engine.models.sources import raw_config, weight_files
from specdec_engine.runtime.head import HeadForm
from specdec_engine.runtime.shape import Shape
from specdec_engine.runtime.weights import SafetensorsWeights

MIMO = "model.mtp_layers.0."
MIMO_FORM = HeadForm(feature_norms="none", output_normed=True, joined=True)
_JOINS = (".fc.weight", ".eh_proj.weight", ".input_proj.weight")
"""The matrix that joins state and embedding."""
_FIRST_NORM = "input_layernorm.weight"
_MTP = r"^(model\.)?mtp\."
_LAYER = r"^model\.(language_model\.)?layers\."
_BEHIND = re.compile(r"^model\.(?:language_model\.)?layers\.(\d+)\.(?:eh_proj|enorm|hnorm|shared_head)\.")
"""Tensors that only a module has: a layer behind the last may be left over from a model that was cut."""
_NUMBER = re.compile(r"layers\.(\d+)\.")
_LOADED: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""Modules by the target's model: pairs of one target share one."""


@dataclass(frozen=True, slots=True)
class MtpFiles:
    """A checkpoint's module, without its weights."""

    path: Path
    names: re.Pattern[str]
    """Matches the first module's tensors."""
    all_names: re.Pattern[str]
    """Matches those of all modules."""
    modules: int
    """How many there are, each for one token further."""
    is_mimo: bool
    """Whether it is stored, and computed, as MiMo's."""
    layers: int
    """Layers that the target has."""


def find_mtp(path: Path) -> MtpFiles | None:
    """The first module in this checkpoint; None if it has none. A GGUF's are not read."""
    if not path.is_dir():
        return None
    text = raw_config(path).get("text_config") or raw_config(path)
    layers = text.get("num_hidden_layers") if isinstance(text, dict) else None
    names = SafetensorsWeights(weight_files(path)).names
    behind = [int(found[1]) for name in names if (found := _BEHIND.search(name))]
    later = "|".join(map(str, sorted({i for i in behind if isinstance(layers, int) and i >= layers})))
    for first, every, mimo in (
        (re.escape(MIMO), r"^model\.mtp_layers\.", True),
        (_MTP, _MTP, False),
        (rf"{_LAYER}{layers}\.", rf"{_LAYER}({later})\.", False),
    ):
        if (every != rf"{_LAYER}()\.") and any(re.search(first, name) for name in names):
            own = [found[1] for name in names if re.search(every, name) and (found := _NUMBER.search(name))]
            modules = max(1, len(set(own)))
            return MtpFiles(path, re.compile(first), re.compile(every), modules, mimo, int(layers or 0))
    return None


def check_module(found: MtpFiles, name: str) -> None:
    """Look whether a module has what a layer of its target has, and the matrix that joins state and embedding, by names and
    sizes alone. Raises ModelUnavailable."""
    weights, hint = SafetensorsWeights(weight_files(found.path)), f"fetch it again: {found.path}"
    names = [tensor for tensor in weights.names if found.names.search(tensor)]
    stem = next((tensor.removesuffix(_FIRST_NORM) for tensor in names if tensor.endswith(_FIRST_NORM)), None)
    if not any(tensor.endswith(_JOINS) for tensor in names):
        raise ModelUnavailable(f"the MTP module of {name} lacks the matrix that joins state and embedding", hint)
    last = re.compile(rf"{_LAYER}{found.layers - 1}\.(.+)")
    coded = "quantization_config" in raw_config(found.path)  # a module beside codes is often left as it was
    for tensor in sorted(weights.names) if stem is not None and not coded else ():
        if (part := last.search(tensor)) is None:
            continue
        own, size = f"{stem}{part[2]}", weights.size(tensor)
        if own not in weights.names:
            raise ModelUnavailable(f"the MTP module of {name} lacks {own}, which layers of its target have", hint)
        if weights.size(own) != size:
            raise ModelUnavailable(f"{own} of {name} has the size {weights.size(own)}, and {tensor} {size}", hint)
    for tensor in (tensor for tensor in names if tensor.endswith(_JOINS)):
        rows, *columns = weights.size(tensor)
        if columns != [2 * rows]:
            raise ModelUnavailable(
                f"{tensor} of {name} has the size {weights.size(tensor)}, which joins no two states", hint
            )


def load_module(found: MtpFiles, model: Any, name: str) -> Any:
    """transformers' `MtpModel` of the first module, beside the target's model and on its device. Raises ModelUnavailable for
    a damaged one, and PairIncompatible where transformers has no such class."""
    try:
        from transformers.modeling_layers import MtpModel
    except ImportError:
        from transformers import __version__

        raise PairIncompatible(
            f"transformers {__version__} has no class for MTP modules", "pip install -U transformers, or another draft"
        ) from None
    if model in _LOADED:
        return _LOADED[model]
    _describe(model.config)
    # Under its own name: transformers looks up by name and module how tensors are renamed.
    regex = staticmethod(lambda main_model: found.names)
    own = {"get_mtp_weights_regex": regex, "__module__": MtpModel.__module__}
    made: Any = type("MtpModel", (MtpModel,), own)
    usual, model.config.name_or_path = model.config.name_or_path, str(found.path)
    try:
        with explained(f"the MTP module of {name}", found.path):
            module: Any = _read(made, model, name)
    finally:
        model.config.name_or_path = usual
    _LOADED[model] = module = module.to(model.dtype).eval()
    return module


def _read(made: Any, model: Any, name: str) -> Any:
    try:
        return made.from_pretrained(model, device_map={"": model.device})
    except RuntimeError as error:
        if "weights are missing" not in str(error):
            raise
        first = str(error).partition("[")[2].partition(",")[0].strip("'\"]")
        raise ModelUnavailable(
            f"the MTP module of {name} lacks tensors that transformers' has, the first {first}",
            "its file is cut, or the module is of a kind that transformers does not know: choose another draft",
        ) from error


def _describe(config: Any) -> None:
    """Say of one module what transformers asks a config for, where it does not say so itself: Qwen's."""
    text = config.get_text_config()
    text.num_mtp_layers = 1
    for kinds, ours, plain in (
        ("layer_types", "mtp_layer_types", "full_attention"),
        ("mlp_layer_types", "mtp_mlp_layer_types", "sparse"),
    ):
        if getattr(text, kinds, None) is not None:
            with suppress(AttributeError):  # some make it of the count
                setattr(text, ours, list(getattr(text, ours, None) or [plain])[:1])


def mimo_weights(found: MtpFiles, shape: Shape) -> dict[str, Tensor]:
    """Its tensors by our names. Raises KeyError for one that is missing, ValueError for one that is not known."""
    weights = SafetensorsWeights(weight_files(found.path))
    stored = {name.removeprefix(MIMO): name for name in weights.names if name.startswith(MIMO)}
    left = {name for name in stored if not name.startswith("self_attn.rotary_emb.")}

    def take(name: str) -> Tensor:
        left.discard(name)
        return weights.dense(stored[name])

    made = {ours: take(theirs) for theirs, ours in _MIMO_NAMES.items()}
    made |= layer_weights(take, stored, (shape.heads, shape.kv_heads, shape.head_size), "", "", "input_layernorm")
    if left:
        raise ValueError(f"it has {len(left)} tensors that this forward does not know, the first {min(left)}")
    return made


_MIMO_NAMES = {
    "token_layernorm.weight": "embedding_norm",
    "hidden_layernorm.weight": "joined_norm",
    "input_proj.weight": "join.weight",
    "final_layernorm.weight": "final_norm",
}


def mimo_shape(shape: Shape) -> dict[str, Any]:
    """The config of a module of a target so shaped, as `head_shape` reads it."""
    return {
        "head_dim": shape.head_size,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "hidden_size": shape.hidden,
        "vocab_size": shape.vocab,
        "rms_norm_eps": shape.eps,
        "rotation": shape.rotations[0],
    }
