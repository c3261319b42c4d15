"""A drafter that goes on from what the target computed on the way: a draft head, or a module for multi-token prediction.

It reads the target's features of every token that the target has read, and of its own drafted tokens its own states (EAGLE;
Li et al. 2024, arXiv:2401.15077). When the target has verified a draft, slots that stood on own states are computed again
from true features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec_engine.core.cycle_types import Draft, Part, Sampling, Sibling, Verdict
from specdec_engine.core.randomness import Randomness
from specdec_engine.core.transfer import upload
from specdec_engine.core.trees import MOST as LARGEST
from specdec_engine.drafters.base import DraftSetup, empty_draft
from specdec_engine.drafters.context_ids import MOST, ContextIds
from specdec_engine.drafters.token_choice import DraftChoice, TextSampler, TwoLikeliest, draft_numbers, masked
from specdec_engine.runtime import Runtime, native
from specdec_engine.runtime.arithmetic import refuse_packing
from specdec_engine.runtime.decoder import Decoder
from specdec_engine.runtime.head_runtime import HeadRuntime
from specdec_engine.runtime.likely import Likely
from specdec_engine.runtime.mtp import MtpRuntime


class Featured(Protocol):
    """**Protocol:** a target's runtime that keeps what a draft reads of it: `LeanRuntime`, tapped, and `GenericRuntime`."""

    @property
    def cached(self) -> int: ...

    def features(self, start: int, end: int) -> Tensor:
        """[end - start, F, hidden] of cached tokens."""
        ...


