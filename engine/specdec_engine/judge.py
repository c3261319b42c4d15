"""From the target's logits to a verdict: launched first, read later.

On a GPU the warping, the rule and the draw of a cycle are some hundred small kernels: recorded once they are one launch.
Their result comes to the host in one asynchronous copy into pinned memory, so that until it is asked for the host is free
for the cycle before. On a CPU the verdict is made at once, and of all that a recording works out only what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from specdec_engine.acceptance import (
    AcceptanceRule,
    Numbers,
    Unwarped,
    certain,
    read,
    report,
    report_on_host,
    told_on_host,
)
from specdec_engine.coupling import coupled, gumbel_noise
from specdec_engine.randomness import Randomness
from specdec_engine.runtime.graphs import Recorder
from specdec_engine.sampling import Narrow, one_hot, warp, wide
from specdec_engine.types import Draft, Sampling, Verdict

Awaited = Callable[[], Verdict]
"""A verdict on its way to the host: waits for it. Raises GenerationFailed where a distribution that mattered is not made of
numbers."""


class Judge:
    """One rule on one device; eager without a recorder."""

    def __init__(self, rule: AcceptanceRule, device: torch.device, recorder: Recorder | None = None) -> None:
        self.rule = rule
        self._device = device
        self._recorder = recorder
        self._recordings: dict[Hashable, _Recorded] = {}

    @torch.inference_mode()
    def start(self, logits: Tensor, draft: Draft, sampling: Sampling, random: Randomness, position: int) -> Awaited:
        """logits [k + 1, V] of the target, the draft they follow, and the length of the context before it."""
        numbers = Numbers.drawn(random, position, len(draft))
        before = Unwarped(logits, draft.raw, draft.raw_ids) if sampling.raw and len(draft) else None
        sides = 0 if before is None else before.sides
        here = self._device.type == "cpu" and self._recorder is None
        if here and sampling.greedy:
            settled = _greedily(self.rule, logits, draft, numbers, before)
            return lambda: settled
        if sampling.coupled:  # its noise is made on the host, a row a position: not recorded
            noise = gumbel_noise(random.seed, position, len(draft) + 1, logits.shape[-1], self._device)
            p = coupled(warp(logits, sampling), noise)
        elif self._recorder is None:
            p = warp(logits, sampling)
        else:
            u = numbers.tensor(self._device)
            values = self._replayed(self._recorder, logits, draft, sampling, u)
            return partial(_read, *_brought_home(values), draft.source, numbers, logits.shape[1], sides)
        if here:
            said = report_on_host(self.rule, p, draft.tokens, draft.probs, numbers)
            if before is not None:
                tested = min(int(said[0]) + 1, len(draft))
                said += told_on_host(tested, before, draft.tokens, lambda at: p[:tested].gather(1, at), draft.probs)
            return partial(read, said, draft.source, numbers, logits.shape[1], sides)
        u = numbers.tensor(self._device).to(self._device, non_blocking=True)
        values = report(self.rule, p, draft.tokens, draft.probs, u, before)
        return partial(_read, *_brought_home(values), draft.source, numbers, logits.shape[1], sides)

    def _replayed(self, recorder: Recorder, logits: Tensor, draft: Draft, sampling: Sampling, u: Tensor) -> Tensor:
        """A new temperature records nothing anew; a new k, a filter, or a drafter of the other kind does, once."""
        none = logits.new_empty(0)
        unwarped = (draft.raw, draft.raw_ids) if sampling.raw else (None, None)
        given = [logits, draft.tokens, u, *(none if t is None else t for t in (draft.probs, *unwarped))]
        key = (sampling.greedy, sampling.filters, sampling.raw, *((t.shape, t.dtype) for t in given))
        if key not in self._recordings:
            fixed = [torch.zeros(t.shape, dtype=t.dtype, device=self._device) for t in given]
            temperature = torch.ones((), dtype=wide(self._device), device=self._device)
            replay = recorder.record(lambda: (self._work(sampling, temperature, *fixed),))
            self._recordings[key] = _Recorded(fixed, temperature, replay)
        recorded = self._recordings[key]
        for kept, fresh in zip(recorded.inputs, given, strict=True):
            kept.copy_(fresh, non_blocking=True)  # u comes from the host: under 64 KB, such a copy does not wait
        recorded.temperature.fill_(sampling.temperature)
        return recorded.replay()[0]

    def _work(
        self,
        sampling: Sampling,
        temperature: Tensor,
        logits: Tensor,
        tokens: Tensor,
        u: Tensor,
        probs: Tensor,
        raw: Tensor,
        ids: Tensor,
    ) -> Tensor:
        """probs, raw, ids: empty where the draft has none."""
        given = [t if t.numel() else None for t in (probs, raw, ids)]
        before = Unwarped(logits, *given[1:]) if sampling.raw and len(tokens) else None
        return report(self.rule, warp(logits, sampling, temperature), tokens, given[0], u, before)


@dataclass(frozen=True, slots=True)
class _Recorded:
    inputs: list[Tensor]
    temperature: Tensor
    replay: Callable[[], tuple[Tensor, ...]]


def _greedily(rule: AcceptanceRule, logits: Tensor, draft: Draft, numbers: Numbers, before: Unwarped | None) -> Verdict:
    """At temperature 0 and on the host."""
    drafted, (best, sure) = draft.tokens.tolist(), one_hot(logits)
    narrow = None if rule.lossless and draft.probs is None else Narrow.of(best, sure, drafted)
    values = certain(best, sure, drafted) if narrow is None else _narrowly(rule, narrow, draft, numbers)
    if before is not None:
        tested = min(int(values[0]) + 1, len(drafted))
        at_best = torch.tensor(best[:tested])[:, None]
        values += told_on_host(tested, before, draft.tokens, lambda at: (at == at_best).float(), draft.probs)
    sides = 0 if before is None else before.sides
    found = read(values, draft.source, numbers, 1 if narrow is None else len(narrow.ids), sides)
    return found if narrow is None else _named(narrow, found)


def _narrowly(rule: AcceptanceRule, narrow: Narrow, draft: Draft, numbers: Numbers) -> list[float]:
    """A report over the few ids that have mass or were drafted."""
    tokens = torch.tensor([narrow.ids.index(token) for token in draft.tokens.tolist()], dtype=torch.long)
    probs = None if draft.probs is None else draft.probs[:, narrow.ids]
    return report_on_host(rule, narrow.p, tokens, probs, numbers)


def _named(narrow: Narrow, found: Verdict) -> Verdict:
    """A verdict about places among the ids, about these."""
    return replace(
        found,
        drafted=tuple(narrow.ids[at] for at in found.drafted),
        token=narrow.ids[found.token],
        residual=tuple((narrow.ids[at], mass) for at, mass in found.residual),
    )


def _read(
    values: Tensor, arrived: Callable[[], None], source: str, numbers: Numbers, vocab: int, sides: int
) -> Verdict:
    arrived()
    return read(values.tolist(), source, numbers, vocab, sides)


def _brought_home(values: Tensor) -> tuple[Tensor, Callable[[], None]]:
    if values.device.type != "cuda":
        return values, _at_once
    home = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    home.copy_(values, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return home, event.synchronize


def _at_once() -> None:
    pass
