"""Which device, and which dtype on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from specdec_engine.errors import UsageError
from specdec_engine.runtime.linear import Packing, kernels_available

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
    """bfloat16 for `auto` where the device computes in it, else float16 on a GPU and float32 on a CPU."""
    if name != "auto":
        if name not in DTYPES:
            raise UsageError(f"dtype {name!r} is unknown", f"choose auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_computes_bfloat16() else torch.float32
    return torch.float16


def packed_dtype(quantize: Packing, dtype: str, device: torch.device, keeps: bool) -> torch.dtype | None:
    """bfloat16, the packed kernels' own, if weights are to be packed or (`keeps`) to stay so; None if they are not, or
    cannot.

    Raises UsageError where int8 or int4 is asked for and cannot be done.
    """
    can = device.type == "cpu" and kernels_available() and dtype in ("auto", "bfloat16")
    if quantize in ("int8", "int4") and not can:
        raise UsageError(
            f"weights cannot be packed to {quantize} on {device} in dtype {dtype}",
            "packed weights run on an x86 CPU with AVX-512, in bfloat16; leave out --quantize and --draft-quantize",
        )
    return torch.bfloat16 if can and (keeps or quantize in ("int8", "int4")) else None


def _cpu_computes_bfloat16() -> bool:
    """Without the instructions bfloat16 is emulated, and slower than float32."""
    known: Mapping[str, Any] = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(known.get("avx512_bf16") or known.get("amx_bf16") or known.get("bf16"))
