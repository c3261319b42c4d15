"""What `-k auto` knows of one drafter: how its tokens fared, by their place and by how sure it was of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import inf, sqrt
from operator import mul

from specdec_engine.adaptive.cost import Drafting
from specdec_engine.core.cycle_types import Sibling
from specdec_engine.record.events import TokenId

MOST = 7
"""The largest k that is tried: passes of up to 8 rows."""
MOST_SURE = 15
"""The same of a drafter that knows before how sure it is, as lookups do: a copy that has gone on for long goes on, and its
token at place 7 was kept 90 times in 100. With 7 the built-in pair wrote 2 % fewer tokens a cycle (30 questions)."""
FIRST = 3
"""k until something is known."""
MEMORY = 0.975
"""The weight that evidence keeps from one cycle (for acceptance, from one draft of the drafter) to the next: some 40 are
remembered, two paragraphs. With 25 a draft with
α 0.4 looked like one with 0.3 every few prompts, and was switched off."""
_LONG_MEMORY = 0.92
"""The weight that what is known of a drafter's confidences keeps, every so many cycles."""
_LOOKS = 8
"""Every so many drafts one goes further."""
_BINS = 10
"""Confidences are told apart in tenths."""
_OPTIMISM = 0.5
"""Standard deviations by which a first token's chance may be better than it looks before its drafter is switched off. Three
misses say little: without, drafts with α 0.15 to 0.4 and c 0.09 were off for a third of simulated greedy runs, which lost 3
to 4 %; hopeless ones cost half a per cent more so."""
_AGED = 0.6
"""The weight that what was seen before a drafter was off keeps when it is tried again."""
FIRST_PROBE = 16
"""Cycles after which a drafter that was switched off is tried once more."""


@dataclass(slots=True)
class _Odds:
    """Discounted successes and trials."""

    hits: float = 0.0
    trials: float = 0.0

    def fade(self, kept: float = MEMORY) -> None:
        self.hits *= kept
        self.trials *= kept

    def add(self, hit: float) -> None:
        self.hits += hit
        self.trials += 1

    def value(self, prior: float) -> float:
        """The rate, with a prior worth two trials."""
        return (self.hits + 2 * prior) / (self.trials + 2)

    def at_best(self) -> float:
        """What the rate may well be, going by so few trials: mean and deviation if at first every rate was as likely."""
        rate = (self.hits + 1) / (self.trials + 2)
        return rate + _OPTIMISM * sqrt(rate * (1 - rate) / (self.trials + 3))


