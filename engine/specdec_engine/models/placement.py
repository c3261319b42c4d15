"""How much memory a model will take in the form that was chosen, and on which device it goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from specdec_engine.models.memory_needs import Need, check_fits, estimate, kept_bytes, kv_bytes
from specdec_engine.models.options import LoadOptions
from specdec_engine.models.pretrained import DeviceMap
from specdec_engine.models.sources import weight_files
from specdec_engine.runtime.arithmetic import Arithmetic, Matrices
from specdec_engine.runtime.blocks import cache_dtype
from specdec_engine.runtime.context_limit import context_limit, layer_configs
from specdec_engine.runtime.graphs import room_for
from specdec_engine.runtime.linear import Packing
from specdec_engine.runtime.shape import Shape, Unsupported
from specdec_engine.runtime.weights import Entry
from specdec_engine.system.memory import free_bytes


def packing_of(options: LoadOptions, arithmetic: Arithmetic) -> Packing:
    """The packing that was asked for, or `none` where no weights are packed."""
    return options.quantize if arithmetic.packs else "none"


def matrices_of(config: Any, packed: bool, lean: bool) -> Matrices:
    """Name the sizes to measure by: the projection into the feed-forward network, half of most models' weights."""
    hidden = int(getattr(config.get_text_config(), "hidden_size", 0) or 1024)
    sizes = [getattr(layer, "intermediate_size", 0) for layer in layer_configs(config)]
    widest = max((max(size) if isinstance(size, list) else size or 0 for size in sizes), default=0)
    return Matrices(2 * int(widest or 4 * hidden), hidden, packed, lean)


def need_of(
    path: Path,
    found: Mapping[str, Entry],
    config: Any,
    shape: Shape | Unsupported,
    arithmetic: Arithmetic,
    device: torch.device,
    options: LoadOptions,
    ours: Callable[[str], str],
) -> Need:
    """Reckon weights in the form they will be kept in, and the cache in its own dtype and size, for no more tokens than the
    model reads. ours: what it calls a tensor of the checkpoint; empty for one that it has no part of."""
    quantize: Packing
    dtype, limit = arithmetic.weights, context_limit(config)
    tokens = min(options.tokens, limit or options.tokens)
    if isinstance(shape, Unsupported):
        quantize, cache = "none", kv_bytes(config, dtype, tokens)
    else:
        tokens = room_for(tokens, limit) if device.type == "cuda" else tokens
        quantize = packing_of(options, arithmetic)
        cache = tokens * shape.kv_values * cache_dtype(arithmetic.dtype, device, arithmetic.kernels).itemsize
    if not found:
        return estimate(weight_files(path), config, dtype, cache, quantize, ours)
    return Need(sum(kept_bytes(name, entry, dtype, quantize) for name, entry in found.items()), cache)


def place(name: str, need: Need, device: torch.device, options: LoadOptions) -> torch.device | DeviceMap:
    """Choose the device, if the model fits; else all of them together, where there is more than one GPU to spread over.
    Raises OutOfMemory."""
    if options.device_map is not None and device.type != "cpu":  # CPUs alone are nothing to spread over
        return options.device_map
    free = free_bytes(device)
    if device.type == "cuda" and options.device == "auto" and free is not None and need.total > free:
        everywhere = sum(free_bytes(torch.device("cuda", i)) or 0 for i in range(torch.cuda.device_count()))
        if need.total <= everywhere:
            return "auto"
    check_fits(name, need, device, free)
    return device
