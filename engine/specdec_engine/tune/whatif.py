"""What a draft would do for every k at once, from text that the target has written. No generation, no torch.

A target that says x with probability p takes it from a draft with min(p, q): of all the times it says x, in a share
min(1, q/p), whatever became of the tokens before. So along a given text acceptances are independent events, whose chances
two teacher-forced passes tell (target and draft), and a walk over the places where cycles may begin gives the expected
cycles of every k. Exact for the token rule. A deterministic draft's chances are 0 and 1; so are all at temperature 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median

from specdec_engine.bench.figures import Interval
from specdec_engine.cost import Drafting, Staircase
from specdec_engine.events import Cycle


@dataclass(frozen=True, slots=True)
class Chances:
    """One drafter along one answer of n tokens."""

    drafted: tuple[int, ...]
    """[n]: tokens of a draft that begins before each token of the answer, of as many as may be drafted."""
    accept: tuple[tuple[float, ...], ...]
    """[n]: row i, column j: the chance that token j of that draft is accepted, given that all before it were; 0 beyond a
    row's end."""
    ended: bool = False
    """Whether the target ended the answer, and not the budget, before which the last draft has less room."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Cycles that cost the same."""

    member: int
    """Who drafted, by place in the cascade; 0 where nobody did."""
    drafted: int


def expected_cycles(members: Sequence[Chances], k: int) -> dict[Kind, float]:
    """How many of each kind, averaged over what draft and target draw. members: a cascade, whose first that proposes wins the
    cycle; for one drafter a list of one."""
    n, found = len(members[0].drafted), dict[Kind, float]()
    begins = [1.0] + [0.0] * n  # expected cycles that begin before each token
    for i in range(n):
        room = k if members[0].ended else min(k, n - i - 1)  # the last token of a budget is the target's own
        kind = next((Kind(m, min(room, c.drafted[i])) for m, c in enumerate(members) if c.drafted[i]), Kind(0, 0))
        kind = kind if kind.drafted else Kind(0, 0)
        found[kind] = found.get(kind, 0.0) + begins[i]
        reach, row = begins[i], members[kind.member].accept[i]
        for j, chance in enumerate([*row, *[0.0] * kind.drafted][: kind.drafted]):
            begins[min(n, i + j + 1)] += reach * (1 - chance)
            reach *= chance
        begins[min(n, i + kind.drafted + 1)] += reach
    return found


class UnitCosts:
    """What cycles cost beside one drafter, in its own plain cycles: so a machine that was slower meanwhile falls out."""

    def __init__(self) -> None:
        self._draft, self._passes = Drafting(), Staircase()
        self._other: dict[bool, list[float]] = {False: [], True: []}

    def add(self, cycle: Cycle) -> None:
        n = len(cycle.drafted)
        if n:
            self._draft.add(n, cycle.draft_s)
        self._passes.add(n + 1, cycle.verify_s)
        self._other[n > 0].append(cycle.other_s)

    def draft_takes(self, times: Iterable[tuple[int, float]]) -> None:
        """Tokens and seconds of drafts that were timed apart; they take the place of those in the cycles."""
        self._draft = Drafting()
        for tokens, seconds in times:
            if tokens:
                self._draft.add(tokens, seconds)

    def seconds(self, drafted: int) -> float:
        """Of a cycle that drafts so many. Raises ValueError while nothing is measured."""
        return self._draft(drafted) + self._passes(drafted + 1) + self.other(drafted)

    def other(self, drafted: int) -> float:
        """Of them, neither drafting nor in the target's pass."""
        return median(self._other[drafted > 0] or self._other[False])

    @property
    def drafts(self) -> bool:
        """Whether any draft was timed."""
        return self._draft.known

    def passes(self, tokens: int) -> float:
        """Seconds of the target's pass over so many."""
        return self._passes(tokens)

    def drafting(self, tokens: int) -> float:
        """Seconds of a draft of so many."""
        return self._draft(tokens)

    def __call__(self, drafted: int) -> float:
        return self.seconds(drafted) / self.seconds(0)


@dataclass(frozen=True, slots=True)
class Member:
    """A drafter by itself, looked at along every answer."""

    name: str
    lookup: bool
    """Whether it copies, and costs next to nothing: then it may go before a model."""
    chances: tuple[Chances, ...]
    costs: UnitCosts


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
    for chances in zip(*(member.chances for member in cascade), strict=True):
        kinds = expected_cycles(chances, k)
        n = len(chances[0].drafted)
        ratios.append(n / sum(times * cascade[kind.member].costs(kind.drafted) for kind, times in kinds.items()))
        tokens, cycles = tokens + n, cycles + sum(kinds.values())
    return Setting(",".join(m.name for m in cascade), k, tokens / cycles, Interval.of(ratios), tuple(ratios))


def cascades(members: Sequence[Member]) -> list[tuple[Member, ...]]:
    """Each by itself, and each lookup before each model."""
    pairs = ((a, b) for a, b in product(members, members) if a.lookup and not b.lookup)
    return [*((member,) for member in members), *pairs]


def curves(members: Sequence[Member], most: int) -> Mapping[str, list[Setting]]:
    """By draft, for every k from 1 to `most`; the draft with the best setting first."""
    found = {
        curve[0].draft: curve
        for cascade in cascades(members)
        if (curve := [predicted(cascade, k) for k in range(1, most + 1)])
    }
    return dict(sorted(found.items(), key=lambda item: -best_of(item[1]).speedup.mean))


WITHIN = 0.01
"""Settings this close are taken for equal: confirming runs differ by more."""


def best_of(curve: Sequence[Setting]) -> Setting:
    """The smallest k within a hundredth of the best."""
    top = max(setting.speedup.mean for setting in curve)
    return next(setting for setting in curve if setting.speedup.mean >= top * (1 - WITHIN))
