"""Figures over several cycles, for screens and reports. What belongs to a whole run is in `stats.Summary`.

Costs are in plain cycles: the seconds that a cycle without a draft takes on the same runtime.

    speedup = E / (draft + verify + other)      E: tokens a cycle; draft = k · c, verify = v(k)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from specdec_engine.record.events import Cycle, Phases
from specdec_engine.record.stats import Summary


def rates(cycles: Sequence[Cycle]) -> list[float | None]:
    """Tokens a second of each cycle; None where its time is not known."""
    return [len(cycle.emitted) / cycle.seconds if cycle.seconds else None for cycle in cycles]


def rate(cycles: Sequence[Cycle]) -> float | None:
    """Tokens a second of these cycles together; None where a time is not known."""
    times = [cycle.seconds for cycle in cycles]
    known = [s for s in times if s is not None]
    total = sum(known)
    return sum(len(cycle.emitted) for cycle in cycles) / total if total and len(known) == len(times) else None


def rolling_alpha(cycles: Sequence[Cycle], window: int) -> list[float | None]:
    """After each cycle, accepted of tested in the last `window` cycles; None where nothing was tested. Tokens that a grammar
    forces are no draft's."""
    found = list[float | None]()
    counts = [(0, 0) if cycle.forced else (cycle.accepted, cycle.tested) for cycle in cycles]
    accepted = tested = 0
    for i, (more, of) in enumerate(counts):
        accepted, tested = accepted + more, tested + of
        if i >= window:
            accepted, tested = accepted - counts[i - window][0], tested - counts[i - window][1]
        found.append(accepted / tested if tested else None)
    return found


def median_phases(cycles: Sequence[Cycle]) -> Phases | None:
    """Medians over these cycles; None where there are none whose phases are known."""
    known = [phases for cycle in cycles if (phases := cycle.phases) is not None]
    if not known:
        return None
    return Phases(*(median(getattr(phases, name) for phases in known) for name in ("draft_s", "verify_s", "other_s")))


def lost_to(draft: float, verify: float, other: float) -> tuple[tuple[str, float], ...]:
    """Name what keeps a speedup below E, dearest first, in plain cycles. A wider pass is what a cycle takes beside its draft,
    beyond the plain cycle's 1; the parts, but for what is too small to
    name, sum up to the cost less 1."""
    parts = (("the wider pass", verify + other - 1), ("drafting", draft))
    return tuple(sorted(((name, cost) for name, cost in parts if cost > 0.005), key=lambda part: -part[1]))


@dataclass(frozen=True, slots=True)
class Budget:
    """What a cycle brings and what it costs, in plain cycles."""

    emitted: float
    """E, tokens a cycle."""
    draft: float
    verify: float
    other: float
    at_constant_alpha: float | None
    """The speedup at this cost if every token were accepted with the chance alpha (`expected_emitted` of the mean length of a
    draft). None where nothing was tested."""

    @property
    def cost(self) -> float:
        return self.draft + self.verify + self.other

    @property
    def speedup(self) -> float:
        return self.emitted / self.cost

    @property
    def lost(self) -> tuple[tuple[str, float], ...]:
        """See `lost_to`."""
        return lost_to(self.draft, self.verify, self.other)


def budget(s: Summary, plain_s: float) -> Budget | None:
    """Of these cycles together. plain_s: seconds of a plain cycle. None without cycles that took time, and where their phases
    are not known."""
    if not s.cycles or not plain_s or (phases := s.phases) is None or not phases.total_s:
        return None
    draft, verify, other = (total / s.cycles / plain_s for total in (phases.draft_s, phases.verify_s, phases.other_s))
    steady = None
    if s.alpha is not None:
        steady = expected_emitted(s.alpha, s.drafted / s.cycles) / (draft + verify + other)
    return Budget(s.emitted / s.cycles, draft, verify, other, steady)


def expected_emitted(alpha: float, k: float) -> float:
    """(1 − alpha^(k+1)) / (1 − alpha): tokens of a cycle whose every token is accepted with this chance (Leviathan et al.
    2023, equation 1)."""
    return k + 1.0 if alpha == 1 else (1 - alpha ** (k + 1)) / (1 - alpha)
