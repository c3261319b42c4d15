"""A weight matrix in the form in which this machine multiplies it fastest: dense, or packed in 8 or 4 bits.

All take x [n, K] and give [n, N]. Every form gives a row the same bits whether it comes alone or among others (tested from 1
to 9 rows), but for torch's dense bfloat16 without AVX-512; this keeps plain and speculative decoding together. A prompt is
read alike by both, so that its rows may be multiplied in another way (`reading`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import compress, groupby
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from specdec_engine.runtime.native import Kernels
from specdec_engine.runtime.native_records import Matrix
from specdec_engine.runtime.torch_forms import (
    AT_ONCE,
    INT8_COLUMNS,
    WIDE,
    Dense,
    Int4,
    Int8,
    biased,
    onednn_takes,
    packs_int4,
    products,
)
from specdec_engine.runtime.weights import GROUP, Grouped
from specdec_engine.system.threads import as_at_first

Quantize = Literal["auto", "none", "int8", "int4"]
Packing = Literal["auto", "none", "int8", "int4", "light"]
"""`Quantize`, and `light` for drafts: as `auto`, but what is dense goes into 8 bits, the head too."""


class Projection(Protocol):
    """**Protocol:** one matrix, ready to multiply."""

    form: str
    """int4, int8, or the dtype's name."""
    matrices: tuple[Matrix, ...]
    """What kernels of our own multiply, side by side; none where torch does."""

    def __call__(self, x: Tensor, reading: bool = False) -> Tensor:
        """[n, K] -> [n, N]; reading: the rows are a prompt's, which may be multiplied in another way than those that are
        verified."""
        ...


@runtime_checkable
class Rows(Protocol):
    """**Protocol:** a matrix whose rows can be asked for, as an embedding does."""

    def dense_rows(self, order: Tensor) -> Tensor:
        """[n] -> [n, K] float32"""
        ...


