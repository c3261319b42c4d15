"""torch's threads on a CPU: no more than get to run at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import cache
from time import perf_counter
from typing import Literal

import torch

from specdec_engine.errors import UsageError
from specdec_engine.system.machine import usable_cores

Threads = int | Literal["auto"] | None
"""auto: for the cores that this process may use, fewer where other programs keep them busy; None leaves them as they are."""


def set_threads(threads: Threads, device: torch.device) -> None:
    """For a target on `device`. Raises UsageError for more than any machine has: OpenMP's stacks would not fit."""
    if threads == "auto":
        cores = usable_cores()
        threads = free_threads(cores) if device.type == "cpu" else cores
    if threads is not None and threads > (most := 4 * max(64, usable_cores())):
        raise UsageError(f"--threads {threads} is more than {most}", "more threads than cores only wait for each other")
    if threads is not None:
        torch.set_num_threads(threads)
    _initial.append(torch.get_num_threads())


def initial_threads() -> int:
    """Torch's threads as `set_threads` left them last, whatever a model took since."""
    return _initial[-1] if _initial else torch.get_num_threads()


_initial: deque[int] = deque(maxlen=1)


def use_fewer_threads(most: int | None) -> None:
    """No more than that, where a number is known."""
    if most is not None and most < torch.get_num_threads():
        torch.set_num_threads(most)


@cache
def free_threads(cores: int, fit: Callable[[int], bool] | None = None) -> int:
    """Of the threads for so many cores, those that other programs leave room for: half of them, and half again, until they
    keep step.

    Threads that are not let run at once wait for each other in every operation: a pass of 10 ms, or 17 on one thread, took
    1,500 on two threads of two cores beside one other program. A pass has the same bits on one thread and on two.
    Asked once a process, so that what is compared in it runs on the same number.
    """
    fit = fit or keep_step
    while cores > 1 and not fit(cores):
        cores //= 2
    return cores


def keep_step(threads: int, clock: Callable[[], float] = perf_counter) -> bool:
    """Whether so many of torch's threads get to run at once, by many small operations. Sets torch's number of threads."""
    torch.set_num_threads(threads)
    numbers = torch.zeros(threads * _GRAIN, dtype=torch.int8)
    numbers.add_(1)  # starts them
    began = now = clock()
    waited = 0
    while waited < _WAITED and now - began < _WINDOW_S:
        numbers.add_(1)
        before, now = now, clock()
        waited += now - before > _LONG_S
    return waited < _WAITED


_GRAIN = 2**15
"""Elements that torch gives a thread at least."""
_WINDOW_S, _LONG_S, _WAITED = 0.1, 0.001, 5
"""Of operations of 0.01 ms on two cores, how many take a millisecond in a tenth of a second: two at most where nothing else
runs (60 times), 8 to 16 beside one or two other programs. A program that has slept may run undisturbed for 25 ms."""
