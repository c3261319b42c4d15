"""From a name to a model on a device.

`find_model` fetches and looks, `Candidate.load` reads the weights; what can be refused is refused in between. Code that
comes with a checkpoint is run only on demand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jinja2 import TemplateError

from specdec_engine.cache import new_cache
from specdec_engine.errors import ModelUnavailable, OutOfMemory, SpecdecError, UsageError
from specdec_engine.memory import Need, check_fits, estimate, free_bytes
from specdec_engine.progress import Progress, Report, silent
from specdec_engine.runtime.generic import GenericRuntime
from specdec_engine.sources import first_line, resolve, weight_files

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DeviceMap = Literal["auto"]
RuntimeName = Literal["auto", "generic"]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Where and how models are loaded; the same for target and draft."""

    device: str = "auto"
    """auto (cuda, then mps, then cpu), or a torch device such as cuda:1."""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16."""
    device_map: DeviceMap | None = None
    """`auto` spreads the target over all GPUs and the CPU, by accelerate."""
    runtime: RuntimeName = "auto"
    """How forwards are run: auto chooses the fastest that fits, of which there is one: generic."""
    offline: bool = False
    trust_remote_code: bool = False
    tokens: int = 2048
    """Context to reckon with when memory is estimated: prompt and output."""
    report: Report = silent


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model with what belongs to it."""

    name: str
    runtime: GenericRuntime
    tokenizer: Any
    dtype: str
    stop_ids: frozenset[int]
    """All end-of-sequence ids of the generation config, the config and the tokenizer."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that was found and looked at; its weights are not read yet."""

    name: str
    path: Path
    config: Any
    tokenizer: Any
    need: Need
    device: torch.device
    dtype: torch.dtype
    options: LoadOptions

    @property
    def vocab(self) -> int:
        """Size of the logits, by the config."""
        return int(self.config.get_text_config().vocab_size)

    def load(self) -> Loaded:
        """Read the weights. Raises ModelUnavailable for damaged ones, OutOfMemory if they do not fit any more."""
        report, size = self.options.report, self.need.weights
        placement = _placement(self.name, self.need, self.device, self.options)
        report(Progress("load", self.name, 0, size))
        with _explained(self.name, self.path):
            model = _load_weights(self.path, self.dtype, placement, self.options)
        report(Progress("load", self.name, size, size))
        runtime = GenericRuntime(model, self.name)
        dtype = str(self.dtype).removeprefix("torch.")
        return Loaded(self.name, runtime, self.tokenizer, dtype, _stop_ids(model, self.tokenizer))


def find_model(name: str, options: LoadOptions) -> Candidate:
    """The model that `name` means, fetched if need be and checked as far as that goes without its weights.

    Raises UsageError for a device or dtype that does not exist, ModelUnavailable for a model that cannot be had,
    PairIncompatible for one that cannot be rolled back, OutOfMemory for one that does not fit.
    """
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    path = resolve(name, offline=options.offline, trust_remote_code=options.trust_remote_code, report=options.report)
    with _explained(name, path):
        config = _load_config(path, options)
        new_cache(config, name)
        tokenizer = load_tokenizer(path, options)
        need = estimate(weight_files(path), config, dtype, options.tokens)
        _placement(name, need, device, options)
    return Candidate(name, path, config, tokenizer, need, device, dtype, options)


def load_model(name: str, options: LoadOptions) -> Loaded:
    """`find_model`, and its weights."""
    return find_model(name, options).load()


