"""The passes behind a what-if: plain answers, two teacher-forced passes a draft, cycles of every width against the clock."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle as endlessly
from pathlib import Path

import torch

from specdec_engine.choose import along
from specdec_engine.control import Controls
from specdec_engine.drafters.base import Drafter, Foreseeing
from specdec_engine.errors import UsageError
from specdec_engine.events import Cycle, Started
from specdec_engine.pair import Pair
from specdec_engine.randomness import KeyedRandomness, Randomness
from specdec_engine.target import ModelTarget
from specdec_engine.trace import read_trace
from specdec_engine.tune.whatif import Chances, UnitCosts
from specdec_engine.types import Draft, Sampling, Verdict

MOST_K = 16
ROUNDS = 5
"""Cycles of every width that are timed; and as many again of the usual ones."""
_WARM = 3
_CHUNK = 64
"""Logits that are kept at a time: 64 rows of 150,000 are 40 MB."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A text that the target has written."""

    context: tuple[int, ...]
    """Prompt and answer."""
    begin: int
    """Where the answer begins."""
    ended: bool
    """By the target, and not by the budget."""

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.context[: self.begin]


def written(
    pair: Pair, prompts: Iterable[Sequence[int]], sampling: Sampling, max_tokens: int, seed: int
) -> Iterator[Answer]:
    """Plain decoding's answers; none to a prompt that fills the target's context."""
    for number, prompt in enumerate(prompts):
        said, ended = list[int](), False
        try:
            for event in pair.decode(prompt, k=0, sampling=sampling, max_tokens=max_tokens, seed=seed + number):
                if isinstance(event, Cycle):
                    said += event.emitted
                    ended = event.end == "stop"
        except UsageError:
            continue
        if said:
            yield Answer((*prompt, *said), len(prompt), ended)


def recorded(path: Path, target: str, sampling: Sampling) -> list[Answer]:
    """The answers in a trace: whatever drafted, they are the target's. Raises UsageError for those of another target or
    another distribution."""
    wanted = {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
    }
    found, prompt, said, ended = list[Answer](), tuple[int, ...](), list[int](), False

    def close() -> None:
        if said:
            found.append(Answer((*prompt, *said), len(prompt), ended))

    for event in read_trace(path):
        if isinstance(event, Started):
            close()
            prompt, said, ended = event.prompt, [], False
            if event.settings.get("target") != target:
                raise UsageError(
                    f"{path} is of the target {event.settings.get('target')}, not {target}",
                    "name that one with --target",
                )
            for name, value in wanted.items():
                if event.settings.get(name, value) != value:
                    raise UsageError(
                        f"{path} was recorded with {name} {event.settings[name]}, not {value}", "give the same settings"
                    )
        elif isinstance(event, Cycle):
            said += event.emitted
            ended = event.end == "stop"
    close()
    if not found:
        raise UsageError(f"{path} has no emitted tokens", "record a longer run with --trace")
    return found


def cut(ids: Sequence[int], prompt: int, answer: int) -> list[Answer]:
    """A text as if the target had written it: pieces, each with its first tokens as its prompt."""
    pieces = (tuple(ids[i : i + prompt + answer]) for i in range(0, len(ids), prompt + answer))
    return [Answer(piece, prompt, False) for piece in pieces if len(piece) > prompt + 1]


def looked_at(
    pair: Pair, answers: Sequence[Answer], sampling: Sampling, seed: int
) -> tuple[tuple[Chances, ...], UnitCosts]:
    """The pair's drafter along these answers, and against the clock."""
    chances, times = list[Chances](), list[tuple[int, float]]()
    for answer in answers:
        found, took = chances_along(pair.drafter, pair.target, answer, sampling)
        chances.append(found)
        times += took
    if isinstance(pair.drafter, Foreseeing):
        return tuple(chances), unit_costs(pair, answers, sampling, seed)
    # A lookup proposes where it finds something, and too rarely to time a pass of every width.
    costs = unit_costs(replace(pair, drafter=_Filler(pair.target.device)), answers, sampling, seed)
    return tuple(chances), costs.drafting(times)


