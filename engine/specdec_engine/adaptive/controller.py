"""`-k auto`: how far to draft, learned while decoding.

Two questions with one answer: what does one more drafted token add, and what does it cost? It adds its chance of being
accepted, reach · a, where reach is the chance that all before it are; it costs a draft step and the step of the verify
staircase, in tokens at the rate of this run. Between cycles a cap is set for each drafter from how far its drafts got;
within a draft the drafter's own confidence decides, calibrated by how such tokens fared before. k = 0 is a legal
answer: a draft that does not pay is switched off, and tried again now and then.

Nothing here looks at the value of a drawn token before it is in the draft, so no rule is biased by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import inf, sqrt
from operator import mul

from specdec_engine.adaptive.cost import Choice, Drafting, Drift, Staircase, Times, best_k, cycle_of
from specdec_engine.record.events import Cycle, known_phases

MOST = 7
"""The largest k that is tried: passes of up to 8 rows. A ninth costs as much as a quarter of all eight in int4 on a CPU (2.3
plain passes against 1.85), and one drafted token rarely brings that."""
_FIRST = 3
"""k until something is known."""
_PLAIN_AT = (2, 8, 16, 32, 64, 128, 256)
"""The cycles that measure a plain pass, which every comparison needs: one alone, on a shared machine, was so far off that
a draft with α 0.4 was switched off for a sixth of the cycles."""
_MEMORY = 0.975
"""The weight that evidence keeps from one cycle (for acceptance, from one draft of the drafter) to the next: some 40 are
remembered, two paragraphs. With 25 a draft with
α 0.4 looked like one with 0.3 every few prompts, and was switched off."""
_FADES_EVERY = 8
_LONG_MEMORY = 0.92
"""The weight that what is known of a drafter's confidences keeps, every so many cycles."""
_AGED = 0.6
"""The weight that what was seen before a drafter was off keeps when it is tried again."""
_LOOKS = 8
"""Every so many drafts one goes further."""
_BINS = 10
"""Confidences are told apart in tenths."""
_FIRST_PROBE, _LAST_PROBE = 16, 128
"""Cycles after which a drafter that was switched off is tried once more; the pause doubles where it lost clearly."""
_CLEARLY = 1.07
"""How much faster plain decoding must be for that: in simulated runs, whose texts and machine changed as real ones do, drafts
near the break-even so gained up to 1.4 %, and hopeless ones lost 0.2."""
_PROBE_SHARE = 0.01
"""Share of the time that a drafter's probes may take, but for the first two: `self:8` reads 100 tokens in 4 plain passes, and
ran at 0.96 of plain decoding."""
_OPTIMISM = 0.5
"""Standard deviations by which a first token's chance may be better than it looks before its drafter is switched off. Three
misses say little: without, drafts with α 0.15 to 0.4 and c 0.09 were off for a third of simulated greedy runs, which lost 3
to 4 %; hopeless ones cost half a per cent more so."""
_BETTER = 1.02
"""A new k must promise this much more than the one in force, or it would change with every breath of noise."""
_BETTER_OFF = 1.03
"""The same for none at all, after which nothing more is learnt."""