def pick_device(name: str) -> torch.device:
    """cuda, then mps, then cpu for `auto`; otherwise the named one. Raises UsageError if this machine has none such."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        here += ["mps"] if torch.backends.mps.is_available() else []
        raise UsageError(f"device {name!r} cannot be used here", f"there is {', '.join(here)}; or auto") from error
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 for `auto` where the device computes in it, else float16 on a GPU and float32 on a CPU."""
    if name != "auto":
        if name not in DTYPES:
            raise UsageError(f"dtype {name!r} is unknown", f"choose auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_computes_bfloat16() else torch.float32
    return torch.float16


def _cpu_computes_bfloat16() -> bool:
    """Without the instructions bfloat16 is emulated, and slower than float32."""
    known: Mapping[str, Any] = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(known.get("avx512_bf16") or known.get("amx_bf16") or known.get("bf16"))


def load_tokenizer(path: Path, options: LoadOptions) -> Any:
    """The tokenizer beside the weights. Raises ModelUnavailable if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(**_source(path, options))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise
        raise ModelUnavailable(
            f"{path} has no tokenizer that can be read: {first_line(error)}",
            "put tokenizer.json and tokenizer_config.json beside the weights; token ids mean nothing without them",
        ) from error


def _load_config(path: Path, options: LoadOptions) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(**_source(path, options))


def _load_weights(path: Path, dtype: torch.dtype, placement: torch.device | DeviceMap, options: LoadOptions) -> Any:
    from transformers import AutoModelForCausalLM

    on_map = {"device_map": placement} if isinstance(placement, str) else {}
    model: Any
    model, info = AutoModelForCausalLM.from_pretrained(
        **_source(path, options), **on_map, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):  # transformers would go on with random numbers in their place
        raise ModelUnavailable(
            f"{path} lacks {len(missing)} tensors that its config asks for, the first {missing[0]}", "download it again"
        )
    if isinstance(placement, torch.device):
        model = model.to(placement)
    return model.eval()


def _source(path: Path, options: LoadOptions) -> dict[str, Any]:
    """What every from_pretrained takes; local paths only, so that nothing leaves the machine here."""
    common = {"local_files_only": True, "trust_remote_code": options.trust_remote_code}
    if path.is_file():
        return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, **common}
    return {"pretrained_model_name_or_path": path, **common}


def _placement(name: str, need: Need, device: torch.device, options: LoadOptions) -> torch.device | DeviceMap:
    """The device, if the model fits; else all of them together, where there is more than one GPU to spread over."""
    if options.device_map is not None:
        return options.device_map
    free = free_bytes(device)
    if device.type == "cuda" and options.device == "auto" and free is not None and need.total > free:
        everywhere = sum(free_bytes(torch.device("cuda", i)) or 0 for i in range(torch.cuda.device_count()))
        if need.total <= everywhere:
            return "auto"
    check_fits(name, need, device, free)
    return device


def _stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    ids: set[int] = set()
    for holder in (model.generation_config, model.config.get_text_config(), tokenizer):
        value = getattr(holder, "eos_token_id", None)
        ids |= {value} if isinstance(value, int) else set(value or ())
    return frozenset(ids)


@contextmanager
def _explained(name: str, path: Path) -> Iterator[None]:
    """What goes wrong inside transformers, safetensors and gguf, as one of our errors."""
    from safetensors import SafetensorError

    try:
        yield
    except SpecdecError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(f"out of memory while loading {name}", "use --dtype bfloat16, or a smaller model") from error
    except SafetensorError as error:
        raise ModelUnavailable(
            f"the weights of {name} are damaged: {first_line(error)}", f"delete them and download them again: {path}"
        ) from error
    except Exception as error:  # a checkpoint can be broken in as many ways as there are lines in its reader
        if "trust_remote_code" in str(error):
            raise ModelUnavailable(
                f"{name} brings its own code, which is not run unless you ask for it",
                "read the code, and pass --trust-remote-code if you trust it",
            ) from error
        if path.is_file():
            raise ModelUnavailable(
                f"{name} cannot be read as GGUF: {first_line(error)}", "download it again"
            ) from error
        raise ModelUnavailable(
            f"{name} cannot be loaded: {first_line(error)}", "run with --debug for the traceback"
        ) from error


def chat_ids(tokenizer: Any, prompt: str, system: str | None) -> list[int]:
    """The prompt as one user turn of the tokenizer's chat template, the assistant's turn opened."""
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": prompt})
    try:
        encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)
    except TemplateError as error:  # some templates refuse a system turn, in their own words
        raise UsageError(
            f"the chat template refuses this prompt: {error}", "leave out --system, or use --raw"
        ) from error
    return cast("list[int]", list(encoded["input_ids"]))
