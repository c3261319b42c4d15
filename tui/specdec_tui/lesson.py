"""Fourteen pages on a recorded run: what a cycle does, why nothing is lost, when it pays, and what was learnt. Pure, without
Textual.

A page puts the view somewhere, wants one thing done, knows when it was, and ends with a question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from specdec_engine.record.events import Cycle
from specdec_tui import questions
from specdec_tui.frame import Frame, View, steps
from specdec_tui.narrate import step_words
from specdec_tui.panels import number
from specdec_tui.pieces import Name
from specdec_tui.questions import Question
from specdec_tui.toy import Branches, Draws, WhatIf

ENOUGH = 2000
"""Draws after which the histograms have met: a share is then off by 0.01."""


@dataclass(slots=True)
class State:
    """What pages look at to see whether theirs was done."""

    view: View
    draws: Draws = field(default_factory=Draws)
    branches: Branches = field(default_factory=Branches)
    what: WhatIf = field(default_factory=WhatIf)


@dataclass(frozen=True, slots=True)
class Page:
    """One thing to understand."""

    title: str
    text: str
    """At most 60 words."""
    task: str
    done: Callable[[State], bool]
    view: Callable[[Frame], View]
    question: Question | None = None
    """After its thing was done; None on the last page."""
    shows: Literal["run", "stacks", "draws", "branches", "curve", "recap"] = "run"
    inspects: bool = False
    """Whether the decision is what to look at."""
    what: WhatIf | None = None
    """What the curve begins with."""


class Lesson:
    """The pages for a run, and which one is open."""

    def __init__(self, frame: Frame) -> None:
        """frame: a whole run with a rejection, a full acceptance and a plain cycle (`demo.jsonl`)."""
        self.pages = pages(frame)
        self.at = 0
        self.ticked = set[int]()
        self.answers = dict[int, int]()
        """By page: the index of the choice."""
        self.asking = False
        """Whether the page's question is shown."""

    @property
    def page(self) -> Page:
        return self.pages[self.at]

    def turn(self, by: int) -> None:
        self.at = max(0, min(len(self.pages) - 1, self.at + by))
        self.asking = False

    def answer(self, choice: int) -> None:
        """The first answer counts."""
        if self.asking:
            self.answers.setdefault(self.at, choice)

    @property
    def score(self) -> tuple[int, int]:
        """Questions that were answered right, and all there are."""
        asked = [page.question for page in self.pages]
        right = sum(q is not None and self.answers.get(at) == q.right for at, q in enumerate(asked))
        return right, sum(q is not None for q in asked)

    def look(self, state: State) -> None:
        """Tick the page if its thing was done; once ticked it stays so."""
        if self.page.done(state):
            self.ticked.add(self.at)


