"""From a name to a model on a device: the one file that talks to the hub.

A name is `builtin`, a `.gguf` file, a folder, or a hub id; all but the GGUF become a folder with safetensors weights, and
are loaded alike. Pickle files are never read, code from a checkpoint is run only on demand, and with `offline` nothing
leaves the machine. Everything that can be refused is refused before weights are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jinja2 import TemplateError

from specdec_engine.builtin import builtin_folder
from specdec_engine.cache import new_cache
from specdec_engine.errors import ModelUnavailable, OutOfMemory, SpecdecError, UsageError
from specdec_engine.memory import Need, check_fits, estimate, free_bytes
from specdec_engine.progress import Progress, Report, silent
from specdec_engine.runtime.generic import GenericRuntime

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
    path = resolve(name, options)
    with _explained(name, path):
        config = _load_config(path, options)
        new_cache(config, name)
        tokenizer = load_tokenizer(path, options)
        need = estimate(_weight_files(path), config, dtype, options.tokens)
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
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"device {name!r} cannot be used here: {reason}", "choose auto, cpu, cuda, cuda:1 or mps"
        ) from error
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


# -- names to paths ----------------------------------------------------------------------------------------------------

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def resolve(name: str, options: LoadOptions) -> Path:
    """The folder or .gguf file that holds the model, fetched if need be. Raises ModelUnavailable."""
    path = Path(name).expanduser()
    if name == "builtin":
        return builtin_folder(options.offline, options.report)
    if path.suffix == ".gguf":
        return _checked_gguf(path)
    if path.is_dir():
        return _checked_folder(path)
    if not _HUB_ID.fullmatch(name) or path.exists():
        raise ModelUnavailable(
            f"no model at {name!r}: there is no such folder or .gguf file",
            "give a folder with config.json and *.safetensors, a .gguf file, a hub id such as org/name, or builtin",
        )
    return _checked_folder(_fetch(name, options))


def _checked_gguf(path: Path) -> Path:
    if not path.is_file():
        raise ModelUnavailable(f"no file {str(path)!r}", "give the path of a .gguf file")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelUnavailable(f"{path} is not a GGUF file: it begins with {magic!r}", "download it again")
    return path


def _checked_folder(folder: Path) -> Path:
    """Only safetensors, and all shards that the index names."""
    if not (folder / "config.json").is_file():
        raise ModelUnavailable(f"{folder} has no config.json", "give the folder that save_pretrained wrote")
    if not list(folder.glob("*.safetensors")):
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for p in folder.glob(pattern))
        found = f", only pickled ones ({pickled[0]})" if pickled else ""
        raise ModelUnavailable(
            f"{folder} has no safetensors weights{found}",
            "pickled weights can run code when read, and are not; where you trust them, load them once with transformers "
            "and save them again with save_pretrained, which writes safetensors",
        )
    if missing := [file.name for file in _weight_files(folder) if not file.is_file()]:
        raise ModelUnavailable(f"{folder} lacks the weights file {missing[0]}", "download it again")
    return folder


def _weight_files(path: Path) -> list[Path]:
    """The files transformers will read: a GGUF, the shards of the index, or the one model.safetensors."""
    index = path / "model.safetensors.index.json"
    if path.is_file() or not index.is_file():
        return [path if path.is_file() else path / "model.safetensors"]
    try:
        return sorted(path / name for name in set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelUnavailable(f"{index} cannot be read: {error}", "download it again") from error


def _fetch(name: str, options: LoadOptions) -> Path:
    """A hub model's files in the hub's own cache."""
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    wanted = [*_WANTED, "*.py"] if options.trust_remote_code else _WANTED
    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=wanted,
                ignore_patterns=["*/*", "consolidated*"],  # the same weights in other formats
                local_files_only=options.offline,
                tqdm_class=_reporting_tqdm(name, options.report),
            )
        )
    except hub.GatedRepoError as error:
        raise ModelUnavailable(
            f"{name} is gated: its owner wants you to accept terms first",
            f"accept them at the model's page, then run `hf auth login` ({_status(error)})",
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise ModelUnavailable(
            f"the hub has no model {name!r}, or it is private",
            f"check the spelling, or run `hf auth login` for a private one ({_status(error)})",
        ) from error
    except hub.HFValidationError as error:
        raise ModelUnavailable(f"{name!r} is no hub id: {_first_line(error)}", "a hub id is org/name") from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        if options.offline or isinstance(error, hub.OfflineModeIsEnabled):
            raise ModelUnavailable(
                f"{name} is not in the local cache, and offline mode forbids fetching it",
                f"run `hf download {name}` while online, or leave out --offline",
            ) from error
        raise ModelUnavailable(
            f"{name} is neither a local folder nor in the cache, and the hub cannot be reached",
            "check the spelling and the network; `builtin` and local folders need no hub",
        ) from error
    except hub.HfHubHTTPError as error:
        raise ModelUnavailable(f"{name} could not be fetched: {_status(error)}", "try again later") from error
    except Exception as error:  # a full disk, or whatever the client's transport says when a connection dies
        raise ModelUnavailable(
            f"{name} could not be fetched: {getattr(error, 'strerror', None) or _first_line(error)}",
            "free some space or check the network, and try again: what was fetched is kept",
        ) from error


def _status(error: Any) -> str:
    response = getattr(error, "response", None)
    return f"HTTP {response.status_code}" if response is not None else str(error).splitlines()[0]


def _reporting_tqdm(name: str, report: Report) -> type[Any]:
    """huggingface_hub draws its progress with the tqdm class it is given: ours reports the bytes and draws nothing."""
    from tqdm.auto import tqdm

    class Reporting(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            self._counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})
            self._seen = 0

        def update(self, n: float | None = 1) -> None:
            self._seen += int(n or 0)
            if self._counts_bytes:
                report(Progress("download", name, self._seen, int(self.total) if self.total else None))

    return Reporting


# -- paths to models ---------------------------------------------------------------------------------------------------


def load_tokenizer(path: Path, options: LoadOptions) -> Any:
    """The tokenizer beside the weights. Raises ModelUnavailable if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(**_source(path, options))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise
        raise ModelUnavailable(
            f"{path} has no tokenizer that can be read: {_first_line(error)}",
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
            f"the weights of {name} are damaged: {_first_line(error)}", f"delete them and download them again: {path}"
        ) from error
    except Exception as error:  # a checkpoint can be broken in as many ways as there are lines in its reader
        if "trust_remote_code" in str(error):
            raise ModelUnavailable(
                f"{name} brings its own code, which is not run unless you ask for it",
                "read the code, and pass --trust-remote-code if you trust it",
            ) from error
        if path.is_file():
            raise ModelUnavailable(
                f"{name} cannot be read as GGUF: {_first_line(error)}", "download it again"
            ) from error
        raise ModelUnavailable(
            f"{name} cannot be loaded: {_first_line(error)}", "run with --debug for the traceback"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


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