@dataclass(slots=True)
class _Odds:
    """Discounted successes and trials."""

    hits: float = 0.0
    trials: float = 0.0

    def fade(self, kept: float = _MEMORY) -> None:
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
class _DrafterHistory:
    """What is known of one drafter."""

    k: int = _FIRST
    by_position: list[_Odds] = field(default_factory=lambda: [_Odds() for _ in range(MOST)])
    by_confidence: list[_Odds] = field(default_factory=lambda: [_Odds() for _ in range(2 * _BINS)])
    """Of first tokens, then of later ones: where a lookup was right once, it mostly goes on to be right."""
    draft: Drafting = field(default_factory=Drafting)
    confidences: list[float] = field(default_factory=list)
    """Of the draft in flight."""
    sure_before: bool = False
    """Knows how sure it is before it drafts, and at no cost: then that decides, and it is never switched off as a whole."""
    drafts: int = 0
    probe_pause: int = _FIRST_PROBE
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
    def alpha(self) -> float:
        """Chance of a tested token, wherever it stands."""
        hits, trials = sum(odds.hits for odds in self.by_position), sum(odds.trials for odds in self.by_position)
        return (hits + 1) / (trials + 2)

    def reach(self) -> list[float]:
        """By position: the chance that it and all before are accepted."""
        alpha = self.alpha
        return list(accumulate((odds.value(alpha) for odds in self.by_position), mul))

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
        return self.by_position[min(position, MOST - 1)].value(self.alpha)

    def _odds(self, confidence: float, position: int) -> _Odds:
        return self.by_confidence[min(int(confidence * _BINS), _BINS - 1) + (_BINS if position else 0)]

    def forget_a_little(self) -> None:
        """Fade what is known of confidences, so that old failures stop counting."""
        for odds in self.by_confidence:
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

    def learn(self, cycle: Cycle, draft_s: float, kept: Sequence[float]) -> None:
        """draft_s: the cycle's own, evened out; kept: of each tested token 1 or 0, or its acceptance probability."""
        self.drafts += 1
        self.least_s = min(self.least_s, draft_s)
        if self.backlog:  # mostly that: held to be what a draft costs, it kept a drafter off for good
            self.catch_up = min(self.catch_up, (draft_s - self.least_s) / self.backlog)
            draft_s -= self.catch_up * self.backlog
            self.backlog_read, self.backlog = self.backlog_read + self.backlog, 0
        self.draft.add(len(cycle.drafted), draft_s)
        self.probe_drafts += self.probing
        for odds in self.by_position:
            odds.fade()
        for odds, hit in zip(self.by_position, kept, strict=False):
            odds.add(hit)
        for position, (confidence, hit) in enumerate(zip(self.confidences, kept, strict=False)):
            self._odds(confidence, position).add(hit)
        self.confidences = []