def pages(frame: Frame) -> tuple[Page, ...]:
    """Raises ValueError for a run that lacks what they show."""
    plain = _first(frame, lambda c: not c.drafted)
    shown = _first(frame, _begins_well)
    refused = _first(frame, lambda c: _ends_badly(c) and c.accepted < len(c.drafted) - 1, _ends_badly)
    thrown = next((i for i, c in enumerate(frame.cycles) if _kept_by_a_throw(c) and _rejects_after(frame, i)), None)
    whole = _first(frame, lambda c: len(c.drafted) > 1 and c.end == "bonus")
    k, at, s = len(frame.cycles[shown].drafted), frame.cycles[refused].accepted, frame.summary()
    before_throw = len(frame.cycles[refused].drafted) + 1 + at

    def within(index: int, step: int) -> Callable[[Frame], View]:
        return partial(_within, index=index, step=step)

    def reached(index: int, step: int) -> Callable[[State], bool]:
        return lambda state: _reached(state.view, index, step)

    return (
        Page(
            "One pass, one token",
            "A language model, the target, reads the text so far and says how likely each next token is. One is drawn, and "
            "everything begins again. Each pass reads all of the model's weights, so one pass for four tokens "
            f"costs far less than four passes. Cycle {plain + 1} was a pass for one: nothing was drafted, one token came.",
            "press → for the next cycle",
            lambda state: state.view.shown > plain + 1,
            lambda f: View(f).to(plain + 1),
            question=questions.ONE_PASS,
        ),
        Page(
            "A draft guesses ahead",
            "Something small and fast guesses the next few tokens: a little model, or a lookup of what followed "
            "the same words before. It may be wrong; nothing is decided yet. A model draws its guess from a "
            "distribution q; a lookup names one token, so its q is 1. Guesses stand dim in the text.",
            f"press . until all {k} guesses are there",
            reached(shown, k),
            within(shown, 1),
            question=questions.DRAFT,
        ),
        Page(
            "One pass reads them all",
            "The target reads all guesses in a single pass. At each place it says what it would have said there "
            "itself: a whole distribution p, beside the draft's q. That is the dear step of the cycle, but one pass for "
            "all guesses costs less than a pass for each.",
            "press . for the pass",
            reached(shown, k + 1),
            within(shown, k),
            question=questions.READS,
        ),
        Page(
            "Likely enough: always kept",
            "Now each guess is tested, left to right. Where the target finds the guess at least as likely as the "
            "draft did, p ≥ q, it is kept. Nothing is left to chance: min(1, p/q) is 1.",
            "press . to test the first guess",
            reached(shown, k + 2),
            within(shown, k + 1),
            inspects=True,
            question=questions.KEPT,
        ),
        Page(
            "Too sure: a throw decides",
            "Where the draft was surer than the target, p < q, the guess would come too often. It is kept with "
            "probability p/q only: q · p/q is p. A number u between 0 and 1 is drawn, the mark ▲ on the line. Left of "
            "the end of the bar min(1, p/q): kept. Right of it: rejected.",
            "press . to throw" + ("" if thrown is None else ", then ! for a throw that is lost"),
            reached(refused, before_throw + 1) if thrown is None else partial(_lost_after, thrown),
            within(refused, before_throw) if thrown is None else within(thrown, _before_throw(frame.cycles[thrown])),
            inspects=True,
            question=questions.THROWN,
        ),
        Page(
            "Rejected: drawn from what is left",
            "The guesses after it are untested: they stood on a token that is not there. In its place comes a "
            "token drawn from what the target still has coming: max(0, p − q), the part of p that the draft's "
            "guesses did not cover. So the cycle still gives a token of the target's own.",
            "press . for the correction",
            reached(refused, steps(frame.cycles[refused])),
            within(refused, before_throw + 1),
            inspects=True,
            question=questions.LEFT,
        ),
        Page(
            "All kept: one more for nothing",
            "In this cycle every guess holds. The pass has read them all, so it also says what comes after the last: a "
            "bonus token. With k guesses a cycle gives up to k + 1 tokens for one pass of the target.",
            "press . until the bonus is there",
            reached(whole, steps(frame.cycles[whole])),
            within(whole, len(frame.cycles[whole].drafted) + 1),
            question=questions.BONUS,
        ),
        Page(
            "Why nothing is lost",
            "A guess comes with chance q and is kept with min(1, p/q): min(p, q) of all places. Corrections bring what "
            "is missing, p − min(p, q). The sum is p, however bad the draft. Not the same words as without a draft, but "
            "each with the same chance: at every place, so for the whole text.",
            f"press space, until {ENOUGH:,} are drawn",
            lambda state: state.draws.made >= ENOUGH,
            View,
            shows="stacks",
            question=questions.PARTS,
        ),
        Page(
            "The careless way",
            "More draws, beside the target's own, and beside a careless rule, which after a rejection draws "
            "from p again instead of from what is left of it. It never gets there: what the draft likes comes too "
            "often. The distance to p says it in one number; chance alone leaves about 0.01.",
            f"press space, until {ENOUGH:,} more are drawn",
            lambda state: state.draws.made >= 2 * ENOUGH,
            View,
            shows="draws",
            question=questions.CARELESS,
        ),
        Page(
            "Two guesses for one place",
            "A draft may branch: a lookup and a model guess at once, and the pass reads both. The second guess is tested "
            "only where the first was rejected, by the same rule, against what is left of p. Nothing is lost, and one of "
            "two holds more often than one. It pays where the wider pass is cheap.",
            f"press space, until {ENOUGH:,} are drawn",
            lambda state: state.branches.made >= ENOUGH,
            View,
            shows="branches",
            question=questions.BRANCHES,
        ),
        Page(
            "Two ways to count",
            f"In this run {s.drafted} tokens were drafted and {s.accepted} kept: an acceptance rate of "
            f"{number(s.acceptance_rate)}. But a rejection leaves those after it untested: {s.tested} were tested, and "
            "of them "
            f"{number(s.alpha)} were kept. That is α, how often a guess that is tested holds: it says how good a draft is, "
            "whatever k is.",
            "press end for the whole run",
            lambda state: state.view.at_end,
            lambda f: View(f).to(refused + 1),
            question=questions.COUNTED,
        ),
        Page(
            "How far to guess",
            "If a guess holds with chance α, two in a row do with α²: k guesses give 1 + α + α² + … + α^k tokens a pass. "
            "But each costs a draft step, and widens the pass: at some k one more is not worth it. `-k 4` sets k; "
            "`-k auto` learns it.",
            "press ] for more, [ for fewer, until you have found the best k",
            lambda state: state.what.k == state.what.best,
            View,
            shows="curve",
            what=WhatIf(),
            question=questions.BEST_K,
        ),
        Page(
            "When it loses",
            "Where few guesses hold, or guessing is dear, no k saves what it costs. Then the best k is 0, plain "
            "decoding, and an honest tool says so. Another temperature changes p and q alike, so α may fall or rise "
            "with it; only a measurement tells.",
            "in this toy T lowers α: press it until plain decoding is best",
            lambda state: state.what.best == 0,
            View,
            shows="curve",
            what=WhatIf(alpha=0.6, k=4),
            question=questions.LOSES,
        ),
        Page(
            "What there is to remember",
            "One line a page; ✓ where you answered right.",
            "",
            lambda state: True,
            View,
            shows="recap",
        ),
    )


