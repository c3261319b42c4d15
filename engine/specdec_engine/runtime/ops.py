"""A pass through decoder blocks, and what it does between their matrices, in as few kernels as can be.

A small kernel costs some 2 µs on a GPU whatever it does (H100), where all four matrices of a 1B model's layer take 50; on a
CPU an operation of torch costs as much. So it is kernels that are saved. `Ops` are those kernels: torch's (`TORCH`), our own
in Triton for a GPU (`fused`), or our own in C for a CPU (`cpu`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, rms_norm, silu

from specdec_engine.runtime.attention import attend_grouped, attend_in_groups, attend_scored, causal_mask, causal_of
from specdec_engine.runtime.experts import Experts
from specdec_engine.runtime.linear import Projection, multiply_texts
from specdec_engine.runtime.mixture import Gate
from specdec_engine.runtime.native import Stack
from specdec_engine.runtime.native_records import Beginning, Following, LayerFields, Tapped, of_texts, pass_fields
from specdec_engine.runtime.shape import Growth, Shape

FEW_ROWS = 16
"""Rows up to which query heads that share keys are rows of one head, whose keys are read once."""


@dataclass(frozen=True, slots=True)
class Network:
    """A gated feed-forward network."""

    gate_up: Projection
    down: Projection

    @property
    def projections(self) -> tuple[Projection, ...]:
        return (self.gate_up, self.down)


@dataclass(frozen=True, slots=True)
class Layer:
    """One block; the norms' weights are float32."""

    attention_norm: Tensor | None
    """The norm of what attention reads; None where that is the stream as it is."""
    qkv: Projection
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Projection
    mlp_norm: Tensor | None
    """The norm of what the feed-forward network reads, likewise."""
    network: Network | Experts
    window: int | None
    rotation: int = 0
    """The number of its rotation, of those that the shape has."""
    attention_after: Tensor | None = None
    """The norm of what attention gives; None where that is added as it is."""
    mlp_after: Tensor | None = None
    sinks: Tensor | None = None
    """[heads] float32: the score that each head has for nothing."""
    fields: LayerFields | None = None
    """All this for our own kernels on a CPU, where they multiply all its matrices."""


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Qwen3 norms each query's and each key's head."""

    q: Tensor
    """[head_size] float32"""
    k: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Ops:
    """What a pass does between its matrices."""

    add_norm: Callable[[Tensor, Tensor | None, Tensor, float, torch.dtype], Tensor]
    """(x [n, hidden] float32, what is added to it in place, the norm's weight [hidden], eps, dtype) -> x normed, in dtype."""
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor, HeadNorms | None], Tensor]
    """(qkv [n, (heads + 2 · kv_heads) · head_size], rotation [n, head_size / 2] complex, positions [n], cache of the layer
    [2 · kv_heads, capacity, head_size], norms) -> queries [n, heads, head_size], rotated, as `attend` takes them. Writes
    keys, rotated, and values into the cache at the positions. May use qkv for its own ends."""
    gate: Callable[[Tensor], Tensor]
    """[n, 2 · m] -> [n, m]: silu of the first half, times the second."""
    attend: Callable[..., Tensor] | None = None
    """(queries, cache of the layer, positions, window) -> [n, heads · head_size] for up to `few` rows. Reads on the device
    how far to look, so that a recording fits every length. On a CPU it takes a pass's `hidden` besides. None: torch's
    attention, over a span."""
    few: int = FEW_ROWS
    wide_dtype: torch.dtype | None = None
    """The dtype in which torch's attention of more rows reads a cache that is not float32; by default the cache's own."""
    remark: str = ""
    """Why better ones were not taken."""


