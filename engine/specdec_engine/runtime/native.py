"""Kernels of our own for a CPU, compiled once by the machine's C compiler; where there is none, torch's operations are taken.

torch multiplies packed weights well at one row and badly at four, and only with AVX-512 quickly at all: 106M weights in
4 bits on two cores with AVX2 take 9.7 and 19.1 ms, and here 3.0 and 7.1. Whether they are taken is measured
(`arithmetic.py`), like everything else about a CPU.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from specdec_engine.runtime import compiled
from specdec_engine.runtime.compiled import Unavailable
from specdec_engine.runtime.likely import Likely
from specdec_engine.runtime.native_check import check
from specdec_engine.runtime.native_records import (
    TILED,
    Beginning,
    Drafting,
    Following,
    LayerFields,
    Matrix,
    PassFields,
    Tapped,
    address,
    pass_fields,
)
from specdec_engine.runtime.weights import Grouped

if TYPE_CHECKING:  # which imports this file
    from specdec_engine.runtime.ops import HeadNorms

SOURCE = Path(__file__).parent / "kernels" / "kernels.c"

Reading = Literal["alike", "unpacked", "tiles"]
"""How a prompt's rows are multiplied: like all others, by torch with weights unpacked to bfloat16, or in tiles of it."""


class Kernels:
    """`kernels.c`, loaded. Threads are torch's own pool."""

    def __init__(self, library: Path) -> None:
        """Raises OSError for a library that this machine cannot load."""
        if (runtime := compiled.openmp()) is not None:
            ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(str(library))
        self.lanes = int(self._library.lanes())
        self.tiled = bool(self._library.reads())
        """True where the processor multiplies tiles of bfloat16, as with AMX, and the system lets us."""
        self.reading: Reading = "alike"
        address, size, small, single = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
        for name, arguments in {
            "pack": (small, small, *[address] * 3, size, size, address, address, small),
            "multiply": (address, address, size, small, address, small),
            "unpack": (small, small, small, address, address, size, size, size, address, small),
            "rows": (address, address, size, address),
            "best": (address, size, size, address, address, small),
            "likeliest": (address, size, address, address),
            "top": (address, size, size, address, address),
            "warp": (address, size, size, single, address, small),
            "place": (address, size, ctypes.c_double),
            "residual": (address, address, size, size, address),
            "widen": (address, address, size, size, size, address),
            "add_norm": (*[address] * 3, single, size, size, small, address, small),
            "gate": (address, size, size, small, address, small),
            "rotate": (address, address, small, address, address, single, address, address, small),
            "attend": (*[address] * 3, size, address, small, small),
            "draft_token": (address, single, ctypes.c_double, address, small),
            "blocks": (address, size, address, address, size, *[address] * 4, size, address, small, small),
        }.items():
            getattr(self._library, name).argtypes = arguments
        self._library.place.restype, self._library.residual.restype = size, single

    def reading_as(self, how: Reading) -> Kernels:
        """The same, with `reading` so, where it can be: what was remembered may be another process's, or compiler's."""
        other = copy.copy(self)
        other.reading = "alike" if how == "tiles" and not self.tiled else how
        return other

    def reads_tiled(self, rows: int) -> bool:
        """Tell whether so many of a prompt are multiplied in tiles."""
        return self.reading == "tiles" and rows >= TILED

    def pack(self, weight: Grouped) -> tuple[Tensor, Tensor]:
        """The words, and the float16 scales and offsets, as `multiply` wants them."""
        assert weight.bits == 8 or weight.layout == (4, 32, True)
        rows, columns = weight.q.shape
        padded = -(-rows // self.lanes) * self.lanes
        sets = 1 if weight.offset is None else 2
        words = torch.empty(padded * columns * weight.bits // 16, dtype=torch.int16)
        constants = torch.empty(padded * columns // weight.group * sets, dtype=torch.float16)
        q, scale = weight.q.contiguous(), weight.scale.half().contiguous()
        offset = None if weight.offset is None else weight.offset.half().contiguous()
        self._library.pack(
            weight.bits,
            weight.group,
            q.data_ptr(),
            scale.data_ptr(),
            address(offset),
            rows,
            columns,
            words.data_ptr(),
            constants.data_ptr(),
            torch.get_num_threads(),
        )
        return words, constants

    def multiply(self, x: Tensor, matrix: Matrix, reading: bool = False) -> Tensor:
        """[n, K] float32 -> [n, N] float32; reading: in tiles, if `reads_tiled`."""
        assert x.dtype == torch.float32
        assert x.shape[1] == matrix.K
        x = x.contiguous()
        out = torch.empty(x.shape[0], matrix.N)
        threads = torch.get_num_threads()
        tiles = reading and self.reads_tiled(len(x))
        failed = self._library.multiply(ctypes.byref(matrix), x.data_ptr(), len(x), tiles, out.data_ptr(), threads)
        _check_memory(failed, x.shape[0])
        return out

    def unpack(self, rows: range, matrix: Matrix) -> Tensor:
        """[K, n] bfloat16: so many rows of a packed matrix as columns, from a multiple of `lanes` on."""
        padded = -(-len(rows) // self.lanes) * self.lanes
        out = torch.empty(matrix.K, padded, dtype=torch.bfloat16)
        self._library.unpack(
            matrix.bits,
            matrix.group,
            matrix.offsets,
            matrix.words,
            matrix.constants,
            rows.start,
            padded,
            matrix.K,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out[:, : len(rows)]

    def rows(self, order: Tensor, matrix: Matrix) -> Tensor:
        """[n] -> [n, K] float32: those rows of a packed matrix."""
        assert order.dtype == torch.long  # read as such
        order = order.contiguous()
        out = torch.empty(len(order), matrix.K)
        self._library.rows(ctypes.byref(matrix), order.data_ptr(), len(order), out.data_ptr())
        return out

    def likeliest(self, logits: Tensor) -> tuple[Likely, Likely]:
        """The two likeliest of [n] float32, at least two, none of them NaN."""
        places, shares = (ctypes.c_int64 * 2)(), (ctypes.c_float * 2)()
        logits = logits.contiguous()
        self._library.likeliest(logits.data_ptr(), logits.shape[0], places, shares)
        return Likely(places[0], shares[0]), Likely(places[1], shares[1])

    def best(self, rows: Tensor) -> list[int] | None:
        """The place of the largest number in each of a few rows [n, V] float32, the first of those that are alike; None where
        one is not finite."""
        rows = rows.contiguous()
        n = rows.shape[0]
        if n == 0:
            return []
        places, values = (ctypes.c_int64 * n)(), (ctypes.c_float * n)()
        self._library.best(rows.data_ptr(), *rows.shape, places, values, torch.get_num_threads())
        return list(places) if all(map(isfinite, values)) else None

    def top(self, row: Tensor, many: int) -> list[tuple[int, float]]:
        """The largest of [n] float32, none of them NaN, and their places, from the largest on; no more than n."""
        places, values = (ctypes.c_int64 * many)(), (ctypes.c_float * many)()
        row = row.contiguous()
        self._library.top(row.data_ptr(), row.shape[0], many, places, values)
        return list(zip(places, values, strict=True))

    def warp(self, logits: Tensor, temperature: float) -> Tensor:
        """[n, V] float32 -> each row's softmax at a temperature; not a number where its largest logit is not finite."""
        logits, out = logits.contiguous(), torch.empty(logits.shape)
        threads = torch.get_num_threads()
        self._library.warp(logits.data_ptr(), *logits.shape, temperature, out.data_ptr(), threads)
        return out

    def place(self, row: Tensor, u: float) -> int:
        """The place at which the sum of [n] float32 first exceeds u of all."""
        row = row.contiguous()
        return int(self._library.place(row.data_ptr(), row.shape[0], u))

    def residual(self, p: Tensor, q: Tensor | None, token: int) -> Tensor | None:
        """max(0, p - q), normalised, of [n] float32; without q all of it is at the token. None where nothing is left."""
        assert token < len(p)
        assert q is None or (q.shape == p.shape and q.dtype == p.dtype)
        p, q, out = p.contiguous(), None if q is None else q.contiguous(), torch.empty(p.shape)
        mass = self._library.residual(p.data_ptr(), address(q), token, p.shape[0], out.data_ptr())
        return out if mass > 0 else None

    def widen(self, rows: Tensor, ids: Tensor, wide: int) -> Tensor:
        """[n, m] float32 and its [m] ids, each once and from 0 on below `wide` -> [n, wide], zeros elsewhere."""
        assert ids.dtype == torch.long
        assert rows.shape[1] == len(ids)
        rows, ids, out = rows.contiguous(), ids.contiguous(), torch.empty(rows.shape[0], wide)
        self._library.widen(rows.data_ptr(), ids.data_ptr(), *rows.shape, wide, out.data_ptr())
        return out

    def add_norm(self, x: Tensor, more: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """See `ops.Ops`; dtype: float32 or bfloat16, as `more`."""
        out = torch.empty(x.shape, dtype=dtype)
        more = None if more is None else more.to(dtype).contiguous()
        narrow, threads = dtype == torch.bfloat16, torch.get_num_threads()
        self._library.add_norm(
            x.data_ptr(), address(more), weight.data_ptr(), eps, *x.shape, narrow, out.data_ptr(), threads
        )
        return out

    def gate(self, gate_up: Tensor) -> Tensor:
        """See `ops.Ops`."""
        n, columns = gate_up.shape
        gate_up = gate_up.contiguous()
        out = torch.empty(n, columns // 2, dtype=gate_up.dtype)
        narrow = gate_up.dtype == torch.bfloat16
        self._library.gate(gate_up.data_ptr(), n, columns // 2, narrow, out.data_ptr(), torch.get_num_threads())
        return out

    def rotate(self, qkv: Tensor, rotation: Tensor, positions: Tensor, kept: Tensor, norms: HeadNorms | None) -> Tensor:
        """See `ops.Ops`; the queries are float32."""
        size = kept.shape[2]
        qkv = qkv.contiguous()
        queries = torch.empty(len(qkv), qkv.shape[1] // size - kept.shape[0], size)
        q, k, eps = (None, None, 0.0) if norms is None else (norms.q, norms.k, norms.eps)
        self._library.rotate(
            ctypes.byref(pass_fields(queries.shape[1], rotation, positions, kept)),
            qkv.data_ptr(),
            qkv.dtype == torch.bfloat16,
            address(q),
            address(k),
            eps,
            queries.data_ptr(),
            kept.data_ptr(),
            torch.get_num_threads(),
        )
        return queries

    def attend(
        self,
        dtype: torch.dtype,
        queries: Tensor,
        kept: Tensor,
        positions: Tensor,
        window: int | None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """See `ops.Ops`; dtype: of what is seen, float32 or bfloat16. Positions never decrease. hidden: see `ops.Pass`."""
        n, heads, size = queries.shape
        out = torch.empty(n, heads * size, dtype=dtype)
        failed = self._library.attend(
            ctypes.byref(pass_fields(heads, None, positions, kept, hidden)),
            queries.data_ptr(),
            kept.data_ptr(),
            window or 0,
            out.data_ptr(),
            dtype == torch.bfloat16,
            torch.get_num_threads(),
        )
        _check_memory(failed, n)
        return out

    def through(
        self,
        layers: ctypes.Array[LayerFields],
        many: int,
        texts: ctypes.Array[PassFields],
        x: Tensor,
        kept: Sequence[Tensor],
        tapped: Tapped | None = None,
        tiles: bool = False,
        before: Beginning | None = None,
        after: Following | None = None,
    ) -> None:
        """The first so many layers, one after the other: each adds to x [n, hidden] float32, whose rows are those of several
        texts.

        texts: of each rotation, of each text. kept: of each text, the cache of the first layer, which those of the others
        follow. tiles: all are prompts' rows, to be multiplied so. before: what a draft head reads before.
        """
        caches = (ctypes.c_void_p * len(kept))(*[cache.data_ptr() for cache in kept])
        taps = () if tapped is None else tapped.layers
        told = (ctypes.c_long * len(taps))(*taps), len(taps), address(None if tapped is None else tapped.features)
        around = None if before is None else ctypes.byref(before), None if after is None else ctypes.byref(after.fields)
        at = ctypes.byref(layers), many, texts, caches, len(kept), x.data_ptr()
        failed = self._library.blocks(*at, *around, *told, tiles, torch.get_num_threads())
        _check_memory(failed, len(x))

    def draft_token(self, drafting: Drafting, temperature: float, u: float, row: int | None) -> None:
        """A step of a head's draft; row: the address of [columns] float32 for what its token is drawn from, at a temperature
        above 0."""
        failed = self._library.draft_token(ctypes.byref(drafting), temperature, u, row, torch.get_num_threads())
        _check_memory(failed, 1)


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers that our own kernels do whole, several in one call: nine operations take 9 µs of Python each, and 1 µs of work
    for few rows."""

    kernels: Kernels
    layers: ctypes.Array[LayerFields]


def stacked(kernels: Kernels | None, layers: Sequence[LayerFields | None]) -> Stack | None:
    """None where some of them are not done whole."""
    found = [layer for layer in layers if layer is not None]
    if kernels is None or not found or len(found) < len(layers):
        return None
    return Stack(kernels, (LayerFields * len(found))(*found))


def _check_memory(failed: int, rows: int) -> None:
    """Raises MemoryError."""
    if failed:
        raise MemoryError(f"no memory for what {rows} rows are worked out in")


@cache
def kernels() -> Kernels | None:
    """Those of this machine, compiled at the first call ever; None where there are none (`why_none`)."""
    found = _attempt()
    return None if isinstance(found, Unavailable) else found


def of_rows(row: Tensor) -> Kernels | None:
    """Give those that this process has, for what is done with such a row; compiles nothing. A model of the lean runtime on a
    CPU has them from its loading on; beside one of transformers' own, torch does it until something else asks for them."""
    own = row.dtype == torch.float32 and row.device.type == "cpu" and _attempt.cache_info().currsize > 0
    return kernels() if own else None


def why_none() -> str:
    """Why there are no kernels of our own; empty where there are."""
    found = _attempt()
    return str(found) if isinstance(found, Unavailable) else ""


def is_ready() -> bool:
    """Whether `kernels` has nothing to compile, which takes 6 s."""
    return compiled.is_ready(SOURCE)


@cache
def _attempt() -> Kernels | Unavailable:
    try:
        return Kernels(compiled.library(SOURCE, lambda library: check(Kernels(library))))
    except OSError as error:  # of a library that was sound once
        return Unavailable(str(error).partition("\n")[0])
    except Unavailable as reason:
        return reason


def key() -> str:
    """Of the library: other kernels have another one."""
    return compiled.key(SOURCE)
