"""Clocks that measure what the device did, without waiting for it.

`mark` notes a moment and `seconds` is asked later, when the cycle's one device-to-host copy has already synchronised.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any, Protocol

import torch


class Timer(Protocol):
    """**Protocol:** marks moments cheaply; tells the seconds between two of them afterwards."""

    def mark(self) -> Any: ...

    def seconds(self, start: Any, end: Any) -> float: ...


class HostTimer:
    """For devices that compute while we wait (CPU), and for tests, which pass their own clock."""

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock

    def mark(self) -> float:
        return self._clock()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class CudaTimer:
    """Events on the current stream: when the GPU passed the mark, not when Python did."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()  # all but returns at once: nothing but the mark itself was launched after the verdict's copy
        return float(start.elapsed_time(end)) / 1000.0


def timer_for(device: torch.device) -> Timer:
    """The timer that is correct on this device."""
    return CudaTimer() if device.type == "cuda" else HostTimer()