class NativePacked:
    """Weights in 4 or 8 bits on kernels of our own; activations and results are float32."""

    def __init__(self, weight: Grouped, bias: Tensor | None, kernels: Kernels) -> None:
        self.form = f"int{weight.bits}"
        self._kernels, self._bias = kernels, bias
        self._words, self._constants = kernels.pack(weight)
        data = (self._words.data_ptr(), self._constants.data_ptr(), None if bias is None else bias.data_ptr())
        self.matrices: tuple[Matrix, ...] = (Matrix(*weight.layout, *weight.q.shape, *data),)

    def __call__(self, x: Tensor, reading: bool = False) -> Tensor:
        return self.of_texts([x])[0] if reading else self._kernels.multiply(x, self.matrices[0])

    def of_texts(self, texts: Sequence[Tensor]) -> list[Tensor]:
        """See `multiply_texts`."""
        matrix = self.matrices[0]
        wide = [len(x) >= WIDE and self._kernels.reading == "unpacked" for x in texts]
        long, others = (list(compress(texts, which)) for which in (wide, [not is_wide for is_wide in wide]))
        with as_at_first():
            wide_ones = list(products([x.bfloat16() for x in long], self._unpacked(), matrix.N)) if long else []
        unpacked = (biased(product.float(), self._bias) for product in wide_ones)
        multiplied = iter(_multiplied(self._kernels, matrix, others))
        return [next(unpacked if is_wide else multiplied) for is_wide in wide]

    def _unpacked(self) -> Iterator[Tensor]:
        """[K, n] bfloat16 at a time, of all N columns."""
        matrix, lanes = self.matrices[0], self._kernels.lanes
        step = max(1, AT_ONCE // (matrix.K * lanes)) * lanes
        for first in range(0, matrix.N, step):
            yield self._kernels.unpack(range(first, min(first + step, matrix.N)), matrix)

    def dense_rows(self, order: Tensor) -> Tensor:
        """[n] -> [n, K] float32: rows of the matrix, as an embedding that shares it wants them."""
        return self._kernels.rows(order, self.matrices[0])


class NativeDense:
    """bfloat16 weights on kernels of our own, which read them where they lie; activations and results are float32."""

    form = "bfloat16"

    def __init__(self, weight: Tensor, bias: Tensor | None, kernels: Kernels) -> None:
        self._weight, self._bias, self._kernels = weight.bfloat16().contiguous(), bias, kernels
        data = (self._weight.data_ptr(), None, None if bias is None else bias.data_ptr())
        self.matrices: tuple[Matrix, ...] = (Matrix(16, 0, 0, *weight.shape, *data),)

    def __call__(self, x: Tensor, reading: bool = False) -> Tensor:
        return self._kernels.multiply(x, self.matrices[0], reading)

    def of_texts(self, texts: Sequence[Tensor]) -> list[Tensor]:
        """See `multiply_texts`."""
        return _multiplied(self._kernels, self.matrices[0], texts)

    def dense_rows(self, order: Tensor) -> Tensor:
        """[n] -> [n, K] float32"""
        return self._weight[order].float()


class Joined:
    """Projections of one input that are packed in different ways, as the values' is in most GGUF files of 4 bits."""

    def __init__(self, parts: Sequence[Projection]) -> None:
        self.form = "+".join(sorted({part.form for part in parts}))
        self.matrices = () if any(not p.matrices for p in parts) else tuple(m for p in parts for m in p.matrices)
        self.parts = parts

    def __call__(self, x: Tensor, reading: bool = False) -> Tensor:
        return torch.cat([part(x, reading) for part in self.parts], -1)


def multiply_texts(projection: Projection, texts: Sequence[Tensor]) -> list[Tensor]:
    """Each [n, K], a prompt's rows, times the matrix, with the bits that it has alone: torch's products depend on how many
    rows there are, ours on whether they are in tiles. What is gained is that weights are unpacked once for all."""
    if isinstance(projection, NativePacked | NativeDense):
        return projection.of_texts(texts)
    if isinstance(projection, Joined):
        parts = [multiply_texts(part, texts) for part in projection.parts]
        return [torch.cat(of_one, -1) for of_one in zip(*parts, strict=True)]
    return [projection(x, reading=True) for x in texts]


def _multiplied(kernels: Kernels, matrix: Matrix, texts: Sequence[Tensor]) -> list[Tensor]:
    """Multiply by kernels of our own: those in tiles together, and the others together."""
    tiled = [kernels.reads_tiled(len(x)) for x in texts]
    found = dict[bool, Iterator[Tensor]]()
    for kind in set(tiled):
        alike = [x for x, is_tiled in zip(texts, tiled, strict=True) if is_tiled == kind]
        product = kernels.multiply(torch.cat(alike), matrix, reading=kind)
        found[kind] = iter(torch.split(product, [len(x) for x in alike]))
    return [next(found[is_tiled]) for is_tiled in tiled]


def project(
    weights: Sequence[Tensor | Grouped],
    bias: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    quantize: Packing,
    kernels: Kernels | None = None,
) -> Projection:
    """One projection for matrices that share their input, stacked along N.

    `auto` keeps packed weights packed where a kernel takes them, `none` makes all dense, int8 and int4 pack dense ones, and
    `light` does the first and packs dense ones to int8. kernels: our own, where they are to multiply; dtype is float32 then.
    """
    bias = None if bias is None else bias.to(device, dtype)

    def one(part: Sequence[Tensor | Grouped], bias: Tensor | None) -> Projection:
        if kernels is not None:
            return _native(part, bias, quantize, kernels)
        return _torchs(part, bias, dtype, device, quantize)

    runs = [list(run) for _, run in groupby(weights, _layout)]
    if len(runs) == 1 or quantize == "none":
        return one(weights, bias)
    parts = list[Projection]()
    for run in runs:
        rows = _shape(run)[0]
        parts.append(one(run, None if bias is None else bias[:rows]))
        bias = None if bias is None else bias[rows:]
    return Joined(parts)


def head_packing(quantize: Packing, kernels: Kernels | None) -> Packing:
    """For the matrix that makes logits, where the layers' are packed so.

    As the file has it, or in 8 bits where the layers' are packed on demand. But where oneDNN has bfloat16 and torch's kernels
    multiply, it is dense: reordered bfloat16 takes 2.0 ms for one row as for eight, int4 in halves 1.8 for one and 7 for
    eight (49,152 x 576, AVX-512).
    """
    if kernels is not None:
        return "light" if quantize in ("int8", "int4") else quantize
    return "int8" if quantize in ("int8", "int4", "light") else "none" if onednn_takes(torch.bfloat16) else quantize


def _layout(weight: Tensor | Grouped) -> tuple[int, int, bool] | None:
    return weight.layout if isinstance(weight, Grouped) else None


def _native(
    weights: Sequence[Tensor | Grouped], bias: Tensor | None, quantize: Packing, kernels: Kernels
) -> Projection:
    packed = [w for w in weights if isinstance(w, Grouped)]
    if packed and (quantize in ("auto", "light") or quantize == f"int{packed[0].bits}"):
        return NativePacked(_stacked(packed), bias, kernels)
    dense = _dense(weights)
    packs = dense.abs().max() > _LEAST_WEIGHT
    if packs and quantize == "int4" and dense.shape[1] % GROUP == 0:
        return NativePacked(quantized(dense), bias, kernels)
    if packs and quantize in ("int8", "int4", "light") and dense.shape[1] % _LEAST_GROUP == 0:
        return NativePacked(quantized_to_8_bits(dense), bias, kernels)
    return NativeDense(dense, bias, kernels)


def _torchs(
    weights: Sequence[Tensor | Grouped],
    bias: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    quantize: Packing,
) -> Projection:
    packed = [w for w in weights if isinstance(w, Grouped)]
    stays = bool(packed) and (quantize in ("auto", "light") or quantize == f"int{packed[0].bits}")
    if stays and packed[0].layout in _FOR_INT4 and packs_int4(*_shape(weights)):
        return Int4(_stacked(packed), bias)
    dense = _dense(weights)
    if quantize == "int4" and packs_int4(*dense.shape):
        return Int4(quantized(dense), bias)
    eight = quantize in ("int8", "int4", "light") or (stays and packed[0].bits == 8)
    if eight and dense.shape[1] % INT8_COLUMNS == 0:
        return Int8(dense, bias)
    return Dense(dense.to(device, dtype), bias)


def _dense(weights: Sequence[Tensor | Grouped]) -> Tensor:
    matrices = [w.dense() if isinstance(w, Grouped) else w for w in weights]
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


_FOR_INT4 = ((4, GROUP, True), (8, GROUP, False))
"""Layouts that torch's int4 kernel multiplies, the second as two halves."""


def quantized(weight: Tensor) -> Grouped:
    """Dense [N, K] -> 4 bits a weight, each group between its own least and largest."""
    blocks = weight.float().view(weight.shape[0], -1, GROUP)
    low, high = blocks.aminmax(dim=-1)
    scale = ((high - low) / 15).clamp(min=1e-8)
    q = ((blocks - low[..., None]) / scale[..., None]).round_().clamp_(0, 15)
    return Grouped(q.to(torch.int8).flatten(1), scale, low)


def quantized_to_8_bits(weight: Tensor) -> Grouped:
    """Dense [N, K] -> 8 bits a weight, around 0, as Q8_0 has them; where 32 do not divide K, in groups of 16."""
    group = GROUP if weight.shape[1] % GROUP == 0 else _LEAST_GROUP
    blocks = weight.float().view(weight.shape[0], -1, group)
    scale = (blocks.abs().amax(-1) / 127).clamp(min=1e-7)
    q = (blocks / scale[..., None]).round_()
    return Grouped(q.to(torch.int8).flatten(1), scale, None, bits=8)


_LEAST_GROUP = 16
_LEAST_WEIGHT = 2e-3
"""A matrix whose largest weight is smaller stays dense: its groups' scales, in float16, would be off by 0.2 % and more."""


def _shape(weights: Sequence[Tensor | Grouped]) -> tuple[int, int]:
    shapes = [w.q.shape if isinstance(w, Grouped) else w.shape for w in weights]
    return sum(shape[0] for shape in shapes), shapes[0][1]


def _stacked(parts: Sequence[Grouped]) -> Grouped:
    offsets = [part.offset for part in parts if part.offset is not None]
    return Grouped(
        torch.cat([part.q for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat(offsets) if offsets else None,
        parts[0].bits,
    )
