"""From the target's logits to a verdict: launched first, read later.

On a GPU the warping, the rule and the draw of a cycle are some hundred small kernels: recorded once they are one launch.
Their result comes to the host in one asynchronous copy into pinned memory, so that between `start` and `verdict` the host
is free for the cycle before.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec_engine.acceptance import AcceptanceRule, Numbers, read, report
from specdec_engine.coupling import coupled, gumbel_noise
from specdec_engine.randomness import Randomness
from specdec_engine.runtime.graphs import Recorder
from specdec_engine.sampling import warp, wide
from specdec_engine.types import Draft, Sampling, Verdict


@dataclass(frozen=True, slots=True)
class Awaited:
    """A verdict on its way to the host."""

    values: Tensor
    arrived: Callable[[], None]
    source: str
    numbers: Numbers
    vocab: int
    sides: int
    """Of whose distributions it tells what they were before warping: 0, 1 (the target's) or 2 (the draft's as well)."""

    def verdict(self) -> Verdict:
        """Waits for it. Raises GenerationFailed where a distribution that mattered is not made of numbers."""
        self.arrived()
        return read(self.values.tolist(), self.source, self.numbers, self.vocab, self.sides)


class Judge:
    """One rule on one device; eager without a recorder."""

    def __init__(self, rule: AcceptanceRule, device: torch.device, recorder: Recorder | None = None) -> None:
        self.rule = rule
        self._device = device
        self._recorder = recorder
        self._recordings: dict[Hashable, _Recorded] = {}

    @torch.inference_mode()
    def start(
        self,
        logits: Tensor,
        draft: Draft,
        sampling: Sampling,
        random: Randomness,
        position: int,
    ) -> Awaited:
        """logits [k + 1, V] of the target, the draft they follow, and the length of the context before it."""
        numbers = Numbers.drawn(random, position, len(draft))
        told = sampling.raw and len(draft) > 0
        before = (logits if told else None, draft.raw if told else None)
        u = numbers.tensor(self._device)
        if sampling.coupled:  # its noise is made on the host, a row a position: not recorded
            noise = gumbel_noise(random.seed, position, len(draft) + 1, logits.shape[-1], self._device)
            p = coupled(warp(logits, sampling), noise)
            values = report(self.rule, p, draft.tokens, draft.probs, u.to(self._device, non_blocking=True), *before)
        elif self._recorder is None:
            values = report(
                self.rule,
                warp(logits, sampling),
                draft.tokens,
                draft.probs,
                u.to(self._device, non_blocking=True),
                *before,
            )
        else:
            values = self._replayed(self._recorder, logits, draft, sampling, u)
        sides = sum(side is not None for side in before)
        return Awaited(*_brought_home(values), draft.source, numbers, logits.shape[1], sides)

    def _replayed(self, recorder: Recorder, logits: Tensor, draft: Draft, sampling: Sampling, u: Tensor) -> Tensor:
        """A new temperature records nothing anew; a new k, a filter, or a drafter of the other kind does, once."""
        none = logits.new_empty(0)
        raw = draft.raw if sampling.raw else None
        given = [logits, draft.tokens, u, *(none if t is None else t for t in (draft.probs, raw))]
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
    ) -> Tensor:
        """probs, raw: empty where the draft has none."""
        p = warp(logits, sampling, temperature)
        told = sampling.raw and len(tokens) > 0
        before = (logits if told else None, raw if told and raw.numel() else None)
        return report(self.rule, p, tokens, probs if probs.numel() else None, u, *before)


@dataclass(frozen=True, slots=True)
class _Recorded:
    inputs: list[Tensor]
    temperature: Tensor
    replay: Callable[[], tuple[Tensor, ...]]


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
