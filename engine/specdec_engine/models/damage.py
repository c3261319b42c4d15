"""Errors of other libraries about a checkpoint that they cannot read, in words of the cause."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from specdec_engine.errors import ModelUnavailable, OutOfMemory, SpecdecError, causes, first_line
from specdec_engine.runtime.shape import Unsupported
from specdec_engine.system.memory import ran_out


@contextmanager
def explained(name: str, path: Path) -> Iterator[None]:
    """Turn what goes wrong inside transformers, safetensors and gguf into one of our errors."""
    from safetensors import SafetensorError

    try:
        yield
    except (SpecdecError, Unsupported):
        raise
    except SafetensorError as error:
        raise ModelUnavailable(
            f"the weights of {name} are damaged: {first_line(error)}", f"delete them and download them again: {path}"
        ) from error
    except Exception as error:  # a checkpoint can be broken in as many ways as there are lines in its reader
        if ran_out(error):
            raise OutOfMemory(
                f"out of memory while loading {name}", "use --dtype bfloat16, or a smaller model"
            ) from error
        if "trust_remote_code" in str(error):
            raise ModelUnavailable(
                f"{name} brings its own code, which is not run unless you ask for it",
                "read the code, and pass --trust-remote-code if you trust it",
            ) from error
        if isinstance(error, ImportError):
            raise ModelUnavailable(
                f"{name} cannot be loaded: {first_line(error)}",
                "install that, or choose a checkpoint that does without",
            ) from error
        if any(isinstance(cause, UnicodeDecodeError) for cause in causes(error)):
            raise ModelUnavailable(
                f"{name} is damaged: it holds text that is not UTF-8", f"compare it with what its owner gives: {path}"
            ) from error
        if path.is_file():
            raise ModelUnavailable(
                f"{name} cannot be read as GGUF: {first_line(error)}", "run with --debug for the traceback"
            ) from error
        raise ModelUnavailable(
            f"{name} cannot be loaded: {first_line(error)}",
            "compare its config.json with what the model's owner gives; --debug shows the traceback",
        ) from error
