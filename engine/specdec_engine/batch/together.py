"""Several prompts at once: one pass of the target reads a row of each text, which reads its weights once for all of them.

Each text is a run of its own (`loop.Run`): it drafts, accepts its own prefix, rolls back its own length and draws its own
numbers, so what it says does not depend on its neighbours, but for rounding. A text that ends makes room for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import TypeVar

from specdec_engine.batch.best_k import BestK
from specdec_engine.decoding.control import Controls
from specdec_engine.decoding.loop import InFlightCycle, Proposed, Run, forget
from specdec_engine.drafters.base import Drafter
from specdec_engine.errors import OutOfMemory, SpecdecError
from specdec_engine.record.events import Event, Failed, Started
from specdec_engine.runtime.target import ModelTarget, score_together
from specdec_engine.system.timing import Mark

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Lane:
    """Room for one text at a time: a cache of the target, a drafter, and what turns between cycles."""

    target: ModelTarget
    drafter: Drafter
    controls: Controls


Begin = Callable[[Lane], tuple[Run, Started]]
"""Makes the run of a prompt in a lane. Raises SpecdecError for a prompt that cannot be."""


@dataclass(slots=True)
class _Running:
    """A text that is being written."""

    number: int
    lane: Lane
    run: Run
    prefill: tuple[Mark, Mark]


def decode_together(lanes: Sequence[Lane], begins: Iterable[Begin], k: int | BestK) -> Iterator[tuple[int, Event]]:
    """The events of each run, with its number in `begins`: Started, cycles, Finished; or Failed, where it is the only one
    that fails. k: fixed, or one that learns what pays with so many texts at once. Raises OutOfMemory."""
    try:
        yield from _decode(lanes, begins, k)
    except GeneratorExit:
        raise
    except BaseException:  # an interrupt in the middle of a pass
        for lane in lanes:
            forget(lane.target, lane.drafter)
        raise


def _decode(lanes: Sequence[Lane], begins: Iterable[Begin], k: int | BestK) -> Iterator[tuple[int, Event]]:
    waiting, free, running = enumerate(begins), list(lanes), list[_Running]()
    while True:
        while free and (job := next(waiting, None)) is not None:
            number, begin = job
            lane = free.pop()
            forget(lane.target, lane.drafter)  # or what it says would depend, by rounding, on what ran here before
            try:
                run, started = begin(lane)
                yield number, started
                running.append(_Running(number, lane, run, run.begin()))
            except SpecdecError as error:
                yield number, _failed(error, lane)
                free.append(lane)
        if not running:
            return
        one_pass = _Pass(running)
        one_pass.run(k)
        for over in one_pass.over:
            running.remove(over)
            free.append(over.lane)
        yield from one_pass.events


class _Pass:
    """One pass over all texts: what it tells, and which of them are over by it."""

    def __init__(self, running: Sequence[_Running]) -> None:
        self._running = running
        self.events = list[tuple[int, Event]]()
        self.over = list[_Running]()

    def run(self, k: int | BestK) -> None:
        """k: as `decode_together` takes it."""
        texts, began = len(self._running), perf_counter()
        chosen = k if isinstance(k, int) else k.choose(texts)
        proposed = [
            (one, made) for one in self._running if (made := self._guarded(one, partial(_propose, one, chosen)))
        ]
        logits = score_together([(one.lane.target, one.run.context, made.draft) for one, made in proposed])
        verified = [
            (one, found)
            for (one, made), rows in zip(proposed, logits, strict=True)
            if (found := self._guarded(one, partial(one.run.verify, made, rows)))
        ]
        emitted = sum(self._finish(one, in_flight) for one, in_flight in verified)
        if not isinstance(k, int):
            k.saw(texts, chosen, emitted, perf_counter() - began)

    def _finish(self, one: _Running, in_flight: InFlightCycle) -> int:
        """Tokens that it emitted."""
        if (done := self._guarded(one, partial(one.run.finish, in_flight))) is None:
            return 0
        cycle, reason = done
        self.events += [(one.number, change) for change in in_flight.proposed.changed]
        self.events.append((one.number, cycle))
        if reason is not None:
            self.events.append((one.number, one.run.finished(reason, one.prefill)))
            self.over.append(one)
        return len(cycle.emitted)

    def _guarded(self, one: _Running, work: Callable[[], T]) -> T | None:
        """Do it; give None where it fails, and then this text is over, and no other."""
        try:
            return work()
        except SpecdecError as error:
            self.events.append((one.number, _failed(error, one.lane)))
            self.over.append(one)
            return None


def _propose(one: _Running, k: int) -> Proposed:
    if one.lane.controls.settings.k != k:
        one.lane.controls.change(k=k, reason="what pays with so many texts at once")
    return one.run.propose()


def _failed(error: SpecdecError, lane: Lane) -> Failed:
    """Make it the failure of one text alone. Raises OutOfMemory again: the others would fail as well."""
    if isinstance(error, OutOfMemory):
        raise error
    forget(lane.target, lane.drafter)
    return Failed(type(error).__name__, error.message, error.hint)
