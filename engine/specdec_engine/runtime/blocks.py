"""Decoder blocks as one lean forward, for whoever has an embedding and a head: a whole model, or a draft head.

What transformers computes, in fewer and larger steps: query, key and value are one projection, so are gate and up; keys and
values lie in one preallocated tensor; the rotation is one complex multiplication; nothing is decided per step that could be
decided once. Positions are a tensor, never a Python number, so that the same code can be recorded as a CUDA graph.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from specdec_engine.runtime import cpu, native
from specdec_engine.runtime.native import Kernels, Stack
from specdec_engine.runtime.native_records import Beginning, Following, PassFields, Tapped, of_texts
from specdec_engine.runtime.ops import TORCH, Layer, Ops, Pass
from specdec_engine.runtime.shape import Shape


@dataclass(frozen=True, slots=True)
class TreeRows:
    """The rows of a pass over a tree of tokens, whose positions are not their places in the cache."""

    places: Tensor
    """[n]: consecutive places in the cache."""
    hidden: Tensor
    """[n] int64: see `ops.Pass`."""


class Blocks:
    """Blocks of one shape, and the forward through each."""

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        ops: Ops | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        """ops: what is done between the matrices; by default the best that run on the device. kernels: our own for a CPU,
        where they multiply."""
        self.shape, self.dtype, self.device, self.kernels = shape, dtype, device, kernels
        self.ops = _ops_for(shape, dtype, device) if ops is None else ops
        self._whole = kernels if ops is None else None
        self.cache_dtype = cache_dtype(dtype, device, kernels)
        self.layers: Sequence[Layer] = ()
        self._frequencies = [rotation.frequencies.to(device) for rotation in shape.rotations]
        self._turned: list[Tensor] = []
        self._places = torch.empty(0, dtype=torch.long)

    @property
    def forms(self) -> str:
        """How the layers' weights are kept: int4, int8, or a dtype."""
        return "+".join(
            sorted({p.form for layer in self.layers for p in (layer.qkv, layer.out, *layer.network.projections)})
        )

    @property
    def reads_length_on_device(self) -> bool:
        """Whether passes of few rows look as far as their positions say, whatever the span: one recording of each width then
        does for every length."""
        return self.ops.attend is not None and self.shape.scales.cap_scores == 0.0

    @property
    def kv_values(self) -> int:
        """Numbers cached a token, keys and values, all layers."""
        return self.shape.kv_values

    def new_cache(self, capacity: int) -> Tensor:
        """[layers, 2 · kv_heads, capacity, head_size]: each layer's keys, then its values; zeros, so that no masked row is
        NaN. On a CPU in pages that cost nothing until they are written."""
        s = self.shape
        size = (s.layers, 2 * s.kv_heads, capacity, s.head_size)
        if self.device.type != "cpu":
            return torch.zeros(size, dtype=self.cache_dtype, device=self.device)
        narrow = self.cache_dtype.itemsize == 2
        room = np.zeros(size, np.int16 if narrow else np.int32)  # torch's zeros would be written
        return torch.from_numpy(room).view(self.cache_dtype)

    def norm_weight(self, weight: Tensor) -> Tensor:
        """[n] float32 on the device."""
        weight = weight.to(self.device).float()
        return weight + 1.0 if self.shape.unit_norms else weight

    def begin(
        self,
        positions: Tensor,
        cache: Tensor,
        span: int,
        start: int | None = None,
        tree: TreeRows | None = None,
        reading: bool = False,
        rotations: Sequence[Tensor] | None = None,
    ) -> Pass:
        """A pass at [n] positions; the residual stream, `x`, is the caller's to fill.

        span: places of the cache that take in all positions. start: the first of consecutive positions, where the host knows
        it; with a tree, the first place in the cache. reading: the rows are a prompt's, of which at most the last is asked
        for. rotations: those of these positions, where they were made with others'.
        """
        stack = self._stack_for(len(positions), start, reading)
        rotations = self.rotations(positions, span) if rotations is None else rotations
        places, hidden = (positions, None) if tree is None else (tree.places, tree.hidden)
        return Pass(self.ops, self.shape, rotations, self.dtype, places, cache, span, start, stack, hidden, reading)

    @cached_property
    def _stack(self) -> Stack | None:
        return native.stacked(self._whole, [layer.fields for layer in self.layers])

    def _stack_for(self, rows: int, start: int | None, reading: bool) -> Stack | None:
        """Give all layers, where our own kernels do them whole for so many rows."""
        growth, end = self.shape.growth, (start or 0) + rows
        if self._whole is None or (growth is not None and (start is None or end > growth.length)):
            return None
        reads = reading and self._whole.reads_tiled(rows) and rows * end <= _SHORT
        return self._stack if rows <= self.ops.few or reads else None

    def in_one_call(
        self,
        stack: Stack,
        x: Tensor,
        start: int,
        cache: Tensor,
        after: Following,
        before: Beginning | None = None,
        tapped: Tapped | None = None,
        reading: bool = False,
    ) -> None:
        """Pass x [n, hidden] through all layers, and what is around them, at consecutive positions of one text; it is written
        over. A `Pass` of the same costs 0.1 ms more: it has tensors for what torch's operations would ask."""
        assert x.dtype == torch.float32
        assert x.is_contiguous()
        assert cache.is_contiguous()  # the layers' follow one another
        kernels, texts = stack.kernels, self.fields_from(start, len(x), cache)
        tiles = reading and kernels.reads_tiled(len(x))
        kernels.through(stack.layers, len(self.layers), texts, x, [cache], tapped, tiles, before, after)

    def rotations(self, positions: Tensor, end: int) -> list[Tensor]:
        """`rotation` of each that the shape has; end: above all positions."""
        if self._whole is None:  # what is recorded must not hold on to a table that grows
            return [self.rotation(positions, i) for i in range(len(self._frequencies))]
        return [table[positions] for table in self._tables(end)]

    def _tables(self, end: int) -> list[Tensor]:
        """Rotations of the first positions, kept: made anew they take 40 µs a pass."""
        if not self._turned or len(self._turned[0]) < end:
            self._places = torch.arange(max(end, _AT_FIRST, 2 * len(self._places)))
            self._turned = [self.rotation(self._places, i) for i in range(len(self._frequencies))]
        return self._turned

    def fields_from(self, start: int, n: int, cache: Tensor, more: int = 0) -> ctypes.Array[PassFields]:
        """Fields of n consecutive positions of one text, in places of their own number; more: how many further ones what it
        points at takes in. That stays until a longer text asks for a longer table: one thread at a time uses a model."""
        tables = self._tables(start + n + more)
        kept, size = cache.shape[2], self.shape.head_size
        shape = n, self.shape.heads, self.shape.kv_heads, size, kept, cache.dtype == torch.bfloat16
        places = self._places.data_ptr() + 8 * start
        return of_texts([PassFields(*shape, table.data_ptr() + 4 * size * start, places, None) for table in tables])

    def rotation(self, positions: Tensor, which: int = 0) -> Tensor:
        """[n] -> [n, head_size / 2] complex: what pairs of a query's or a key's numbers are multiplied by, in one of the
        shape's rotations."""
        angles = positions[:, None] * self._frequencies[which]
        lengths = torch.full_like(angles, self.shape.rotations[which].scale)
        if self.shape.rotary:  # what is not rotated is not scaled
            lengths[:, self.shape.rotary // 2 :] = 1.0
        return torch.polar(lengths, angles)


_AT_FIRST = 512
_SHORT = 2**16
"""Rows of a prompt times the positions that the last of them looks at, up to which our own attention is faster than torch's
with AMX: 256 rows of a new text, or 150 after 300 tokens."""


def cache_dtype(dtype: torch.dtype, device: torch.device, kernels: Kernels | None) -> torch.dtype:
    """The dtype of keys and values: the activations'; on a CPU bfloat16 where our own kernels multiply.

    They read it as fast as memory gives it, half as many bytes as float32. Without them it is float32, in which torch's
    attention of few rows takes half the time.
    """
    if device.type != "cpu":
        return dtype
    narrow = kernels is not None or (dtype == torch.bfloat16 and native.kernels() is not None)
    return torch.bfloat16 if narrow else torch.float32


def _ops_for(shape: Shape, dtype: torch.dtype, device: torch.device) -> Ops:
    if device.type == "cpu":
        return cpu.ops_for(dtype)
    if device.type != "cuda":
        return TORCH
    try:
        from specdec_engine.runtime.fused import checked  # Triton may not be there

        return checked(shape, dtype, device)
    except Exception as error:  # no compiler, an unknown card: in as many ways as there are lines in Triton
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return replace(TORCH, remark=f"our own kernels do not run here: {reason}")
