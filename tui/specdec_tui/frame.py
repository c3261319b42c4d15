"""What is known of a run, folded from its events: immutable, pure, without Textual. Screens draw a `View` of a `Frame`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from specdec_engine.record.events import Counters, Cycle, Event, Failed, Finished, SettingChanged, Started, TokenId
from specdec_engine.record.stats import Summary
from specdec_tui.pieces import plain


@dataclass(frozen=True, slots=True)
class Frame:
    """A run so far."""

    run: int = 0
    """Counts what began; 0 while nothing has."""
    prompt: tuple[TokenId, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    """As in force in the first cycle."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    observer: str = "specdec"
    cycles: tuple[Cycle, ...] = ()
    summaries: tuple[Summary, ...] = (Summary(),)
    """Before the first cycle, and after each."""
    changes: tuple[SettingChanged, ...] = ()
    counters: Counters | None = None
    """The last that came."""
    finished: Finished | None = None
    failed: Failed | None = None

    def plus(self, events: Iterable[Event]) -> Frame:
        """With these events. A `Started` begins anew."""
        frame, cycles, summaries = self, list[Cycle](), list[Summary]()

        def gathered() -> Frame:
            return replace(frame, cycles=(*frame.cycles, *cycles), summaries=(*frame.summaries, *summaries))

        for event in events:
            match event:
                case Started():
                    start = Summary().plus(event)
                    frame = Frame(
                        frame.run + 1,
                        event.prompt,
                        event.settings,
                        event.environment,
                        event.seed,
                        event.observer,
                        summaries=(start,),
                    )
                    cycles, summaries = [], []
                case Cycle():
                    cycles.append(event)
                    summaries.append((summaries or frame.summaries)[-1].plus(event))
                case SettingChanged():
                    frame = replace(frame, changes=(*frame.changes, event))
                case Counters():
                    frame = replace(frame, counters=event)
                case Finished():
                    frame = replace(frame, finished=event)
                case Failed():
                    frame = replace(frame, failed=event)
        return gathered() if cycles else frame

    @property
    def over(self) -> bool:
        return self.finished is not None or self.failed is not None

    def upto(self, cycles: int) -> Frame:
        """As it was after so many cycles."""
        if cycles >= len(self.cycles):
            return self
        changes = tuple(change for change in self.changes if change.cycle < max(cycles, 1))
        return replace(
            self,
            cycles=self.cycles[:cycles],
            summaries=self.summaries[: cycles + 1],
            changes=changes,
            counters=None,
            finished=None,
            failed=None,
        )

    def events(self) -> Iterator[Event]:
        """The events it was folded from."""
        yield Started(self.prompt, self.settings, self.seed, self.environment, self.observer)
        changes = list(self.changes)
        for cycle in self.cycles:
            while changes and changes[0].cycle <= cycle.index:
                yield changes.pop(0)
            yield cycle
        yield from changes
        yield from (event for event in (self.counters, self.finished, self.failed) if event is not None)

    def setting(self, name: str, default: Any = None) -> Any:
        """As last set."""
        return next((c.new for c in reversed(self.changes) if c.name == name), self.settings.get(name, default))

    @property
    def rule(self) -> str:
        """The verification rule's name."""
        return plain(self.settings.get("rule", "token"))

    def summary(self) -> Summary:
        found = self.summaries[-1]
        for event in (self.counters, self.finished):
            found = found if event is None else found.plus(event)
        return found

    @property
    def plain_s(self) -> float | None:
        """Seconds of a plain cycle: measured before the run, else by the run's own plain cycles."""
        rate: float | None = self.environment.get("plain_tokens_per_second")
        s = self.summaries[-1]
        if rate:
            return 1 / rate
        return s.plain_s / s.plain_cycles if s.plain_s is not None and s.plain_cycles else None


@dataclass(frozen=True, slots=True)
class Step:
    """How much of a cycle is shown: its draft appears token by token, is verified in one pass, tested token by token, and
    ends with the target's own token."""

    drafted: int
    verified: bool
    tested: int
    final: bool


def steps(cycle: Cycle) -> int:
    """Steps from nothing shown to all of it."""
    return len(cycle.drafted) + 1 + len(cycle.tests) + 1


