"""A weight matrix in the form in which this machine multiplies it fastest: dense, or packed in 8 or 4 bits.

All take x [n, K] and give [n, N]. Every form gives a row the same bits whether it comes alone or among others (tested from 1
to 9 rows), but for torch's dense bfloat16 without AVX-512; this keeps plain and speculative decoding together. A prompt's
passes, of `WIDE` rows and more, are the same for both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import groupby
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import linear

from specdec_engine.runtime.native import Kernels, Matrix
from specdec_engine.runtime.weights import GROUP, Grouped

Quantize = Literal["auto", "none", "int8", "int4"]
Packing = Literal["auto", "none", "int8", "int4", "light"]
"""`Quantize`, and `light` for drafts: as `auto`, but what is dense goes into 8 bits, the head too."""


class Projection(Protocol):
    """**Protocol:** one matrix, ready to multiply."""

    form: str
    """int4, int8, or the dtype's name."""
    matrices: tuple[Matrix, ...]
    """What kernels of our own multiply, side by side; none where torch does."""

    def __call__(self, x: Tensor) -> Tensor:
        """[n, K] -> [n, N]"""
        ...


@runtime_checkable
class Rows(Protocol):
    """**Protocol:** a matrix whose rows can be asked for, as an embedding does."""

    def dense_rows(self, order: Tensor) -> Tensor:
        """[n] -> [n, K] float32"""
        ...


class Dense:
    """Weights in the activations' dtype; on a CPU in oneDNN's own layout, where it has one.

    Reordered once instead of at every call: 11 ms against 24 for all matrices of a 135M model in bfloat16, and about as much
    for eight rows as for one (2 cores, AVX-512).
    """

    matrices: tuple[Matrix, ...] = ()

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.form = str(weight.dtype).removeprefix("torch.")
        self._bias = bias
        self._reordered = weight.device.type == "cpu" and onednn_takes(weight.dtype)
        # The 1 is a hint at the usual number of rows; with 5 the result is the same and no faster.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1) if self._reordered else weight

    def __call__(self, x: Tensor) -> Tensor:
        if not self._reordered:
            return linear(x, self._weight, self._bias)
        n = x.shape[0]
        # One row alone would take a kernel that sums in another order than the one for several.
        x = torch.cat([x, x]) if n == 1 else x
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out[:n]


