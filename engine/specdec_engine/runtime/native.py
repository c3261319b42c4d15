"""Kernels of our own for a CPU, compiled once by the machine's C compiler; where there is none, torch's are taken.

torch multiplies packed weights well at one row and badly at four, and only with AVX-512 quickly at all. Here four rows cost
1.7 times one (106M weights in 4 bits on two cores with AVX2: 4.1 and 7.0 ms; torch's 9.7 and 19.1), which is what verifying a
draft lives on. Whether they are taken is measured (`arithmetic.py`), like everything else about a CPU.
"""

from __future__ import annotations

import copy
import ctypes
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from specdec_engine.folders import cache_folder
from specdec_engine.machine import cpu_flags
from specdec_engine.weights import Grouped

SOURCE = Path(__file__).with_name("native.c")
_FLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-tree-reassoc", "-fopenmp", "-fPIC")
"""The compiler neither reorders sums nor fuses where the source does not: a row must have the same bits in every tile."""
_COMPILE_S = 60


class NativeUnavailable(Exception):
    """Why there are no kernels of our own here."""


class Kernels:
    """`native.c`, loaded. Threads are torch's own pool."""

    def __init__(self, library: Path) -> None:
        """Raises OSError for a library that this machine cannot load."""
        for runtime in _openmp():
            ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(str(library))
        self.lanes = int(self._library.lanes())
        self.unpacks_wide = False
        """Whether torch multiplies a prompt's passes faster with unpacked bfloat16 weights, as with AMX."""
        address, size, small = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
        self._pack = self._library.pack
        self._pack.argtypes = [small, small, *[address] * 3, size, size, address, address, small]
        self._pack.restype = None
        self._packed_mm = self._library.packed_mm
        self._packed_mm.argtypes = [small, small, small, address, size, size, size, *[address] * 3, small]
        self._unpack = self._library.unpack
        self._unpack.argtypes = [small, small, small, address, address, size, size, size, address, small]
        self._unpack.restype = None
        self._bfloat16_mm = self._library.bfloat16_mm
        self._bfloat16_mm.argtypes = [address, size, size, size, address, address, small]
        self._bfloat16_mm.restype = None

    def unpacking(self, wide: bool) -> Kernels:
        """The same, with `unpacks_wide` so."""
        other = copy.copy(self)
        other.unpacks_wide = wide
        return other

    def pack(self, weight: Grouped) -> tuple[Tensor, Tensor]:
        """The words, and the float16 scales and offsets, as `packed_multiply` wants them."""
        rows, columns = weight.q.shape
        padded = -(-rows // self.lanes) * self.lanes
        sets = 1 if weight.offset is None else 2
        words = torch.empty(padded * columns * weight.bits // 16, dtype=torch.int16)
        constants = torch.empty(padded * columns // weight.group * sets, dtype=torch.float16)
        q, scale = weight.q.contiguous(), weight.scale.half().contiguous()
        offset = None if weight.offset is None else weight.offset.half().contiguous()
        self._pack(
            weight.bits,
            weight.group,
            q.data_ptr(),
            scale.data_ptr(),
            None if offset is None else offset.data_ptr(),
            rows,
            columns,
            words.data_ptr(),
            constants.data_ptr(),
            torch.get_num_threads(),
        )
        return words, constants

    def packed_multiply(
        self, x: Tensor, rows: int, bits: int, group: int, words: Tensor, constants: Tensor, offsets: bool
    ) -> Tensor:
        """[n, K] float32 -> [n, rows] float32."""
        n, columns = x.shape
        x = x.contiguous()
        out = torch.empty(n, rows)
        failed = self._packed_mm(
            bits,
            group,
            offsets,
            x.data_ptr(),
            n,
            columns,
            rows,
            words.data_ptr(),
            constants.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory for the activations of {n} rows")
        return out

    def unpack(
        self, rows: range, columns: int, layout: tuple[int, int, bool], words: Tensor, constants: Tensor
    ) -> Tensor:
        """[n, K] bfloat16: so many rows of the matrix, from a multiple of `lanes` on."""
        padded = -(-len(rows) // self.lanes) * self.lanes
        out = torch.empty(padded, columns, dtype=torch.bfloat16)
        self._unpack(
            *layout,
            words.data_ptr(),
            constants.data_ptr(),
            rows.start,
            padded,
            columns,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out[: len(rows)]

    def dense_multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """[n, K] float32, [N, K] bfloat16 -> [n, N] float32."""
        n, columns = x.shape
        x = x.contiguous()
        out = torch.empty(n, weight.shape[0])
        self._bfloat16_mm(
            x.data_ptr(),
            n,
            columns,
            weight.shape[0],
            weight.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out


@cache
def kernels() -> Kernels | None:
    """Those of this machine, compiled at the first call ever; None where there are none (`why_none`)."""
    try:
        return load()
    except NativeUnavailable:
        return None


def why_none() -> str:
    """Why there are no kernels of our own; empty where there are."""
    try:
        load()
    except NativeUnavailable as reason:
        return str(reason)
    return ""


@cache
def key() -> str:
    """What the compiled library depends on: the source, the compiler and the processor's instructions."""
    return hashlib.sha256(repr((SOURCE.read_bytes(), _FLAGS, _compiler(), cpu_flags())).encode()).hexdigest()[:16]


def load() -> Kernels:
    """The library from the cache, or compiled into it. Raises NativeUnavailable where that cannot be."""
    if not sys.platform.startswith("linux"):
        raise NativeUnavailable("they are compiled on Linux only")
    library = cache_folder() / "native" / f"{key()}.so"
    try:
        if not library.is_file():
            _compile(library)
        return Kernels(library)
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailable(_first_line(error)) from error


def _compile(library: Path) -> None:
    """Atomically: two processes may do it at once. Linked without the compiler's own OpenMP: torch's is in the process, and
    the threads of two such pools would wait for each other."""
    compiler = _compiler()
    if not compiler:
        raise NativeUnavailable("there is no C compiler (cc, gcc or clang)")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".scratch-") as scratch:
        made = Path(scratch) / "native.so"
        compiled = Path(scratch) / "native.o"
        tune = "-march=native" if os.uname().machine in ("x86_64", "i686") else "-mcpu=native"
        _run([*compiler, *_FLAGS, tune, "-c", str(SOURCE), "-o", str(compiled)])
        _run([*compiler, "-shared", str(compiled), "-lm", "-o", str(made)])
        made.replace(library)


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_S, stdin=subprocess.DEVNULL)


@cache
def _compiler() -> tuple[str, ...]:
    """The command, `$CC` first; empty where there is none."""
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        if (path := shutil.which(command[0])) is not None:
            return (path, *command[1:])
    return ()


def _openmp() -> Iterator[str]:
    """The OpenMP library that torch has loaded, whose functions ours is to find."""
    maps = Path("/proc/self/maps").read_text("utf-8")
    yield from sorted(set(re.findall(r"(/\S*lib(?:gomp|iomp5|omp)[^/\s]*\.so\S*)", maps)))


def _first_line(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines()
        return f"the compiler failed: {lines[0] if lines else f'exit code {error.returncode}'}"
    return str(error).partition("\n")[0]
