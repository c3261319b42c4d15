"""Suffix decoding: propose what most often followed the longest suffix seen before (Oliaro et al. 2024, arXiv:2411.04975).

A tree of all runs of up to 16 tokens in the prompt and the output so far, with counts. Unlike a lookup of n-grams it knows
how often each continuation came, so the draft ends where it becomes unlikely. Earlier outputs are not in it: a draft must
depend on nothing that an earlier run drew (`base.py`), or repeating a seed would bias the output.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field

import torch

from specdec_engine.core.cycle_types import Draft, Sampling, Verdict
from specdec_engine.core.randomness import Randomness
from specdec_engine.core.transfer import upload
from specdec_engine.drafters.base import DraftSetup, empty_draft
from specdec_engine.errors import UsageError
from specdec_engine.models.chat import between_turns
from specdec_engine.runtime import Runtime

DEPTH = 16
"""Longest run that is told apart; longer matches continue as their last tokens do."""
_LEAST = 0.1
"""A draft goes on while its chance, by the counts, is at least this; with `-k auto` the controller decides."""


@dataclass(slots=True)
class _Node:
    """A run of tokens, from the root down."""

    count: int = 0
    after: dict[int, _Node] = field(default_factory=dict)
    followed: int = 0
    """Sum of the counts of what came after."""

    def likeliest(self) -> tuple[int, float]:
        """The commonest next token, and its chance: one observation is shared among all that was never seen."""
        token, node = max(self.after.items(), key=lambda item: item[1].count)
        return token, node.count / (self.followed + 1)


class SuffixDrafter:
    """The tree, and where in it the context ends: one node for each of its suffixes."""

    name = "suffix"

    def __init__(self, setup: DraftSetup) -> None:
        self._device, self._limits = setup.device, setup.draft_limits
        self._never = between_turns(setup.tokenizer)
        self._root, self._known = _Node(), 0
        self._ends: list[_Node] = []

    def another(self, target: Runtime) -> SuffixDrafter:
        """See `Repeatable`."""
        made = copy(self)
        made.begin(())
        return made

    def begin(self, prompt: Sequence[int]) -> None:
        self._root, self._ends = _Node(), []
        self._learn(prompt)  # 0.3 s of 16,384 tokens, which are no cost of the first draft
        self._known = len(prompt)

    def propose(self, context: Sequence[int], k: int, sampling: Sampling, random: Randomness) -> Draft:
        self._learn(context[self._known :])
        self._known = len(context)
        tokens, reach, ends = list[int](), 1.0, [*self._ends, self._root]
        stop = self._limits.early_stop(self.name)
        while len(tokens) < k:
            node = next((end for end in ends if end.after), None)
            if node is None:
                break
            token, chance = node.likeliest()
            if token in self._never:  # no answer goes on as the next turn begins
                break
            reach *= chance
            if not tokens and (node is self._root or not self._limits.should_draft(self.name, chance)):
                break  # nothing but how common a token is
            if reach < _LEAST and stop is None:
                break
            tokens.append(token)
            if stop is not None and stop(chance):
                break
            ends = [*_advanced(ends, token), self._root]
        return (
            Draft(upload(torch.tensor(tokens), self._device), None, self.name)
            if tokens
            else empty_draft(self._device, self.name)
        )

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        pass

    def _learn(self, tokens: Iterable[int]) -> None:
        """Extend every suffix by each token; longest first, at most `DEPTH` of them."""
        for token in tokens:
            ends = []
            for node in [*self._ends[-(DEPTH - 1) :], self._root]:
                child = node.after.setdefault(token, _Node())
                child.count += 1
                node.followed += 1
                ends.append(child)
            self._ends = ends


def _advanced(ends: Iterable[_Node], token: int) -> list[_Node]:
    return [end.after[token] for end in ends if token in end.after]


def build(argument: str, setup: DraftSetup) -> SuffixDrafter:
    """`suffix`, which takes no argument."""
    if argument:
        raise UsageError(f"suffix:{argument} is not known", "simply suffix")
    return SuffixDrafter(setup)