class FeatureDrafter:
    """A head, or a module, on a target whose features are kept."""

    def __init__(
        self, head: HeadRuntime | MtpRuntime, target: Featured, ids: ContextIds, setup: DraftSetup, name: str
    ) -> None:
        self.name = name
        self._head, self._target, self._ids, self._setup = head, target, ids, setup

    def another(self, target: Runtime) -> FeatureDrafter:
        """See `Repeatable`; the target's runtime keeps what the first one's does."""
        return FeatureDrafter(self._head.another(), cast(Featured, target), self._ids.another(), self._setup, self.name)

    def begin(self, prompt: Sequence[int]) -> None:
        """The target has read the prompt but for its last token."""
        self._ids.forget()
        known = min(self._head.known.common(prompt), len(prompt) - 1)  # the newest is for the draft
        self._head.rollback(max(0, known - 1))
        self._catch_up(prompt, keep=1)

    def propose(self, context: Sequence[int], k: int, sampling: Sampling, random: Randomness) -> Draft:
        """Nothing after a single token, of which there are no features yet."""
        read = self._target.cached
        if read == 0:
            return empty_draft(self._setup.device, self.name)
        self._catch_up(context, keep=_IN_ONE_PASS)
        begin = self._head.cached
        self._ids.read(context)
        ids = self._ids.ids
        u, temperature = draft_numbers(random, sampling, len(context), k, self._setup.vocab, self._head.device)
        stop = self._setup.draft_limits.early_stop_on(self._head.device, self.name)
        eager = self._head.device.type == "cpu"
        # Not where tokens are drawn: at temperature 0.8 the two likeliest made 1.69 tokens a cycle of drawn ones' 1.85.
        branching = eager and self._setup.draft_limits.merging and sampling.greedy
        two = TwoLikeliest(len(ids), sampling.raw) if branching else None
        choice = two or DraftChoice(sampling, len(ids), eager, confident=stop is not None)
        with masked(choice, self._setup.grammar, self._head.device, ids) as sampler:
            drawn = self._head.unroll(
                self._target.features(begin, read),
                self._tokens(context[begin + 1 :]),
                u[:, ids] if sampling.coupled else u,
                temperature,
                sampler,
                ids,
                stop,
                self._ids.rows,
            )
        self._head.rollback(read)
        self._head.known.note(context, len(context))
        if two is not None and (siblings := self._siblings(drawn.likeliest or two.found)):
            return self._branched(drawn.tokens, siblings)
        raw, raw_ids = drawn.raw, ids
        if raw is not None and not eager:  # or a verdict would be recorded anew for each id of the context
            raw, raw_ids = told_in_one_size(raw, self._ids)
        return Draft(drawn.tokens, self._widened(drawn.rows), self.name, raw, raw_ids)

    def _siblings(self, found: Sequence[tuple[Likely, Likely]]) -> tuple[Sibling, ...]:
        """Second candidates where they pay; found: the two likeliest of each place."""
        sure, seconds = [first.share for first, _ in found], [second for _, second in found]
        places = self._setup.draft_limits.places_of_siblings(self.name, sure, [second.share for second in seconds])
        places = places[: max(0, LARGEST - len(found))]
        tokens = self._ids.ids[[seconds[place].place for place in places]].tolist()
        return tuple(Sibling(at, token, seconds[at].share) for at, token in zip(places, tokens, strict=True))

    def _branched(self, tokens: Tensor, siblings: Sequence[Sibling]) -> Draft:
        """The draft, and second candidates beside its tokens."""
        part = Part(self.name, tuple(tokens.tolist()), 0.0, tuple(siblings))
        parents = (*range(-1, len(tokens) - 1), *(one.place - 1 for one in siblings))
        together = torch.cat([tokens, self._tokens([one.token for one in siblings])])
        return Draft(together, None, self.name, parents=parents, parts=(part,))

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        """Slots of drafted tokens were forgotten at once: all of them stood on own states."""

    def acceptance_along(
        self, context: Sequence[int], p: Sequence[float], k: int, sampling: Sampling
    ) -> list[list[float]]:
        """A draft begun at each place and led along the text: what the head says depends on how many of its own states it
        has read."""
        begin, rows = len(context) - len(p), list[list[float]]()
        self._head.rollback(0)
        self._ids.forget()
        self._feed(context, begin - 2)
        for at in range(begin, len(context)):
            if at < 2:
                rows.append([])
                continue
            self._ids.read(context, at)
            said = TextSampler([self._ids.column(token) for token in context[at : at + k]], p[at - begin :], sampling)
            steps = torch.zeros(min(k, len(context) - at), device=self._head.device)
            newest = self._tokens([context[at - 1]])
            features, ids = self._target.features(at - 2, at - 1), self._ids
            self._head.unroll(features, newest, steps, steps[0], said, ids.ids, said.stop, ids.rows)
            self._head.rollback(at - 1)  # the first slot was a true one
            rows.append(said.chances)
        return rows

    def _catch_up(self, context: Sequence[int], keep: int) -> None:
        """Feed slots whose features are there, but for the last `keep`; usually there are none."""
        self._feed(context, self._target.cached - keep)

    def _feed(self, context: Sequence[int], end: int) -> None:
        for start in range(self._head.cached, end, _CHUNK):
            stop = min(start + _CHUNK, end)
            self._head.forward(self._target.features(start, stop), self._tokens(context[start + 1 : stop + 1]))
            self._head.known.note(context, stop + 1)

    def _tokens(self, tokens: Sequence[int]) -> Tensor:
        return upload(torch.tensor(tokens), self._head.device)

    def _widened(self, rows: Tensor | None) -> Tensor | None:
        if rows is None:
            return None
        if (kernels := native.of_rows(rows)) is not None:
            return kernels.widen(rows, self._ids.ids, self._setup.vocab)
        wide = torch.zeros(rows.shape[0], self._setup.vocab, dtype=rows.dtype, device=rows.device)
        return wide.index_copy_(1, self._ids.ids, rows)


def told_in_one_size(raw: Tensor, ids: ContextIds) -> tuple[Tensor, Tensor]:
    """Rows over a head's columns, and their ids, with room for all that the context may bring: of probability 0."""
    more = len(ids.own) + MOST - len(ids.ids) if ids.grows else 0
    return pad(raw, (0, more)), torch.cat([ids.ids, ids.ids[:1].expand(more)])


def check_packing(setup: DraftSetup, decoder: Decoder) -> None:
    """Raises UsageError where a head cannot be packed as was asked."""
    if setup.draft_quantize in ("int8", "int4") and decoder.kernels is None:
        refuse_packing(setup.draft_quantize, str(decoder.dtype).removeprefix("torch."), setup.device)


def stored_bytes(numbers: int, form: str) -> int:
    """Bytes of so many numbers in a form of weights; in 4 bits with a scale and an offset for each group of 32."""
    return int(numbers * {"int4": 0.625, "int8": 1.0, "bfloat16": 2, "float16": 2}.get(form, 4))


_IN_ONE_PASS = 64
"""Slots behind that still go into a draft's first pass instead of passes of their own."""
_CHUNK = 512