def step_of(cycle: Cycle, n: int) -> Step:
    """What is shown after n steps; all of it after `steps(cycle)`."""
    k = len(cycle.drafted)
    return Step(
        drafted=min(n, k), verified=n > k, tested=min(max(n - k - 1, 0), len(cycle.tests)), final=n >= steps(cycle)
    )


@dataclass(frozen=True, slots=True)
class View:
    """What a screen shows: a frame as it was at some cycle, and what is pointed at."""

    frame: Frame = Frame()
    """All that is known."""
    shown: int = 0
    """Cycles shown."""
    step: int | None = None
    """Of the last cycle shown; None for all of it."""
    position: int | None = None
    """Drafted token inspected, in the last cycle shown; None for the one that decided the cycle."""
    warping: bool = False
    """Whether the inspector tells what temperature and filters did, instead of the decision."""
    unfolded: bool = False
    """Whether the prompt stands before the text."""

    @property
    def past(self) -> Frame:
        """What figures are made of: a cycle that is shown in part does not count yet."""
        return self.frame.upto(self.shown - (self.step is not None))

    @property
    def cycle(self) -> Cycle | None:
        """The last one shown."""
        return self.frame.cycles[self.shown - 1] if self.shown else None

    @property
    def partial(self) -> Step | None:
        """None where the cycle is shown whole."""
        return None if self.step is None or self.cycle is None else step_of(self.cycle, self.step)

    @property
    def at_end(self) -> bool:
        return self.shown == len(self.frame.cycles) and self.step is None

    @property
    def inspected(self) -> int | None:
        """The position looked at: the chosen one, else the first rejected, else the last drafted; None without a draft."""
        cycle = self.cycle
        if cycle is None or not cycle.drafted:
            return None
        if self.position is not None:
            return min(self.position, len(cycle.drafted) - 1)
        if (partial := self.partial) is not None and not partial.final:
            if partial.verified:
                return cycle.tests[partial.tested - 1] if partial.tested else 0
            return max(0, partial.drafted - 1)
        return len(cycle.drafted) - 1 if cycle.rejected is None else cycle.rejected

    @property
    def last_draft(self) -> View | None:
        """After the last cycle before this one that drafted; None where none did."""
        drafted = (i for i in range(self.shown - 1, 0, -1) if self._drafts(i - 1))
        return None if (shown := next(drafted, None)) is None else replace(self, shown=shown, step=None, position=None)

    # -- moving ------------------------------------------------------------------------------------------------------

    def known(self, frame: Frame) -> View:
        """With more known; a view at the end stays at the end only if it is moved there."""
        return replace(self, frame=frame, shown=min(self.shown, len(frame.cycles)))

    def to(self, shown: int) -> View:
        """After so many cycles, as far as there are any."""
        return replace(self, shown=max(0, min(shown, len(self.frame.cycles))), step=None, position=None)

    def end(self) -> View:
        return self.to(len(self.frame.cycles))

    def forward(self) -> View:
        """One step within the cycle, or into the next."""
        if self.step is not None and self.cycle is not None:
            return replace(self, step=self.step + 1 if self.step + 1 < steps(self.cycle) else None, position=None)
        return self if self.at_end else replace(self.to(self.shown + 1), step=1 if self._drafts(self.shown) else None)

    def back(self) -> View:
        """One step within the cycle, or into the one before."""
        if self.cycle is None:
            return self
        now = steps(self.cycle) if self.step is None else self.step
        within = now > 1 and self.cycle.drafted
        return replace(self, step=now - 1, position=None) if within else self.to(self.shown - 1)

    def find(self, wanted: Literal["rejection", "acceptance"]) -> View:
        """At the next cycle with a rejection, or with all drafted tokens accepted; unmoved if there is none."""
        for i in range(self.shown, len(self.frame.cycles)):
            cycle = self.frame.cycles[i]
            rejected = cycle.rejected is not None
            if cycle.drafted and rejected == (wanted == "rejection"):
                return self.to(i + 1)
        return self

    def _drafts(self, index: int) -> bool:
        return bool(self.frame.cycles[index].drafted)
