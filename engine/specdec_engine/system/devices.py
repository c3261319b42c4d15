"""Which device, and which dtype on it."""

from __future__ import annotations

import torch

from specdec_engine.errors import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """cuda, where it computes, then mps, then cpu for `auto`; otherwise the named one. Raises UsageError if this machine has
    none such, or it does not compute."""
    if name == "auto":
        if torch.cuda.is_available() and why_unusable(torch.device("cuda")) is None:
            return torch.device("cuda")
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        _compute(device)
    except (RuntimeError, AssertionError) as error:
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        here += ["mps"] if torch.backends.mps.is_available() else []
        raise UsageError(f"device {name!r} cannot be used here", f"there is {', '.join(here)}; or auto") from error
    return device


def why_unusable(device: torch.device) -> str | None:
    """Why nothing can be computed there, in the words of torch; None where it can. A driver also lists cards that this torch
    has no kernels for."""
    try:
        _compute(device)
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().partition("\n")[0]
    return None


def idle_gpu(taken: torch.device) -> str | None:
    """A sentence about a GPU that `auto` had to leave for the device taken; None where it left none."""
    if taken.type == "cuda" or not torch.cuda.is_available():
        return None
    why = why_unusable(torch.device("cuda"))
    return why and f"the GPU is left alone, as this torch cannot compute on it: {why}"


def _compute(device: torch.device) -> None:
    """One kernel, to its end: a card without kernels still allocates."""
    torch.zeros(1, device=device).add_(1).item()


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The named dtype; for `auto` bfloat16 where a GPU computes in it, else float16. On a CPU `auto` is
    measured (`arithmetic.py`).

    Raises UsageError for a name that is none."""
    if name != "auto":
        if name not in DTYPES:
            raise UsageError(f"dtype {name!r} is unknown", f"choose auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float16
