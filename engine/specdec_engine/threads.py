"""torch's threads on a CPU: no more than get to run at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor

from specdec_engine.machine import usable_cores

Threads = int | Literal["auto"] | None
"""auto: for the cores that this process may use, fewer where other programs keep them busy; None leaves them as they are."""


def set_threads(threads: Threads, device: torch.device) -> list[str]:
    """For a target on `device`. What there is to say about it."""
    if threads is None:
        return []
    if threads != "auto":
        torch.set_num_threads(threads)
        return []
    cores = usable_cores()
    free = free_threads(cores) if device.type == "cpu" else cores
    torch.set_num_threads(free)
    if free == cores:
        return []
    return [f"other programs keep this machine busy, so it is {free} of {cores} threads; --threads {cores} insists"]


@cache
def free_threads(cores: int, fit: Callable[[int], bool] | None = None) -> int:
    """Of the threads for so many cores, those that other programs leave room for: half of them, and half again, until they
    keep step.

    Threads that are not let run at once wait for each other in every operation: a pass of 10 ms, or 17 on one thread, took
    1,500 on two threads beside another program on both of two cores. A pass has the same bits on one thread and on two.
    Asked once a process, so that what is compared in it runs on the same number.
    """
    fit = fit or keep_step
    while cores > 1 and not fit(cores):
        cores //= 2
    return cores


def keep_step(threads: int) -> bool:
    """Whether so many of torch's threads get to run at once: a hundred small operations, 1 ms where they do. Sets torch's
    number of threads."""
    torch.set_num_threads(threads)
    numbers = torch.zeros(threads * _GRAIN, dtype=torch.int8)
    numbers.add_(1)  # starts them
    return any(_in_time(numbers) for _ in range(3))  # one stall may be the system's own


def _in_time(numbers: Tensor) -> bool:
    began = perf_counter()
    for _ in range(_OPERATIONS):
        numbers.add_(1)
        if perf_counter() - began > _PATIENCE:
            return False
    return True


_GRAIN = 2**15
"""Elements that torch gives a thread at least."""
_OPERATIONS, _PATIENCE = 100, 0.05
"""Beside another program on both of two cores an operation took 7 ms, and without it 0.01; a quiet machine's worst hundred
took 14 ms."""
