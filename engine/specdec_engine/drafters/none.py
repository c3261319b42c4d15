"""No drafting: the loop then is plain decoding, one token a pass."""

from __future__ import annotations

from collections.abc import Sequence

from specdec_engine.core.cycle_types import Draft, Sampling, Verdict
from specdec_engine.core.randomness import Randomness
from specdec_engine.drafters.base import DraftSetup, empty_draft
from specdec_engine.runtime import Runtime


class NoDrafter:
    """Never proposes."""

    name = "none"

    def __init__(self, setup: DraftSetup) -> None:
        self._device = setup.device

    def another(self, target: Runtime) -> NoDrafter:
        """See `Repeatable`."""
        return self

    def begin(self, prompt: Sequence[int]) -> None:
        pass

    def propose(self, context: Sequence[int], k: int, sampling: Sampling, random: Randomness) -> Draft:
        return empty_draft(self._device)

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        pass


def build(argument: str, setup: DraftSetup) -> NoDrafter:
    return NoDrafter(setup)
