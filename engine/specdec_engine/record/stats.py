"""Every figure the tool prints, computed here and nowhere else.

Counters are folded from events; rates are derived from counters. What is undefined, or what one of the cycles does not
tell, is None (shown "–"), never 0.

    acceptance rate         accepted / drafted, what vLLM prints; it falls as k grows, since a rejection wastes the rest
    alpha                   accepted / tested; tokens after a rejection were never tested
    expected alpha          mean of Σ min(p, q) over tested positions: the same quantity without the coin flips
    mean emitted per cycle  emitted / cycles, final token included (τ, "mean acceptance length")
    tokens per second       emitted / seconds of the cycles: decoding only, the prompt's prefill is apart
    speedup estimate        tokens per second · seconds of the run's own plain cycles; `bench` measures it
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from specdec_engine.record.events import Counters, Cycle, Event, Finished, Phases, Started


@dataclass(frozen=True, slots=True)
class Position:
    """What became of the tokens at one position of a draft."""

    drafted: int = 0
    tested: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float | None:
        """Accepted of those tested: given that all before were accepted."""
        return _ratio(self.accepted, self.tested)

    @property
    def reach(self) -> float | None:
        """Accepted of those drafted: the chance to get this far."""
        return _ratio(self.accepted, self.drafted)


@dataclass(frozen=True, slots=True)
class Summary:
    """A run so far. `summary = summary.plus(event)` for each event; the figures are properties."""

    prompt_tokens: int = 0
    seed: int | None = None
    cycles: int = 0
    drafted: int = 0
    tested: int = 0
    accepted: int = 0
    emitted: int = 0
    forced: int = 0
    """Tokens that had to come by the grammar, and were proposed as such: emitted, but in no count of drafts."""
    overlap: float = 0.0
    """Sum of Σ min(p, q) over the tested positions where it is known."""
    overlap_known: int = 0
    draft_s: float | None = 0.0
    verify_s: float | None = 0.0
    other_s: float | None = 0.0
    decode_s: float | None = 0.0
    """Seconds in cycles, without prefill and without the consumer's own time."""
    from_prompt: int = 0
    """Cycles that are one token of the pass that read the prompt, at a server: their time is in `prefill_s`, and no rate has
    them."""
    plain_cycles: int = 0
    """Cycles in which nothing was drafted."""
    plain_s: float | None = 0.0
    """Their seconds, without what the drafter took to say nothing."""
    positions: tuple[Position, ...] = ()
    """First drafted tokens, second ones, and so on."""
    prefill_s: float | None = None
    cached_tokens: int | None = None
    """Of the prompt, from before."""
    finish_reason: str | None = None
    observer: str = "specdec"
    inferred: int = 0
    """Cycles that were deduced from outside."""
    untested: bool = False
    """Whether it is not told how much of what was drafted was held against the target."""
    counted: bool = False
    """Whether the totals are an engine's own counters, which came without cycles."""

    def plus(self, event: Event) -> Summary:
        match event:
            case Started():
                return Summary(prompt_tokens=len(event.prompt), seed=event.seed, observer=event.observer)
            case Cycle():
                return self._plus_cycle(event)
            case Counters() if self.counted or not self.cycles:
                return self._plus_counters(event)
            case Counters() if self.inferred:
                return self._corrected(event)
            case Finished():
                return replace(
                    self,
                    finish_reason=event.reason,
                    prefill_s=event.prefill_s,
                    cached_tokens=event.cached_tokens,
                )
            case _:
                return self

    def _plus_forced(self, cycle: Cycle) -> Summary:
        """A pass that verified tokens which had to come: its time and its tokens count, and no draft does."""
        return replace(
            self,
            cycles=self.cycles + 1,
            emitted=self.emitted + len(cycle.emitted),
            forced=self.forced + min(cycle.accepted, len(cycle.emitted)),
            draft_s=_sum(self.draft_s, cycle.draft_s),
            verify_s=_sum(self.verify_s, cycle.verify_s),
            other_s=_sum(self.other_s, cycle.other_s),
            decode_s=_sum(self.decode_s, cycle.seconds),
        )

    def _plus_cycle(self, cycle: Cycle) -> Summary:
        if self.counted:  # cycles say more
            return Summary(self.prompt_tokens, self.seed, observer=self.observer).plus(cycle)
        if cycle.forced:
            return self._plus_forced(cycle)
        # Of a tree it is not told which of several overlaps a level was decided by.
        overlaps = [] if cycle.parents else [o for o in cycle.overlap[: cycle.tested] if o is not None]
        plain_s = cycle.seconds if (phases := cycle.phases) is None else phases.verify_s + phases.other_s
        if cycle.exactness == "inferred":  # it may have drafted, and all been rejected
            plain_s = None
        from_prompt = not cycle.drafted and cycle.cycle_s == 0
        return replace(
            self,
            cycles=self.cycles + 1,
            drafted=self.drafted + len(cycle.drafted),
            tested=self.tested + cycle.tested,
            accepted=self.accepted + cycle.accepted,
            emitted=self.emitted + len(cycle.emitted),
            overlap=self.overlap + sum(overlaps),
            overlap_known=self.overlap_known + len(overlaps),
            draft_s=_sum(self.draft_s, cycle.draft_s),
            verify_s=_sum(self.verify_s, cycle.verify_s),
            other_s=_sum(self.other_s, cycle.other_s),
            decode_s=_sum(self.decode_s, cycle.seconds),
            from_prompt=self.from_prompt + from_prompt,
            plain_cycles=self.plain_cycles + (not cycle.drafted and not from_prompt),
            plain_s=self.plain_s if cycle.drafted or from_prompt else _sum(self.plain_s, plain_s),
            positions=_positions(self.positions, cycle),
            inferred=self.inferred + (cycle.exactness == "inferred"),
        )

    def _corrected(self, totals: Counters) -> Summary:
        """The run's own totals, which its server tells at the end, in place of what was deduced of how much was drafted. Two
        of its steps may have come as one cycle; what was emitted, and when, was seen."""
        return replace(
            self,
            drafted=totals.drafted,
            tested=totals.tested or 0,
            untested=totals.tested is None,
            accepted=totals.accepted,
            positions=tuple(Position(drafted=totals.cycles, accepted=kept) for kept in totals.accepted_at),
        )

    def _plus_counters(self, totals: Counters) -> Summary:
        return replace(
            self,
            cycles=totals.cycles,
            drafted=totals.drafted,
            accepted=totals.accepted,
            emitted=totals.emitted,
            draft_s=None,
            verify_s=None,
            other_s=None,
            decode_s=None,
            # What was tested is not told: a rejection cannot be told apart from the end of a shorter draft.
            positions=tuple(Position(drafted=totals.cycles, accepted=kept) for kept in totals.accepted_at),
            counted=True,
        )

    @property
    def acceptance_rate(self) -> float | None:
        return _ratio(self.accepted, self.drafted)

    @property
    def alpha(self) -> float | None:
        return None if self.untested else _ratio(self.accepted, self.tested)

    @property
    def expected_alpha(self) -> float | None:
        return _ratio(self.overlap, self.overlap_known)

    @property
    def mean_emitted_per_cycle(self) -> float | None:
        # Counted cycles are those that drafted; what the others emitted is in the total as well.
        if self.counted:
            return _ratio(self.accepted + self.cycles, self.cycles)
        return _ratio(self.emitted - self.from_prompt, self.cycles - self.from_prompt)

    @property
    def exactness(self) -> Literal["exact", "inferred", "counted"]:
        """Whether all cycles were seen as they were, some deduced, or none told at all."""
        return "counted" if self.counted else "inferred" if self.inferred else "exact"

    @property
    def phases(self) -> Phases | None:
        """Seconds by what cycles do; None where one of them does not tell."""
        return Phases.of(self.draft_s, self.verify_s, self.other_s)

    @property
    def tokens_per_second(self) -> float | None:
        return _ratio(self.emitted - self.from_prompt, self.decode_s)

    @property
    def speedup_estimate(self) -> float | None:
        """Over plain decoding, as this run's own plain cycles have it; an estimate of what `bench` measures. None with fewer
        than four of them: from one alone it was off by a tenth either way."""
        rate = self.tokens_per_second
        if rate is None or self.plain_s is None or self.plain_cycles < 4:
            return None
        return rate * self.plain_s / self.plain_cycles

    def figures(self) -> dict[str, Any]:
        """Counters and rates under the names that JSON output uses."""
        return {
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "emitted": self.emitted,
            "cycles": self.cycles,
            "drafted": self.drafted,
            "tested": None if self.untested else self.tested,
            "accepted": self.accepted,
            "forced": self.forced,
            "acceptance_rate": self.acceptance_rate,
            "alpha": self.alpha,
            "expected_alpha": self.expected_alpha,
            "mean_emitted_per_cycle": self.mean_emitted_per_cycle,
            "tokens_per_second": self.tokens_per_second,
            "speedup_estimate": self.speedup_estimate,
            "prefill_s": self.prefill_s,
            "draft_s": self.draft_s,
            "verify_s": self.verify_s,
            "other_s": self.other_s,
            "seed": self.seed,
            "observer": self.observer,
            "exactness": self.exactness,
        }


def _positions(before: tuple[Position, ...], cycle: Cycle) -> tuple[Position, ...]:
    drafted = cycle.depth
    if not drafted:
        return before
    known = [*before, *(Position() for _ in range(drafted - len(before)))]
    for i in range(drafted):
        old = known[i]
        known[i] = Position(old.drafted + 1, old.tested + (i < cycle.tested), old.accepted + (i < cycle.accepted))
    return tuple(known)


def _sum(total: float | None, part: float | None) -> float | None:
    return None if total is None or part is None else total + part


def _ratio(part: float, whole: float | None) -> float | None:
    return part / whole if whole else None
