"""How far drafts go, as drafters see it: asked within a cycle, decided by `controller.AutoK` between cycles."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from specdec_engine.adaptive.controller import AutoK
from specdec_engine.runtime import StopDrafting


class DraftLimits:
    """Lets every draft go as far as k while there is no controller."""

    controller: AutoK | None = None
    merging: bool = False
    """Several drafters propose at once, whose drafts are one token tree."""

    def limit(self, drafter: str, k: int) -> int:
        """Tokens that this drafter may propose in this cycle, at most k."""
        return k if self.controller is None else min(k, self.controller.limit(drafter))

    def should_draft(self, drafter: str, confidence: float) -> bool:
        """Whether a draft that is this sure of its first token should begin."""
        return self.controller is None or self.controller.should_draft(drafter, confidence, alone=not self.merging)

    def should_join(self, drafter: str, others: Mapping[str, int]) -> bool:
        """Say whether a draft should be made beside those that are in a tree; others: their drafters, and how many tokens."""
        return self.controller is None or not others or self.controller.should_join(drafter, others)

    def early_stop(self, drafter: str) -> StopDrafting | None:
        """Asked once a draft: what to ask after each of its tokens; None if there is nothing to ask."""
        return None if self.controller is None else self.controller.early_stop(drafter)

    def early_stop_on(self, device: torch.device, drafter: str) -> StopDrafting | None:
        """The same for a draft made on this device: there is nothing to ask where looking would wait for it."""
        return self.early_stop(drafter) if device.type == "cpu" else None
