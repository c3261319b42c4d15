"""From samples to figures: paired ratios, intervals, shares, and what was predicted. No torch.

A prompt's speedup is the geometric mean over repeats of plain seconds a token over the arm's, for the same prompt in the same
round, so that drift cancels. An arm's speedup is the geometric mean over prompts, its interval a percentile bootstrap over
prompts: other prompts, and not other runs of the same, are what a reader wants to know about.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from specdec_engine.bench.plan import Form
from specdec_engine.record.cycle_stats import lost_to

RESAMPLES = 2000
FEWEST = 3
"""Prompts without which nothing is recommended."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One run, prefill apart."""

    question: int
    repeat: int
    temperature: float
    arm: int | None
    seed: int
    emitted: int
    cycles: int
    drafted: int
    tested: int
    accepted: int
    draft_s: float
    verify_s: float
    other_s: float
    prefill_s: float | None
    passes: Mapping[str, tuple[int, float]]
    """Target passes by how many tokens they read: how many, and their seconds together."""
    token_ids: tuple[int, ...]
    turns: tuple[int, ...] = ()
    """Tokens of each turn's answer."""
    quantize: str = ""
    structured: bool = False
    forced: int = 0
    """Tokens that had to come by the grammar, in no count of drafts."""
    context: int = 0

    @property
    def form(self) -> Form:
        return Form(self.temperature, self.quantize, self.structured, self.context)

    @property
    def decode_s(self) -> float:
        return self.draft_s + self.verify_s + self.other_s

    @property
    def token_s(self) -> float:
        """Seconds a token."""
        return self.decode_s / self.emitted

    @property
    def tokens_per_second(self) -> float:
        return self.emitted / self.decode_s


def geometric(values: Sequence[float]) -> float:
    """Raises ValueError for none."""
    if not values:
        raise ValueError("there is nothing to average")
    return math.exp(fmean(math.log(value) for value in values))


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of the geometric mean over what was sampled."""
    if len(values) < 2:  # one prompt says nothing about others
        return (math.nan, math.nan)
    chance, logs = random.Random(seed), [math.log(value) for value in values]
    means = sorted(fmean(chance.choices(logs, k=len(logs))) for _ in range(RESAMPLES))
    return math.exp(means[int(0.025 * RESAMPLES)]), math.exp(means[int(0.975 * RESAMPLES) - 1])


def by_question(arm: Sequence[Sample], plain: Sequence[Sample]) -> dict[int, float]:
    """Each prompt's speedup, over the rounds that both have run."""
    base = {(s.question, s.repeat): s.token_s for s in plain}
    ratios = dict[int, list[float]]()
    for s in arm:
        if (s.question, s.repeat) in base:
            ratios.setdefault(s.question, []).append(base[s.question, s.repeat] / s.token_s)
    return {question: geometric(found) for question, found in ratios.items()}


@dataclass(frozen=True, slots=True)
class Interval:
    """A geometric mean over prompts, and where it would lie with others."""

    mean: float
    low: float
    high: float
    slower: float
    """Share of the prompts below 1."""

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Interval:
        """Raises ValueError for none."""
        return cls(geometric(ratios), *bootstrap(ratios), sum(r < 1 for r in ratios) / len(ratios))

    def __str__(self) -> str:
        return f"{self.mean:.2f}×" if math.isnan(self.low) else f"{self.mean:.2f}× ({self.low:.2f}–{self.high:.2f})"


@dataclass(frozen=True, slots=True)
class Costs:
    """What a cycle brings and costs, in plain passes, and what follows."""

    emitted: float
    """E, tokens a cycle."""
    k: float
    """Drafted tokens a cycle."""
    alpha: float | None
    c: float | None
    """A drafted token, in plain passes."""
    v: Mapping[int, float]
    """A pass over n tokens, in plain passes, by n."""
    draft: float
    verify: float
    other: float

    @property
    def predicted(self) -> float:
        """E / (k·c + v̄): what counts and unit costs promise, without what is spent beside them. The one prediction that this
        program makes of a run that it has seen."""
        return self.emitted / (self.draft + self.verify)

    def cause(self, measured: float) -> str:
        """Why it is not E, dearest first, in words."""
        lost = [f"{name} {cost:.2f}" for name, cost in lost_to(self.draft, self.verify, self.other)]
        spent = f"; lost to {', '.join(lost)}" if lost else ""
        gap = measured / self.predicted - 1
        off = f"; {gap:+.0%} against the prediction" if abs(gap) >= 0.03 else ""
        return f"{self.emitted:.2f} tokens a cycle{spent}{off}"


def costs(arm: Sequence[Sample], plain: Sequence[Sample]) -> Costs:
    """Unit costs are medians over runs of a run's means: a hiccup in one run moves nothing."""
    plain_s = median(s.token_s for s in plain)
    cycles = sum(s.cycles for s in arm)
    drafted, tested = sum(s.drafted for s in arm), sum(s.tested for s in arm)
    c = median(s.draft_s / s.drafted for s in arm if s.drafted) / plain_s if drafted else None
    widths = sorted({int(w) for s in arm for w in s.passes})
    by_width = {w: [s.passes[str(w)] for s in arm if str(w) in s.passes] for w in widths}
    v = {w: median(seconds / n for n, seconds in found) / plain_s for w, found in by_width.items()}
    verify = sum(v[w] * n for w, found in by_width.items() for n, _ in found) / cycles
    return Costs(
        emitted=sum(s.emitted for s in arm) / cycles,
        k=drafted / cycles,
        alpha=sum(s.accepted for s in arm) / tested if tested else None,
        c=c,
        v=v,
        draft=(c or 0.0) * drafted / cycles,
        verify=verify,
        other=sum(s.other_s for s in arm) / cycles / plain_s,
    )


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What to set, and why, in a sentence."""

    arm: int | None
    """None for plain decoding."""
    speedup: float
    reason: str
    decided: bool = True
    """Not with too few prompts: then plain decoding is no advice."""


def recommend(ratios: Sequence[Mapping[int, float]], ks: Sequence[object], labels: Sequence[str]) -> Recommendation:
    """The smallest k within noise of the best: with an interval of the paired ratio that takes in 1. ratios: each arm's, by
    prompt; ks: a number, or anything else for an arm that chooses it itself, which comes last."""
    intervals = [Interval.of(list(found.values())) for found in ratios]
    best = max(range(len(ratios)), key=lambda i: intervals[i].mean)
    if len(ratios[best]) < FEWEST:
        said = f"too few prompts to say: {labels[best]} had {len(ratios[best])}, and {FEWEST} are the least"
        return Recommendation(None, 1.0, said, decided=False)
    if intervals[best].low <= 1:
        said = (
            f"turn it off: even the best, {labels[best]}, is not surely faster than plain decoding, {intervals[best]}"
        )
        return Recommendation(None, 1.0, said)

    def near(i: int) -> bool:
        shared = ratios[i].keys() & ratios[best].keys()
        return intervals[i].low > 1 and bootstrap([ratios[i][q] / ratios[best][q] for q in sorted(shared)])[1] >= 1

    fixed = sorted((i for i, k in enumerate(ks) if isinstance(k, int) and near(i)), key=lambda i: int(str(ks[i])))
    pick = fixed[0] if fixed else best
    if pick == best:
        return Recommendation(pick, intervals[pick].mean, f"{labels[pick]} was fastest: {intervals[pick]}")
    return Recommendation(
        pick,
        intervals[pick].mean,
        f"{labels[pick]}: {intervals[pick]}, within noise of the best, {labels[best]}, {intervals[best]}",
    )
