"""What a model will need, compared with what is free, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from specdec_engine.errors import OutOfMemory
from specdec_engine.runtime.context_limit import kv_size, layer_configs
from specdec_engine.runtime.linear import Packing
from specdec_engine.runtime.weights import PACKED, Entry
from specdec_engine.system.memory import gib

_HEADROOM = 1.1  # activations, buffers, the allocator's own; 5 % measured on the built-in target, twice that allowed


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes, at least: what the weights take in a dtype, and the keys and values of a context."""

    weights: int
    cache: int

    @property
    def total(self) -> int:
        return int((self.weights + self.cache) * _HEADROOM)


def estimate(
    files: Sequence[Path],
    config: Any,
    dtype: torch.dtype,
    cache: int,
    quantize: Packing = "none",
    ours: Callable[[str], str] = str,
) -> Need:
    """From file headers and the config alone; a GGUF with unknown names is reckoned unpacked. ours: see `need_of`.

    Raises SafetensorError for a file whose size is not what its header says: a truncated download.
    """
    each = PACKED_BYTES.get(quantize, dtype.itemsize)
    if files[0].suffix != ".safetensors":
        return Need(int(_parameters(config) * each), cache)
    stored = [size for file in files for size in _stored_numbers(file, ours)]
    # Two codes of 4 bits a byte (MXFP4), which are kept in 8 bits with a scale for each group of 32, or dense.
    of_codes = 2 * {"none": dtype.itemsize, "int4": each}.get(quantize, 1.125)
    kept = sum(numbers * (of_codes if name.endswith("_blocks") else each) for name, numbers in stored)
    return Need(int(kept), cache)


PACKED_BYTES: dict[Packing, float] = {"int4": 0.7, "int8": 1.15, "light": 1.6}
"""A number's bytes in each form, scales included, and a little for the head; a `light` one is packed beside the table of
embeddings, a quarter of a small model."""


def kept_bytes(name: str, entry: Entry, dtype: torch.dtype, quantize: Packing) -> int:
    """What a GGUF's tensor takes once loaded: packed, its bits and the constants of its groups; else one `dtype` a number."""
    numbers = math.prod(entry.shape)
    if quantize == "none" or len(entry.shape) == 1:
        return numbers * dtype.itemsize
    if quantize in ("auto", "light") and entry.kind in PACKED:
        return int(numbers * (0.625 if entry.kind.startswith("Q4") else 1.25))
    return int(numbers * PACKED_BYTES.get(quantize, dtype.itemsize))


def kv_bytes(config: Any, dtype: torch.dtype, tokens: int) -> int:
    """Keys and values of `tokens` tokens: 2 · layers · KV heads · head size · bytes."""
    return sum(2 * math.prod(kv_size(layer)) for layer in layer_configs(config)) * dtype.itemsize * tokens


def _stored_numbers(file: Path, ours: Callable[[str], str]) -> list[tuple[str, int]]:
    """How many each tensor has, by its name."""
    with safe_open(file, "pt") as tensors:
        names = filter(ours, tensors.keys())
        return [(name, math.prod(tensors.get_slice(name).get_shape())) for name in names]


def _parameters(config: Any) -> int:
    """Counted on a model without storage."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return int(AutoModelForCausalLM.from_config(config).num_parameters())


def check_fits(name: str, need: Need, device: torch.device, free: int | None) -> None:
    """Raises OutOfMemory, with the sizes, if the model cannot fit."""
    if free is not None and need.total > free:
        raise OutOfMemory(
            f"{name} needs about {gib(need.total)} on {device} ({gib(need.weights)} weights, {gib(need.cache)} cache), "
            f"and {gib(free)} are free",
            "use --dtype bfloat16, a smaller model, fewer --max-tokens, or --device-map auto to spread it",
        )
