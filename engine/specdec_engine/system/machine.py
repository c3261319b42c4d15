"""What this machine has: cores that can be used, its processor's name, its GPU's driver."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

import psutil


def usable_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Physical cores, but no more than this process may run on, nor than a container's quota pays for.

    torch counts the machine's cores only: in a container with two of 64 its threads would mostly wait for each other.
    """
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    try:
        limit, period = quota.read_text("ascii").split()
        cores = min(cores, math.ceil(int(limit) / int(period)))
    except (OSError, ValueError):  # no cgroup, or its quota is "max"
        pass
    return max(cores, 1)


def cpu_name() -> str | None:
    """Its model, where the system tells."""
    return _cpu_entry("model name") or platform.processor() or None


def cpu_flags() -> str:
    """Its instruction sets as Linux lists them, in order; empty where it does not."""
    return " ".join(sorted((_cpu_entry("flags") or _cpu_entry("Features") or "").split()))


def has_amx() -> bool:
    """Say whether torch multiplies by AMX's tiles here."""
    import torch  # takes a second, which who asks for cores need not wait for

    known = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return known is not None and bool(known())


def instructions() -> str:
    """The widest instruction sets that torch takes here, such as `AVX512, AMX`."""
    import torch

    return torch.backends.cpu.get_cpu_capability() + (", AMX" if has_amx() else "")


def _cpu_entry(name: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return None
    entries = (line.split(":", 1) for line in lines if ":" in line)
    return next((value.strip() for key, value in entries if key.strip() == name), None)


def gpu_driver() -> str | None:
    """NVIDIA's kernel driver, in its own words; None where there is none, or not on Linux."""
    try:
        return Path("/proc/driver/nvidia/version").read_text("utf-8").splitlines()[0]
    except (OSError, IndexError):
        return None
