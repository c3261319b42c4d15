"""Decoder blocks as one lean forward, for whoever has an embedding and a head: a whole model, or a draft head.

What transformers computes, in fewer and larger steps: query, key and value are one projection, so are gate and up; keys and
values lie in one preallocated tensor; the rotation is one complex multiplication; nothing is decided per step that could be
decided once. Positions are a tensor, never a Python number, so that the same code can be recorded as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, rms_norm, scaled_dot_product_attention, silu

from specdec_engine.runtime.gpu import Ops, Pass, causal_mask, ops_for
from specdec_engine.runtime.linear import WIDE, Projection
from specdec_engine.runtime.shape import Shape


@dataclass(frozen=True, slots=True)
class Layer:
    """One block; the norms' weights as `Blocks.norm_weight` has them."""

    attention_norm: Tensor
    qkv: Projection
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Projection
    mlp_norm: Tensor
    gate_up: Projection
    down: Projection
    window: int | None


class Norm:
    """RMSNorm of what lies in `x`, as x · w√d / √(Σx² + d·eps); weights hold w√d, and the sum's last term is a column of its
    own.

    Four operations into ready buffers take 5 µs, torch's rms_norm 23; a pass of 30 layers has 61 of them.
    """

    def __init__(self, size: Sequence[int], eps: float, dtype: torch.dtype, device: torch.device) -> None:
        """size: of x, [..., d]."""
        *rows, d = size
        self._x_and_eps = torch.full((*rows, d + 1), (eps * d) ** 0.5, device=device)
        self.x = self._x_and_eps[..., :-1]
        self._length = torch.empty(*rows, 1, device=device)
        self._scaled = torch.empty(*rows, d, device=device)
        self._normed = torch.empty(*rows, d, dtype=dtype, device=device)

    def __call__(self, weight: Tensor) -> Tensor:
        """[..., d] in the activations' dtype, until the next call."""
        torch.linalg.vector_norm(self._x_and_eps, dim=-1, keepdim=True, out=self._length)
        torch.mul(self.x, weight, out=self._scaled)
        self._normed.copy_(self._scaled.div_(self._length))
        return self._normed


@dataclass(slots=True)
class Step:
    """What a pass computes once for all its layers: tensors that the layers fill one after another, and every view of them.

    A view costs 1 to 2 µs, and a layer would make some twenty. Passes of as many rows share one, see `Blocks.begin`.
    """

    positions: Tensor
    """[n] int64"""
    normed: Norm
    x: Tensor
    """[n, hidden] float32: the residual stream, which `normed` reads."""
    heads: Tensor
    """[n, heads + 2 · kv_heads, head_size]: a layer's queries, keys and values."""
    pairs: Tensor
    """The same as complex numbers, [n, heads + 2 · kv_heads, head_size / 2]."""
    rotation: Tensor
    """What they are multiplied by; 1 for the values, which are not rotated. Scales the queries by 1 / √head_size, too."""
    fresh: Tensor
    """The keys and values among `heads`, as the cache wants them: [2 · kv_heads, n, head_size]."""
    asked: Tensor
    """The queries among `heads`: [groups, heads a group, n, head_size]."""
    queries: Tensor
    """[groups, rows, head_size]; rows beyond the real ones stay 0."""
    places: Tensor
    """The real rows of `queries`, shaped as `asked`."""
    masks: dict[int | None, Tensor]
    """By window: [rows, span], or [1, span] for one row; 0 or -inf."""
    kept: Sequence[Tensor]
    """Per layer: [2 · kv_heads, capacity, head_size], to write into."""
    keys: Sequence[Tensor]
    """Per layer: [kv_heads, span, head_size]."""
    values: Sequence[Sequence[Tensor]]
    """The same, in parts that are summed one after another; for fused attention one."""
    scores: Tensor | None
    """[groups, rows, span], where attention is done in three steps; None where torch's fused attention is used."""
    shares: Sequence[Tensor]
    """`scores` in such parts."""
    parts: Sequence[_Part]
    """What fused attention does one after another."""
    seen: Tensor
    """[groups, rows, head_size]: what attention gave."""
    answers: Tensor
    """The real rows of `seen`, as [n, groups, heads a group, head_size]."""
    mixed: Tensor
    """Shaped as `answers`, in the activations' dtype."""
    table: _Table | None = None
    """What `masks`, `kept`, `keys` and `values` are from, and `scores` and `shares` fit."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Some rows of a pass, and how many places of the cache, from its first, hold all that they may look at."""

    rows: slice
    span: int | None
    """None: as many as the whole pass."""


