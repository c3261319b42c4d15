"""The choice of a model's forward by its config: ours, or transformers'."""

from __future__ import annotations

from typing import Any

import torch

from specdec_engine.models.options import LoadOptions
from specdec_engine.runtime.shape import Shape, Unsupported, shape_of


def lean_shape(config: Any, options: LoadOptions, device: torch.device) -> Shape | Unsupported:
    """Describe a config for the lean forward, or say why the generic one is to run."""
    if options.runtime == "generic":
        return Unsupported("--runtime generic was asked for")
    if device.type == "mps":
        return Unsupported("it has not been tried on Apple's GPUs")
    if options.runtime == "graph" and device.type != "cuda":
        return Unsupported(f"graphs are recorded on a CUDA device, and this is {device}")
    try:
        shape = shape_of(config)
    except Unsupported as reason:
        return reason
    if shape.mixture is not None and device.type != "cpu":
        # The host asks at every layer which experts were chosen: no recorded graph can, and each question waits for a GPU.
        return Unsupported("its experts run on our own forward on a CPU alone")
    return shape
