"""What transformers reads of a checkpoint: config, tokenizer, weights, stop ids. Local paths only."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from specdec_engine.errors import ModelUnavailable, first_line
from specdec_engine.models.chat import turn_ends
from specdec_engine.models.kinds import causal_class, check_sizes
from specdec_engine.models.sources import raw_config
from specdec_engine.record.files import read_json

DeviceMap = Literal["auto"]
_NOT_OF_ONE = "its config and its weights are not of one model: compare config.json with what the weights' owner gives"


def load_config(path: Path, trust_remote_code: bool) -> Any:
    """The config, for the architecture that it names. Raises ModelUnavailable for absurd counts of layers or heads, and for a
    type that transformers does not know."""
    from transformers import AutoConfig, __version__

    check_sizes(path)
    if path.is_dir() and (kind := _ALIKE.get(str(raw_config(path).get("model_type")))) is not None:
        return AutoConfig.for_model(kind, **{k: v for k, v in raw_config(path).items() if k not in _OWN_CLASS})
    try:
        return AutoConfig.from_pretrained(**_source(path, trust_remote_code))
    except ValueError as error:
        if "does not recognize this architecture" not in str(error):
            raise
        kind = raw_config(path).get("model_type")
        raise ModelUnavailable(
            f"{path} is of the type {kind!r}, which transformers {__version__} does not know",
            "a newer one may: pip install -U transformers",
        ) from error


_ALIKE = {"mimo": "qwen2"}
"""Kinds that bring code of their own for what transformers has under another name, but for tensors that it does without."""
_OWN_CLASS = ("model_type", "auto_map", "architectures")


@dataclass(frozen=True, slots=True)
class State:
    """A model's tensors by their names, and the config of their class."""

    config: Any
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Read:
    """A transformers model as it was read."""

    model: Any
    unused: tuple[str, ...]
    """Tensors of the checkpoint that the model has no place for."""


def load_weights(
    path: Path,
    folder: Path,
    state: State | None,
    dtype: torch.dtype,
    placement: torch.device | DeviceMap,
    trust_remote_code: bool,
) -> Read:
    """The model in evaluation mode, from its tensors where they were read, else from safetensors or a GGUF; on the meta
    device, the names and sizes of its tensors alone. Raises ModelUnavailable for a tensor that is missing or has another size
    than its config asks for."""
    from transformers import AutoModelForCausalLM

    common: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if isinstance(placement, str):
        common["device_map"] = placement
    elif placement.type == "meta":
        common |= {"device_map": placement, "ignore_mismatched_sizes": True}
    model: Any
    if state is not None:
        if path.is_file():
            _check_gguf_sizes(path, folder, state)
        made = causal_class(state.config)
        model, info = made.from_pretrained(None, config=state.config, state_dict=state.tensors, **common)
    elif path.is_file():
        from specdec_engine.models.gguf_header import Header, given_to_transformers

        # Our config: it says what the header does not. Read once more for the tensors, by the reader that is fast.
        with given_to_transformers(Header(path, lambda done, total: None), path):
            model, info = AutoModelForCausalLM.from_pretrained(
                **_source(path, trust_remote_code), **common, config=load_config(folder, trust_remote_code)
            )
    else:
        model, info = AutoModelForCausalLM.from_pretrained(
            **_source(path, trust_remote_code), **_alike(path), **common, use_safetensors=True
        )
    check_loaded(path, folder, info)
    if isinstance(placement, torch.device):
        model = model.to(placement)
    return Read(model.eval(), tuple(sorted(info["unexpected_keys"])))


def _alike(path: Path) -> dict[str, Any]:
    """Ours for a config of a kind that transformers does not know by its name."""
    known = raw_config(path).get("model_type") not in _ALIKE
    return {} if known else {"config": load_config(path, trust_remote_code=False)}


def _check_gguf_sizes(path: Path, folder: Path, state: State) -> None:
    """Look whether a GGUF's tensors are what its config asks for, on sizes alone: a damaged header falls back on
    its class's own sizes, and a file of 60 kB asked for 26 GB. Raises ModelUnavailable."""
    sizes = {name: tensor.to("meta") for name, tensor in state.tensors.items()}
    how = {"device_map": torch.device("meta"), "ignore_mismatched_sizes": True, "output_loading_info": True}
    made = causal_class(state.config)
    check_loaded(path, folder, made.from_pretrained(None, config=state.config, state_dict=sizes, **how)[1])


