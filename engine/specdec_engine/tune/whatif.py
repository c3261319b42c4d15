"""What a draft would do for every k at once, from text that the target has written. No generation, no torch.

A token that the target emits with probability p was an accepted draft token with probability min(1, q/p), whatever became
of the tokens before. So along a given text acceptances are independent events, whose chances
two teacher-forced passes tell (target and draft), and a walk over the places where cycles may begin gives the expected
cycles of every k. Exact for the token rule. A deterministic draft's chances are 0 and 1; so are all at temperature 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from specdec_engine.bench.figures import Interval
from specdec_engine.record.events import Cycle, known_phases


@dataclass(frozen=True, slots=True)
class Chances:
    """One drafter along one answer of n tokens."""

    drafted: tuple[int, ...]
    """[n]: length of the draft that begins before each token of the answer, at the largest k."""
    accept: tuple[tuple[float, ...], ...]
    """[n]: row i, column j: the chance that token j of that draft is accepted, given that all before it were; 0 beyond a
    row's end."""
    ended: bool = False
    """Whether the target ended the answer, and not the budget, before which the last draft has less room."""


@dataclass(frozen=True, slots=True)
class CycleKind:
    """Cycles that cost the same."""

    member: int
    """Who drafted, by place in the cascade; 0 where nobody did."""
    drafted: int


def expected_cycles(members: Sequence[Chances], k: int) -> dict[CycleKind, float]:
    """How many of each kind, averaged over what draft and target draw. members: a cascade, whose first that proposes wins the
    cycle; for one drafter a list of one."""
    n, found = len(members[0].drafted), dict[CycleKind, float]()
    begins = [1.0] + [0.0] * n  # expected cycles that begin before each token
    for i in range(n):
        room = k if members[0].ended else min(k, n - i - 1)  # the last token of a budget is the target's own
        kind = next(
            (CycleKind(m, min(room, c.drafted[i])) for m, c in enumerate(members) if c.drafted[i]), CycleKind(0, 0)
        )
        kind = kind if kind.drafted else CycleKind(0, 0)
        found[kind] = found.get(kind, 0.0) + begins[i]
        reach, row = begins[i], members[kind.member].accept[i]
        for j, chance in enumerate([*row, *[0.0] * kind.drafted][: kind.drafted]):
            begins[min(n, i + j + 1)] += reach * (1 - chance)
            reach *= chance
        begins[min(n, i + kind.drafted + 1)] += reach
    return found


@dataclass(frozen=True, slots=True)
class UnitCosts:
    """What cycles cost beside one drafter, in plain cycles of the same moment."""

    plain_s: float
    """Seconds of a plain cycle."""
    draft: Mapping[int, float]
    """By drafted tokens; at 0 what a drafter takes to say that it proposes nothing."""
    passes: Mapping[int, float]
    """The target's, by tokens read."""
    other: float
    """Of a cycle with a draft, neither drafting nor in the target's pass."""

    @classmethod
    def of(cls, cycles: Sequence[Cycle]) -> UnitCosts:
        """Medians; each cycle is held against the two plain ones nearest to it, so that a machine whose speed changes falls
        out. Raises ValueError without plain cycles."""
        timed = [(len(cycle.drafted), known_phases(cycle)) for cycle in cycles]
        plain = [(i, phases.total_s) for i, (n, phases) in enumerate(timed) if not n]
        if not plain:
            raise ValueError("no plain cycle was timed")
        draft, passes, other = dict[int, list[float]](), dict[int, list[float]](), list[float]()
        for i, (n, phases) in enumerate(timed):
            near = fmean(s for _, s in sorted(plain, key=lambda p: abs(p[0] - i))[:2])
            passes.setdefault(n + 1, []).append(phases.verify_s / near)
            # After a plain cycle a drafter has more to catch up with than in a run.
            if n and i and timed[i - 1][0]:
                draft.setdefault(n, []).append(phases.draft_s / near)
            if n:
                other.append(phases.other_s / near)
        return cls(median(s for _, s in plain), _medians(draft), _medians(passes), median(other or [0.0]))

    def drafting(self, times: Iterable[tuple[int, float]]) -> UnitCosts:
        """With tokens and seconds of drafts that were timed apart in place of those in the cycles."""
        apart = dict[int, list[float]]()
        for tokens, took in times:
            apart.setdefault(tokens, []).append(took / self.plain_s)
        return replace(self, draft=_medians(apart))

    @property
    def miss_cost(self) -> float:
        """What it costs to ask a drafter that proposes nothing."""
        return self.draft.get(0, 0.0)

    def __call__(self, drafted: int) -> float:
        """A cycle that drafts so many."""
        if not drafted:
            return 1.0 + self.miss_cost
        return _known(self.draft, drafted) + _known(self.passes, drafted + 1) + self.other


def _medians(table: Mapping[int, Sequence[float]]) -> dict[int, float]:
    return {n: median(values) for n, values in sorted(table.items())}


def _known(table: Mapping[int, float], n: int) -> float:
    """At n, or at the next larger that was measured, else the dearest; 0 where nothing was."""
    return next((cost for m, cost in table.items() if m >= n), max(table.values(), default=0.0))


@dataclass(frozen=True, slots=True)
class Member:
    """A drafter by itself, looked at along every answer."""

    name: str
    chances: tuple[Chances, ...]
    costs: UnitCosts
    before: tuple[Chances, ...] = ()
    """The same of a lookup before another drafter, where it proposes only what it is sure of."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What could be set, and what is expected of it."""

    draft: str
    k: int
    emitted: float
    """Tokens a cycle."""
    speedup: Interval
    """Over plain decoding: geometric mean over the answers."""
    ratios: tuple[float, ...]
    """By answer."""


def predicted(cascade: Sequence[Member], k: int) -> Setting:
    """For these drafters, the first that proposes winning each cycle. Raises ValueError where there is no text."""
    ratios, tokens, cycles = list[float](), 0, 0.0
    front, last = cascade[:-1], cascade[-1]
    for chances in zip(*(member.before or member.chances for member in front), last.chances, strict=True):
        kinds = expected_cycles(chances, k)
        n = len(chances[0].drafted)
        ratios.append(n / sum(times * _cost(cascade, kind) for kind, times in kinds.items()))
        tokens, cycles = tokens + n, cycles + sum(kinds.values())
    return Setting(",".join(m.name for m in cascade), k, tokens / cycles, Interval.of(ratios), tuple(ratios))


def _cost(cascade: Sequence[Member], kind: CycleKind) -> float:
    """Of a cycle in plain ones; whoever stands before the one that drafted was asked in vain."""
    asked_in_vain = cascade if not kind.drafted else cascade[: kind.member]
    own = cascade[kind.member].costs(kind.drafted) if kind.drafted else 1.0
    return own + sum(member.costs.miss_cost for member in asked_in_vain)


def curves(cascades: Iterable[Sequence[Member]], most: int) -> Mapping[str, list[Setting]]:
    """By draft, for every k from 1 to `most`; the draft with the best setting first."""
    found = [[predicted(cascade, k) for k in range(1, most + 1)] for cascade in cascades]
    return {curve[0].draft: curve for curve in sorted(found, key=lambda curve: -best_of(curve).speedup.mean)}


WITHIN = 0.01
"""Settings this close are taken for equal: confirming runs differ by more."""


def best_of(curve: Sequence[Setting]) -> Setting:
    """The smallest k within a hundredth of the best."""
    top = max(setting.speedup.mean for setting in curve)
    return next(setting for setting in curve if setting.speedup.mean >= top * (1 - WITHIN))
