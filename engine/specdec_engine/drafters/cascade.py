"""Several drafters in order: the first that proposes anything wins the cycle."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

from specdec_engine.core.cycle_types import Draft, Sampling, Verdict
from specdec_engine.core.randomness import Randomness
from specdec_engine.drafters.base import Drafter, DraftSetup, another, empty_draft
from specdec_engine.runtime import Runtime


class CascadeDrafter:
    """Cheap drafters first. Whether a member proposes depends on the context alone, so the rule stays unbiased."""

    def __init__(self, members: Sequence[Drafter], setup: DraftSetup) -> None:
        if not members:
            raise ValueError("a cascade needs at least one member")
        self._limits, self._device = setup.draft_limits, setup.device
        self.take(members)

    def take(self, members: Sequence[Drafter]) -> None:
        """Have these members."""
        self.name = ",".join(member.name for member in members)
        self._members = tuple(members)
        self._proposer = self._members[-1]

    def another(self, target: Runtime) -> CascadeDrafter:
        """See `Repeatable`. Raises UsageError where a member can be had only once."""
        made = copy(self)
        made.take([another(member, target) for member in self._members])
        return made

    def begin(self, prompt: Sequence[int]) -> None:
        for member in self._members:
            member.begin(prompt)

    def propose(self, context: Sequence[int], k: int, sampling: Sampling, random: Randomness) -> Draft:
        for member in self._members:
            if own := self._limits.limit(member.name, k):
                draft = member.propose(context, own, sampling, random)
                if len(draft):
                    self._proposer = member
                    return draft
        return empty_draft(self._device)

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        """Told to the member that proposed: the others proposed nothing and catch up from the context."""
        self._proposer.observe(draft, verdict)
