"""What a model will need, compared with what is free, before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from specdec_engine.errors import OutOfMemory

_HEADROOM = 1.1  # activations, buffers, the allocator's own; 5 % measured on the built-in target, twice that allowed


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes, at least: what the weights take in a dtype, and the keys and values of a context."""

    weights: int
    cache: int

    @property
    def total(self) -> int:
        return int((self.weights + self.cache) * _HEADROOM)


def estimate(path: Path, config: Any, dtype: torch.dtype, tokens: int) -> Need:
    """From file headers and the config alone. A GGUF counts with its file size, which is the least it can take."""
    if path.is_file():
        return Need(path.stat().st_size, kv_bytes(config, dtype, tokens))
    elements = sum(_elements(file) for file in path.glob("*.safetensors"))
    return Need(elements * dtype.itemsize, kv_bytes(config, dtype, tokens))


def kv_bytes(config: Any, dtype: torch.dtype, tokens: int) -> int:
    """Keys and values of `tokens` tokens: 2 · layers · KV heads · head size · bytes."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", 0) or 1
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_size = getattr(text, "head_dim", None) or getattr(text, "hidden_size", 0) // heads
    return int(2 * getattr(text, "num_hidden_layers", 0) * kv_heads * head_size * dtype.itemsize * tokens)


def _elements(file: Path) -> int:
    """Numbers stored in a safetensors file: an 8-byte length, then a JSON header with each tensor's shape."""
    with file.open("rb") as handle:
        header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    total = 0
    for name, entry in header.items():
        if name != "__metadata__":
            size = 1
            for n in entry["shape"]:
                size *= n
            total += size
    return total


def free_bytes(device: torch.device) -> int | None:
    """What is free on the device now; None where it cannot be asked."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type in ("cpu", "mps"):  # MPS shares the machine's memory
        return int(psutil.virtual_memory().available)
    return None


def check_fits(name: str, need: Need, device: torch.device, free: int | None) -> None:
    """Raises OutOfMemory, with the sizes, if the model cannot fit."""
    if free is not None and need.total > free:
        raise OutOfMemory(
            f"{name} needs about {gib(need.total)} on {device} ({gib(need.weights)} weights, {gib(need.cache)} cache), "
            f"and {gib(free)} are free",
            "use --dtype bfloat16, a smaller model, fewer --max-tokens, or --device-map auto to spread it",
        )


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
