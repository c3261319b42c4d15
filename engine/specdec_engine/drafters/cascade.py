"""Several drafters in order: the first that proposes anything wins the cycle. A lookup stands back where it is not sure."""

from __future__ import annotations

from collections.abc import Sequence

from specdec_engine.core.cycle_types import Draft, Sampling, Verdict
from specdec_engine.core.randomness import Randomness
from specdec_engine.drafters.base import Drafter, DraftSetup, empty_draft
from specdec_engine.drafters.several import Several


class CascadeDrafter(Several):
    """Cheap drafters first. Whether a member proposes depends on the context alone, so the rule stays unbiased."""

    def __init__(self, members: Sequence[Drafter], setup: DraftSetup) -> None:
        if not members:
            raise ValueError("a cascade needs at least one member")
        super().__init__(members, setup)

    def take(self, members: Sequence[Drafter]) -> None:
        super().take(members)
        self._proposer = self._members[-1]

    def propose(self, context: Sequence[int], k: int, sampling: Sampling, random: Randomness) -> Draft:
        for member in self._members:
            self._limits.followed = self._is_followed(member, k)
            if own := self._limits.limit(member.name, k):
                draft = member.propose(context, own, sampling, random)
                if len(draft):
                    self._proposer = member
                    return draft
        return empty_draft(self._device)

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        """Told to the member that proposed: the others proposed nothing and catch up from the context."""
        self._proposer.observe(draft, verdict)