def chances_along(
    drafter: Drafter, target: ModelTarget, answer: Answer, sampling: Sampling
) -> tuple[Chances, list[tuple[int, float]]]:
    """How its drafts would fare in this answer; and of one that had to be asked, the tokens and seconds of each draft."""
    if not isinstance(drafter, Foreseeing):
        return _proposed_along(drafter, answer, sampling)
    rows = drafter.foresee(answer.context, _target_along(target, answer, sampling), MOST_K, sampling)
    return Chances(tuple(MOST_K if row else 0 for row in rows), tuple(map(tuple, rows)), answer.ended), []


@torch.inference_mode()
def _target_along(target: ModelTarget, answer: Answer, sampling: Sampling) -> list[float]:
    """The target's probability of each token of the answer; afterwards it has read all but the last."""
    target.prefill(answer.context[: answer.begin - 1])
    found = list[float]()
    for start in range(answer.begin, len(answer.context), _CHUNK):
        tokens = torch.tensor(answer.context[start - 1 : start + _CHUNK][:-1], device=target.device)
        logits = target.runtime.forward(tokens, len(tokens))
        found += along(logits, answer.context[start : start + len(tokens)], sampling)
    # Greedy text was chosen by passes over single tokens, which may round differently: what it says is what the target says.
    return [1.0] * len(found) if sampling.greedy else found


def _proposed_along(drafter: Drafter, answer: Answer, sampling: Sampling) -> tuple[Chances, list[tuple[int, float]]]:
    """What a drafter that draws nothing proposes at each place, and the tokens and seconds of each draft. Raises UsageError
    for one that draws."""
    context, random = list(answer.context), KeyedRandomness(0)
    drafted, rows, times = list[int](), list[tuple[float, ...]](), list[tuple[int, float]]()
    drafter.begin(context[: answer.begin])
    for at in range(answer.begin, len(context)):
        began = time.perf_counter()
        draft = drafter.propose(context[:at], MOST_K, sampling, random)
        times.append((len(draft), time.perf_counter() - began))
        if draft.probs is not None:
            raise UsageError(
                f"the draft {draft.source} draws at random, and cannot tell what it would have drawn",
                "tune at temperature 0, or leave it out",
            )
        tokens = draft.tokens.tolist()
        rows.append(tuple(float(a == b) for a, b in zip(tokens, context[at:], strict=False)))
        drafted.append(len(tokens))
    return Chances(tuple(drafted), tuple(rows), answer.ended), times


def unit_costs(pair: Pair, answers: Sequence[Answer], sampling: Sampling, seed: int) -> UnitCosts:
    """Time cycles of every k up to `MOST_K` in real runs, in shuffled order, each beside a plain one."""
    order, cycles = random.Random(seed), list[Cycle]()
    rounds = [order.sample(range(1, MOST_K + 1), MOST_K) for _ in range(ROUNDS)]
    rounds += [order.sample(_OFTEN, len(_OFTEN)) for _ in range(ROUNDS)]
    ks = [0] * _WARM + [k for ks in rounds for drafted in ks for k in (0, drafted)]
    controls = Controls(0, sampling)
    for number, answer in zip(range(4 * len(ks)), endlessly(answers), strict=False):
        for event in pair.decode(answer.prompt, controls=controls, max_tokens=_ROOM, seed=seed + number):
            if isinstance(event, Cycle):
                cycles.append(event)
                if len(cycles) == len(ks):
                    return UnitCosts.of(cycles[_WARM:])
                controls.change(k=ks[len(cycles)])
    return UnitCosts.of(cycles)


_OFTEN = range(1, 9)
"""What mostly is best is timed twice as often."""
_ROOM = 256


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
