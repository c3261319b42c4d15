"""A model with another tokenizer as drafter: its text, in the target's tokens (Timor et al. 2025, arXiv:2502.05202).

It drafts greedily at every temperature, and its tokens are proposed as deterministic ones: a token of the target's may be
several of the draft's, so that there is no row of probabilities to report for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from specdec_engine.core.cycle_types import Draft, Sampling, Verdict
from specdec_engine.core.randomness import KeyedRandomness, Randomness
from specdec_engine.core.transfer import upload
from specdec_engine.drafters.base import DraftSetup, empty_draft
from specdec_engine.drafters.token_choice import DraftChoice
from specdec_engine.models.translation import Reading, Translation
from specdec_engine.runtime import Runtime, prefill


class TranslatedDrafter:
    """Any causal LM on a runtime, whatever its tokenizer."""

    def __init__(self, runtime: Runtime, setup: DraftSetup, name: str, translation: Translation) -> None:
        self.name = name
        self._runtime, self._device, self._target_vocab = runtime, setup.device, setup.vocab
        self._translation = translation
        self._reading = Reading(translation)
        self._choice = DraftChoice(Sampling(), min(runtime.vocab, len(translation.draft)), confident=False)
        self._fed: list[int] = []
        """The tokens that the runtime has cached."""

    def begin(self, prompt: Sequence[int]) -> None:
        """Read all but the last token."""
        self._runtime.rollback(0)
        self._fed = []
        self._reading = Reading(self._translation)
        self._reading.follow(prompt)
        ids = self._reading.ids
        if self._runtime.limit is None or len(ids) <= self._runtime.limit:
            self._catch_up(ids[:-1])

    def propose(self, context: Sequence[int], k: int, sampling: Sampling, random: Randomness) -> Draft:
        """Nothing while the context ends with half a character, or where the draft's own context ends."""
        self._reading.follow(context)
        ids = self._reading.ids
        steps = self._steps(k, len(context), len(ids))
        limit = self._runtime.limit
        if not self._reading.whole or not ids or (limit is not None and len(ids) + steps - 1 > limit):
            return empty_draft(self._device, self.name)
        self._catch_up(ids[:-_IN_ONE_PASS])
        pending = ids[len(self._fed) :]
        zeros = torch.zeros(steps + 1, device=self._runtime.device)
        drawn = self._runtime.unroll(self._tensor(pending), zeros[:steps], zeros[steps], self._choice)
        drafted: list[int] = drawn.tokens.tolist()
        self._fed = [*ids, *drafted[:-1]]
        tokens = self._translation.proposed(*self._reading.tail, drafted)[:k]
        known = next((i for i, token in enumerate(tokens) if token >= self._target_vocab), len(tokens))
        return Draft(upload(torch.tensor(tokens[:known], dtype=torch.long), self._device), None, self.name)

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        """The next context tells what became of it."""

    def acceptance_along(
        self, context: Sequence[int], p: Sequence[float], k: int, sampling: Sampling
    ) -> list[list[float]]:
        """It is asked at each place, for a few tokens: what the text says is accepted, and anything else is not."""
        begin, rows = len(context) - len(p), list[list[float]]()
        self.begin(context[:begin])
        for at in range(begin, len(context)):
            draft = self.propose(context[:at], min(k, _FAR), sampling, KeyedRandomness(0)) if at else None
            said = [] if draft is None else draft.tokens.tolist()
            right = [a == b for a, b in zip(said, context[at:], strict=False)]
            wrong = right.index(False) + 1 if False in right else len(right)
            rows.append([float(known) for known in right[:wrong]])
        return rows

    def _steps(self, k: int, ours: int, theirs: int) -> int:
        """Tokens to draft for k of the target's, and one more, since the last is left out."""
        ratio = min(max(theirs / ours, 0.5), _MOST_FOR_ONE) if ours >= _ENOUGH else 1.0
        return math.ceil(k * ratio) + 1

    def _catch_up(self, ids: Sequence[int]) -> None:
        """Forget what the text has not taken, and read what it has, but for what goes into the draft's own first pass."""
        whole = self._reading.ids[:-1]
        same = next((i for i, (a, b) in enumerate(zip(self._fed, whole, strict=False)) if a != b), None)
        same = min(len(self._fed), len(whole)) if same is None else same
        self._runtime.rollback(same)
        self._fed = self._fed[:same]
        if len(ids) > same:
            prefill(self._runtime, self._tensor(ids[same:]))
            self._fed = list(ids)

    def _tensor(self, ids: Sequence[int]) -> torch.Tensor:
        most = self._runtime.vocab - 1  # a tokenizer may have ids that its model has no rows for
        return upload(torch.tensor([min(token, most) for token in ids]), self._runtime.device)


_IN_ONE_PASS = 64
"""Tokens behind that still go into a draft's first pass instead of passes of their own."""
_FAR = 8
"""Tokens that are asked for at each place of a text: each is a draft step at every place of every answer."""
_ENOUGH, _MOST_FOR_ONE = 16, 4.0
"""Tokens of a context whose translation tells how many of the draft's stand for one; and how many may."""
