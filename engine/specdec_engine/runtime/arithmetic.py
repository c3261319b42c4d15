"""What a CPU multiplies fastest, found by a short measurement on this machine and remembered.

Instruction flags say what can run, not what is fast: on a CPU with AVX2 alone the flags chose float32 and decoded 8 tokens a
second, where bfloat16 gave 26 and packed weights 40. So each form of the weights that could be taken is timed at one row
(plain decoding) and at four (verifying a draft), from memory and not from caches, on matrices as wide as the model's.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import get_args

import torch
from torch import Tensor

from specdec_engine.errors import UsageError
from specdec_engine.runtime import native
from specdec_engine.runtime.linear import Packing, Projection, project, quantized
from specdec_engine.runtime.native import Kernels, Reading
from specdec_engine.runtime.torch_forms import torch_packs
from specdec_engine.system.devices import pick_dtype
from specdec_engine.system.folders import cache_folder
from specdec_engine.system.machine import cpu_name, usable_cores
from specdec_engine.system.threads import initial_threads, keep_step


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """In what a model is computed."""

    dtype: torch.dtype
    """Of the activations."""
    weights: torch.dtype
    """Of weights that are not packed."""
    packs: bool = False
    """Whether weights can be packed, or stay so."""
    kernels: Kernels | None = None
    """Our own, where they multiply; then activations are float32."""
    threads: int | None = None
    """With which it was fastest, where that was measured."""

    @property
    def name(self) -> str:
        """As `info` and `-v` say it."""
        by = "our own" if self.kernels is not None else "torch's"
        return f"{'packed' if self.packs else _name(self.weights)} by {by} kernels"


@dataclass(frozen=True, slots=True)
class Form:
    """A way to keep and multiply weights."""

    name: str
    packed: bool
    own: bool
    dtype: torch.dtype
    """Of weights that are not packed; of torch's activations, too."""

    @property
    def arithmetic(self) -> Arithmetic:
        kernels = native.kernels() if self.own else None
        return Arithmetic(torch.float32 if self.own else self.dtype, self.dtype, self.packed, kernels)


FORMS = (
    Form("int4, own kernels", True, True, torch.bfloat16),
    Form("int4, torch", True, False, torch.bfloat16),
    Form("bfloat16, own kernels", False, True, torch.bfloat16),
    Form("bfloat16, torch", False, False, torch.bfloat16),
    Form("float32, torch", False, False, torch.float32),
)


@dataclass(frozen=True, slots=True)
class Timing:
    """What a form took, in milliseconds for 100 million weights."""

    form: str
    one_ms: float
    """A pass over one row."""
    four_ms: float
    """Over four."""

    @property
    def cost(self) -> float:
        """A plain pass and a verifying one weigh alike."""
        return self.one_ms + self.four_ms


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured once for a machine, a torch and a size of matrices."""

    cpu: str
    torch: str
    kernels: str
    """Of our own: a hash of what they depend on; empty where there are none."""
    threads: int
    rows: int
    columns: int
    """Of the matrices measured: [rows, columns]."""
    timings: tuple[Timing, ...]
    fastest_threads: int
    """With which the best form was fastest: `threads`, or fewer."""
    reading: Reading = "alike"
    """How our own kernels read a prompt fastest."""

    def best(self, forms: Sequence[Form]) -> Form:
        """Of these, the one that costs least; the last where none of them could be timed."""
        costs = {timing.form: timing.cost for timing in self.timings}
        return min((f for f in forms if f.name in costs), key=lambda f: costs[f.name], default=forms[-1])


def usable(form: Form) -> bool:
    """Whether it can run here at all."""
    if form.own:
        return native.kernels() is not None
    return torch_packs() or not form.packed


def measured(rows: int, columns: int) -> Measurement:
    """For matrices of about this size; from the cache folder, or measured now, for half a second, and put there."""
    return _measured(*_bucket(rows, columns), min(initial_threads(), usable_cores()))


def most_threads() -> int:
    """Threads that were fastest where all cores were free, as far as that was measured."""
    cores = usable_cores()
    return max((one.fastest_threads for one in current() if one.threads == cores), default=cores)


@cache
def _measured(rows: int, columns: int, threads: int) -> Measurement:
    known = {(one.threads, one.rows, one.columns): one for one in current()}
    if (threads, rows, columns) in known:
        return known[threads, rows, columns]
    now = torch.get_num_threads()
    try:
        quiet = keep_step(threads)
        fresh = measure(rows, columns)
        quiet = quiet and keep_step(threads)
    finally:
        torch.set_num_threads(now)
    if quiet:  # beside other programs, what was found holds for this hour only
        others = (one for one in remembered() if (one.cpu, one.torch) != (fresh.cpu, fresh.torch))
        remember([*others, *known.values(), fresh])  # without what older kernels took
        return fresh
    alike = [
        one for one in known.values() if (one.rows, one.columns) == (rows, columns)
    ]  # with other threads, and quiet
    return replace(alike[0], fastest_threads=min(alike[0].fastest_threads, threads)) if alike else fresh


def measure(rows: int, columns: int) -> Measurement:
    """Time every form that can run here. Leaves torch's number of threads as it is."""
    threads = torch.get_num_threads()
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    made = {form.name: _projections(form, matrix) for form in FORMS if usable(form)}
    timings = [_time(name, *case, rows, columns) for name, case in made.items()]
    best = min(timings, key=lambda timing: timing.cost)
    fastest = _fastest_threads(threads, lambda: _time(best.form, *made[best.form], rows, columns).cost)
    return Measurement(
        cpu=cpu_name() or "",
        torch=torch.__version__,
        kernels=_kernels_key(),
        threads=threads,
        rows=rows,
        columns=columns,
        timings=tuple(timings),
        fastest_threads=fastest,
        reading=_fastest_reading(matrix),
    )


