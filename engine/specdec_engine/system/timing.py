"""Stopwatches that measure what the device did, without waiting for it.

`mark` notes a moment and `seconds` is asked later, when the cycle's one device-to-host copy has already synchronised. What
is done inside `pause` counts for nothing: a pass that is recorded takes ten times as long as one that is replayed, and
says nothing about the next.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from time import perf_counter
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment in a run."""

    at: Any
    """As the clock tells it."""
    pauses: int
    """How many there had been."""


class Timer(ABC):
    """Marks moments cheaply; tells the seconds between two of them afterwards."""

    def __init__(self) -> None:
        self._pauses = list[tuple[Any, Any]]()

    def mark(self) -> Mark:
        return Mark(self._now(), len(self._pauses))

    def seconds(self, start: Mark, end: Mark) -> float:
        """Between them, without the pauses."""
        return max(0.0, self._between(start.at, end.at) - self.paused(start, end))  # a GPU's clock has 24 bits

    def paused(self, start: Mark, end: Mark) -> float:
        """Seconds of the pauses that began and ended between them."""
        return sum(self._between(*pause) for pause in self._pauses[start.pauses : end.pauses])

    @contextmanager
    def pause(self) -> Iterator[None]:
        began = self._now()
        try:
            yield
        finally:
            self._pauses.append((began, self._now()))

    @abstractmethod
    def _now(self) -> Any:
        """A moment, as `_between` takes it."""

    @abstractmethod
    def _between(self, start: Any, end: Any) -> float:
        """Seconds."""


class HostTimer(Timer):
    """For devices that compute while we wait (CPU), and for tests, which pass their own clock."""

    def __init__(self, clock: Callable[[], float] = perf_counter, wait: Callable[[], None] | None = None) -> None:
        """wait: for what the device was told to do, where that is done later (Apple's MPS)."""
        super().__init__()
        self._clock, self._wait = clock, wait

    def _now(self) -> float:
        if self._wait is not None:
            self._wait()
        return self._clock()

    def _between(self, start: float, end: float) -> float:
        return end - start


class CudaTimer(Timer):
    """Events on the device's current stream: when the GPU passed the mark, not when Python did.

    So a pause, too, is what the GPU sees of it: from where it had done all that was launched before, to where it goes on.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def _now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()  # all but returns at once: nothing but the mark itself was launched after the verdict's copy
        return float(start.elapsed_time(end)) / 1000.0


def timer_for(device: torch.device) -> Timer:
    """The device's stopwatch. There is one, so that whoever makes recordings on it can stop what times its cycles."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _stopwatch(device)


@cache
def _stopwatch(device: torch.device) -> Timer:
    if device.type == "cuda":
        return CudaTimer(device)
    return HostTimer(wait=torch.mps.synchronize if device.type == "mps" else None)
