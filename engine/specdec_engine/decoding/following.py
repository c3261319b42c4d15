"""Runs whose threads follow the machine: between two passes, so that no phase has what a look takes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from specdec_engine.record.events import Cycle, Event, SettingChanged
from specdec_engine.system.threads import FollowedThreads


def followed(events: Iterator[Event], threads: FollowedThreads) -> Iterator[Event]:
    """The same events, and before a cycle on another number of threads a SettingChanged that says so."""
    threads.begin()
    changed: SettingChanged | None = None
    for event in events:
        if changed is not None and isinstance(event, Cycle | SettingChanged):
            yield changed
            changed = None
        yield event
        if isinstance(event, Cycle):
            changed = _looked(threads, event.index + 1)


def followed_together(events: Iterator[tuple[int, Event]], threads: FollowedThreads) -> Iterator[tuple[int, Event]]:
    """The same of several runs, which share their passes; none of them says it."""
    threads.begin()
    for number, event in events:
        yield number, event
        if isinstance(event, Cycle):
            threads.look()


def _looked(threads: FollowedThreads, cycle: int) -> SettingChanged | None:
    before = torch.get_num_threads()
    if not threads.look():
        return None
    now = torch.get_num_threads()
    why = "other programs keep the cores busy" if now < before else "the cores are free again"
    return SettingChanged(cycle, "threads", before, now, why)
