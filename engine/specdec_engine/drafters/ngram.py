"""Prompt lookup: propose what followed the same n tokens before (Saxena 2023, "prompt lookup decoding").

The longest suffix of the context that occurred earlier wins; among its occurrences, the most recent. Work on the host,
with plain ints: an index from each n-gram to the positions after it is extended by the new tokens of each cycle.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from itertools import takewhile

import torch

from specdec_engine.core.cycle_types import Draft, Sampling, Verdict
from specdec_engine.core.randomness import Randomness
from specdec_engine.core.transfer import upload
from specdec_engine.drafters.base import DraftSetup, empty_draft
from specdec_engine.errors import UsageError
from specdec_engine.models.chat import between_turns
from specdec_engine.runtime import Runtime, StopDrafting

_LARGEST_N = 64
"""The largest n: each token adds an index entry for each length."""


class NgramDrafter:
    """Looks up the last n tokens, n from `longest` down to `shortest`, in everything before them.

    With the context 1 2 3 9 2 3 and k = 2: the suffix 9 2 3 is new, but 2 3 was followed by 9 2, which is proposed.
    """

    name = "ngram"

    def __init__(self, setup: DraftSetup, longest: int = 3, shortest: int = 1) -> None:
        if not 1 <= shortest <= longest <= _LARGEST_N:
            raise UsageError(
                f"ngram:{longest} is not from {shortest} to {_LARGEST_N}", "the number is the longest n-gram to look up"
            )
        self._device, self._limits = setup.device, setup.draft_limits
        self._never = between_turns(setup.tokenizer)
        self._lengths = range(longest, shortest - 1, -1)
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> where what followed its last occurrence begins
        self._indexed = 0

    def another(self, target: Runtime) -> NgramDrafter:
        """See `Repeatable`."""
        made = copy(self)
        made.begin(())
        return made

    def begin(self, prompt: Sequence[int]) -> None:
        self._after, self._indexed = {}, 0
        self._index(prompt)

    def propose(self, context: Sequence[int], k: int, sampling: Sampling, random: Randomness) -> Draft:
        self._index(context)
        for n in self._lengths:
            start = self._after.get(tuple(context[-n:])) if len(context) > n else None
            if start is None or context[start] in self._never:
                continue
            if self._limits.should_draft(self.name, sure := _confidence_at(context, start)):
                kept = _draft_length(k, sure, self._limits.early_stop(self.name))
                found = self._of_an_answer(_copy(context, start, kept))
                return Draft(upload(torch.tensor(found), self._device), None, self.name)
        return empty_draft(self._device, self.name)

    def _of_an_answer(self, tokens: Sequence[int]) -> list[int]:
        """Those before one that only the template has: no answer goes on as the next turn begins."""
        return list(takewhile(lambda token: token not in self._never, tokens))

    def guess(self, context: Sequence[int], said: Sequence[int], k: int) -> list[int]:
        """See `Guesser`. A match of one token is no guess: a row for it costs more than it is right."""
        self._index(context)
        recent = [*context[-self._lengths[0] :], *said]  # of a long context no copy: it took 0.15 ms of 65,536 tokens
        for n in self._lengths:
            start = self._after.get(tuple(recent[-n:])) if len(context) + len(said) > n > 1 else None
            if start is not None:
                found = [*context[start : start + k], *said]
                return self._of_an_answer([found[i % len(found)] for i in range(k)])
        return []

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        pass

    def _index(self, context: Sequence[int]) -> None:
        """Enter all n-grams that end before the context's last token: the suffix itself must not find itself."""
        for end in range(self._indexed + 1, len(context)):
            for n in self._lengths:
                if n <= end:
                    self._after[tuple(context[end - n : end])] = end
        self._indexed = max(self._indexed, len(context) - 1)


_CONFIDENCE = {12: 0.95, 8: 0.82, 4: 0.7, 3: 0.6, 2: 0.5, 1: 0.25}
"""By the least length of the match, longest first: the chance that the next token of a copy is accepted, until a run
tells. At temperature 0 after 12, 8, 4, 3, 2 and 1 it was so 97, 82, 71, 58, 58 and 25 times in 100 (20 Spec-Bench
questions). So a copy that has gone on for long is drafted far, and one that has just begun is not: 2 % of a run's speed."""


def _confidence_at(context: Sequence[int], start: int) -> float:
    """How sure a copy from `start` on is of its first token."""
    alike, most = 1, min(start, max(_CONFIDENCE))
    while alike < most and context[start - alike - 1] == context[-alike - 1]:
        alike += 1
    return next(sure for least, sure in _CONFIDENCE.items() if alike >= least)


def _draft_length(k: int, sure: float, stop: StopDrafting | None) -> int:
    """How many of k tokens to propose, where it is this sure of each."""
    if stop is None:
        return k
    return next((i for i in range(1, k) if stop(sure)), k)


def _copy(context: Sequence[int], start: int, k: int) -> list[int]:
    """k tokens from `start` on, running into its own copy where the context ends: 1 2 1 2 goes on with 1 2 1 2."""
    period = len(context) - start
    return [context[start + i % period] for i in range(k)]


def build(argument: str, setup: DraftSetup) -> NgramDrafter:
    """`ngram` or `ngram:LONGEST`."""
    if not argument:
        return NgramDrafter(setup)
    if not argument.isdecimal():
        raise UsageError(f"ngram:{argument} is not a number", "ngram:5 looks up at most 5 tokens")
    return NgramDrafter(setup, int(argument))
