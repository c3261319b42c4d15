"""`Ops` of a CPU: kernels of our own, or, where no compiler made any, torch's operations."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from specdec_engine.runtime import native
from specdec_engine.runtime.experts import Experts
from specdec_engine.runtime.native_records import LayerFields, Matrix
from specdec_engine.runtime.ops import TORCH, Layer, Ops
from specdec_engine.runtime.shape import Shape
from specdec_engine.runtime.torch_forms import WIDE
from specdec_engine.system.machine import has_amx


def ops_for(dtype: torch.dtype) -> Ops:
    """For activations of this dtype."""
    own = native.kernels() if dtype in (torch.float32, torch.bfloat16) else None
    if own is None:
        return TORCH
    # For a prompt's rows torch's is faster: 512 after 4,096 cached take 47 ms of ours, and 25, on two cores with AVX2.
    wide = torch.bfloat16 if _tiled() else torch.float32
    return Ops(own.add_norm, own.rotate, own.gate, partial(own.attend, dtype), WIDE - 1, wide)


def whole(layer: Layer, shape: Shape) -> Layer:
    """With `fields`, where our own kernels multiply all of it."""
    parts = [p.matrices for p in (layer.qkv, layer.out, *layer.network.projections)]
    if not all(parts) or not shape.plain or isinstance(layer.network, Experts):
        return layer
    matrices = [matrix for part in parts for matrix in part]
    norms = (layer.attention_norm, layer.mlp_norm, layer.q_norm, layer.k_norm)
    fields = LayerFields(
        *(None if norm is None else norm.data_ptr() for norm in norms),
        shape.eps,
        layer.window or 0,
        shape.hidden,
        parts[3][0].K,
        max(matrix.K for matrix in matrices),
        layer.rotation,
        tuple(map(len, parts)),
        (Matrix * 8)(*matrices),
    )
    return replace(layer, fields=fields)


def _tiled() -> bool:
    """Whether torch's attention of many rows is faster in bfloat16 than in float32: with AMX, where 512 rows after 512 cached
    take 2.0 ms a layer, and 5.1."""
    return has_amx()