@torch.inference_mode()
def _fastest_reading(matrix: Tensor) -> Reading:
    """Time passes over `_PROMPT` rows in each way, in turns, and compare the best of each: what disturbs one disturbs it
    alone. Give the first way unless another is clearly faster."""
    own = native.kernels()
    if own is None:
        return "alike"
    x, cpu = torch.ones(_PROMPT, matrix.shape[1]), torch.device("cpu")
    ways: tuple[Reading, ...] = ("alike", "unpacked", "tiles") if own.tiled else ("alike", "unpacked")
    packed = quantized(matrix)
    made = {way: project([packed], None, torch.float32, cpu, "auto", own.reading_as(way)) for way in ways}
    rounds = [{way: _pass_s([one], x, reading=True) for way, one in made.items()} for _ in range(_ROUNDS)]
    seconds = {way: min(found[way] for found in rounds) for way in ways}
    best = min(ways, key=lambda way: seconds[way])
    return best if seconds[best] < _CLEARLY * seconds["alike"] else "alike"


def _projections(form: Form, matrix: Tensor) -> tuple[list[Projection], torch.dtype]:
    """As many as hold `_WEIGHTS`, and the dtype of what they read."""
    arithmetic = form.arithmetic
    weight = quantized(matrix) if form.packed else matrix
    packing: Packing = "auto" if form.packed else "none"
    many = max(1, _WEIGHTS // matrix.numel())
    cpu = torch.device("cpu")
    made = [project([weight], None, arithmetic.dtype, cpu, packing, arithmetic.kernels) for _ in range(many)]
    return made, arithmetic.dtype


@torch.inference_mode()
def _time(form: str, projections: Sequence[Projection], dtype: torch.dtype, rows: int, columns: int) -> Timing:
    unit = 1e3 * 1e8 / (rows * columns * len(projections))
    seconds = []
    for n in (1, 4):
        x = torch.ones(n, columns, dtype=dtype)
        seconds.append(median(_pass_s(projections, x) for _ in range(_REPEATS)))
    return Timing(form, *(round(unit * s, 3) for s in seconds))


def _pass_s(projections: Sequence[Projection], x: Tensor, reading: bool = False) -> float:
    _evicted().sum()
    began = perf_counter()
    for projection in projections:
        projection(x, reading)
    return perf_counter() - began


@cache
def _evicted() -> Tensor:
    """48 MB, which reading leaves in the caches in place of weights."""
    return torch.zeros(12 * 2**20)


def _fastest_threads(threads: int, cost: Callable[[], float]) -> int:
    """Half as many, and half again, while that is clearly faster: where memory is the bound, more only wait for it."""
    least, fastest = cost(), threads
    try:
        while fastest > 1:
            torch.set_num_threads(fastest // 2)
            found = cost()
            if found > _CLEARLY * least:
                break
            least, fastest = found, fastest // 2
    finally:
        torch.set_num_threads(threads)
    return fastest


@dataclass(frozen=True, slots=True)
class Matrices:
    """What of a model decides how it is computed best."""

    rows: int
    """Of its largest matrix in a layer."""
    columns: int
    packed: bool
    """Whether its checkpoint has packed weights."""
    lean: bool
    """Whether our own forward runs it; transformers' takes torch's dense forms only."""


def choose(matrices: Matrices, dtype: str, packing: Packing, device: torch.device) -> Arithmetic:
    """For `dtype` auto on a CPU what is fastest; otherwise what is asked for, on torch's kernels.

    Raises UsageError for a dtype that is none, and where int8 or int4 is asked for and cannot be done.
    """
    must = packing in ("int8", "int4")
    if device.type == "cpu" and dtype == "auto":
        forms = [f for f in FORMS if usable(f) and (matrices.lean or not (f.packed or f.own))]
        may = packing != "none" and (matrices.packed or packing == "light")
        forms = [f for f in forms if (f.packed if must else may or not f.packed)]
        if forms:
            found = measured(matrices.rows, matrices.columns)
            best = found.best(forms).arithmetic
            kernels = best.kernels and best.kernels.reading_as(found.reading)
            return replace(best, kernels=kernels, threads=found.fastest_threads)
    if must and matrices.lean:  # else the loader says what is in the way
        refuse_packing(packing, dtype, device)
    may = packing != "none" and (matrices.packed or packing != "auto")
    packs = device.type == "cpu" and dtype == "bfloat16" and torch_packs() and matrices.lean and may
    named = pick_dtype(dtype, device)
    return Arithmetic(named, named, packs)


def refuse_packing(packing: Packing, dtype: str, device: torch.device) -> None:
    """Raises UsageError unless torch's kernels pack weights there."""
    if device.type == "cpu" and dtype == "auto":
        raise UsageError(
            f"weights cannot be packed to {packing}: torch has no kernels for that on this CPU, "
            f"and of our own there are none ({native.why_none()})",
            "leave out --quantize and --draft-quantize",
        )
    if device.type != "cpu" or dtype != "bfloat16" or not torch_packs():
        raise UsageError(
            f"weights cannot be packed to {packing} on {device} in dtype {dtype}",
            "packed weights run on a CPU, in dtype auto; leave out --quantize and --draft-quantize, or --dtype",
        )


def remembered() -> tuple[Measurement, ...]:
    """All that the cache folder holds; a file that cannot be read holds nothing."""
    found = list[Measurement]()
    with suppress(OSError, ValueError, TypeError, RecursionError):
        for entry in json.loads(_file().read_text("utf-8")):
            with suppress(TypeError, KeyError):
                one = Measurement(**{**entry, "timings": tuple(Timing(**timing) for timing in entry["timings"])})
                found += [one] if _is_sane(one) else []
    return tuple(found)


def _is_sane(one: Measurement) -> bool:
    """Check that an entry can be what was written: a file may be damaged, or somebody's own work."""
    names, numbers = {form.name for form in FORMS}, [ms for t in one.timings for ms in (t.one_ms, t.four_ms)]
    return (
        bool(one.timings)
        and {timing.form for timing in one.timings} <= names
        and all(isinstance(ms, float) and 0 < ms < math.inf for ms in numbers)
        and all(isinstance(n, int) for n in (one.threads, one.rows, one.columns, one.fastest_threads))
        and 1 <= one.fastest_threads <= one.threads
        and one.reading in get_args(Reading)
    )


def current() -> tuple[Measurement, ...]:
    """Measurements that hold for this CPU, torch and kernels of our own."""
    here = (cpu_name() or "", torch.__version__, _kernels_key())
    return tuple(one for one in remembered() if (one.cpu, one.torch, one.kernels) == here)


def remember(measurements: Sequence[Measurement]) -> None:
    """Atomically; where the folder cannot be written, the next start measures again."""
    with suppress(OSError):
        _file().parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=_file().parent, prefix=".scratch-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump([asdict(one) for one in measurements], file, indent=1)
        Path(scratch).replace(_file())


def _file() -> Path:
    return cache_folder() / "measured.json"


def _kernels_key() -> str:
    return native.key() if native.kernels() is not None else ""


def _bucket(rows: int, columns: int) -> tuple[int, int]:
    """Powers of two near by, so that like models share a measurement; no larger than can be timed at once, and no smaller
    than where products are more than their calls."""
    columns = min(max(_power(columns), 512), 8192)
    return min(max(_power(rows), 1024), max(1024, _WEIGHTS // columns)), columns


def _power(n: int) -> int:
    return 1 << (n.bit_length() - 1) if n > 0 else 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_WEIGHTS = 2**22
"""Of a pass that is timed: 0.2 ms in 4 bits, 1.6 in float32."""
_REPEATS = 7
_PROMPT = 256
"""Rows of a pass over a prompt."""
_ROUNDS = 5
_CLEARLY = 0.95