def _parts(rows: int, start: int | None) -> Sequence[_Part]:
    """start: the position of the first row; where that is not known, all rows are one part."""
    if start is None:
        return [_Part(slice(None), None)]
    firsts = range(0, rows, _PART_ROWS)
    return [_Part(slice(i, i + _PART_ROWS), -(-(start + i + _PART_ROWS) // SPAN) * SPAN) for i in firsts]


@dataclass(frozen=True, slots=True)
class _Table:
    """What passes share while they end in the same `SPAN` positions."""

    span: int
    cache: int
    """Where it lies."""
    first: int
    """The position that the rows of `positions`, `rotation` and `masks` begin with."""
    positions: Tensor
    rotation: Tensor
    masks: dict[int | None, Tensor]
    kept: Sequence[Tensor]
    keys: Sequence[Tensor]
    values: Sequence[Sequence[Tensor]]


def cache_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What keys and values are kept in: on a CPU float32, where attention of few rows takes half the time it takes in
    bfloat16."""
    return torch.float32 if device.type == "cpu" else dtype


class Blocks:
    """Blocks of one shape, and the forward through each."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, ops: Ops | None = None) -> None:
        """ops: how a GPU computes what lies between the matrices; by default the best that run on the device."""
        self.shape, self.dtype, self.device = shape, dtype, device
        self.ops = ops_for(shape, dtype, device) if ops is None else ops
        self.layers: Sequence[Layer] = ()
        self._frequencies = shape.frequencies.to(device)
        self._table: _Table | None = None
        self._steps: dict[int, Step] = {}
        self._rotated = (0, torch.empty(0))
        self._padding = 4 if device.type == "cpu" else 1

    @property
    def forms(self) -> str:
        """How the layers' weights are kept: int4, int8, or a dtype."""
        return "+".join(
            sorted({p.form for layer in self.layers for p in (layer.qkv, layer.out, layer.gate_up, layer.down)})
        )

    @property
    def reads_length_on_device(self) -> bool:
        """Whether passes of up to `gpu.FEW_ROWS` look as far as their positions say, whatever the span: one recording of each
        width then does for every length."""
        return self.ops is not None and self.ops.attend is not None

    @property
    def kv_values(self) -> int:
        """Numbers cached a token, keys and values, all layers."""
        return self.shape.kv_values

    @property
    def cache_dtype(self) -> torch.dtype:
        return self.dtype if self.ops is not None else cache_dtype(self.dtype, self.device)

    def new_cache(self, capacity: int) -> Tensor:
        """[layers, 2 · kv_heads, capacity, head_size]: each layer's keys, then its values; zeros, so that no masked row is
        NaN.

        On a CPU in float32, see `cache_dtype`, and in pages that cost nothing until they are written.
        """
        s = self.shape
        size = (s.layers, 2 * s.kv_heads, capacity, s.head_size)
        if self.ops is None:  # numpy's zeros are the system's; torch's would be written
            return torch.from_numpy(np.zeros(size, np.float32))
        return torch.zeros(size, dtype=self.cache_dtype, device=self.device)

    def norm_weight(self, weight: Tensor) -> Tensor:
        """As `Norm` wants it, with the factor √size, or on a GPU without."""
        weight = weight.to(self.device).float()
        return weight * float(self.shape.hidden**0.5) if self.ops is None else weight

    def block(self, i: int, inputs: Tensor, step: Step | Pass) -> None:
        """Layer i, whose attention reads `inputs` [n, ...], already normed: adds to the residual stream."""
        layer = self.layers[i]
        if isinstance(step, Pass):
            step.block(i, layer, inputs)
            return
        step.x.add_(layer.out(self._attention(i, layer, inputs, step)))
        gate_up = layer.gate_up(step.normed(layer.mlp_norm))
        half = gate_up.shape[1] // 2
        step.x.add_(layer.down(silu(gate_up[:, :half]).mul_(gate_up[:, half:])))

    def begin(self, positions: Tensor, cache: Tensor, span: int, start: int | None = None) -> Step | Pass:
        """A pass at [n] positions; the residual stream, `x`, is the caller's to fill.

        start: where known, the first of consecutive positions, the last of which, on a CPU, is in the last `SPAN` of `span`.
        Then the step of an earlier pass is taken again there, and only what positions decide is filled in: 250 µs become 10.
        """
        if self.ops is not None:
            return Pass(self.ops, self.shape, self._frequencies, self.dtype, positions, cache, span, start)
        n = positions.shape[0]
        if start is None or n > _TABLED_ROWS:
            return self._begin(positions, cache, span, start)
        table = self._table_of(cache, span)
        step = self._steps.get(n)
        if step is None:
            step = self._steps[n] = self._begin(torch.zeros_like(positions), cache, span)
        if step.table is not table:
            self._fit(step, table, n)
        at = slice(start - table.first, start - table.first + n)
        step.positions.copy_(table.positions[at])
        step.rotation.copy_(table.rotation[at])
        for window, mask in step.masks.items():
            real = mask[: mask.shape[0] // n * n]
            real.view(-1, n, mask.shape[1]).copy_(table.masks[window][at])
        return step

    def _fit(self, step: Step, table: _Table, n: int) -> None:
        """To a cache and a span."""
        groups, rows, _ = step.queries.shape
        span = table.span
        step.table, step.kept, step.keys, step.values = table, table.kept, table.keys, table.values
        step.masks = {window: mask.new_zeros(1 if n == 1 else rows, span) for window, mask in table.masks.items()}
        step.scores = step.queries.new_empty(groups, rows, span) if self._in_steps(grouped=True) else None
        step.shares = _summed(step.scores)

    def _table_of(self, cache: Tensor, span: int) -> _Table:
        """For passes over few rows that end in the last `SPAN` positions of the span."""
        where = cache.data_ptr()
        if self._table is not None and self._table.cache != where:
            for step in self._steps.values():  # else a step that is not asked for again would keep the old cache
                step.table, step.kept, step.keys, step.values, step.scores, step.shares = None, (), (), (), None, ()
        if self._table is None or self._table.span != span or self._table.cache != where:
            first = max(0, span - SPAN - _TABLED_ROWS + 1)
            positions = torch.arange(first, span, device=self.device)
            masks = {w: self._mask(positions, span, w, cache.dtype) for w in set(self.shape.windows)}
            views = self._views(cache, span, grouped=True)
            self._table = _Table(span, where, first, positions, self._rotations(first, span), masks, *views)
        return self._table

    def _rotations(self, first: int, end: int) -> Tensor:
        """`rotation` of these positions, of which a block is made at once."""
        begin, made = self._rotated
        if first < begin or end > begin + made.shape[0]:
            begin, made = self._rotated = (
                first,
                self.rotation(torch.arange(first, end + _ROTATIONS, device=self.device)),
            )
        return made[first - begin : end - begin]

    def _views(
        self, cache: Tensor, span: int, grouped: bool
    ) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Sequence[Tensor]]]:
        """`kept`, `keys` and `values` of a step."""
        keys, values = cache[:, : self.shape.kv_heads, :span], cache[:, self.shape.kv_heads :, :span]
        if not self._in_steps(grouped):
            return cache.unbind(0), keys.unbind(0), [(part,) for part in values.unbind(0)]
        parts = [part.unbind(0) for part in torch.split(values, _SUMMED, 2)]
        return cache.unbind(0), keys.transpose(-1, -2).unbind(0), list(zip(*parts, strict=True))

    def _in_steps(self, grouped: bool) -> bool:
        """Fused attention takes 39 µs here for one row and 112 positions, three steps into ready buffers 28."""
        return grouped and self.device.type == "cpu"

    def _begin(self, positions: Tensor, cache: Tensor, span: int, start: int | None = None) -> Step:
        s, n = self.shape, positions.shape[0]
        heads = torch.empty(n, s.heads + 2 * s.kv_heads, s.head_size, device=self.device)
        # A group's query heads go as further rows of one head, whose keys are read once; many rows would need too large a
        # mask.
        grouped = n <= _GROUPED_ROWS
        groups = s.kv_heads if grouped else s.heads
        together = s.heads // groups
        rows = n * together
        # To a multiple of 4 rows: then a row has the same bits alone and among others (117 of 130 cases, against 29 without).
        surplus = -rows % self._padding
        tiled = n >= WIDE and self.dtype == torch.bfloat16 and _tiled(self.device)
        attends = self.dtype if tiled else cache.dtype
        queries = torch.zeros(groups, rows + surplus, s.head_size, dtype=attends, device=self.device)
        seen = torch.empty_like(queries)
        views = self._views(cache, span, grouped)
        scores = queries.new_empty(groups, rows + surplus, span) if self._in_steps(grouped) else None
        normed = Norm((n, s.hidden), s.eps, self.dtype, self.device)
        return Step(
            positions=positions,
            normed=normed,
            x=normed.x,
            heads=heads.view(n, -1),
            pairs=torch.view_as_complex(heads.view(n, -1, s.head_size // 2, 2)),
            rotation=self.rotation(positions),
            fresh=heads[:, s.heads :].transpose(0, 1),
            asked=heads[:, : s.heads].view(n, groups, together, -1).permute(1, 2, 0, 3),
            queries=queries,
            places=queries[:, :rows].view(groups, together, n, -1),
            masks={w: _by_row(self._mask(positions, span, w, attends), rows + surplus) for w in set(s.windows)},
            kept=views[0],
            keys=views[1],
            values=views[2],
            scores=scores,
            shares=_summed(scores),
            parts=_parts(rows + surplus, None if grouped else start),
            seen=seen,
            answers=seen[:, :rows].view(groups, together, n, -1).permute(2, 0, 1, 3),
            mixed=torch.empty(n, groups, together, s.head_size, dtype=self.dtype, device=self.device),
        )

    def rotation(self, positions: Tensor) -> Tensor:
        """[n] -> [n, heads + 2 · kv_heads, head_size / 2] complex: see `Step.rotation`."""
        s, n = self.shape, positions.shape[0]
        angles = positions[:, None] * self._frequencies
        turned = torch.polar(torch.full_like(angles, s.rope_scale), angles)[:, None]
        queries = (turned * s.head_size**-0.5).expand(n, s.heads, -1)
        return torch.cat(
            [queries, turned.expand(n, s.kv_heads, -1), torch.ones_like(turned).expand(n, s.kv_heads, -1)], 1
        )

    def _mask(self, positions: Tensor, span: int, window: int | None, dtype: torch.dtype) -> Tensor:
        return causal_mask(positions, span, window, dtype)

    def _attention(self, i: int, layer: Layer, h: Tensor, step: Step) -> Tensor:
        step.heads.copy_(layer.qkv(h))
        if layer.q_norm is not None and layer.k_norm is not None:
            self._norm_heads(step, layer.q_norm, layer.k_norm)
        step.pairs.mul_(step.rotation)
        step.kept[i].index_copy_(1, step.positions, step.fresh.to(step.kept[i].dtype))
        step.places.copy_(step.asked)
        if step.scores is not None:
            torch.baddbmm(step.masks[layer.window], step.queries, step.keys[i], out=step.scores)
            torch.softmax(step.scores, -1, out=step.scores)
            values = step.values[i]
            torch.bmm(step.shares[0], values[0], out=step.seen)
            for share, more in zip(step.shares[1:], values[1:], strict=True):
                step.seen.baddbmm_(share, more)
        else:
            kept = step.keys[i].to(step.seen.dtype), step.values[i][0].to(step.seen.dtype)
            for part in step.parts:
                step.seen[:, part.rows] = self._fused_attention(*kept, layer.window, step, part)
        step.mixed.copy_(step.answers)
        return step.mixed.view(h.shape[0], -1)

    def _fused_attention(self, keys: Tensor, values: Tensor, window: int | None, step: Step, part: _Part) -> Tensor:
        attended: Tensor = scaled_dot_product_attention(
            step.queries[None, :, part.rows],
            keys[None, :, : part.span],
            values[None, :, : part.span],
            step.masks[window][part.rows, : part.span],
            scale=1.0,
            enable_gqa=step.queries.shape[0] != self.shape.kv_heads,
        )
        return attended[0]

    def _norm_heads(self, step: Step, q_norm: Tensor, k_norm: Tensor) -> None:
        """Qwen3 norms each query's and each key's head."""
        s = self.shape
        heads = step.heads.view(-1, s.heads + 2 * s.kv_heads, s.head_size)
        for part, weight in ((heads[:, : s.heads], q_norm), (heads[:, s.heads : s.heads + s.kv_heads], k_norm)):
            part.copy_(rms_norm(part, (s.head_size,), weight, s.eps))


@cache
def _tiled(device: torch.device) -> bool:
    """Whether attention of many rows takes less than half the time in bfloat16 that it takes in float32 (512 rows after 512
    cached: 2.0 ms a layer, and 5.1), as it does on a CPU with AMX; elsewhere it takes longer."""
    known = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return device.type == "cpu" and known is not None and bool(known())


def _summed(scores: Tensor | None) -> Sequence[Tensor]:
    """In the parts that are summed one after another."""
    return () if scores is None else torch.split(scores, _SUMMED, 2)


def _by_row(mask: Tensor, rows: int) -> Tensor:
    """[n, span] -> [rows, span], the n rows again and again for heads that share keys, and what is filled up is not used; or
    [1, span] where one row is for all."""
    n = mask.shape[0]
    if n == 1:
        return mask
    return pad(mask.repeat(rows // n, 1), (0, 0, 0, rows % n))


SPAN = 16
"""Attention looks at a multiple of this many positions, so that a row's sums are cut alike in passes of any width."""
_SUMMED = 384
"""Positions whose values are summed at once. More of them MKL sums in pieces that their number decides, and a row alone then
differed from the same row in a pass that ended in the next `SPAN`: 131 of 2,520 rows at 40 to 1,000 positions, now none."""
_TABLED_ROWS = 16
_ROTATIONS = 256
"""Positions: 1 MB for a model of 135M, and 0.1 ms every so many tokens."""
_PART_ROWS = 128
"""Rows of a wide pass whose attention is worked out at once: a first pass over 512 takes 2.3 ms a layer so, and 3.8 in one,
most of it for what the mask hides."""
_GROUPED_ROWS = 32
"""Rows of a pass up to which query heads are grouped."""