class Int8:
    """Symmetric int8 weights, one scale an output row; activations stay bfloat16. Wide passes unpack them."""

    form = "int8"
    matrices: tuple[Matrix, ...] = ()

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._q = torch.empty(weight.shape, dtype=torch.int8)
        scale = torch.empty(weight.shape[0])
        rows = max(1, _AT_ONCE // weight.shape[1])  # in float32 a large head takes gigabytes
        for q, to, part in zip(*(torch.split(each, rows) for each in (self._q, scale, weight)), strict=True):
            to.copy_(part.float().abs().amax(1).clamp(min=1e-8) / 127)
            q.copy_((part / to[:, None]).round_())
        self._scale = scale.bfloat16()
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] < WIDE or not onednn_takes(torch.bfloat16):
            return _biased(torch._weight_int8pack_mm(x, self._q, self._scale), self._bias)
        parts = torch.split(self._q, max(1, _AT_ONCE // self._q.shape[1]))
        product = _products([x], (part.bfloat16().T for part in parts), len(self._q))[0]
        return _biased(product.mul_(self._scale), self._bias)


class Int4:
    """Packed weights in groups of 32, multiplied as they are, or by wide passes unpacked; 8-bit ones as two 4-bit halves.

    An 8-bit q is 16 · high + low, so [x, x] · [high, low] needs no other scales than the file's own. Scales and offsets are
    rounded to bfloat16, as the kernel wants them, which moves a weight about as much as rounding it to bfloat16 itself.
    """

    form = "int4"
    matrices: tuple[Matrix, ...] = ()

    def __init__(self, weight: Grouped, bias: Tensor | None) -> None:
        q, scale, offset = weight.q.int(), weight.scale, weight.offset
        self._halves = offset is None
        if offset is None:
            q = torch.cat([(q >> 4) + 8, q & 15], 1)
            scale, offset = torch.cat([scale * 16, scale], 1), torch.cat([scale * -128, torch.zeros_like(scale)], 1)
            self.form = "int8"
        # The kernel computes (q - 8) · scale + zero.
        zero = offset + 8 * scale
        self._q = torch._convert_weight_to_int4pack_for_cpu(q, 1)
        self._scale_and_zero = torch.stack([scale, zero], -1).transpose(0, 1).bfloat16().contiguous()
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        x = torch.cat([x, x], -1) if self._halves else x
        block = packing_block()
        unpacks = onednn_takes(torch.bfloat16)  # without, torch's bfloat16 product takes 200 times as long
        if x.shape[0] >= WIDE and unpacks and block is not None and self._q.shape[0] % block == 0:
            return _biased(_products([x], self._unpacked(block), len(self._q))[0], self._bias)
        return _biased(torch._weight_int4pack_mm_for_cpu(x, self._q, GROUP, self._scale_and_zero), self._bias)

    def _unpacked(self, block: int) -> Iterator[Tensor]:
        """[K, n] bfloat16 at a time, of all N columns."""
        columns = 2 * self._q.shape[1]
        rows = max(1, _AT_ONCE // (block * columns)) * block
        for q, constants in zip(torch.split(self._q, rows), torch.split(self._scale_and_zero, rows, 1), strict=True):
            n = q.shape[0]
            pairs = q.view(n // block, columns, block // 2).transpose(0, 1)
            weights = torch.empty(columns, n // block, 2, block // 2, dtype=torch.bfloat16)
            weights[:, :, 0].copy_(pairs & 15)
            weights[:, :, 1].copy_(pairs >> 4)
            # One after another in memory: every second one in turn is no vector, and took three times as long.
            scale, zero = constants.permute(2, 0, 1).contiguous()[:, :, None]
            grouped = weights.view(columns // GROUP, GROUP, n)
            torch.addcmul(zero - 8 * scale, grouped, scale, out=grouped)
            yield weights.view(columns, n)


class NativePacked:
    """Weights in 4 or 8 bits on kernels of our own; activations and results are float32."""

    def __init__(self, weight: Grouped, bias: Tensor | None, kernels: Kernels) -> None:
        self.form = f"int{weight.bits}"
        self._kernels, self._bias = kernels, bias
        self._words, self._constants = kernels.pack(weight)
        data = (self._words.data_ptr(), self._constants.data_ptr(), None if bias is None else bias.data_ptr())
        self.matrices: tuple[Matrix, ...] = (Matrix(*weight.layout, *weight.q.shape, *data),)

    def __call__(self, x: Tensor) -> Tensor:
        return self.of_texts([x])[0]

    def of_texts(self, texts: Sequence[Tensor]) -> list[Tensor]:
        """See `multiply_texts`."""
        matrix = self.matrices[0]
        wide = [len(x) >= WIDE and self._kernels.unpacks_wide for x in texts]
        long = [x.bfloat16() for x, is_wide in zip(texts, wide, strict=True) if is_wide]
        products = iter(_products(long, self._unpacked(), matrix.N) if long else ())
        return [
            _biased(next(products).float(), self._bias) if is_wide else self._kernels.multiply(x, matrix)
            for x, is_wide in zip(texts, wide, strict=True)
        ]

    def _unpacked(self) -> Iterator[Tensor]:
        """[K, n] bfloat16 at a time, of all N columns."""
        matrix, lanes = self.matrices[0], self._kernels.lanes
        step = max(1, _AT_ONCE // (matrix.K * lanes)) * lanes
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

    def __call__(self, x: Tensor) -> Tensor:
        return self._kernels.multiply(x, self.matrices[0])

    def dense_rows(self, order: Tensor) -> Tensor:
        """[n] -> [n, K] float32"""
        return self._weight[order].float()


class Joined:
    """Projections of one input that are packed in different ways, as the values' is in most GGUF files of 4 bits."""

    def __init__(self, parts: Sequence[Projection]) -> None:
        self.form = "+".join(sorted({part.form for part in parts}))
        self.matrices = () if any(not p.matrices for p in parts) else tuple(m for p in parts for m in p.matrices)
        self.parts = parts

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], -1)


def multiply_texts(projection: Projection, texts: Sequence[Tensor]) -> list[Tensor]:
    """Each [n, K] times the matrix, with the bits that it has alone: torch's products depend on how many rows there are.
    What is gained is that weights are unpacked once for all."""
    if isinstance(projection, NativePacked):
        return projection.of_texts(texts)
    if isinstance(projection, Joined):
        parts = [multiply_texts(part, texts) for part in projection.parts]
        return [torch.cat(of_one, -1) for of_one in zip(*parts, strict=True)]
    return [projection(x) for x in texts]


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
    if eight and dense.shape[1] % _INT8_COLUMNS == 0:
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


def packs_int4(rows: int, columns: int) -> bool:
    """Whether the int4 kernel takes this shape."""
    return rows % 16 == 0 and columns % GROUP == 0


@cache
def packing_block() -> int | None:
    """How many rows torch's int4 kernel keeps together, of which a byte holds the i-th of either half: 64 with AVX-512, 32
    with AVX2. Found by trying, since it is torch's own affair."""
    some = torch.Generator().manual_seed(0)
    for block in (64, 32):
        q = torch.randint(0, 16, (2 * block, GROUP), dtype=torch.int32, generator=some)
        pairs = torch._convert_weight_to_int4pack_for_cpu(q, 1).view(2, GROUP, block // 2)
        if torch.equal(torch.cat([pairs & 15, pairs >> 4], -1).transpose(1, 2).reshape(q.shape), q.byte()):
            return block
    return None


def torch_packs() -> bool:
    """Whether torch has int4 and int8 kernels for this CPU. Elsewhere they are scalar, 100 times slower than dense."""
    vectorised = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512", "AMX")
    return vectorised and hasattr(torch, "_weight_int4pack_mm_for_cpu")


def onednn_takes(dtype: torch.dtype) -> bool:
    if not torch._C._has_mkldnn or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


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


WIDE = 66
"""Rows of a pass that unpacks its weights: more than the 65 of k 64, so that what is verified is multiplied as plain decoding
multiplies it, and about where it pays: with AMX, 135M weights take 80 ms, then a row 0.35 ms instead of 1.7 (2 cores);
without, rows gain less."""
_AT_ONCE = 4 * 2**20
"""Weights packed or unpacked at once: 8 MB in bfloat16, however large the matrix."""
_INT8_COLUMNS = 16
"""Of which torch's int8 kernel takes so many at a time, and none singly."""


def _products(texts: Sequence[Tensor], parts: Iterable[Tensor], rows: int) -> list[Tensor]:
    """[n, K] each, and [K, N] in parts of some of its N columns -> [n, N] each."""
    found, done = [x.new_empty(x.shape[0], rows) for x in texts], 0
    for part in parts:
        for x, out in zip(texts, found, strict=True):
            torch.mm(x, part, out=out[:, done : done + part.shape[1]])
        done += part.shape[1]
    return found


def _biased(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y.add_(bias)
