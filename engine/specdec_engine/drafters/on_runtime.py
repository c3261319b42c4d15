"""A model on a runtime as drafter (Leviathan et al. 2023; Chen et al. 2023), with a cache of its own.

The drafted tokens stay on the device: each step's token feeds the next step's forward, and the host reads them with the
verdict. The last drafted token is never fed, so after a full acceptance two tokens are pending, and both go into the next
draft's first pass; no extra pass closes the gap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import partial

import torch
from torch import Tensor

from specdec_engine.core.cycle_types import Draft, Sampling, Verdict
from specdec_engine.core.randomness import Randomness
from specdec_engine.core.transfer import upload
from specdec_engine.drafters.base import DraftSetup, Guesser, Repeatable, empty_draft
from specdec_engine.drafters.token_choice import (
    DraftChoice,
    acceptance_of_emitted,
    draft_numbers,
    masked,
    probabilities_of,
)
from specdec_engine.models.draft_files import inverse
from specdec_engine.runtime import DraftTokens, Runtime, guided, in_one_pass, prefill, step_by_step


class RuntimeDrafter:
    """Any causal LM on a runtime. Greedy at temperature 0; otherwise drawn under the run's own sampling settings."""

    def __init__(
        self, runtime: Runtime, setup: DraftSetup, name: str, ids: Tensor | None = None, mask: int | None = None
    ) -> None:
        """ids [V']: the target's id of each of the draft's, for a draft with a reduced vocabulary. Whatever else the target
        says is fed to it as its last id. mask: of a model that fills in masked places (PARD), the token that masks them."""
        self.name = name
        self._guesser: Guesser | None = None
        self._mask = mask
        self.runtime = runtime
        self._device = setup.device
        self._limits, self._grammar = setup.draft_limits, setup.grammar
        self._target_vocab = setup.vocab
        self._vocab = min(
            runtime.vocab, setup.vocab
        )  # ids that both have; padding rows differ between sizes of a family
        self._ids_of = None if ids is None else ids.to(runtime.device)
        self._targets: list[int] | None = None if ids is None else ids.tolist()
        self._draft_id_of = None if ids is None else inverse(ids, setup.vocab, lacking=len(ids) - 1).tolist()
        self._drafted_from = 0  # length of the context that the last draft followed

    def another(self, target: Runtime) -> RuntimeDrafter:
        """See `Repeatable`."""
        made = copy(self)
        made.runtime = self.runtime.another()
        if isinstance(self._guesser, Repeatable):
            guesser = self._guesser.another(target)
            assert isinstance(guesser, Guesser)
            made.take_guesses(guesser, self.name)
        return made

    @property
    def in_one_pass(self) -> bool:
        """True for a model that fills in masked places."""
        return self._mask is not None

    def take_guesses(self, guesser: Guesser, name: str) -> None:
        """Let a lookup draft for this draft, which is called so from then on: see `guided`."""
        self._guesser, self.name = guesser, name

    def begin(self, prompt: Sequence[int]) -> None:
        self.runtime.rollback(
            max(0, min(self.runtime.known.common(prompt), len(prompt) - 1))
        )  # the newest is for the draft
        if self._guesser is not None:
            self._guesser.begin(prompt)
        if self.runtime.limit is None or len(prompt) <= self.runtime.limit:
            self._catch_up(prompt, keep=1)

    def propose(self, context: Sequence[int], k: int, sampling: Sampling, random: Randomness) -> Draft:
        """Fewer than k where the draft's own context ends: its last fed position is len(context) + k - 2."""
        limit = self.runtime.limit
        k = k if limit is None else min(k, limit - len(context) + 1)
        if k < 1:
            return empty_draft(self._device, self.name)
        self._drafted_from = len(context)
        self._catch_up(context, keep=_MOST_IN_ONE_PASS)
        u, temperature = draft_numbers(random, sampling, len(context), k, self._target_vocab, self.runtime.device)
        if sampling.coupled:
            u = u[:, : self._vocab] if self._ids_of is None else u[:, self._ids_of]
        stop = self._limits.early_stop_on(self.runtime.device, self.name)
        choice, pending = DraftChoice(sampling, self._vocab, confident=stop is not None), context[self.runtime.cached :]
        with masked(choice, self._grammar, self.runtime.device, self._ids_of) as sampler:
            drawn = self._unroll(context, sampling)(self._ids(pending), u, temperature, sampler, stop)
        tokens = self._translated(drawn.tokens).to(self._device)
        self.runtime.known.note(context, min(len(context), self.runtime.cached))
        raw = None if drawn.raw is None else drawn.raw.to(self._device)
        ids = None if self._ids_of is None else self._ids_of.to(self._device)
        return Draft(tokens, self._widened(drawn.rows), self.name, raw, ids, drawn.guessed)

    def _unroll(self, context: Sequence[int], sampling: Sampling) -> Callable[..., DraftTokens]:
        """How its tokens are made: see `Runtime.unroll`."""
        if self._guesser is not None:
            return partial(guided, self.runtime, lambda said, k: self._guesses(context, said, k))
        if self._mask is not None:
            return partial(in_one_pass, self.runtime, self._mask)
        # What a runtime records has no input for Gumbel noise, [V] a token, nor for a grammar's masks.
        masks = self._grammar.matching is not None and self.runtime.device.type == "cpu"
        stepwise = sampling.coupled or masks
        return partial(step_by_step, self.runtime) if stepwise else self.runtime.unroll

    def _guesses(self, context: Sequence[int], said: Sequence[int], k: int) -> list[int]:
        """Expect at most k tokens that this draft may go on with, its own ids; said: its own, too."""
        assert self._guesser is not None
        targets = said if self._targets is None else [self._targets[token] for token in said]
        found = self._draft_ids(self._guesser.guess(context, targets, k))
        return found[: next((i for i, token in enumerate(found) if not 0 <= token < self._vocab), len(found))]

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        """Forget what was fed for the rejected tokens; all drafted ones but the last were fed."""
        self.runtime.rollback(to=self._drafted_from + min(verdict.accepted, len(draft) - 1))

    @torch.inference_mode()
    def acceptance_along(
        self, context: Sequence[int], p: Sequence[float], k: int, sampling: Sampling
    ) -> list[list[float]]:
        """One pass covers every beginning: a token's probability depends on the text before it alone, but for a draft that
        fills in masked places, which is asked at each. Rows beyond the draft's own context are empty."""
        if self._mask is not None:
            return self._acceptance_at_each(context, p, k, sampling)
        begin = len(context) - len(p)
        end = len(context) if self.runtime.limit is None else min(len(context), self.runtime.limit + 1)
        self.runtime.rollback(0)
        if begin < end:
            self._catch_up(context[:begin], keep=1)
        chances = list[float]()
        for at in range(begin, end, _MOST_IN_ONE_PASS):
            targets = context[at : min(at + _MOST_IN_ONE_PASS, end)]
            logits = self.runtime.forward(self._ids(context[at - 1 : at - 1 + len(targets)]), len(targets))
            q = probabilities_of(logits[:, : self._vocab], self._draft_ids(targets), sampling)
            chances += [acceptance_of_emitted(*pair) for pair in zip(p[at - begin :], q, strict=False)]
        return [chances[i : i + k] for i in range(len(p))]

    def _acceptance_at_each(
        self, context: Sequence[int], p: Sequence[float], k: int, sampling: Sampling
    ) -> list[list[float]]:
        begin, rows = len(context) - len(p), list[list[float]]()
        self.runtime.rollback(0)
        for at in range(begin, len(context)):
            targets = context[at : at + k]
            if self.runtime.limit is not None and at + len(targets) - 1 > self.runtime.limit:
                rows.append([])
                continue
            self._catch_up(context[:at], keep=1)
            masked = [*self._ids(context[self.runtime.cached : at]).tolist(), *[self._mask] * (len(targets) - 1)]
            logits = self.runtime.forward(upload(torch.tensor(masked), self.runtime.device), len(targets))
            self.runtime.rollback(at)
            q = probabilities_of(logits[:, : self._vocab], self._draft_ids(targets), sampling)
            rows.append([acceptance_of_emitted(*pair) for pair in zip(p[at - begin :], q, strict=False)])
        return rows

    def _draft_ids(self, tokens: Sequence[int]) -> list[int]:
        """-1 where it has none."""
        if self._targets is None or self._draft_id_of is None:
            return list(tokens)
        found = [self._draft_id_of[token] for token in tokens]
        return [own if self._targets[own] == token else -1 for own, token in zip(found, tokens, strict=True)]

    def _translated(self, tokens: Tensor) -> Tensor:
        return tokens if self._ids_of is None else self._ids_of[tokens]

    def _widened(self, rows: Tensor | None) -> Tensor | None:
        """[k, V'] -> [k, V]: q is 0 at ids that the draft lacks."""
        if rows is None:
            return None
        if self._ids_of is None:
            return torch.nn.functional.pad(rows, (0, self._target_vocab - self._vocab)).to(self._device)
        wide = torch.zeros(rows.shape[0], self._target_vocab, dtype=rows.dtype, device=rows.device)
        return wide.index_copy_(1, self._ids_of, rows).to(self._device)

    def _catch_up(self, context: Sequence[int], keep: int) -> None:
        """Cache the context but for its last `keep` tokens; usually there is nothing to do."""
        behind = context[self.runtime.cached : len(context) - keep]
        if behind:
            prefill(self.runtime, self._ids(behind))
            self.runtime.known.note(context, self.runtime.cached)

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        # An id the draft has no embedding for is fed as its last one: any q is lossless, as long as it was drawn from.
        ids = [min(t, self.runtime.vocab - 1) if self._draft_id_of is None else self._draft_id_of[t] for t in tokens]
        return upload(torch.tensor(ids), self.runtime.device)


_MOST_IN_ONE_PASS = 64
"""Tokens behind that still go into the draft's own first pass instead of a prefill of their own."""
