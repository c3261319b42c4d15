"""What transformers reads of a checkpoint: config, tokenizer, weights, stop ids. Local paths only."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jinja2 import TemplateError

from specdec_engine.errors import ModelUnavailable, UsageError
from specdec_engine.sources import first_line

DeviceMap = Literal["auto"]


def load_config(path: Path, trust_remote_code: bool) -> Any:
    """The config, for the architecture that it names."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(**_source(path, trust_remote_code))


def load_weights(
    path: Path,
    folder: Path,
    gguf_state: Callable[[], dict[str, torch.Tensor] | None],
    dtype: torch.dtype,
    placement: torch.device | DeviceMap,
    trust_remote_code: bool,
) -> Any:
    """The model in evaluation mode, from safetensors or a GGUF's tensors. Raises ModelUnavailable if a tensor is missing."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    state = gguf_state() if path.is_file() else None
    common: dict[str, Any] = {"device_map": placement} if isinstance(placement, str) else {}
    common |= {"dtype": dtype, "output_loading_info": True}
    model: Any
    if state is not None:
        config = load_config(folder, trust_remote_code)
        made = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model, info = made.from_pretrained(None, config=config, state_dict=state, **common)
    else:
        model, info = AutoModelForCausalLM.from_pretrained(
            **_source(path, trust_remote_code), **common, use_safetensors=True
        )
    if missing := sorted(info["missing_keys"]):  # transformers would go on with random numbers in their place
        raise ModelUnavailable(
            f"{path} lacks {len(missing)} tensors that its config asks for, the first {missing[0]}", "download it again"
        )
    if isinstance(placement, torch.device):
        model = model.to(placement)
    return model.eval()


def generation_config(folder: Path) -> Any:
    """None where there is none."""
    from transformers import GenerationConfig

    with suppress(OSError, ValueError):  # it need not be there
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    return None


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


def stop_ids(*holders: Any) -> frozenset[int]:
    """The end-of-sequence ids of configs and tokenizers together."""
    ids: set[int] = set()
    for holder in holders:
        text = holder.get_text_config() if hasattr(holder, "get_text_config") else holder
        value = getattr(text, "eos_token_id", None)
        ids |= {value} if isinstance(value, int) else set(value or ())
    return frozenset(ids)


def chat_ids(tokenizer: Any, prompt: str, system: str | None, history: Sequence[tuple[str, str]] = ()) -> list[int]:
    """The prompt as the next user turn of the tokenizer's chat template, the assistant's turn opened. history: what was said
    before, user and assistant."""
    turns = [{"role": "system", "content": system}] if system else []
    for user, assistant in history:
        turns += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    turns.append({"role": "user", "content": prompt})
    try:
        encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)
    except TemplateError as error:  # some templates refuse a system turn, in their own words
        raise UsageError(
            f"the chat template refuses this prompt: {error}", "leave out --system, or use --raw"
        ) from error
    return cast("list[int]", list(encoded["input_ids"]))