class Pass:
    """A pass at some positions: the residual stream, what all layers share, and the way through one layer."""

    def __init__(
        self,
        ops: Ops,
        shape: Shape,
        rotations: Sequence[Tensor],
        dtype: torch.dtype,
        positions: Tensor,
        cache: Tensor,
        span: int,
        start: int | None,
        stack: Stack | None = None,
        hidden: Tensor | None = None,
        reading: bool = False,
    ) -> None:
        """rotations: see `Blocks.rotation`. span: places of the cache that take in all positions. start: the first position,
        where the host knows it. stack: all layers, where our own kernels do them whole. hidden [n] int64: in a tree of
        tokens, of each row bits of the rows before it that it does not see; positions are then places in the cache.
        reading: the rows are a prompt's, see `Projection`."""
        self.reading, self.tiles = reading, reading and stack is not None and stack.kernels.reads_tiled(len(positions))
        self.ops, self.eps, self.dtype, self.positions = ops, shape.eps, dtype, positions
        n = len(positions)
        self._x = torch.empty(n, shape.hidden, device=positions.device)
        self._more: Tensor | None = None
        self._rotations = rotations
        self.cache = cache
        self._end = span if start is None else start + n
        capped = shape.scales.cap_scores != 0.0 or shape.sinks  # no kernel knows of either
        self._hidden = hidden
        tree = hidden is not None
        self._causal = None if start is None or capped or tree else causal_of(n, self._end, positions.device)
        self._attend_few = ops.attend if (n <= ops.few or stack is not None) and not capped else None
        self._grouped = n <= FEW_ROWS and (start is None or tree) and not capped
        together = shape.heads // shape.kv_heads if self._grouped else 1
        self._wide_dtype = cache.dtype if cache.dtype == torch.float32 else ops.wide_dtype or cache.dtype
        grown = shape.growth is not None and (start is None or start + n > shape.growth.length)
        self._growth = factors(positions, shape.growth) if grown and shape.growth is not None else None
        self.stack = stack
        if self.stack is not None:
            assert cache.is_contiguous()  # the layers' follow one another
            self.fields = [pass_fields(shape.heads, rotation, positions, cache[0], hidden) for rotation in rotations]
            self._texts = of_texts(self.fields)
        self.shape = shape
        self._masks = {w: self._mask(w, together, self._wide_dtype) for w in self._masked(shape.windows)}

    @property
    def x(self) -> Tensor:
        """[n, hidden] float32: the residual stream, with all that was added."""
        if self._more is not None:
            self._x.add_(self._more)
            self._more = None
        return self._x

    def normed(self, weight: Tensor) -> Tensor:
        """[n, hidden] in the activations' dtype."""
        if self.shape.centred:
            return layer_norm(self.x, weight.shape, weight, None, self.eps).to(self.dtype)
        more, self._more = self._more, None
        return self.ops.add_norm(self._x, more, weight, self.eps, self.dtype)

    def finish(
        self, layers: Sequence[Layer], norm: Tensor, output: Projection | None, rows: int, tapped: Tapped | None
    ) -> tuple[Tensor, Tensor]:
        """Pass all layers and the last norm [hidden] -> [n, hidden] as it leaves that, and the last `rows` rows times the
        output's matrix; without one they are as they leave the norm."""
        rows = min(rows, len(self._x))
        matrices = () if output is None or rows == 0 else output.matrices
        if self.stack is not None and (output is None or matrices):
            after = Following(len(self._x), norm, matrices, rows if matrices else 0)
            self.through(layers, tapped=tapped, after=after)
            return after.last, after.out if output is not None else after.last
        self.through(layers, tapped=tapped)
        last = self.normed(norm)
        if tapped is not None:
            tapped.features[:, -1].copy_(last)
        return last, last if output is None else output(last[-rows:])

    def through(
        self,
        layers: Sequence[Layer],
        inputs: Tensor | None = None,
        tapped: Tapped | None = None,
        before: Beginning | None = None,
        after: Following | None = None,
    ) -> None:
        """Pass all layers, one after the other; inputs: what the first of them reads, see `block`; before, after: around a
        `stack`."""
        if self.stack is not None and inputs is None:
            caches, many = self.layer_caches(0), len(layers)
            kernels, fields = self.stack.kernels, self.stack.layers
            kernels.through(fields, many, self._texts, self.x, caches, tapped, self.tiles, before, after)
            return
        for i, layer in enumerate(layers):
            self.block(i, layer, inputs if i == 0 else None)
            for place, tap in enumerate(tapped.layers if tapped is not None else ()):
                if tapped is not None and tap == i:
                    tapped.features[:, place].copy_(self.x)

    def block(self, i: int, layer: Layer, inputs: Tensor | None = None) -> None:
        """Layer i, whose attention reads `inputs` [n, ...], already normed, or else the residual stream: adds to that."""
        inputs = self._read(layer.attention_norm) if inputs is None else inputs
        multiply = self._multiply
        attended = self.attention(i, layer, multiply(layer.qkv, inputs))
        self._add(multiply(layer.out, attended), layer.attention_after)
        inputs = inputs if self.shape.parallel else self._read(layer.mlp_norm)
        if isinstance(layer.network, Experts):
            self._add(self._mixed(layer.network, inputs), layer.mlp_after)
            return
        gated = multiply(layer.network.gate_up, inputs)
        gated = gelu_gate(gated) if self.shape.gelu else self.ops.gate(gated)
        self._add(multiply(layer.network.down, gated), layer.mlp_after)

    def _mixed(self, experts: Experts, x: Tensor) -> Tensor:
        return experts(x, self.ops.gate, self.reading)

    def _multiply(self, projection: Projection, x: Tensor) -> Tensor:
        return projection(x, self.reading)

    def layer_caches(self, i: int) -> Sequence[Tensor]:
        """Of layer i, of each text."""
        return (self.cache[i],)

    def attention(self, i: int, layer: Layer, qkv: Tensor) -> Tensor:
        """Layer i's, of queries, keys and values as they come from its matrix -> [n, heads · head_size]."""
        kept, norms = self.cache[i], None
        if layer.q_norm is not None and layer.k_norm is not None:
            if self.shape.wide_norms:
                qkv = self._widely_normed(qkv, layer.q_norm, layer.k_norm)
            else:
                norms = HeadNorms(layer.q_norm, layer.k_norm, self.eps)
        queries = self.ops.rotate(qkv, self._rotations[layer.rotation], self.positions, kept, norms)
        if self.shape.scales.scores != 1.0:
            queries = queries * self.shape.scales.scores
        if self._growth is not None:
            queries = (queries * self._growth).to(queries.dtype)
        return self._attended(queries, kept, layer.window, layer.sinks)

    def _read(self, norm: Tensor | None) -> Tensor:
        """What attention or the feed-forward network reads of the stream."""
        return self.x.to(self.dtype) if norm is None else self.normed(norm)

    def _add(self, more: Tensor, norm: Tensor | None) -> None:
        """To the stream what one of them gives."""
        if norm is not None:
            more = rms_norm(more.float(), more.shape[-1:], norm, self.eps).to(self.dtype)
        if self.shape.scales.residual != 1.0:
            more = more * self.shape.scales.residual
        self._more = more if self._more is None else self._more + more

    def _widely_normed(self, qkv: Tensor, q_norm: Tensor, k_norm: Tensor) -> Tensor:
        """Queries and keys normed over all heads at once."""
        wide, end = qkv.float(), len(q_norm) + len(k_norm)
        queries = rms_norm(wide[:, : len(q_norm)], q_norm.shape, q_norm, self.eps)
        keys = rms_norm(wide[:, len(q_norm) : end], k_norm.shape, k_norm, self.eps)
        return torch.cat([queries, keys, wide[:, end:]], 1).to(qkv.dtype)

    def _attended(self, queries: Tensor, kept: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
        """[n, heads, head_size] -> [n, heads · head_size]"""
        if self._attend_few is not None:
            tree = () if self._hidden is None else (self._hidden,)
            return self._attend_few(queries, kept, self.positions, window, *tree).to(self.dtype)
        queries, kept = queries.to(self._wide_dtype), kept[:, : self._end].to(self._wide_dtype)
        if self.shape.scales.cap_scores != 0.0 or sinks is not None:
            mask = self._masks[window]
            return attend_scored(queries, kept, mask, self.shape.scales.cap_scores, sinks).to(self.dtype)
        if self._grouped:
            return attend_grouped(queries, kept, self._masks[window]).to(self.dtype)
        return attend_in_groups(queries, kept, self._masks.get(window, self._causal)).to(self.dtype)

    def _masked(self, windows: Sequence[int | None]) -> set[int | None]:
        """The windows that need a mask: without one, rows in order look at all that comes before them, which attention knows
        of itself. Only so may torch take its best kernel, and 8k rows need no mask of 128 MB."""
        if self._attend_few is not None:
            return set()
        return {w for w in windows if self._causal is None or (w is not None and w < self._end)}

    def _mask(self, window: int | None, together: int, dtype: torch.dtype) -> Tensor:
        """[n · together, end]: a row's mask as often as heads share keys. Each has its own, since cuDNN, which torch prefers
        on a Hopper, may find no plan for one that is spread over several rows."""
        mask = causal_mask(self.positions, self._end, window, dtype)
        if self._hidden is not None:
            n = len(self.positions)
            own = mask[:, self._end - n :]  # the pass's own places are the last
            own.masked_fill_((self._hidden[:, None] >> torch.arange(n, device=own.device) & 1) == 1, float("-inf"))
        return mask[:, None].expand(-1, together, -1).reshape(-1, self._end)


class PassTogether(Pass):
    """Several sequences at once, each in its own cache: their rows are multiplied together, which reads the weights once, and
    each looks at its own sequence alone."""

    def __init__(self, parts: Sequence[Pass]) -> None:
        first = parts[0]
        self._parts, self._sizes = parts, [len(part.positions) for part in parts]
        self.ops, self.shape, self.eps, self.dtype = first.ops, first.shape, first.eps, first.dtype
        self._x = torch.empty(sum(self._sizes), self.shape.hidden, device=first.positions.device)
        self._more, self.stack = None, None
        self.reading, self.tiles = first.reading, first.tiles
        if all(part.stack is not None and part.tiles == first.tiles for part in parts):
            self.stack = first.stack
            by_rotation = zip(*(part.fields for part in parts), strict=True)
            self._texts = of_texts([fields for of_one in by_rotation for fields in of_one])

    def layer_caches(self, i: int) -> Sequence[Tensor]:
        return [part.cache[i] for part in self._parts]

    def attention(self, i: int, layer: Layer, qkv: Tensor) -> Tensor:
        rows = zip(self._parts, torch.split(qkv, self._sizes), strict=True)
        return torch.cat([part.attention(i, layer, own) for part, own in rows])


class PassOfPrompts(PassTogether):
    """The same of whole prompts, each with the bits that it has alone."""

    def _multiply(self, projection: Projection, x: Tensor) -> Tensor:
        return torch.cat(multiply_texts(projection, torch.split(x, self._sizes)))

    def _mixed(self, experts: Experts, x: Tensor) -> Tensor:
        return torch.cat([experts(own, self.ops.gate, reading=True) for own in torch.split(x, self._sizes)])


def factors(positions: Tensor, growth: Growth) -> Tensor:
    """[n, 1, 1] float32: what queries at these positions are multiplied by."""
    return (1.0 + growth.beta * torch.log1p((positions // growth.length).float()))[:, None, None]


def add_norm(x: Tensor, more: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """See `Ops`."""
    if more is not None:
        x.add_(more)
    return rms_norm(x, x.shape[-1:], weight, eps).to(dtype)


def rotate(qkv: Tensor, rotation: Tensor, positions: Tensor, kept: Tensor, norms: HeadNorms | None) -> Tensor:
    """See `Ops`."""
    groups, size = kept.shape[0] // 2, kept.shape[2]
    heads = qkv.view(len(qkv), -1, size).float()
    queries, keys = heads[:, : -2 * groups], heads[:, -2 * groups : -groups]
    if norms is not None:
        for part, weight in ((queries, norms.q), (keys, norms.k)):
            part.copy_(rms_norm(part, (size,), weight, norms.eps))
    torch.view_as_complex(heads.view(len(qkv), -1, size // 2, 2))[:, :-groups].mul_(rotation[:, None])
    heads = heads.to(kept.dtype)
    kept.index_copy_(1, positions, heads[:, -2 * groups :].transpose(0, 1))
    return heads[:, : -2 * groups]


def gate(gate_up: Tensor) -> Tensor:
    """See `Ops`."""
    gates, ups = gate_up.chunk(2, -1)
    return silu(gates).mul_(ups)


def gelu_gate(gate_up: Tensor) -> Tensor:
    """The same with a gelu, by tanh."""
    gates, ups = gate_up.chunk(2, -1)
    return gelu(gates, approximate="tanh").mul_(ups)


def clamped_gate(form: Gate, gate_up: Tensor) -> Tensor:
    """The same as GPT-OSS has it: see `Gate`."""
    gates, ups = gate_up.chunk(2, -1)
    gates, ups = gates.clamp(max=form.limit), ups.clamp(-form.limit, form.limit)
    return (gates * form.steep).sigmoid_().mul_(gates).mul_(ups.add_(1.0))


TORCH = Ops(add_norm, rotate, gate)
"""Torch's own kernels."""
