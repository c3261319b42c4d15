"""Records for kernels of our own, as their C has them. Whoever makes one keeps what it points at."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TILED = 16
"""Rows of a prompt from which on it is done in tiles: making them of the weights takes 10 ms a pass, and a row 0.1 to 0.4
instead of 0.7 to 1.3 (106M weights on two cores, in quiet hours and others)."""


class Matrix(ctypes.Structure):
    """`matrix` in `packed.h`."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("bits", "group", "offsets")),
        *((name, ctypes.c_long) for name in ("N", "K")),
        *((name, ctypes.c_void_p) for name in ("words", "constants", "bias")),
    )


class PassFields(ctypes.Structure):
    """`pass` in `attention.h`."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("n", "heads", "groups", "size", "capacity")),
        ("narrow", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("rotation", "positions", "hidden")),
    )


class LayerFields(ctypes.Structure):
    """`layer` in `kernels.c`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_long) for name in ("window", "hidden", "inner", "widest", "rotation")),
        ("many", ctypes.c_long * 4),
        ("matrices", Matrix * 8),
    )


class Beginning(ctypes.Structure):
    """`beginning` in `kernels.c`."""

    _fields_ = (
        ("features", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("parts", "size")),
        ("feature_norm", ctypes.c_void_p),
        ("fuse", ctypes.POINTER(Matrix)),
        *((name, ctypes.c_void_p) for name in ("embedded", "embedding_norm")),
        ("residual_normed", ctypes.c_int),
    )


class Ending(ctypes.Structure):
    """`ending` in `kernels.c`."""

    _fields_ = (
        ("norm", ctypes.c_void_p),
        ("matrices", ctypes.POINTER(Matrix)),
        *((name, ctypes.c_long) for name in ("many", "rows")),
        *((name, ctypes.c_void_p) for name in ("last", "out")),
    )


class Drafting(ctypes.Structure):
    """`drafting` in `kernels.c`."""

    _fields_ = (
        ("layers", ctypes.POINTER(LayerFields)),
        ("many", ctypes.c_long),
        ("text", PassFields),
        ("kept", ctypes.c_void_p),
        ("before", Beginning),
        ("after", Ending),
        ("x", ctypes.c_void_p),
        ("normed", ctypes.c_int),
        ("tiles", ctypes.c_int),
        ("embedding", ctypes.POINTER(Matrix)),
        ("tokens", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("token", ctypes.c_int64),
        ("places", ctypes.c_int64 * 2),
        ("shares", ctypes.c_float * 2),
    )


class Following:
    """The end of a pass, behind its layers: the last norm, and products of the last `rows` rows with some matrices."""

    def __init__(self, n: int, norm: Tensor, matrices: Sequence[Matrix], rows: int) -> None:
        """norm [hidden], of a pass of n rows; both, and what matrices point at, live as long as this."""
        self.last = torch.empty(n, len(norm))
        """[n, hidden]: what leaves the norm."""
        self.out = torch.empty(rows, sum(matrix.N for matrix in matrices))
        """[rows, N of all]"""
        told = (Matrix * len(matrices))(*matrices)
        self.fields = Ending(norm.data_ptr(), told, len(matrices), rows, self.last.data_ptr(), self.out.data_ptr())


@dataclass(frozen=True, slots=True)
class Tapped:
    """The places for the stream as it leaves some of the layers."""

    layers: tuple[int, ...]
    features: Tensor
    """[n, layers + 1, hidden] in the activations' dtype; the last is the caller's."""


def of_texts(fields: Sequence[PassFields]) -> ctypes.Array[PassFields]:
    """Put them together as `Kernels.through` takes them."""
    return (PassFields * len(fields))(*fields)


def pass_fields(
    heads: int, rotation: Tensor | None, positions: Tensor, kept: Tensor, hidden: Tensor | None = None
) -> PassFields:
    """Describe tensors, which live as long as what is given; kept: see `ops.Ops`; hidden: see `ops.Pass`."""
    groups, capacity, size = kept.shape[0] // 2, kept.shape[1], kept.shape[2]
    narrow = kept.dtype == torch.bfloat16
    at = address(rotation), positions.data_ptr(), address(hidden)
    return PassFields(len(positions), heads, groups, size, capacity, narrow, *at)


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
