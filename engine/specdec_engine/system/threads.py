"""torch's threads on a CPU: no more than get to run at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from time import perf_counter, process_time
from types import TracebackType
from typing import Literal, Self

import torch

from specdec_engine.errors import UsageError
from specdec_engine.system.machine import usable_cores

Threads = int | Literal["auto", "follow"] | None
"""auto: for the cores that this process may use, fewer where other programs keep them busy; follow: as many at first, and
then as other programs come and go (`FollowedThreads`); None leaves them as they are."""


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


@contextmanager
def as_at_first() -> Iterator[None]:
    """The threads that a process began with, for torch's own products: their sums fall otherwise on another number."""
    now = torch.get_num_threads()
    torch.set_num_threads(initial_threads())
    try:
        yield
    finally:
        torch.set_num_threads(now)


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
    """Torch's threads, fewer while other programs keep cores busy, and more again afterwards: for passes that have the same
    bits on any number of them. A context manager that each pass is made in; `look` is called between passes, and never while
    one is timed.

    Threads that wait for each other spin, so a pass takes all the time of its cores: 0.99 of it where nothing else runs, 0.5
    to 0.67 on two cores beside one or two other programs.
    """

    def __init__(
        self,
        most: int,
        *,
        fit: Callable[[int], bool] | None = None,
        clock: Callable[[], float] = perf_counter,
        used: Callable[[], float] = process_time,
    ) -> None:
        """most: threads where nothing else runs."""
        self._fit, self._clock, self._used = fit or keep_step, clock, used
        self._most = most
        self._began = self._had = self._passes_s = self._used_s = 0.0
        self._next_look, self._pause = clock(), _FIRST_PAUSE_S
        self.begin()

    def begin(self) -> None:
        """A run begins, of which `told` is to tell."""
        self._seen = {torch.get_num_threads()}

    @property
    def told(self) -> str:
        """A few words on their number, if it changed in this run."""
        return f"at times {min(self._seen)} of {self._most} threads" if len(self._seen) > 1 else ""

    def __enter__(self) -> Self:
        self._began, self._had = self._clock(), self._used()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._passes_s += self._clock() - self._began
        self._used_s += self._used() - self._had

    def look(self) -> bool:
        """Take half of them, or twice as many, if that is what there is room for, and True; mostly there is nothing to be
        done, which takes no time. Where it was so again, look less often: each time takes a tenth of a second."""
        if self._passes_s < _WINDOW_S:
            return False
        threads = torch.get_num_threads()
        lost = threads - self._used_s / self._passes_s
        self._passes_s = self._used_s = 0.0
        busy = threads > 1 and lost > max(_LOST_CORES, _LOST_SHARE * threads)
        if self._clock() < self._next_look or not (busy or threads < self._most):
            return False
        found = threads
        try:
            found = self._room(threads, busy)
        finally:
            torch.set_num_threads(found)
        self._seen.add(found)
        self._pause = _FIRST_PAUSE_S if found != threads else min(2 * self._pause, _LAST_PAUSE_S)
        self._next_look = self._clock() + self._pause
        return found != threads

    def _room(self, threads: int, busy: bool) -> int:
        """How many there is room for. Passes get less than their cores for other reasons, too."""
        if busy and not self._fit(threads):
            return threads // 2
        more = min(2 * threads, self._most)
        return more if more > threads and self._fit(more) else threads


_LOST_CORES, _LOST_SHARE = 0.3, 0.05
"""Cores whose time passes did not get, see `FollowedThreads`: 0.02 on two where nothing else runs, 0.7 beside one program;
and on many cores a share of them, of which a hundredth is always lost."""
_FIRST_PAUSE_S, _LAST_PAUSE_S = 1.0, 16.0
"""Between two looks."""
