"""Several drafters in order: the first that proposes anything wins the cycle."""

from __future__ import annotations

from collections.abc import Sequence

from specdec_engine.drafters.base import Drafter
from specdec_engine.randomness import Randomness
from specdec_engine.types import Draft, Sampling, Verdict


class CascadeDrafter:
    """Cheap drafters first. Whether a member proposes depends on the context alone, so the rule stays unbiased."""

    def __init__(self, members: Sequence[Drafter]) -> None:
        if not members:
            raise ValueError("a cascade needs at least one member")
        self.name = ",".join(member.name for member in members)
        self._members = tuple(members)
        self._proposer = self._members[-1]

    def begin(self, prompt: Sequence[int]) -> None:
        for member in self._members:
            member.begin(prompt)

    def propose(self, context: Sequence[int], k: int, sampling: Sampling, random: Randomness) -> Draft:
        for member in self._members:
            draft = member.propose(context, k, sampling, random)
            if len(draft):
                break
        self._proposer = member
        return draft

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        """Told to the member that proposed: the others proposed nothing and catch up from the context."""
        self._proposer.observe(draft, verdict)
