"""Memory that is used and free, now."""

from __future__ import annotations

import sys

import psutil
import torch


def peak_bytes(device: torch.device) -> int | None:
    """The most so far: allocated on a GPU, elsewhere what this process has had in memory, where that is known."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        from resource import RUSAGE_SELF, getrusage  # not on Windows
    except ImportError:
        return None
    return int(getrusage(RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def free_bytes(device: torch.device) -> int | None:
    """What is free on the device now; None where it cannot be asked."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type in ("cpu", "mps"):  # MPS shares the machine's memory
        return int(psutil.virtual_memory().available)
    return None


def ran_out(error: BaseException) -> bool:
    """Whether memory ran out, the machine's or a device's. Only torch's own allocators say so by type; CUDA itself and its
    libraries do in words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
