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
from specdec_engine.batch.prompts import read_prompts
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
    batch = _Batch(lanes, begins)
    while True:
        yield from batch.admit()
        if not batch.running:
            return
        one_pass = _Pass(batch.running)
        one_pass.run(k)
        batch.end(one_pass.over)
        yield from one_pass.events


class _Batch:
    """Which texts are being written, which wait, and which lanes are free."""

    def __init__(self, lanes: Sequence[Lane], begins: Iterable[Begin]) -> None:
        self._waiting, self._free = enumerate(begins), list(lanes)
        self._targets = [lane.target for lane in lanes]
        self.running = list[_Running]()

    def admit(self) -> Iterator[tuple[int, Event]]:
        """Begin as many as there are lanes for, and read their prompts."""
        while self._free:
            begun = list[tuple[int, Lane, Run]]()
            yield from self._begin(begun)
            if not begun:
                return
            yield from self._read(begun)

    def end(self, over: Sequence[_Running]) -> None:
        """Make room in their lanes."""
        for one in over:
            self.running.remove(one)
            self._free.append(one.lane)

    def _begin(self, begun: list[tuple[int, Lane, Run]]) -> Iterator[tuple[int, Event]]:
        while self._free and (job := next(self._waiting, None)) is not None:
            number, begin = job
            lane = self._free[-1]
            try:
                run, started = begin(lane)
            except SpecdecError as error:
                yield number, _failed(error, lane)
                continue
            if not lane.target.holds(run.context[:-1]):  # else it may keep it, and what its drafter has of it
                forget(lane.target, lane.drafter)  # or what it says would depend, by rounding, on what ran here before
            begun.append((number, self._free.pop(), run))
            yield number, started

    def _read(self, begun: Sequence[tuple[int, Lane, Run]]) -> Iterator[tuple[int, Event]]:
        marks = [run.mark() for _, _, run in begun]
        read_prompts([(lane.target, run.context[:-1]) for _, lane, run in begun], self._targets)
        for (number, lane, run), began in zip(begun, marks, strict=True):
            try:
                self.running.append(_Running(number, lane, run, (began, run.begin_draft())))
            except SpecdecError as error:
                yield number, _failed(error, lane)
                self._free.append(lane)


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
