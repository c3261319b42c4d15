"""An audit: places of answers tested one by one, and a verdict on all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from specdec_engine.audit.sources import LOOKED_AT, Said, Source
from specdec_engine.audit.statistics import (
    SIGNIFICANT,
    Cells,
    combined,
    p_value,
    p_value_of_two,
    power_of,
    toward,
)

Verdict = Literal["lossless", "biased", "undecided"]
PROMPTS = (
    "red, green, blue, red, green, blue, red,",
    "The cat sat on the mat. The dog sat on the",
    "one two three one two three one two",
    "def f(x):\n    return x + 1\n\ndef g(x):\n    return",
)
"""Each repeats itself, so that a lookup has something to propose."""
SHIFT = 0.1
"""Of the mass, moved to the likeliest token: the fault whose discovery is reckoned with where drafts are not told."""
_ENOUGH = 0.9
"""The chance to find a fault, below which nothing is claimed."""
_FEWEST = 40
"""Answers with the likeliest first token, for the second place to be looked at."""


@dataclass(frozen=True, slots=True)
class Place:
    """One place of the answers to one prompt."""

    prompt: int
    place: int
    draws: int
    drafted: float | None
    """Share of the answers in which a drafted token stood here; None where it is not told."""
    p_value: float
    distance: float
    """Total variation of what was said from the distribution, which chance alone makes greater than 0."""


@dataclass(frozen=True, slots=True)
class Audit:
    """What was found."""

    source: str
    against: str
    verdict: Verdict
    p_value: float
    power: float
    """The chance to have found the fault that `fault` says."""
    fault: str
    places: tuple[Place, ...]
    control: float
    """The p-value of one run of that very fault on the same places, which has to be small."""

    @property
    def draws(self) -> int:
        return sum(place.draws for place in self.places)


@dataclass(frozen=True, slots=True)
class _Looked:
    cells: Cells
    faulty: np.ndarray
    draws: int
    place: Place


Exactly = Callable[[Sequence[int], Sequence[int]], np.ndarray]
"""(prompt, what was said after it) -> [V]: the target's own distribution of the next token."""


def audit(
    source: Source,
    against: str,
    exactly: Exactly,
    prompts: Sequence[Sequence[int]],
    samples: int,
    seed: int,
    done: Callable[[], None],
) -> Audit:
    """Against the target's own distribution. done: called after each answer."""
    looked = list[_Looked]()
    for number, prompt in enumerate(prompts):
        said = source.sample(prompt, samples, seed + 1_000_003 * number, done)
        for place in range(source.first_place, LOOKED_AT):
            found = _look(number, place, prompt, said, exactly)
            looked += [] if found is None else [found]
    told = any(entry.place.drafted is not None for entry in looked)
    fault = (
        "drawing from p after a rejection, and not from what p has more than q,"
        if told
        else f"moving {SHIFT:.0%} of the mass to the likeliest token"
    )
    return _judged(source.name, against, looked, fault, seed)