@dataclass(slots=True)
class DrafterHistory:
    """What is known of one drafter."""

    k: int = FIRST
    by_position: list[_Odds] = field(default_factory=lambda: [_Odds() for _ in range(MOST_SURE)])
    by_confidence: list[_Odds] = field(default_factory=lambda: [_Odds() for _ in range(2 * _BINS)])
    """Of first tokens, then of later ones: where a lookup was right once, it mostly goes on to be right."""
    by_sibling: list[_Odds] = field(default_factory=lambda: [_Odds() for _ in range(_BINS)])
    """Second candidates, by the drafter's own chance of them, which is a half at most."""
    draft: Drafting = field(default_factory=Drafting)
    confidences: list[float] = field(default_factory=list)
    """Of the draft in flight."""
    first: float | None = None
    """Chance of the first token of the draft in flight, where the drafter was sure before it."""
    refused: int = 0
    """Cycles in a row in which it would not have paid beside others."""
    sure_before: bool = False
    """Knows how sure it is before it drafts, and at no cost: then that decides, and it is never switched off as a whole."""
    drafts: int = 0
    probe_pause: int = FIRST_PROBE
    cycles_off: int = 0
    """Cycles since it was switched off."""
    backlog: int = 0
    """Cycles of the newest run in which it was not asked: the text that a probe has to read first."""
    least_s: float = inf
    """Of a draft."""
    catch_up: float = inf
    """Least seconds beyond that, for each missed cycle, that a probe took to catch up."""
    probes: int = 0
    probe_drafts: int = 0
    """Drafts in all probes."""
    probing: bool = False
    """It has been switched on again, and has not yet been found to pay."""
    backlog_read: int = 0
    """Missed cycles that all probes had to read."""

    @property
    def most(self) -> int:
        """The largest k that is tried."""
        return MOST_SURE if self.sure_before else MOST

    @property
    def alpha(self) -> float:
        """Chance of a tested token, wherever it stands."""
        hits, trials = sum(odds.hits for odds in self.by_position), sum(odds.trials for odds in self.by_position)
        return (hits + 1) / (trials + 2)

    def reach(self) -> list[float]:
        """By position: the chance that it and all before are accepted."""
        alpha = self.alpha
        return list(accumulate((odds.value(alpha) for odds in self.by_position[: self.most]), mul))

    def reach_of_draft(self, tokens: int) -> list[float]:
        """The same of the draft in flight, of so many tokens: of its first one as sure as it is, and none beyond its end."""
        reach = self.reach()
        more = 1.0 if self.first is None else self.first / reach[0]
        return [min(1.0, one * more) if i < tokens else 0.0 for i, one in enumerate(reach)]

    def optimistic_reach(self) -> list[float]:
        """The same, if the first token is what it may well be."""
        reach = self.reach()
        more = self.by_position[0].at_best() / reach[0]
        return [one * more for one in reach]

    def chance(self, confidence: float, position: int) -> float:
        """Of a token that the drafter is this sure of, given that all before it are right; until there is evidence, the
        drafter is believed."""
        return self._odds(confidence, position).value(confidence)

    def next_chance(self, confidence: float, position: int) -> float:
        """Of a token not drafted yet, after one that the drafter was this sure of."""
        if self.sure_before:
            return self.chance(confidence, position)
        return self.by_position[min(position, self.most - 1)].value(self.alpha)

    def chance_of_sibling(self, chance: float) -> float:
        """Its chance, given that all before it are right; chance: the drafter's own of it."""
        return self._odds_of_sibling(chance).value(chance)

    def _odds_of_sibling(self, chance: float) -> _Odds:
        return self.by_sibling[min(int(2 * chance * _BINS), _BINS - 1)]

    def _odds(self, confidence: float, position: int) -> _Odds:
        return self.by_confidence[min(int(confidence * _BINS), _BINS - 1) + (_BINS if position else 0)]

    def age(self) -> None:
        """It is tried again: what was seen before the pause counts less."""
        for odds in self.by_position:
            odds.fade(_AGED)

    def forget_a_little(self) -> None:
        """Fade what is known of confidences, so that old failures stop counting."""
        for odds in (*self.by_confidence, *self.by_sibling):
            odds.fade(_LONG_MEMORY)

    @property
    def looks_further(self) -> bool:
        """Whether the next draft goes one token further than pays: else what that would cost and bring is never seen again,
        and one slow draft in a run's first cycles holds k down for good."""
        return not self.sure_before and 0 < self.k < MOST and self.drafts % _LOOKS == _LOOKS - 1

    @property
    def probes_s(self) -> float:
        """Seconds of all probes, and of one more now."""
        drafts = self.probe_drafts * (self.probes + 1) / max(1, self.probes)
        return self.least_s * drafts + self.catch_up * (self.backlog_read + self.backlog)

    def learn(self, drafted: int, draft_s: float, kept: Sequence[float]) -> None:
        """Learn from a draft of so many tokens. draft_s: its seconds, evened out; kept: of each tested token 1 or 0, or its
        acceptance probability."""
        self.drafts += 1
        self.least_s = min(self.least_s, draft_s)
        if self.backlog:  # mostly that: held to be what a draft costs, it kept a drafter off for good
            self.catch_up = min(self.catch_up, (draft_s - self.least_s) / self.backlog)
            draft_s -= self.catch_up * self.backlog
            self.backlog_read, self.backlog = self.backlog_read + self.backlog, 0
        self.draft.add(drafted, draft_s)
        self.probe_drafts += self.probing
        for odds in self.by_position:
            odds.fade()
        for odds, hit in zip(self.by_position, kept, strict=False):
            odds.add(hit)
        for position, (confidence, hit) in enumerate(zip(self.confidences, kept, strict=False)):
            self._odds(confidence, position).add(hit)
        self.confidences = []

    def learn_of_siblings(self, siblings: Sequence[Sibling], tokens: Sequence[int], emitted: Sequence[TokenId]) -> None:
        """Learn from second candidates beside drafted tokens: those all before which are the text's."""
        for one in siblings:
            if one.place < len(emitted) and tuple(tokens[: one.place]) == tuple(emitted[: one.place]):
                self._odds_of_sibling(one.chance).add(emitted[one.place] == one.token)
