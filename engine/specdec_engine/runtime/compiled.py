"""A C file as a library for this machine: compiled once, checked, kept in the cache folder.

It is linked without the compiler's own OpenMP: torch's is in the process, and the threads of two such pools would wait for
each other.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from specdec_engine.system.folders import cache_folder
from specdec_engine.system.machine import cpu_flags

_FLAGS = (
    *("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-tree-reassoc"),
    *("-fno-schedule-insns", "-fopenmp", "-fPIC"),
)
"""The compiler neither reorders sums nor fuses where the source does not: a row must have the same bits in every tile. Nor
does it order instructions before registers are given out: a tile of 6 rows took 324 a group for ARM, and takes 208."""
_COMPILE_S = 60


class Unavailable(Exception):
    """Why there is no library here."""


def library(source: Path, check: Callable[[Path], None]) -> Path:
    """The library's file. check: raises for one that gives wrong answers; asked of a fresh one only.

    Raises Unavailable where there can be none, at once where that was found before.
    """
    if not sys.platform.startswith("linux"):
        raise Unavailable("they are compiled on Linux only")
    folder = cache_folder() / "native"
    try:
        file = folder / f"{key(source)}.so"
        if _sound(file):
            return file
        refusal = folder / f"{_hash(key(source), _compiler())}.why"
        if refusal.is_file():
            raise Unavailable(refusal.read_text("utf-8"))
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".scratch-") as scratch:
            try:
                fresh = _compiled(source, Path(scratch))
                check(fresh)
            except (subprocess.CalledProcessError, Unavailable) as error:  # it would fail again
                with suppress(OSError):
                    refusal.write_text(_first_line(error), "utf-8")
                raise
            _keep(fresh, file)
        return file
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise Unavailable(_first_line(error)) from error


def is_ready(source: Path) -> bool:
    """True where `library` has nothing to compile."""
    try:
        return _sound(cache_folder() / "native" / f"{key(source)}.so")
    except (OSError, ValueError, Unavailable):
        return True


def key(source: Path) -> str:
    """Name what a library depends on: the source, the headers beside it and the processor's instructions. The compiler may
    be gone since."""
    headers = [file.read_bytes() for file in sorted(source.parent.glob("*.h"))]
    return _hash(source.read_bytes(), headers, _FLAGS, cpu_flags())


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def openmp() -> str | None:
    """The OpenMP library that torch has loaded, whose functions ours is to find."""
    lines = Path("/proc/self/maps").read_text("utf-8", "replace").splitlines()
    files = {line.split(maxsplit=5)[5] for line in lines if line.count("/")}
    found = sorted(file for file in files if re.search(r"/lib(gomp|iomp5|omp)\b[^/]*\.so", file))
    torchs = [file for file in found if Path(torch.__file__).parent.parent in Path(file).parents]
    return next(iter(torchs or found), None)


def _sound(file: Path) -> bool:
    """Whether it is what was checked: a damaged library kills the process."""
    try:
        return _sum(file.read_bytes()) == file.with_suffix(".sum").read_text("ascii")
    except (OSError, ValueError):
        return False


def _keep(fresh: Path, file: Path) -> None:
    """Atomically, the sum last: two processes may do it at once."""
    whole = fresh.read_bytes()
    note = fresh.with_suffix(".sum")
    note.write_text(_sum(whole), "ascii")
    fresh.replace(file)
    note.replace(file.with_suffix(".sum"))


def _sum(whole: bytes) -> str:
    return hashlib.sha256(whole).hexdigest()


def _compiled(source: Path, folder: Path) -> Path:
    made, compiled = folder / "made.so", folder / "made.o"
    tune = "-march=native" if os.uname().machine in ("x86_64", "i686") else "-mcpu=native"
    _run([*_compiler(), *_FLAGS, tune, "-c", str(source), "-o", str(compiled)])
    _run([*_compiler(), "-shared", str(compiled), "-lm", "-o", str(made)])
    return made


def _run(command: Sequence[str]) -> None:
    subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_COMPILE_S,
        stdin=subprocess.DEVNULL,
    )


@cache
def _compiler() -> tuple[str, ...]:
    """The command, `$CC` first. Raises Unavailable where there is none."""
    wanted = os.environ.get("CC", "")
    try:
        named = shlex.split(wanted)
    except ValueError as error:
        raise Unavailable(f"$CC is {wanted!r}, which is no command: {error}") from error
    for command in [named] if named else [["gcc"], ["cc"]]:
        if (path := shutil.which(command[0])) is not None:
            return (path, *command[1:])
    raise Unavailable(f"$CC is {wanted!r}, and there is no such compiler" if named else "there is no C compiler (gcc)")


def _first_line(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines()
        return f"the compiler failed: {lines[0] if lines else f'exit code {error.returncode}'}"
    return str(error).partition("\n")[0]