def audit_two(
    source: Source,
    plain: Source,
    prompts: Sequence[Sequence[int]],
    samples: int,
    seed: int,
    done: Callable[[], None],
) -> Audit:
    """The same against answers without speculation: their distribution is known by their counts alone."""
    looked = list[_Looked]()
    for number, prompt in enumerate(prompts):
        ours = source.sample(prompt, samples, seed + 1_000_003 * number, done)
        theirs = plain.sample(prompt, samples, seed + 1_000_003 * number + 500_000, done)
        for place in range(source.first_place, LOOKED_AT):
            a, b = (_draws(said, place, _likeliest(theirs)) for said in (ours, theirs))
            if min(len(a), len(b)) < _FEWEST:
                continue
            tokens = sorted({*a, *b})
            counts = [np.array([draws.count(token) for token in tokens]) for draws in (a, b)]
            p = counts[1] / counts[1].sum()
            cells = Cells.of(np.where(p > 0, p, 1e-9), len(a) // 2)  # two samples find half as much
            faulty = _in_cells(cells, toward(p, int(p.argmax()), SHIFT))
            distance = float(np.abs(counts[0] / counts[0].sum() - p).sum() / 2)
            found = Place(number, place, len(a), None, p_value_of_two(*counts), distance)
            looked.append(_Looked(cells, faulty, len(a) // 2, found))
    return _judged(source.name, plain.name, looked, f"moving {SHIFT:.0%} of the mass to the likeliest token", seed)


def _judged(source: str, against: str, looked: Sequence[_Looked], fault: str, seed: int) -> Audit:
    """All places together, and the fault tried on them."""
    faults, chance = [(entry.cells, entry.faulty, entry.draws) for entry in looked], np.random.default_rng(seed)
    control = combined([p_value(chance.multinomial(n, faulty / faulty.sum()), c.p) for c, faulty, n in faults])
    total, power = combined([entry.place.p_value for entry in looked]), power_of(faults, seed)
    places = tuple(entry.place for entry in looked)
    return Audit(source, against, _verdict(total, power), total, power, fault, places, control)


def _verdict(total: float, power: float) -> Verdict:
    if total < SIGNIFICANT:
        return "biased"
    return "lossless" if power >= _ENOUGH else "undecided"


def _likeliest(said: Sequence[Said]) -> int:
    return Counter(answer.tokens[0] for answer in said if answer.tokens).most_common(1)[0][0]


def _draws(said: Sequence[Said], place: int, first: int) -> list[int]:
    """The tokens at this place; at the second of those answers that begin with this token."""
    return [s.tokens[place] for s in said if len(s.tokens) > place and (place == 0 or s.tokens[0] == first)]


def _look(number: int, place: int, prompt: Sequence[int], said: Sequence[Said], exactly: Exactly) -> _Looked | None:
    """None for a place with too few answers, or of which there is only one thing to say."""
    first = _likeliest(said)
    kept = [s for s in said if len(s.tokens) > place and (place == 0 or s.tokens[0] == first)]
    if len(kept) < _FEWEST:
        return None
    p = exactly(prompt, [first][:place])
    cells = Cells.of(p, len(kept))
    if len(cells.p) < 2:
        return None
    draws = [s.tokens[place] for s in kept]
    told = [s for s in kept if len(s.drafted) > place and s.drafted[place] is not None]
    speculates = any(token is not None for s in said for token in s.drafted)
    drafted = len(told) / len(kept) if speculates else None
    if drafted == 0.0:  # nothing was drafted here, so nothing is learnt of it
        return None
    faulty = toward(p, int(p.argmax()), SHIFT) if drafted is None else _careless(p, kept, place)
    distance = float(np.abs(np.bincount(draws, minlength=len(p))[: len(p)] / len(draws) - p).sum() / 2)
    value = p_value(cells.counts(draws), cells.p)
    return _Looked(
        cells, _in_cells(cells, faulty), len(kept), Place(number, place, len(kept), drafted, value, distance)
    )


def _careless(p: np.ndarray, said: Sequence[Said], place: int) -> np.ndarray:
    """[V] what the same drafts would give if a rejection were followed by a draw from p itself."""
    found = np.zeros_like(p)
    for answer in said:
        token = answer.drafted[place] if len(answer.drafted) > place else None
        q = answer.q[place] if len(answer.q) > place else None
        if token is None or not q:
            found += p
            continue
        kept = min(1.0, p[token] / q)
        found += (1.0 - kept) * p
        found[token] += kept
    shares: np.ndarray = found / found.sum()
    return shares


def _in_cells(cells: Cells, p: np.ndarray) -> np.ndarray:
    """[V] -> [cells]"""
    kept = p[list(cells.tokens)] if cells.tokens else np.zeros(0)
    return np.array([*kept, max(0.0, 1.0 - float(kept.sum()))])


def sentence(found: Audit) -> str:
    """The answer, in one."""
    counted = f"{found.draws:,} tokens at {len(found.places)} places"
    if found.verdict == "biased":
        return f"{found.source} is biased: {counted} are not what {found.against} says (p {found.p_value:.1g})"
    if found.verdict == "undecided":
        return f"undecided: {counted} show no bias of {found.source}, and too few were looked at to find one"
    return (
        f"no bias found: {counted} of {found.source} are what {found.against} says (p {found.p_value:.2f}); the fault of "
        f"{found.fault} would have been found with {found.power:.0%}"
    )


def figures(found: Audit) -> Mapping[str, object]:
    """For JSON."""
    return {
        "verdict": found.verdict,
        "p_value": found.p_value,
        "power": found.power,
        "fault": found.fault,
        "control_p_value": found.control,
        "source": found.source,
        "against": found.against,
    }
