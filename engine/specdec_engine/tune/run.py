"""`tune`: look at every draft along the same answers, solve for the best setting, and confirm it with a short paired run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from specdec_engine.bench.figures import FEWEST, Interval, Recommendation, recommend
from specdec_engine.bench.plan import Arm, Plan
from specdec_engine.bench.report import ArmFigures, figures_of
from specdec_engine.bench.session import Session
from specdec_engine.core.cycle_types import Sampling
from specdec_engine.core.registry import drafters as registered
from specdec_engine.core.registry import is_lookup, members_of
from specdec_engine.errors import UsageError
from specdec_engine.pair import Pair
from specdec_engine.record.prompt_files import Question
from specdec_engine.tune.answers import Answer
from specdec_engine.tune.passes import MOST_K, looked_at, unit_costs
from specdec_engine.tune.whatif import Chances, Member, Setting, UnitCosts, best_of, curves

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was found."""

    answers: tuple[Answer, ...]
    members: tuple[Member, ...]
    curves: Mapping[str, Sequence[Setting]]
    """By draft, the best one's first; k from 1 on."""
    best: Setting
    """By prediction."""
    confirmed: tuple[ArmFigures, ...]
    """The best setting and `-k auto` beside plain decoding; none where nothing could be compared."""
    advice: Recommendation

    @property
    def tokens(self) -> int:
        return sum(len(answer.context) - answer.begin for answer in self.answers)

    @property
    def measured(self) -> Interval | None:
        """Of the best setting."""
        return next((arm.speedup for arm in self.confirmed if arm.arm.k == self.best.k), None)

    @property
    def gap(self) -> float | None:
        """Measured over predicted, less one."""
        return None if self.measured is None else self.measured.mean / self.best.speedup.mean - 1

    @property
    def setting(self) -> tuple[str, int | Literal["auto"]]:
        """Draft and k to use, as confirmed, else as predicted; `none` and 0 for plain decoding."""
        if self.advice.arm is not None:
            return self.best.draft, self.confirmed[self.advice.arm].arm.k
        pays = not self.advice.decided and self.best.speedup.mean > 1
        return (self.best.draft, self.best.k) if pays else ("none", 0)


def candidates(drafts: Sequence[str]) -> list[str]:
    """Each draft by itself, a cascade's members once each, and the lookups. Raises UsageError for a token tree."""
    if trees := [draft for draft in drafts if members_of(draft)[0]]:
        raise UsageError(
            f"tune works out chains, and {trees[0]} is a token tree", f"measure it: specdec bench -d {trees[0]} -k 2-5"
        )
    lookups = [entry.name for entry in registered().values() if entry.lookup]
    named = dict.fromkeys(member.strip() for draft in [*drafts, *lookups] for member in draft.split(","))
    return [member for member in named if member not in ("", "none")]


def with_cascades(names: Sequence[str]) -> list[str]:
    """And each lookup before each other."""
    before = (f"{a},{b}" for a in names if is_lookup(a) for b in names if not is_lookup(b))
    return [*names, *before]


def tuned(
    target: str,
    pairs: Mapping[str, Pair],
    answers: Sequence[Answer],
    temperature: float,
    max_tokens: int,
    seed: int,
    say: Say,
    confirm: bool = True,
    leave_out: Callable[[str, UsageError], None] | None = None,
) -> Tuned:
    """pairs: by draft, for each of `with_cascades`; confirm: not for a text that the target has not said; leave_out: told of
    a draft that cannot be looked at, where that ends nothing. Raises UsageError without answers, and for such a draft."""
    if not answers:
        raise UsageError("the target answered no prompt", "give shorter prompts, or more of them")
    members, sampling, lookups = dict[str, Member](), Sampling(temperature), list[UnitCosts]()
    for name, pair in pairs.items():
        if "," in name:
            continue
        try:
            chances, times = looked_at(pair, answers, sampling, partial(_counted, say, f"looking at {name}"))
        except UsageError as error:
            if leave_out is None:
                raise
            leave_out(name, error)
            continue
        say(f"timing {name}")
        costs = lookups[0] if times and lookups else unit_costs(pair, answers, sampling, seed)
        before = tuple[Chances, ...]()
        if times:  # the passes over a lookup's drafts are any lookup's
            lookups.append(costs)
            costs = costs.drafting(times)
        if is_lookup(name):
            before = _before_others(pair, answers, sampling)
        members[name] = Member(name, chances, costs, before)
    say(f"solving for {len(pairs)} drafts and {MOST_K} k")
    cascades = [names for names in (draft.split(",") for draft in pairs) if set(names) <= members.keys()]
    found = curves(([members[name] for name in names] for names in cascades), MOST_K)
    best = best_of(next(iter(found.values())))
    confirmed = list[ArmFigures]()
    if confirm and len(answers) >= FEWEST:
        confirmed = _confirmed(target, pairs[best.draft], best, answers, temperature, max_tokens, seed, say)
    advice = Recommendation(None, best.speedup.mean, _only_predicted(best, len(answers)), decided=False)
    if confirmed:
        labels = [f"{best.draft} with k {arm.arm.k}" for arm in confirmed]
        advice = recommend([a.ratios for a in confirmed], [a.arm.k for a in confirmed], labels)
    return Tuned(tuple(answers), tuple(members.values()), found, best, tuple(confirmed), advice)


def _before_others(pair: Pair, answers: Sequence[Answer], sampling: Sampling) -> tuple[Chances, ...]:
    """A lookup along these answers, where another drafter is asked after it."""
    pair.draft_limits.followed = True
    try:
        return looked_at(pair, answers, sampling, lambda number, total: None)[0]
    finally:
        pair.draft_limits.followed = False


def _counted(say: Say, what: str, number: int, total: int) -> None:
    say(f"{what}, answer {number} of {total}")


def _only_predicted(best: Setting, answers: int) -> str:
    why = f"{answers} of at least {FEWEST} answers" if answers < FEWEST else "the text is not what the target says"
    return f"{best.draft} with k {best.k}: {best.speedup}, predicted and not confirmed: {why}"


def _confirmed(
    target: str,
    pair: Pair,
    best: Setting,
    answers: Sequence[Answer],
    temperature: float,
    max_tokens: int,
    seed: int,
    say: Say,
) -> list[ArmFigures]:
    """Plain decoding, the setting and `-k auto` on the answers' prompts, in shuffled order."""
    arms = (Arm(best.draft, best.k, temperature), Arm(best.draft, "auto", temperature))
    questions = tuple(Question("tune", ("",), answer.prompt) for answer in answers)
    plan = Plan(target, arms, questions, 1, max_tokens, seed)
    session = Session(plan, {"": pair}, {(best.draft, ""): pair}, {})
    session.warm_up()
    for number, run in enumerate(runs := session.runs(), 1):
        say(f"confirming, run {number} of {len(runs)}")
        session.measure(run)
    return figures_of(plan, session.samples)
