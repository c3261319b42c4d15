"""Weight matrices that torch's kernels multiply: dense, or packed in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear

from specdec_engine.runtime.native_records import Matrix
from specdec_engine.runtime.weights import GROUP, Grouped


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

    def __call__(self, x: Tensor, reading: bool = False) -> Tensor:
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
        rows = max(1, AT_ONCE // weight.shape[1])  # in float32 a large head takes gigabytes
        for q, to, part in zip(*(torch.split(each, rows) for each in (self._q, scale, weight)), strict=True):
            to.copy_(part.float().abs().amax(1).clamp(min=1e-8) / 127)
            q.copy_((part / to[:, None]).round_())
        self._scale = scale.bfloat16()
        self._bias = bias

    def __call__(self, x: Tensor, reading: bool = False) -> Tensor:
        if not reading or x.shape[0] < WIDE or not onednn_takes(torch.bfloat16):
            return biased(torch._weight_int8pack_mm(x, self._q, self._scale), self._bias)
        parts = torch.split(self._q, max(1, AT_ONCE // self._q.shape[1]))
        product = products([x], (part.bfloat16().T for part in parts), len(self._q))[0]
        return biased(product.mul_(self._scale), self._bias)


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

    def __call__(self, x: Tensor, reading: bool = False) -> Tensor:
        x = torch.cat([x, x], -1) if self._halves else x
        block = packing_block()
        # Without, torch's bfloat16 product takes 200 times as long.
        unpacks = reading and x.shape[0] >= WIDE and onednn_takes(torch.bfloat16)
        if unpacks and block is not None and self._q.shape[0] % block == 0:
            return biased(products([x], self._unpacked(block), len(self._q))[0], self._bias)
        return biased(torch._weight_int4pack_mm_for_cpu(x, self._q, GROUP, self._scale_and_zero), self._bias)

    def _unpacked(self, block: int) -> Iterator[Tensor]:
        """[K, n] bfloat16 at a time, of all N columns."""
        columns = 2 * self._q.shape[1]
        rows = max(1, AT_ONCE // (block * columns)) * block
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


WIDE = 66
"""Rows of a pass that unpacks its weights: more than the 65 of k 64, so that what is verified is multiplied as plain decoding
multiplies it, and about where it pays: with AMX, 135M weights take 80 ms, then a row 0.35 ms instead of 1.7 (2 cores);
without, rows gain less."""
AT_ONCE = 4 * 2**20
"""Weights packed or unpacked at once: 8 MB in bfloat16, however large the matrix."""
INT8_COLUMNS = 16
"""Of which torch's int8 kernel takes so many at a time, and none singly."""


def products(texts: Sequence[Tensor], parts: Iterable[Tensor], rows: int) -> list[Tensor]:
    """[n, K] each, and [K, N] in parts of some of its N columns -> [n, N] each."""
    found, done = [x.new_empty(x.shape[0], rows) for x in texts], 0
    for part in parts:
        for x, out in zip(texts, found, strict=True):
            torch.mm(x, part, out=out[:, done : done + part.shape[1]])
        done += part.shape[1]
    return found


def biased(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y.add_(bias)
