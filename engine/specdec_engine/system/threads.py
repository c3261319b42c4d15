"""torch's threads on a CPU: no more than get to run at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import cache
from time import perf_counter, process_time
from types import TracebackType
from typing import Literal, Self

import torch

from specdec_engine.errors import UsageError
from specdec_engine.system.machine import usable_cores

Threads = int | Literal["auto", "follow"] | None
"""auto: for the cores that this process may use, fewer where other programs keep them busy; follow: so at first, and then as
other programs come and go (`FollowedThreads`); None leaves them as they are."""


def set_threads(threads: Threads, device: torch.device) -> None:
    """For a target on `device`. Raises UsageError for more than any machine has: OpenMP's stacks would not fit."""
    if threads in ("auto", "follow"):
        cores = usable_cores()
        threads = free_threads(cores) if device.type == "cpu" else cores
    if isinstance(threads, int) and threads > (most := 4 * max(64, usable_cores())):
        raise UsageError(f"--threads {threads} is more than {most}", "more threads than cores only wait for each other")
    if isinstance(threads, int):
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


class FollowedThreads:
    """Torch's threads for passes that have the same bits on any number of them: fewer while other programs keep cores busy,
    and more again afterwards. A context manager, which each pass runs in.

    Threads that wait for each other spin, so a pass takes all the time of its cores: 0.99 of it where nothing else runs, 0.5
    to 0.67 on two cores beside one or two other programs.
    """

    def __init__(
        self,
        most: int | None = None,
        *,
        fit: Callable[[int], bool] | None = None,
        clock: Callable[[], float] = perf_counter,
        used: Callable[[], float] = process_time,
    ) -> None:
        self._fit, self._clock, self._used = fit or keep_step, clock, used
        self._most = most or _most_threads()
        self._seen = {torch.get_num_threads()}
        self._began = self._had = self._passes_s = self._used_s = 0.0
        self._next_look, self._pause = clock(), _FIRST_PAUSE_S

    @property
    def told(self) -> str:
        """A few words on their number, if it changed."""
        return f"at times {min(self._seen)} of {self._most} threads" if len(self._seen) > 1 else ""

    def __enter__(self) -> Self:
        self._began, self._had = self._clock(), self._used()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        now = self._clock()
        self._passes_s += now - self._began
        self._used_s += self._used() - self._had
        if self._passes_s < _WINDOW_S:
            return
        threads = torch.get_num_threads()
        busy = threads > 1 and threads - self._used_s / self._passes_s > _LOST_CORES
        self._passes_s = self._used_s = 0.0
        if now >= self._next_look and (busy or threads < self._most):
            self._look(threads, busy)

    def _look(self, threads: int, busy: bool) -> None:
        """Take half of them, or twice as many, if that is what there is room for; and look less often where it was not."""
        if busy:
            changed = not self._fit(threads)
            threads = threads // 2 if changed else threads
        else:
            changed = self._fit(more := min(2 * threads, self._most))
            threads = more if changed else threads
        torch.set_num_threads(threads)
        self._seen.add(threads)
        self._pause = _FIRST_PAUSE_S if changed else min(2 * self._pause, _LAST_PAUSE_S)
        self._next_look = self._clock() + self._pause


def _most_threads() -> int:
    """Threads for all cores, where some were given up at the start; else those of now, which were measured to be best."""
    return usable_cores() if initial_threads() < usable_cores() else torch.get_num_threads()


_LOST_CORES = 0.3
"""Cores whose time passes did not get, see `FollowedThreads`: 0.02 where nothing else runs, 0.7 beside one program."""
_FIRST_PAUSE_S, _LAST_PAUSE_S = 1.0, 16.0
"""Between two looks, which take a tenth of a second each."""