def script(frame: Frame, name: Name) -> Iterator[str]:
    """The lesson in sentences."""
    found = pages(frame)
    for place, page in enumerate(found, 1):
        yield f"{place} of {len(found)}. {page.title}"
        yield page.text
        if page.shows == "run":
            yield step_words(_whole(page.view(frame)), name)
        if (asked := page.question) is not None:
            yield f"Question: {asked.text} {asked.choices[asked.right].capitalize()}. {asked.why}"
        if page.shows == "recap":
            yield from (page.question.recap for page in found if page.question is not None)
        yield ""


def _whole(view: View) -> View:
    return replace(view, step=None)


def _within(frame: Frame, index: int, step: int) -> View:
    return replace(View(frame).to(index + 1), step=step)


def _reached(view: View, index: int, step: int) -> bool:
    """Whether the view is at this step of this cycle, or past it; elsewhere nothing was seen of it."""
    return view.shown == index + 1 and (view.step is None or view.step >= step)


def _first(frame: Frame, *wanted: Callable[[Cycle], bool]) -> int:
    """The first cycle that fits the first of these that any fits."""
    found = (i for fits in wanted for i, cycle in enumerate(frame.cycles) if fits(cycle))
    if (first := next(found, None)) is None:
        raise ValueError("the run has no cycle that a page could show")
    return first


def _begins_well(cycle: Cycle) -> bool:
    """Its first guess is kept without a throw."""
    if len(cycle.drafted) < 2 or not cycle.accepted:
        return False
    p, q = cycle.p[0], cycle.q[0]
    return p is not None and q is not None and p >= q and q < 1


def _kept_by_a_throw(cycle: Cycle) -> bool:
    """Its first guess is kept though p < q, and the number that was drawn was not far from failing."""
    if not cycle.drafted or not cycle.accepted or cycle.parents is not None:
        return False
    p, q, u = cycle.p[0], cycle.q[0], cycle.u[0]
    return p is not None and q is not None and u is not None and q < 1 and 0.2 < p / q < 0.8 and u > 0.2


def _before_throw(cycle: Cycle) -> int:
    """The step at which all of it is read, and nothing tested."""
    return len(cycle.drafted) + 1


def _rejects_after(frame: Frame, index: int) -> bool:
    """Say whether the next rejection after a cycle is by a throw, too."""
    after = next((c for c in frame.cycles[index + 1 :] if c.rejected is not None), None)
    return after is not None and _thrown_out(after)


def _thrown_out(cycle: Cycle) -> bool:
    p, q = (None, None) if cycle.rejected is None else (cycle.p[cycle.rejected], cycle.q[cycle.rejected])
    return p is not None and q is not None and 0.02 < p < q < 1


def _lost_after(index: int, state: State) -> bool:
    """Say whether a guess of a later cycle is looked at that was rejected by a throw."""
    view = state.view
    return view.shown > index + 1 and view.cycle is not None and _thrown_out(view.cycle)


def _ends_badly(cycle: Cycle) -> bool:
    """A guess is rejected by a throw, and what is left is more than one token."""
    at = cycle.accepted
    if at >= len(cycle.drafted) or len(cycle.residual) < 3:
        return False
    p, q = cycle.p[at], cycle.q[at]
    return p is not None and q is not None and 0.02 < p < q < 1
