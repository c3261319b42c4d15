"""How far drafts go, as drafters see it: asked within a cycle, decided by `controller.AutoK` between cycles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import mul

import torch

from specdec_engine.adaptive.controller import AutoK
from specdec_engine.runtime import StopDrafting


class DraftLimits:
    """Lets every draft go as far as k while there is no controller."""

    controller: AutoK | None = None
    merging: bool = False
    """Several drafters propose at once, whose drafts are one token tree."""
    followed: bool = False
    """Another drafter is asked where this one proposes nothing."""
    drafted: int = 0
    """Tokens that are in the tree so far, before those alike are merged."""

    def limit(self, drafter: str, k: int) -> int:
        """Tokens that this drafter may propose in this cycle, at most k."""
        return k if self.controller is None else min(k, self.controller.limit(drafter))

    def should_draft(self, drafter: str, confidence: float) -> bool:
        """Say whether a draft that is this sure of its first token should begin. Where costs are not known and another
        drafter follows, it must be sure enough to stand before that one."""
        enough = confidence >= SURE or not self.followed
        if self.controller is None:
            return enough
        return self.controller.should_draft(drafter, confidence, alone=not self.merging, unknown=enough)

    def should_join(self, drafter: str, others: Mapping[str, int]) -> bool:
        """Say whether a draft should be made beside those that are in a tree; others: their drafters, and how many tokens."""
        return self.controller is None or not others or self.controller.should_join(drafter, others, self.drafted)

    def places_of_siblings(self, drafter: str, sure: Sequence[float], chances: Sequence[float]) -> list[int]:
        """Give the places of a draft at which a second candidate is worth a row of the pass. sure: of each token how sure the
        drafter is; chances: of each second candidate. Without a controller, where it may well be the one."""
        if self.controller is not None:
            return self.controller.places_of_siblings(drafter, sure, chances, self.drafted)
        reached = accumulate(sure, mul, initial=1.0)
        return [
            at for at, (reach, chance) in enumerate(zip(reached, chances, strict=False)) if reach * chance >= _LIKELY
        ]

    def early_stop(self, drafter: str) -> StopDrafting | None:
        """Asked once a draft: what to ask after each of its tokens; None if there is nothing to ask."""
        return None if self.controller is None else self.controller.early_stop(drafter)

    def early_stop_on(self, device: torch.device, drafter: str) -> StopDrafting | None:
        """The same for a draft made on this device: there is nothing to ask where looking would wait for it."""
        return self.early_stop(drafter) if device.type == "cpu" else None


SURE = 0.5
"""How sure of its first token a lookup stands before another. Twelve prompts at temperature 0 and k 3, tokens a cycle of
`ngram,builtin`: 2.01 where a match of one token is a draft, 2.16 from here on (two tokens), 2.17 from 0.6 and 2.19 from 0.7,
where the head drafts more often (1.6, 2.6, 3.0 and 3.1 ms a cycle); the head alone 2.15, at 3.4 ms."""
_LIKELY = 0.1
"""Chance from which on a second candidate is taken where costs are not known."""
