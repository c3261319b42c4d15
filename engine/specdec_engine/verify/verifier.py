"""From the target's logits to a verdict: started first, read later.

On a GPU the warping, the rule and the draw of a cycle are some hundred small kernels: recorded once they are one launch.
Their result comes to the host in one asynchronous copy into pinned memory, so that until it is asked for the host is free
for the cycle before. On a CPU the verdict is made at once, and of all that a recording works out only what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from specdec_engine.core.cycle_types import Draft, Sampling, Verdict
from specdec_engine.core.randomness import Randomness
from specdec_engine.core.transfer import download, upload
from specdec_engine.runtime.graphs import Recorder, repeatable
from specdec_engine.verify.coupling import coupled, gumbel_noise
from specdec_engine.verify.greedy import GreedyReports
from specdec_engine.verify.report import Numbers, Unwarped, read, report, report_on_host, told_on_host
from specdec_engine.verify.rules import AcceptanceRule
from specdec_engine.verify.sampling import best_where_sure, warp, wide

PendingVerdict = Callable[[], Verdict]
"""A verdict on its way to the host: waits for it. Raises GenerationFailed where a distribution that mattered is not made of
numbers."""


class Verifier:
    """One rule on one device; eager without a recorder, which is nobody else's."""

    def __init__(self, rule: AcceptanceRule, device: torch.device, recorder: Recorder | None = None) -> None:
        self.rule = rule
        self._greedy = GreedyReports(rule)
        self._device = device
        self._recorder = recorder
        self._recordings: dict[Hashable, _Recorded] = {}

    @torch.inference_mode()
    def start(
        self, logits: Tensor, draft: Draft, sampling: Sampling, random: Randomness, position: int
    ) -> PendingVerdict:
        """logits [k + 1, V] of the target, the draft they follow, and the length of the context before it."""
        numbers = Numbers.drawn(random, position, len(draft))
        before = Unwarped(logits, draft.raw, draft.raw_ids) if sampling.raw and len(draft) else None
        sides = 0 if before is None else before.sides
        here = self._device.type == "cpu" and self._recorder is None
        if here and sampling.greedy and draft.probs is None:
            best = best_where_sure(logits)
            if best is not None:
                verdict = self._greedily(best, draft, numbers, before, logits.shape[1])
                return lambda: verdict
        if here:
            p = self._warped(logits, sampling, random, position)
            said = report_on_host(self.rule, p, draft.tokens, draft.probs, numbers)
            if before is not None:
                said += told_on_host(int(said[0]), before, draft, lambda at: p[: len(at)].gather(1, at))
            return partial(read, said, draft.source, numbers, logits.shape[1], sides)
        u = upload(numbers.tensor(self._device), self._device)
        values = self._replayed(logits, draft, sampling, u)
        if values is None:
            p = self._warped(logits, sampling, random, position)
            values = report(self.rule, p, draft.tokens, draft.probs, u, before)
        return partial(_read, *download(values), draft.source, numbers, logits.shape[1], sides)

    def _warped(self, logits: Tensor, sampling: Sampling, random: Randomness, position: int) -> Tensor:
        """[k + 1, V]: with Gumbel coupling all mass on the token that the noise chooses."""
        p = warp(logits, sampling)
        if not sampling.coupled:
            return p
        rows, vocab = logits.shape
        return coupled(p, gumbel_noise(random.seed, position, rows, vocab, self._device))

    def _greedily(
        self, best: list[int], draft: Draft, numbers: Numbers, before: Unwarped | None, vocab: int
    ) -> Verdict:
        """At temperature 0 and on the host."""
        said = self._greedy.report(best, draft.tokens.tolist(), numbers, vocab)
        if before is not None:
            at_best = torch.tensor(best)[:, None]
            said += told_on_host(int(said[0]), before, draft, lambda at: (at == at_best[: len(at)]).float())
        return read(said, draft.source, numbers, vocab, 0 if before is None else before.sides)

    def _replayed(self, logits: Tensor, draft: Draft, sampling: Sampling, u: Tensor) -> Tensor | None:
        """None where nothing is recorded: with Gumbel coupling, whose noise would be one more input as large as the logits;
        and for what the run's end has cut, each draft to another length, since a recording costs what ten verdicts do.

        A new temperature records nothing anew; a new k, a filter, or a drafter of the other kind does, once.
        """
        if self._recorder is None or sampling.coupled:
            return None
        none = logits.new_empty(0)
        unwarped = (draft.raw, draft.raw_ids) if sampling.raw else (None, None)
        given = [logits, draft.tokens, u, *(none if t is None else t for t in (draft.probs, *unwarped))]
        key = (sampling.greedy, sampling.filters, sampling.raw, *((t.shape, t.dtype) for t in given))
        if key not in self._recordings:
            if draft.cut:
                return None
            fixed = [torch.zeros(t.shape, dtype=t.dtype, device=self._device) for t in given]
            temperature = torch.ones((), dtype=wide(self._device), device=self._device)
            replay = repeatable(self._recorder, lambda: (self._work(sampling, temperature, *fixed),))
            self._recordings[key] = _Recorded(fixed, temperature, replay)
        recorded = self._recordings[key]
        for kept, fresh in zip(recorded.inputs, given, strict=True):
            kept.copy_(fresh)
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


def _read(
    values: Tensor, arrived: Callable[[], None], source: str, numbers: Numbers, vocab: int, sides: int
) -> Verdict:
    arrived()
    return read(values.tolist(), source, numbers, vocab, sides)