class AutoK:
    """The controller; one a pair, so that what a run learns serves the next."""

    def __init__(self) -> None:
        self._seed, self._tokenwise = 0, False
        self._forget()

    def _forget(self) -> None:
        self._passes, self._other, self._drift = Staircase(), Times(), Drift()
        self._histories: dict[str, _DrafterHistory] = {}
        self._seeds: set[int] = set()  # of the runs it has learnt from
        self._cycles = 0
        self._tokens = self._seconds = self._elapsed = 0.0

    def begin(self, seed: int, *, tokenwise: bool = False) -> None:
        """A run begins. What an earlier run with the same seed has taught is forgotten: it was tested with the very numbers
        that this one will be, and k must not depend on them.

        tokenwise: the rule keeps each token that it tests with chance Σ min(p, q), the `overlap` of its cycle.
        """
        if seed in self._seeds:
            self._forget()
        for history in self._histories.values():  # drafters read a prompt before the run
            history.backlog = 0
        self._seed, self._tokenwise = seed, tokenwise

    @property
    def k(self) -> int:
        """For the next cycle: the most that any drafter may propose."""
        if self._measuring:
            return 0
        return max((history.k + history.looks_further for history in self._histories.values()), default=_FIRST)

    @property
    def _measuring(self) -> bool:
        return self._cycles in _PLAIN_AT and self._passes.measured(1) <= _PLAIN_AT.index(self._cycles)

    @property
    def off(self) -> bool:
        """Whether every drafter was switched off."""
        return bool(self._histories) and not any(history.k for history in self._histories.values())

    def limit(self, name: str) -> int:
        """What this drafter may propose in the next cycle."""
        history = self._history(name)
        return history.k + history.looks_further

    def should_draft(self, name: str, confidence: float) -> bool:
        """Whether a draft that is this sure of its first token should begin: it pays, and more than that of another drafter
        which knows only afterwards how sure it is."""
        history = self._history(name)
        history.sure_before = True
        if not self._knows(history):
            return True
        gain = self._net_gain(history, 1.0, 0, history.chance(confidence, 0), history.chance(confidence, 1))
        return gain > max([0.0, *(self._net_gain_of_draft(other) for other in self._histories.values())])

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

    def observe(self, cycle: Cycle) -> str:
        """Learn from a cycle. Returns why `k` is another now; empty if it is not."""
        before, reasons = self.k, list[str]()
        self._seeds.add(self._seed)
        self._cycles += 1
        width = len(cycle.drafted) + 1
        phases = known_phases(cycle)
        self._drift.saw(width, phases.verify_s)
        draft_s, verify_s, other_s = map(self._drift.evened, (phases.draft_s, phases.verify_s, phases.other_s))
        self._passes.add(width, verify_s)
        self._other.add(other_s)
        self._tokens = _MEMORY * self._tokens + len(cycle.emitted)
        self._seconds = _MEMORY * self._seconds + draft_s + verify_s + other_s
        self._elapsed += draft_s + verify_s + other_s
        if self._cycles % _FADES_EVERY == 0:
            for history in self._histories.values():
                history.forget_a_little()
        if cycle.drafted:
            self._history(cycle.drafter).learn(cycle, draft_s, self._kept(cycle))
        if self._measuring:
            reasons = ["a plain pass is measured, which all else is held against"]
        elif self._passes.measured(1):
            reasons = [
                self._set_k(name, history, bool(cycle.drafted) and name == cycle.drafter)
                for name, history in self._histories.items()
            ]
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

    def _set_k(self, name: str, history: _DrafterHistory, drafted: bool) -> str:
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
            for odds in history.by_position:  # what was seen before the pause has aged
                odds.fade(_AGED)
            return f"{name} is tried once more"
        if not drafted:
            return ""
        reach = history.reach()
        now = self._choice_at(history, reach, history.k)
        best = self._choice_at(history, reach, MOST) if history.sure_before else self._best_choice(history, reach)
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
        history.probe_pause = _FIRST_PROBE
        if history.sure_before:
            return f"{name} drafts as far as it is sure"
        return f"{name}: {best.emitted:.2f} tokens expected for {best.seconds / self._plain:.2f} plain cycles"

    def _best_choice(self, history: _DrafterHistory, reach: Sequence[float]) -> Choice:
        return best_k(reach, history.draft, self._passes, self._other.seconds)

    def _choice_at(self, history: _DrafterHistory, reach: Sequence[float], k: int) -> Choice:
        return cycle_of(reach[:k], history.draft, self._passes, self._other.seconds)

    @property
    def _plain(self) -> float:
        """Seconds of a plain cycle."""
        return self._passes(1) + self._other.seconds

    def _pays(self, history: _DrafterHistory, reach: float, drafted: int, first: float, later: float) -> bool:
        """Whether drafting on adds more than it costs."""
        return self._net_gain(history, reach, drafted, first, later) > 0 if self._knows(history) else drafted < _FIRST

    def _knows(self, history: _DrafterHistory) -> bool:
        return self._passes.measured(1) > 0 and history.draft.known

    def _net_gain(self, history: _DrafterHistory, reach: float, drafted: int, first: float, later: float) -> float:
        """The best net gain in tokens of drafting 1, 2, … more: tokens added, less the draft's and the pass's extra
        seconds at this run's tokens a second.

        By several, because of the staircase: the first row more may cost as much as three. `first` and `later` are the
        chances of the next token and of those after it.
        """
        rate, gain, nets = self._rate, 0.0, list[float]()
        now = history.draft(drafted) + self._passes(drafted + 1)
        for k in range(drafted + 1, MOST + 1):
            reach *= first if k == drafted + 1 else later
            gain += reach
            nets.append(gain - rate * (history.draft(k) + self._passes(k + 1) - now))
        return max(nets, default=0.0)

    def _net_gain_of_draft(self, history: _DrafterHistory) -> float:
        """The same for a whole draft of a drafter that is sure of nothing before; 0 for one that is off, or not known yet."""
        if history.sure_before or not history.k or not self._knows(history):
            return 0.0
        rate, plain = self._rate, self._passes(1)
        gains = accumulate(history.reach()[: history.k])
        return max(
            gain - rate * (history.draft(k) + self._passes(k + 1) - plain) for k, gain in enumerate(gains, start=1)
        )

    @property
    def _rate(self) -> float:
        """Tokens a second, not below plain decoding's."""
        return max(self._tokens / self._seconds, 1 / self._plain)

    def _history(self, name: str) -> _DrafterHistory:
        history = self._histories.get(name)
        if history is None:  # setdefault makes one every time, 7 µs
            history = self._histories[name] = _DrafterHistory()
        return history