def check_loaded(path: Path, folder: Path, info: dict[str, Any]) -> None:
    """Look for tensors that are missing or of another size: transformers goes on with random numbers in their place. Raises
    ModelUnavailable."""
    from specdec_engine.models.gguf_header import DAMAGED  # gguf takes 0.1 s to import

    mend = DAMAGED if path.is_file() else _NOT_OF_ONE
    if missing := sorted(info["missing_keys"]):
        made = next(iter(raw_config(folder).get("architectures") or ()), "")
        what, hint = "its config asks for", mend
        if made and "CausalLM" not in str(made) and "LMHead" not in str(made):
            what, hint = (
                f"a text model of its kind has (it is a {made})",
                "choose the causal model that it was made from",
            )
        count = f"{len(missing)} tensors that {what}, the first" if len(missing) > 1 else f"a tensor that {what},"
        raise ModelUnavailable(f"{path} lacks {count} {missing[0]}", hint)
    if differing := sorted(info["mismatched_keys"]):
        name, stored, wanted = differing[0]
        sizes = f"has the size {tuple(stored)}, and its config asks for {tuple(wanted)}"
        raise ModelUnavailable(f"{name} of {path} {sizes}", mend)


def generation_config(folder: Path, config: Any) -> Any:
    """The file's, or where there is none, what config.json says of it, as older checkpoints do. Raises ModelUnavailable for
    one that cannot be read: its ends and penalties would be left out without a word."""
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    try:
        if not file.is_file():
            return GenerationConfig.from_model_config(config) if hasattr(config, "to_dict") else None
        return GenerationConfig.from_dict(read_json(file))
    except Exception as error:  # what is not JSON, or what transformers does not take for a setting
        raise ModelUnavailable(
            f"{file} cannot be read: {first_line(error)}", "get that one file again: it is small"
        ) from error


def _source(path: Path, trust_remote_code: bool) -> dict[str, Any]:
    """What every from_pretrained takes; local paths only, so that nothing leaves the machine here."""
    common = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    if path.is_file():
        return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, **common}
    return {"pretrained_model_name_or_path": path, **common}


def load_tokenizer(path: Path, trust_remote_code: bool) -> Any:
    """The tokenizer beside the weights. Raises ModelUnavailable if there is none."""
    try:
        return _tokenizer_class(path).from_pretrained(**_source(path, trust_remote_code))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise
        raise ModelUnavailable(
            f"{path} has no tokenizer that can be read: {first_line(error)}",
            "put tokenizer.json and tokenizer_config.json beside the weights; token ids mean nothing without them",
        ) from error


def _tokenizer_class(path: Path) -> Any:
    """The plain fast tokenizer where the folder names it, as the one beside a GGUF does: AutoTokenizer imports for 2 s."""
    import transformers

    with suppress(OSError, ValueError, AttributeError):
        named = json.loads((path / "tokenizer_config.json").read_text("utf-8")).get("tokenizer_class")
        if named in ("TokenizersBackend", "PreTrainedTokenizerFast") and (path / "tokenizer.json").is_file():
            return transformers.PreTrainedTokenizerFast
    return transformers.AutoTokenizer


def stop_ids(folder: Path, config: Any, generation: Any, tokenizer: Any) -> frozenset[int]:
    """All that ends a text: the end-of-sequence ids of generation config, config and tokenizer, and the ends of a turn.
    Raises ModelUnavailable for an id that is none."""
    ids = set(turn_ends(tokenizer))
    for where, holder in (
        ("generation_config.json", generation),
        ("config.json", config.get_text_config()),
        ("the tokenizer", tokenizer),
    ):
        value = getattr(holder, "eos_token_id", None)
        found = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if wrong := [i for i in found if not isinstance(i, int) or isinstance(i, bool)]:
            raise ModelUnavailable(f"eos_token_id in {where} of {folder} is {wrong[0]!r}", "it is a token's number")
        ids |= set(found)
    return frozenset(ids)
