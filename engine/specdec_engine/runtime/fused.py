"""`ops.Ops` as kernels of our own, in Triton: six in a layer where torch takes thirteen.

Attention of few rows is cut along the cache, so that a whole GPU reads it, and looks on the device how long that is. Triton,
which comes with torch's CUDA builds, compiles a kernel when it is first called, in seconds, and keeps it on disk. Importing
this file imports it.
"""

# No `from __future__ import annotations`: Triton reads them.

from dataclasses import dataclass
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_engine.runtime.attention import attend_in_groups, causal_mask
from specdec_engine.runtime.ops import FEW_ROWS, TORCH, HeadNorms, Ops
from specdec_engine.runtime.shape import Shape, Unsupported


@triton.jit
def _add_norm(x, more, weight, out, eps, size: tl.constexpr, adds: tl.constexpr, block: tl.constexpr):
    """One row: x [n, size] float32 += more; out = x · weight / rms."""
    at = tl.program_id(0) * size + tl.arange(0, block)
    inside = tl.arange(0, block) < size
    values = tl.load(x + at, mask=inside, other=0.0)
    if adds:
        values += tl.load(more + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(x + at, values, mask=inside)
    scale = 1 / tl.sqrt(tl.sum(values * values, 0) / size + eps)
    normed = values * scale * tl.load(weight + tl.arange(0, block), mask=inside, other=0.0)
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(
    qkv,
    rotation,
    positions,
    kept,
    queries,
    q_norm,
    k_norm,
    eps,
    capacity,
    heads: tl.constexpr,
    groups: tl.constexpr,
    half: tl.constexpr,
    norms: tl.constexpr,
):
    """One head of one row of qkv [n, (heads + 2 · groups) · 2 · half]: a query goes to queries [n, heads, 2 · half], a key or
    value to kept [2 · groups, capacity, 2 · half]."""
    row, head, pairs = tl.program_id(0), tl.program_id(1), tl.arange(0, half)
    source = qkv + (row * (heads + 2 * groups) + head) * 2 * half + 2 * pairs
    even, odd = tl.load(source).to(tl.float32), tl.load(source + 1).to(tl.float32)
    if head < heads + groups:
        if norms:
            scale = 1 / tl.sqrt(tl.sum(even * even + odd * odd, 0) / (2 * half) + eps)
            is_key = pairs * 0 + head >= heads
            even *= scale * tl.where(is_key, tl.load(k_norm + 2 * pairs), tl.load(q_norm + 2 * pairs))
            odd *= scale * tl.where(is_key, tl.load(k_norm + 2 * pairs + 1), tl.load(q_norm + 2 * pairs + 1))
        turn = rotation + (row * half + pairs) * 2
        cos, sin = tl.load(turn), tl.load(turn + 1)
        even, odd = even * cos - odd * sin, even * sin + odd * cos
    if head < heads:
        target = queries + (row * heads + head) * 2 * half + 2 * pairs
    else:
        place = (head - heads).to(tl.int64) * capacity + tl.load(positions + row)
        target = kept + place * 2 * half + 2 * pairs
    tl.store(target, even.to(kept.dtype.element_ty))
    tl.store(target + 1, odd.to(kept.dtype.element_ty))


@triton.jit
def _gate(gate_up, out, size, block: tl.constexpr):
    """Some columns of a row: out [n, size] = silu of gate_up's first half, times its second."""
    row, columns = tl.program_id(0), tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < size
    gates = tl.load(gate_up + row * 2 * size + columns, mask=inside, other=0.0).to(tl.float32)
    ups = tl.load(gate_up + row * 2 * size + size + columns, mask=inside, other=0.0).to(tl.float32)
    gated = gates / (1 + tl.exp(-gates)) * ups
    tl.store(out + row * size + columns, gated.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _attend(
    queries,
    kept,
    positions,
    parts,
    bests,
    totals,
    n,
    capacity,
    scale,
    groups: tl.constexpr,
    together: tl.constexpr,
    size: tl.constexpr,
    window: tl.constexpr,
    splits: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
):
    """One of the splits of the cache, for one head's keys and some of the rows that ask them: a softmax's parts.

    queries [n, groups · together, size], kept [2 · groups, capacity, size] -> parts [n, groups · together, splits, size]
    float32, and without the last dimension bests, the largest score, and totals, of the exponentials; parts that nobody looks
    into are not written. Splits are whole blocks and a power of two of them, so that a row is cut alike in most passes.
    """
    split, group = tl.program_id(0), tl.program_id(1)
    row, columns = tl.program_id(2) * rows + tl.arange(0, rows), tl.arange(0, size)
    real = row < n * together
    token = row // together
    at = tl.load(positions + token, mask=real, other=0).to(tl.int32)
    head = (token * groups + group) * together + row % together
    query = tl.load(queries + head[:, None] * size + columns[None, :], mask=real[:, None], other=0.0)

    length = tl.load(positions + n - 1).to(tl.int32) + 1
    first = tl.full((), 0, tl.int32)
    if window > 0:
        first = tl.maximum(tl.load(positions).to(tl.int32) - window + 1, 0) // block * block
    width = tl.full((), block, tl.int32)
    while width * splits < length - first:
        width *= 2
    begin = first + split * width
    end = tl.minimum(begin + width, length)

    keys = kept + group.to(tl.int64) * capacity * size
    values = kept + (groups + group).to(tl.int64) * capacity * size
    best = tl.full((rows,), float("-inf"), tl.float32)
    total = tl.zeros((rows,), tl.float32)
    part = tl.zeros((rows, size), tl.float32)
    for start in range(begin, end, block):
        place = start + tl.arange(0, block)
        inside = place < end
        key = tl.load(keys + place[None, :] * size + columns[:, None], mask=inside[None, :], other=0.0)
        seen = inside[None, :] & (place[None, :] <= at[:, None])
        if window > 0:
            seen = seen & (place[None, :] > at[:, None] - window)
        scores = tl.where(seen, tl.dot(query, key, input_precision="ieee") * scale, float("-inf"))
        largest = tl.maximum(best, tl.max(scores, 1))
        base = tl.where(largest == float("-inf"), 0.0, largest)
        shares, shrink = tl.exp(scores - base[:, None]), tl.exp(best - base)
        value = tl.load(values + place[:, None] * size + columns[None, :], mask=inside[:, None], other=0.0)
        part = part * shrink[:, None] + tl.dot(shares.to(value.dtype), value, input_precision="ieee")
        total = total * shrink + tl.sum(shares, 1)
        best = largest

    to = head * splits + split
    tl.store(bests + to, best, mask=real)
    tl.store(totals + to, total, mask=real)
    if begin < end:
        tl.store(parts + to[:, None] * size + columns[None, :], part, mask=real[:, None])


@triton.jit
def _combine(parts, bests, totals, out, size: tl.constexpr, splits: tl.constexpr):
    """One head of one row: out [n · heads, size] of what `_attend` leaves."""
    head, columns = tl.program_id(0), tl.arange(0, size)
    split = head * splits + tl.arange(0, splits)
    best, total = tl.load(bests + split), tl.load(totals + split)
    shares = tl.exp(best - tl.max(best, 0))
    part = tl.load(parts + split[:, None] * size + columns[None, :], mask=(total > 0)[:, None], other=0.0)
    whole = tl.sum(part * shares[:, None], 0) / tl.sum(total * shares, 0)
    tl.store(out + head * size + columns, whole.to(out.dtype.element_ty))


def add_norm(x: Tensor, more: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """See `Ops`."""
    n, size = x.shape
    out = torch.empty(n, size, dtype=dtype, device=x.device)
    block = triton.next_power_of_2(size)
    warps = 8 if block > 2048 else 4
    _add_norm[(n,)](x, x if more is None else more, weight, out, eps, size, more is not None, block, num_warps=warps)
    return out


def rotate(qkv: Tensor, rotation: Tensor, positions: Tensor, kept: Tensor, norms: HeadNorms | None) -> Tensor:
    """See `Ops`."""
    n, groups, capacity, size = len(qkv), kept.shape[0] // 2, kept.shape[1], kept.shape[2]
    heads = qkv.shape[1] // size - 2 * groups
    queries = torch.empty(n, heads, size, dtype=kept.dtype, device=qkv.device)
    turns = torch.view_as_real(rotation)
    q_norm, k_norm, eps = (turns, turns, 0.0) if norms is None else (norms.q, norms.k, norms.eps)
    shape = heads, groups, size // 2, norms is not None
    grid = n, heads + 2 * groups
    _rotate[grid](qkv, turns, positions, kept, queries, q_norm, k_norm, eps, capacity, *shape, num_warps=1)
    return queries


def gate(gate_up: Tensor) -> Tensor:
    """See `Ops`."""
    n, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(n, size, dtype=gate_up.dtype, device=gate_up.device)
    _gate[n, triton.cdiv(size, _GATE_BLOCK)](gate_up, out, size, _GATE_BLOCK)
    return out


def attend(queries: Tensor, kept: Tensor, positions: Tensor, window: int | None) -> Tensor:
    """See `Ops`."""
    n, heads, size = queries.shape
    groups, capacity = kept.shape[0] // 2, kept.shape[1]
    cut = cut_for(n, heads, groups, kept.dtype)
    parts = torch.empty(n, heads, cut.splits, size, device=queries.device)
    bests, totals = torch.empty(2, n, heads, cut.splits, device=queries.device)
    shape = groups, heads // groups, size, window or 0, cut.splits, cut.rows, cut.block
    grid = cut.splits, groups, triton.cdiv(n * heads // groups, cut.rows)
    _attend[grid](queries, kept, positions, parts, bests, totals, n, capacity, size**-0.5, *shape, num_stages=2)
    out = torch.empty(n, heads * size, dtype=queries.dtype, device=queries.device)
    _combine[(n * heads,)](parts, bests, totals, out, size, cut.splits)
    return out


@dataclass(frozen=True, slots=True)
class Cut:
    """How `attend` shares out its work."""

    splits: int
    """Of the cache, each a program's."""
    rows: int
    """A program's: at least the 16 of a matrix unit. At most 32, as with 64 a Hopper takes other units, which may round a row
    otherwise than alone; in float32 16, since more do not fit the registers."""
    block: int
    """Positions at a time."""


def cut_for(n: int, heads: int, groups: int, dtype: torch.dtype) -> Cut:
    """About 256 programs, two for each of the 132 units of an H100; as many splits whatever the length, which the host does
    not know."""
    splits = min(64, triton.next_power_of_2(triton.cdiv(_PROGRAMS, groups)))
    most, block = (32, 64) if dtype.itemsize == 2 else (16, 32)
    return Cut(splits, max(16, min(most, triton.next_power_of_2(n * heads // groups))), block)


_GATE_BLOCK = 1024
_PROGRAMS = 256
FUSED = Ops(add_norm, rotate, gate, attend)


def checked(shape: Shape, dtype: torch.dtype, device: torch.device) -> Ops:
    """The kernels, after each has computed what torch computes on one row and on many, which also compiles them.

    In every form that a model of this shape runs, or may: with and without norms of heads, for each window.
    Raises Unsupported for a shape that they do not take or a result that is off; and whatever Triton raises where it finds no
    compiler, or does not know the card.
    """
    size = shape.head_size
    if size & (size - 1) or not 16 <= size <= 256:
        raise Unsupported(f"heads of {size} are no power of two from 16 to 256")
    for n, normed, window in product((1, FEW_ROWS), (False, True), set(shape.windows)):
        case = _Case(shape, n, normed, window, dtype, device)
        for name, found in _results(FUSED, case).items():
            expected = _results(TORCH, case)[name]
            if not (found - expected).abs().max() <= _CLOSE[dtype] * expected.abs().max():
                raise Unsupported(f"{name} of {n} rows is not what torch computes")
    return FUSED


@dataclass(frozen=True, slots=True)
class _Case:
    shape: Shape
    n: int
    normed: bool
    """Norms of heads; without, nothing is added before the other norm, as in a model's first layer."""
    window: int | None
    dtype: torch.dtype
    device: torch.device


_CLOSE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Of the largest value; a wrong index is off by about as much as that."""


def _results(ops: Ops, case: _Case) -> dict[str, Tensor]:
    """What all operations give for the same random numbers, in float32."""
    shape, n, dtype, device = case.shape, case.n, case.dtype, case.device
    random = torch.Generator().manual_seed(n)

    def numbers(*sizes: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*sizes, generator=random).to(device, to)

    heads, groups, size, end = shape.heads, shape.kv_heads, shape.head_size, 300
    x, weight = numbers(n, shape.hidden, to=torch.float32), numbers(shape.hidden, to=torch.float32)
    more = numbers(n, shape.hidden) if case.normed else None
    normed = ops.add_norm(x, more, weight, shape.eps, dtype)
    gated = ops.gate(numbers(n, 2 * shape.hidden))
    kept, positions = numbers(2 * groups, end + 20, size), torch.arange(end - n, end, device=device)
    turns = torch.polar(torch.ones(n, size // 2), torch.rand(n, size // 2, generator=random)).to(device)
    q, k = (numbers(size, to=torch.float32) for _ in range(2))
    norms = HeadNorms(q, k, shape.eps) if case.normed else None
    queries = ops.rotate(numbers(n, (heads + 2 * groups) * size), turns, positions, kept, norms)
    if ops.attend is not None:
        seen = ops.attend(queries, kept, positions, case.window)
    else:
        seen = attend_in_groups(queries, kept[:, :end], causal_mask(positions, end, case.window, dtype))
    results = {"add_norm": normed, "gate": gated, "rotate": queries, "cache": kept, "attend": seen}
    return {name: each.float() for name, each in results.items()}
