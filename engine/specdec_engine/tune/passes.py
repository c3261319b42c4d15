"""The passes behind a what-if: plain answers, two teacher-forced passes a draft, cycles of every width against the clock."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle as endlessly
from typing import NoReturn

import torch

from specdec_engine.core.cycle_types import Draft, Sampling, Verdict
from specdec_engine.core.randomness import KeyedRandomness, Randomness
from specdec_engine.core.transfer import upload
from specdec_engine.decoding.control import Controls
from specdec_engine.drafters import build_drafter
from specdec_engine.drafters.base import AcceptanceAlong, Drafter, DraftSetup
from specdec_engine.drafters.token_choice import probabilities_of
from specdec_engine.errors import UsageError
from specdec_engine.pair import Pair
from specdec_engine.record.events import Cycle, known_ids
from specdec_engine.runtime.target import ModelTarget
from specdec_engine.tune.answers import ROOM, Answer
from specdec_engine.tune.whatif import Chances, UnitCosts

MOST_K = 16
ROUNDS = 4
"""How often each k is timed, by two cycles; and as often again the usual ones."""
_CHUNK = 64
"""Logits that are kept at a time: 64 rows of 150,000 are 40 MB."""


def written(
    pair: Pair, prompts: Iterable[Sequence[int]], sampling: Sampling, max_tokens: int, seed: int
) -> Iterator[Answer]:
    """Plain decoding's answers; none to a prompt that fills the target's context."""
    for number, prompt in enumerate(prompts):
        said, ended = list[int](), False
        try:
            for event in pair.decode(prompt, k=0, sampling=sampling, max_tokens=max_tokens, seed=seed + number):
                if isinstance(event, Cycle):
                    said += known_ids(event.emitted)
                    ended = event.end == "stop"
        except UsageError:
            continue
        if said:
            yield Answer((*prompt, *said), len(prompt), ended)


def looked_at(
    pair: Pair, answers: Sequence[Answer], sampling: Sampling, at: Callable[[int, int], None]
) -> tuple[tuple[Chances, ...], list[tuple[int, float]]]:
    """The pair's drafter along these answers; and of one that had to be asked, the tokens and seconds of each draft. at: told
    the number of each answer, and of how many."""
    found = list[tuple[Chances, list[tuple[int, float]]]]()
    for number, answer in enumerate(answers, 1):
        at(number, len(answers))
        found.append(chances_along(pair.drafter, pair.target, answer, sampling))
    return tuple(chances for chances, _ in found), [took for _, times in found for took in times]


def chances_along(
    drafter: Drafter, target: ModelTarget, answer: Answer, sampling: Sampling
) -> tuple[Chances, list[tuple[int, float]]]:
    """How its drafts would fare in this answer; and of one that had to be asked, the tokens and seconds of each draft."""
    if not isinstance(drafter, AcceptanceAlong):
        return proposed_along(drafter, answer, sampling)
    rows = drafter.acceptance_along(answer.context, _target_along(target, answer, sampling), MOST_K, sampling)
    return Chances(tuple(MOST_K if row else 0 for row in rows), tuple(map(tuple, rows)), answer.ended), []


@torch.inference_mode()
def _target_along(target: ModelTarget, answer: Answer, sampling: Sampling) -> list[float]:
    """The target's probability of each token of the answer; afterwards it has read all but the last."""
    target.prefill(answer.context[: answer.begin - 1])
    found = list[float]()
    for start in range(answer.begin, len(answer.context), _CHUNK):
        tokens = upload(torch.tensor(answer.context[start - 1 : start + _CHUNK][:-1]), target.device)
        logits = target.runtime.forward(tokens, len(tokens))
        found += probabilities_of(logits, answer.context[start : start + len(tokens)], sampling)
    # Greedy text was chosen by passes over single tokens, which may round differently: what it says is what the target says.
    return [1.0] * len(found) if sampling.greedy else found


def proposed_along(drafter: Drafter, answer: Answer, sampling: Sampling) -> tuple[Chances, list[tuple[int, float]]]:
    """What a drafter that draws nothing proposes at each place, and the tokens and seconds of each draft. Raises UsageError
    for one that draws."""
    context, unused = list(answer.context), KeyedRandomness(0)
    drafted, rows, times = list[int](), list[tuple[float, ...]](), list[tuple[int, float]]()
    drafter.begin(context[: answer.begin])
    for at in range(answer.begin, len(context)):
        began = time.perf_counter()
        draft = drafter.propose(context[:at], MOST_K, sampling, unused)
        times.append((len(draft), time.perf_counter() - began))
        if draft.probs is not None:
            raise UsageError(
                f"the draft {draft.drafter} draws at random, and cannot tell what it would have drawn",
                "tune at temperature 0, or leave it out",
            )
        tokens = draft.tokens.tolist()
        rows.append(tuple(float(a == b) for a, b in zip(tokens, context[at:], strict=False)))
        drafted.append(len(tokens))
    return Chances(tuple(drafted), tuple(rows), answer.ended), times


def unit_costs(pair: Pair, answers: Sequence[Answer], sampling: Sampling, seed: int) -> UnitCosts:
    """Time cycles of every k up to `MOST_K` in real runs, in shuffled order: a plain one, then two of each k. A drafter that
    proposes where it finds something, and too rarely for that, has a stand-in that always does."""
    if not isinstance(pair.drafter, AcceptanceAlong):
        pair = replace(pair, drafter=_Filler(pair.target.device))
    order, cycles = random.Random(seed), list[Cycle]()
    rounds = [order.sample(range(1, MOST_K + 1), MOST_K) for _ in range(ROUNDS)]
    rounds += [order.sample(_OFTEN, len(_OFTEN)) for _ in range(ROUNDS)]
    warm = list(range(MOST_K + 1))  # a first pass of a width may set something up; on a GPU it is recorded
    ks = warm + [k for ks in rounds for drafted in ks for k in (0, drafted, drafted)]
    controls = Controls(warm[0], sampling)
    for number, answer in zip(range(4 * len(ks)), endlessly(answers), strict=False):
        for event in pair.decode(answer.prompt, controls=controls, max_tokens=ROOM, seed=seed + number):
            if isinstance(event, Cycle):
                cycles.append(event)
                if len(cycles) == len(ks):
                    return UnitCosts.of(cycles[len(warm) :])
                controls.change(k=ks[len(cycles)])
    return UnitCosts.of(cycles)


_OFTEN = range(1, 9)
"""What mostly is best is timed twice as often."""


def lookup(name: str) -> Drafter:
    """A lookup by itself: it knows ids, and no model."""

    def none(_: object = None) -> NoReturn:
        raise UsageError(f"{name} has no model here", "name a lookup")

    return build_drafter(name, DraftSetup(name, None, 0, torch.device("cpu"), none, none, none))


class _Filler:
    """Proposes k tokens whatever was said before: for timing the passes that verify a lookup's drafts."""

    name = "filler"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def begin(self, prompt: Sequence[int]) -> None:
        pass

    def propose(self, context: Sequence[int], k: int, sampling: Sampling, random: Randomness) -> Draft:
        return Draft(torch.full((k,), context[-1], device=self._device), None, self.name)

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        pass
