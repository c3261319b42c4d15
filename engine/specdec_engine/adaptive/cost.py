"""What a cycle is worth and what it costs: the sums behind `-k auto`. Plain numbers, no torch.

Notation: reach[j] is the probability that at least j + 1 drafted tokens are accepted (its survival), v(n) the seconds of a
target pass over n tokens, which is a staircase: kernels work on tiles of rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import median


def expected_emitted(reach: Sequence[float]) -> float:
    """Tokens of a cycle that drafts len(reach): the accepted ones, and the target's own."""
    return 1.0 + sum(reach)


class Times:
    """Recent durations of one thing, and their median: what `Drift` has evened out errs either way."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=_KEPT)
        self._median: float | None = None

    def add(self, seconds: float) -> None:
        self._last.append(seconds)
        self._median = None

    def aged(self) -> Times:
        """The same median, as if measured once: the next measurements soon outweigh it."""
        made = Times()
        if self._last:
            made.add(self.seconds)
        return made

    def __len__(self) -> int:
        return len(self._last)

    @property
    def seconds(self) -> float:
        """Raises StatisticsError while nothing is measured."""
        if self._median is None:
            self._median = median(self._last)
        return self._median


_KEPT = 7


class Drift:
    """How slow the machine is now, against when it was first seen: shared machines change by a fifth within seconds, and
    what was measured before that must not be held against what is measured after. Told of each pass; divides it out."""

    def __init__(self) -> None:
        self._factor = 1.0
        self._first: dict[int, tuple[int, float]] = {}

    def evened(self, seconds: float) -> float:
        """As long as it would have taken at first."""
        return seconds / self._factor

    def afresh(self) -> Drift:
        """The same slowness, for passes that are other ones from now on."""
        made = Drift()
        made._factor = self._factor
        return made

    def saw(self, tokens: int, seconds: float) -> None:
        """A pass over so many tokens took so long. Held against the first few of that width, which stay what they are: a
        reference that moved along would drift away with every long pass."""
        if seconds <= 0:
            return
        seen, mean = self._first.get(tokens, (0, 0.0))
        if seen >= 3:
            self._factor *= min(2.0, max(0.5, self.evened(seconds) / mean)) ** _FOLLOWS
        if seen < _KEPT:
            self._first[tokens] = (seen + 1, mean + (self.evened(seconds) - mean) / (seen + 1))


_FOLLOWS = 0.2
"""A change is followed within some five passes."""


class Drafting:
    """Seconds of a draft by its tokens, as measured on the way. The first token is the dearest, since what the target has
    read meanwhile is read with it: a head takes 1.5 ms for one and 0.7 for each more. Between lengths that were measured on a
    line, and on the same line beyond."""

    def __init__(self) -> None:
        self._by_length: dict[int, Times] = {}
        self._points: list[tuple[int, float]] = []  # made once a cycle, since some 50 questions a cycle follow
        self._seconds: list[float] = []  # of 0, 1, … tokens, as far as was asked

    def add(self, tokens: int, seconds: float) -> None:
        self._by_length.setdefault(tokens, Times()).add(seconds)
        lengths = sorted(self._by_length)
        times = accumulate((self._by_length[n].seconds for n in lengths), max)  # more tokens never take less
        self._points, self._seconds = list(zip(lengths, times, strict=True)), [0.0]

    def aged(self) -> Drafting:
        """See `Times.aged`."""
        made = Drafting()
        for tokens, times in self._by_length.items():
            made.add(tokens, times.seconds)
        return made

    @property
    def known(self) -> bool:
        return bool(self._points)

    def __call__(self, tokens: int) -> float:
        """Raises ValueError while nothing is measured."""
        if not tokens:
            return 0.0
        while len(self._seconds) <= tokens:
            self._seconds.append(self._on_the_line(len(self._seconds)))
        return self._seconds[tokens]

    def _on_the_line(self, tokens: int) -> float:
        if not self._points:
            raise ValueError("no draft was measured")
        first, least = self._points[0]
        if len(self._points) == 1 or tokens <= first:
            return least * tokens / first
        i = next((i for i, (n, _) in enumerate(self._points) if n >= tokens), len(self._points) - 1)
        (before, low), (after, high) = self._points[i - 1], self._points[i]
        return low + max(0.0, high - low) / (after - before) * (tokens - before)


class Staircase:
    """Seconds of a pass by its tokens, as measured on the way; between measured widths on a line, beyond them as steep as the
    last of these, but no steeper than all of them. Held to be free there, a lookup's first draft of 15 tokens cost nearly
    five plain passes on a packed CPU. From one step alone nothing follows: on a GPU two rows may cost more than one, and
    more no more than two."""

    def __init__(self) -> None:
        self._by_width: dict[int, Times] = {}
        self._heights: list[float] = []  # of 1, 2, … tokens; as above
        self._slope = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self._by_width.setdefault(tokens, Times()).add(seconds)
        widths = sorted(self._by_width)
        heights = [self._by_width[width].seconds for width in widths]
        for i in range(len(heights) - 2, -1, -1):  # noise only adds: no pass takes longer than a wider one
            heights[i] = min(heights[i], heights[i + 1])
        self._heights = [heights[0]] * widths[0]
        for i in range(1, len(widths)):
            each = (heights[i] - heights[i - 1]) / (widths[i] - widths[i - 1])
            self._heights += [heights[i - 1] + each * step for step in range(1, widths[i] - widths[i - 1] + 1)]
            self._slope = (
                min(each, (heights[i] - heights[0]) / (widths[i] - widths[0])) if widths[i] >= _STEEP_FROM else 0.0
            )

    def __call__(self, tokens: int) -> float:
        """Never falls with more tokens. Raises ValueError while nothing is measured."""
        if not self._heights:
            raise ValueError("no pass was measured")
        known = len(self._heights)
        return self._heights[tokens - 1] if tokens <= known else self._heights[-1] + self._slope * (tokens - known)

    def measured(self, tokens: int) -> int:
        """How often, of late."""
        return len(self._by_width.get(tokens, ()))

    def aged(self) -> Staircase:
        """See `Times.aged`."""
        made = Staircase()
        for width, times in self._by_width.items():
            made.add(width, times.seconds)
        return made


_STEEP_FROM = 4
"""Tokens of the widest pass from which on wider ones are judged by it."""


@dataclass(slots=True)
class Costs:
    """Times of cycles after contexts of about one length: attention over more makes passes dearer, wide ones most of all,
    and a model draft too."""

    passes: Staircase = field(default_factory=Staircase)
    other: Times = field(default_factory=Times)
    drift: Drift = field(default_factory=Drift)
    drafts: dict[str, Drafting] = field(default_factory=dict)
    """By drafter."""
    cycles: int = 0
    plain: int = 0
    """Plain passes among them."""
    tokens: float = 0.0
    seconds: float = 0.0
    """Of late, for a rate."""

    def draft(self, name: str) -> Drafting:
        return self.drafts.setdefault(name, Drafting())

    def carried(self) -> Costs:
        """A copy for another length, until that is measured."""
        drafts = {name: times.aged() for name, times in self.drafts.items()}
        made = Costs(self.passes.aged(), self.other.aged(), self.drift.afresh(), drafts)
        made.tokens, made.seconds = _CARRIED * self.tokens, _CARRIED * self.seconds
        return made


_CARRIED = 0.1
"""Weight of a rate at another length, against one that was measured for long."""


class CostsByLength:
    """Those of the length that contexts have now, and of others."""

    def __init__(self) -> None:
        self.now = Costs()
        self._known: dict[int, Costs] = {}

    def go_to(self, context: int) -> bool:
        """Take the costs of contexts with so many tokens. True where those are others than before, and measured."""
        length = max(0, context.bit_length() - _SHORT_BITS)
        if self._known.get(length) is self.now:
            return False
        if not self.now.cycles and not self._known:
            self._known[length] = self.now
        elif length not in self._known:
            nearest = min(self._known, key=lambda other: abs(other - length))
            self._known[length] = self._known[nearest].carried()
        before, self.now = self.now, self._known[length]
        return self.now is not before and self.now.cycles > 0


_SHORT_BITS = 10
"""Contexts of less than 1,024 tokens are alike, and from there on those of each power of two."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A k, and what is expected of it."""

    k: int
    emitted: float
    """Expected tokens a cycle."""
    seconds: float
    """Expected seconds a cycle."""

    @property
    def rate(self) -> float:
        return self.emitted / self.seconds


def cycle_of(reach: Sequence[float], draft: Callable[[int], float], passes: Staircase, other_s: float) -> Choice:
    """A cycle that drafts len(reach) tokens. draft: seconds of so many."""
    k = len(reach)
    return Choice(k, expected_emitted(reach), draft(k) + passes(k + 1) + other_s)


def best_k(reach: Sequence[float], draft: Callable[[int], float], passes: Staircase, other_s: float) -> Choice:
    """Of 0 to len(reach), the k with the most expected tokens a second."""
    emitted = enumerate(accumulate(reach, initial=1.0))
    choices = (Choice(k, tokens, draft(k) + passes(k + 1) + other_s) for k, tokens in emitted)
    return max(choices, key=lambda choice: choice.rate)
