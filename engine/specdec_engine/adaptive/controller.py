"""`-k auto`: how far to draft, learned while decoding.

Two questions with one answer: what does one more drafted token add, and what does it cost? It adds its chance of being
accepted, reach · a, where reach is the chance that all before it are; it costs a draft step and the step of the verify
staircase, in tokens at the rate of this run. Between cycles a cap is set for each drafter from how far its drafts got;
within a draft the drafter's own confidence decides, calibrated by how such tokens fared before. k = 0 is a legal
answer: a draft that does not pay is switched off, and tried again now and then.

Nothing here looks at the value of a drawn token before it is in the draft, so no rule is biased by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, zip_longest
from math import prod
from operator import mul

from specdec_engine.adaptive.cost import Choice, Costs, CostsByLength, best_k, cycle_of
from specdec_engine.adaptive.history import FIRST, FIRST_PROBE, MEMORY, DrafterHistory
from specdec_engine.core.cycle_types import Part
from specdec_engine.record.events import Cycle, TokenId, known_phases

_PLAIN_AT = (2, 8, 16, 32, 64, 128, 256)
"""The cycles that measure a plain pass, which every comparison needs: one alone, on a shared machine, was so far off that
a draft with α 0.4 was switched off for a sixth of the cycles."""
_FADES_EVERY = 8
_LAST_PROBE = 128
"""The longest such pause, which doubles where it lost clearly."""
_CLEARLY = 1.07
"""How much faster plain decoding must be for that: in simulated runs, whose texts and machine changed as real ones do, drafts
near the break-even so gained up to 1.4 %, and hopeless ones lost 0.2."""
_PROBE_SHARE = 0.01
"""Share of the time that a drafter's probes may take, but for the first two: `self:8` reads 100 tokens in 4 plain passes, and
ran at 0.96 of plain decoding."""
_REFUSALS = 32
"""Cycles after which a draft that did not pay beside others is made all the same."""
_BETTER = 1.02
"""A new k must promise this much more than the one in force, or it would change with every breath of noise."""
_BETTER_OFF = 1.03
"""The same for none at all, after which nothing more is learnt."""


_ROW = 0.02
"""Tokens that a row of a second candidate must bring at least: until a second width is measured, rows seem free."""


class AutoK:
    """The controller; one a pair, so that what a run learns serves the next."""

    def __init__(self) -> None:
        self._seed, self._tokenwise = 0, False
        self._forget()

    def _forget(self) -> None:
        self._lengths = CostsByLength()
        self._histories: dict[str, DrafterHistory] = {}
        self._seeds: set[int] = set()  # of the runs it has learnt from
        self._elapsed = 0.0

    @property
    def _costs(self) -> Costs:
        return self._lengths.now

    def begin(self, seed: int, *, tokenwise: bool = False, context: int = 0) -> None:
        """A run begins. What an earlier run with the same seed has taught is forgotten: it was tested with the very numbers
        that this one will be, and k must not depend on them.

        tokenwise: the rule keeps each token that it tests with chance Σ min(p, q), the `overlap` of its cycle. context: of
        the prompt, in tokens.
        """
        if seed in self._seeds:
            self._forget()
        for history in self._histories.values():  # drafters read a prompt before the run
            history.backlog = 0
        self._seed, self._tokenwise = seed, tokenwise
        self._go_to(context)

    def _go_to(self, context: int) -> None:
        """Take the costs of contexts so long, and draft as far as those say."""
        known = self._lengths.go_to(context)
        for name, history in self._histories.items():
            history.draft = self._costs.draft(name)
            if known and self._knows(history) and not history.sure_before:
                history.k = self._best_choice(history, history.optimistic_reach()).k
                history.cycles_off = 0

    @property
    def k(self) -> int:
        """For the next cycle: the most that any drafter may propose."""
        if self._measuring:
            return 0
        return max((history.k + history.looks_further for history in self._histories.values()), default=FIRST)

    @property
    def _measuring(self) -> bool:
        costs = self._costs
        return costs.cycles in _PLAIN_AT and costs.plain <= _PLAIN_AT.index(costs.cycles)

    @property
    def off(self) -> bool:
        """Whether every drafter was switched off."""
        return bool(self._histories) and not any(history.k for history in self._histories.values())

    def limit(self, name: str) -> int:
        """What this drafter may propose in the next cycle."""
        history = self._history(name)
        return history.k + history.looks_further

    def should_draft(self, name: str, confidence: float, alone: bool = True, unknown: bool = True) -> bool:
        """Whether a draft that is this sure of its first token should begin: it pays, and more than that of another drafter
        which knows only afterwards how sure it is; or, not alone but in a tree, together with that one. unknown: what holds
        while costs are not known."""
        history = self._history(name)
        history.sure_before, first = True, history.chance(confidence, 0)
        history.first = first
        if not self._knows(history):
            return unknown
        gain, drafted = self._net_gain(history, 1.0, 0, first, history.chance(confidence, 1))
        others = [(other, self._net_gain_of_draft(other)) for other in self._histories.values()]
        best, found = max(others, key=lambda one: one[1])
        if not alone and found > 0:
            missed = [1.0 - reach for reach in history.reach_of_draft(drafted)]
            gain += max(0.0, self._net_gain_beside(best, missed, 1 + drafted))
        return gain > max(0.0, found)

    def should_join(self, name: str, others: Mapping[str, int], drafted: int) -> bool:
        """Say whether a draft pays beside those of others in a token tree, so many tokens each, and `drafted` in all, second
        candidates among them: it counts as far as it gets further than they do, and it costs its steps and its rows."""
        history = self._history(name)
        if not self._knows(history):
            return True
        reached = [self._history(other).reach_of_draft(tokens) for other, tokens in others.items()]
        missed = [prod(1.0 - reach for reach in at) for at in zip_longest(*reached, fillvalue=0.0)]
        joins = self._net_gain_beside(history, missed, 1 + drafted) > 0
        history.refused = 0 if joins else history.refused + 1
        history.backlog += not joins
        if history.refused < _REFUSALS:
            return joins
        history.age()  # and it is made: else what it would bring is never seen again
        history.refused = 0
        return True

    def _net_gain_beside(self, history: DrafterHistory, missed: Sequence[float], rows: int) -> float:
        """The net gain of a whole draft in a pass of so many rows anyhow; missed: by position, the chance that none of the
        others gets so far."""
        reach, passes = history.reach()[: history.k], self._costs.passes
        gains = accumulate(own * chance for own, chance in zip(reach, missed, strict=False))
        nets = (
            gain - self._rate * (history.draft(k) + passes(rows + k) - passes(rows))
            for k, gain in enumerate(gains, start=1)
        )
        return max(nets, default=0.0)

    def early_stop(self, name: str) -> Callable[[float], bool]:
        """For one draft: told the confidence of each token drafted, says whether to end with it."""
        history, reach = self._history(name), 1.0
        history.confidences = []
        least = history.k + 1 if history.looks_further else 1

        def stop_now(confidence: float) -> bool:
            nonlocal reach
            drafted = len(history.confidences)
            history.confidences.append(confidence)
            reach *= history.chance(confidence, drafted)
            following = history.next_chance(confidence, drafted + 1)
            return drafted + 1 >= least and not self._pays(history, reach, drafted + 1, following, following)

        return stop_now

    def places_of_siblings(self, name: str, sure: Sequence[float], chances: Sequence[float], drafted: int) -> list[int]:
        """Choose the places at which a second candidate of these chances pays for its row; sure: of each token of the draft
        how sure the drafter is; drafted: tokens of others that are in the tree."""
        history, passes, rows = self._history(name), self._costs.passes, 1 + drafted + len(sure)
        if not self._knows(history):
            return []
        reached = accumulate((history.chance(one, place) for place, one in enumerate(sure)), mul, initial=1.0)
        gains = [reach * history.chance_of_sibling(chance) for reach, chance in zip(reached, chances, strict=False)]
        best = sorted(range(len(gains)), key=lambda place: -gains[place])
        nets = [0.0]
        for many, place in enumerate(best, start=1):
            cost = max(_ROW, self._rate * (passes(rows + many) - passes(rows + many - 1)))
            nets.append(nets[-1] + gains[place] - cost)
        return sorted(best[: nets.index(max(nets))])

    def observe(self, cycle: Cycle, parts: Sequence[Part] = ()) -> str:
        """Learn from a cycle. Returns why `k` is another now; empty if it is not. parts: see `Draft`."""
        before, reasons = self.k, list[str]()
        self._seeds.add(self._seed)
        self._go_to(cycle.context or 0)
        costs = self._costs
        costs.cycles += 1
        width = len(cycle.drafted) + 1
        costs.plain += width == 1
        phases = known_phases(cycle)
        costs.drift.saw(width, phases.verify_s)
        draft_s, verify_s, other_s = map(costs.drift.evened, (phases.draft_s, phases.verify_s, phases.other_s))
        costs.passes.add(width, verify_s)
        costs.other.add(other_s)
        costs.tokens = MEMORY * costs.tokens + len(cycle.emitted)
        costs.seconds = MEMORY * costs.seconds + draft_s + verify_s + other_s
        self._elapsed += draft_s + verify_s + other_s
        if costs.cycles % _FADES_EVERY == 0:
            for history in self._histories.values():
                history.forget_a_little()
        for part in parts:
            kept = _agreed(part.tokens, cycle.emitted)
            history = self._history(part.drafter)
            history.learn(len(part.tokens), costs.drift.evened(part.seconds), kept)
            history.learn_of_siblings(part.siblings, part.tokens, cycle.emitted)
        if cycle.drafted and not parts:
            self._history(cycle.drafter).learn(len(cycle.drafted), draft_s, self._kept(cycle))
        drafted = {part.drafter for part in parts} or ({cycle.drafter} if cycle.drafted else set())
        if self._measuring:
            reasons = ["a plain pass is measured, which all else is held against"]
        elif costs.passes.measured(1):
            reasons = [self._set_k(name, history, name in drafted) for name, history in self._histories.items()]
        if self.k == before:
            return ""
        if any(history.looks_further for history in self._histories.values()):
            reasons.append("one token further, to see what it brings and costs")
        return "; ".join(filter(None, reasons)) or "drafting goes on as before"

    def _kept(self, cycle: Cycle) -> list[float]:
        """Of each tested token the chance that it had, where that is told: it says more than whether it was kept, and brought
        0.5 % in simulated runs with α 0.25 to 0.5."""
        kept = [float(i < cycle.accepted) for i in range(cycle.tested)]
        if self._tokenwise:
            kept = [hit if told is None else told for hit, told in zip(kept, cycle.overlap, strict=False)]
        return kept

    def _set_k(self, name: str, history: DrafterHistory, drafted: bool) -> str:
        """Set the drafter's k for the next cycle; why, if it changed."""
        if not history.k:
            history.cycles_off += 1
            history.backlog += 1
            # Two tell what it costs. Waiting makes one no cheaper: there is more to read.
            dear = history.probes >= 2 and history.probes_s > _PROBE_SHARE * self._elapsed
            if history.cycles_off < history.probe_pause or dear:
                return ""
            history.k, history.cycles_off, history.probing = 1, 0, True
            history.probes += 1
            history.age()
            return f"{name} is tried once more"
        if not drafted:
            return ""
        reach = history.reach()
        now = self._choice_at(history, reach, history.k)
        best = (
            self._choice_at(history, reach, history.most) if history.sure_before else self._best_choice(history, reach)
        )
        if not best.k and not history.sure_before and self._best_choice(history, history.optimistic_reach()).k:
            before, history.k = history.k, 1
            return "" if before == 1 else f"{name} may yet pay: too few drafts to tell"
        history.probing &= not best.k
        needed = _BETTER if best.k else _BETTER_OFF
        if best.k == history.k or (best.rate < needed * now.rate and not history.sure_before):
            return ""
        history.k = best.k
        if not best.k:
            history.probing = False
            if best.rate > _CLEARLY * now.rate:
                history.probe_pause = min(2 * history.probe_pause, _LAST_PROBE)
            cost = now.seconds * best.rate
            return f"{name} does not pay: {now.emitted:.2f} tokens a cycle expected for {cost:.2f} plain cycles"
        history.probe_pause = FIRST_PROBE
        if history.sure_before:
            return f"{name} drafts as far as it is sure, up to {history.k} tokens"
        return f"{name}: {best.emitted:.2f} tokens expected for {best.seconds / self._plain:.2f} plain cycles"

    def _best_choice(self, history: DrafterHistory, reach: Sequence[float]) -> Choice:
        return best_k(reach, history.draft, self._costs.passes, self._costs.other.seconds)

    def _choice_at(self, history: DrafterHistory, reach: Sequence[float], k: int) -> Choice:
        return cycle_of(reach[:k], history.draft, self._costs.passes, self._costs.other.seconds)

    @property
    def _plain(self) -> float:
        """Seconds of a plain cycle."""
        return self._costs.passes(1) + self._costs.other.seconds

    def _pays(self, history: DrafterHistory, reach: float, drafted: int, first: float, later: float) -> bool:
        """Whether drafting on adds more than it costs."""
        return self._net_gain(history, reach, drafted, first, later)[0] > 0 if self._knows(history) else drafted < FIRST

    def _knows(self, history: DrafterHistory) -> bool:
        return self._costs.passes.measured(1) > 0 and history.draft.known

    def _net_gain(
        self, history: DrafterHistory, reach: float, drafted: int, first: float, later: float
    ) -> tuple[float, int]:
        """The best net gain in tokens of drafting 1, 2, … more: tokens added, less the draft's and the pass's extra
        seconds at this run's tokens a second; and how many more that is.

        By several, because of the staircase: the first row more may cost as much as three. `first` and `later` are the
        chances of the next token and of those after it.
        """
        rate, gain, nets = self._rate, 0.0, list[float]()
        now = history.draft(drafted) + self._costs.passes(drafted + 1)
        for k in range(drafted + 1, history.most + 1):
            reach *= first if k == drafted + 1 else later
            gain += reach
            nets.append(gain - rate * (history.draft(k) + self._costs.passes(k + 1) - now))
        return max(zip(nets, range(1, history.most + 1), strict=False), default=(0.0, 0))

    def _net_gain_of_draft(self, history: DrafterHistory) -> float:
        """The same for a whole draft of a drafter that is sure of nothing before; 0 for one that is off, or not known yet."""
        if history.sure_before or not history.k or not self._knows(history):
            return 0.0
        rate, plain = self._rate, self._costs.passes(1)
        gains = accumulate(history.reach()[: history.k])
        return max(
            gain - rate * (history.draft(k) + self._costs.passes(k + 1) - plain)
            for k, gain in enumerate(gains, start=1)
        )

    @property
    def _rate(self) -> float:
        """Tokens a second, not below plain decoding's."""
        return max(self._costs.tokens / self._costs.seconds, 1 / self._plain)

    def _history(self, name: str) -> DrafterHistory:
        history = self._histories.get(name)
        if history is None:  # setdefault makes one every time, 7 µs
            history = self._histories[name] = DrafterHistory(draft=self._costs.draft(name))
        return history


def _agreed(drafted: Sequence[int], emitted: Sequence[TokenId]) -> list[float]:
    """Compare a draft with the text: 1 for each token that is the text's, up to the first that is not, a 0."""
    same = [float(a == b) for a, b in zip(drafted, emitted, strict=False)]
    return same[: same.index(0.0) + 1] if 0.0 in same else same
