"""Assistants that Google publishes for Gemma 4: small models that read their target's last state, keys and values, and keep
none of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from specdec_engine.models.damage import explained
from specdec_engine.models.draft_folder import DraftFolder, TargetLayers
from specdec_engine.models.kinds import WIDEST
from specdec_engine.models.pretrained import check_loaded, load_config

_KINDS = frozenset({"gemma4_assistant", "gemma4_unified_assistant"})


def assistant_folder(path: Path, config: Mapping[str, Any]) -> DraftFolder | None:
    """The assistant in this folder; None if its config is of another kind. Raises KeyError, TypeError and ValueError for a
    damaged one."""
    if config.get("model_type") not in _KINDS:
        return None
    vocab = int(config["text_config"]["vocab_size"])
    if not 1 <= vocab <= WIDEST or int(config["backbone_hidden_size"]) < 1:  # a table of all ids is made
        raise ValueError("its config has a size that is none")
    return DraftFolder(path, "assistant", dict(config), TargetLayers(()), "", torch.arange(vocab), vocab=vocab)


def load_assistant(draft: DraftFolder) -> Any:
    """Read the assistant as transformers computes it, on the CPU and in its file's dtype. Raises ModelUnavailable for a
    damaged one, and OutOfMemory."""
    from transformers import AutoModelForCausalLM

    made: Any = AutoModelForCausalLM
    common = {"dtype": "auto", "local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    common |= {"ignore_mismatched_sizes": True}  # `check_loaded` says which
    with explained(draft.name, draft.path):
        config = load_config(draft.path, trust_remote_code=False)
        text = config.get_text_config()
        text.__class__ = every_layer_shared(type(text))
        model, info = made.from_pretrained(draft.path, config=config, **common)
        check_loaded(draft.path, draft.path, info)
        return model.eval()


def every_layer_shared(kind: type[Any]) -> type[Any]:
    """The config's class, with keys and values of other layers in all of its own. transformers 5.23 looks for a layer of the
    model itself that makes them, finds none in an assistant, and refuses it."""

    def modes(config: Any) -> list[str]:
        return ["reuse"] * int(config.num_hidden_layers)

    return type(kind.__name__, (kind,), {"kv_sharing_modes": property(modes)})
