"""From the target's logits to a verdict: started first, read later. Three forms, of which a pair is built with one.

On a GPU the warping, the rule and the draw of a cycle are some hundred small kernels: captured once as a CUDA graph, they
are one launch. Their result comes to the host in one asynchronous copy into pinned memory; until it is asked for, the host
is free for the cycle before. On a CPU the verdict is computed at once, and only what it needs: 0.5 ms of a cycle of 12,
where `DeviceVerifier` would take 1.0; 0.2 at temperature 0.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from specdec_engine.core.cycle_types import Draft, Sampling, Verdict
from specdec_engine.core.randomness import Randomness
from specdec_engine.core.transfer import download, upload
from specdec_engine.core.trees import depths
from specdec_engine.runtime.graphs import Recorder, repeatable
from specdec_engine.verify.coupling import coupled, gumbel_noise
from specdec_engine.verify.decide import Filtered, decide, decide_on_host, with_raw
from specdec_engine.verify.evidence import Evidence, Layout, RawInputs, Uniforms, unpack, verdict_of
from specdec_engine.verify.greedy import RememberedRule
from specdec_engine.verify.rules import AcceptanceRule
from specdec_engine.verify.sampling import best_where_sure, warp, wide
from specdec_engine.verify.trees import decide_greedily_on_tree, decide_on_tree

PendingVerdict = Callable[[], Verdict]
"""A verdict on its way to the host: waits for it. Raises GenerationFailed where a distribution that mattered is not made of
numbers."""


class Verifier(Protocol):
    """**Protocol:** one rule, applied where the target's logits are."""

    rule: AcceptanceRule
    trees: ClassVar[bool]
    """Whether it takes token trees, with the token rule."""

    def start(
        self, logits: Tensor, draft: Draft, sampling: Sampling, random: Randomness, position: int
    ) -> PendingVerdict:
        """logits [k + 1, V] of the target, the draft they follow, and the length of the context before it."""
        ...


def verifier_for(rule: AcceptanceRule, device: torch.device, recorder: Recorder | None = None) -> Verifier:
    """The form for this device; recorder: one that is nobody else's, where passes are recorded."""
    if recorder is not None:
        return RecordingVerifier(rule, device, recorder)
    return HostVerifier(rule) if device.type == "cpu" else DeviceVerifier(rule, device)


class HostVerifier:
    """On the CPU: decided at once."""

    trees: ClassVar[bool] = True

    def __init__(self, rule: AcceptanceRule) -> None:
        self.rule = rule
        self._remembered = RememberedRule(rule)

    @torch.inference_mode()
    def start(
        self, logits: Tensor, draft: Draft, sampling: Sampling, random: Randomness, position: int
    ) -> PendingVerdict:
        numbers, raw = Uniforms.drawn(random, position, len(draft)), _raw_inputs(logits, draft, sampling)
        best = best_where_sure(logits) if sampling.greedy and draft.probs is None else None
        if draft.parents is not None:
            evidence, filtered = _on_tree(logits, draft, sampling, random, numbers, best)
        elif best is not None:
            evidence, filtered = self._greedily(best, draft, numbers, logits.shape[1])
        else:
            p = _warped(logits, sampling, random, position)
            evidence = decide_on_host(self.rule, p, draft.tokens, draft.probs, numbers)
            filtered = partial(_gathered, p)
        if raw is not None:
            evidence = with_raw(evidence, raw, draft, filtered)
        verdict = verdict_of(evidence, draft.drafter, numbers)
        return lambda: verdict

    def _greedily(self, best: list[int], draft: Draft, numbers: Uniforms, vocab: int) -> tuple[Evidence, Filtered]:
        """At temperature 0. best [k + 1]: where each row's mass is."""
        evidence, places = self._remembered.decide(best, draft.tokens.tolist(), numbers, vocab), best
        return evidence, lambda at: (at == torch.tensor(places)[: len(at), None]).float()


class DeviceVerifier:
    """On a device: its evidence is a row of numbers that comes home in one copy."""

    trees: ClassVar[bool] = False

    def __init__(self, rule: AcceptanceRule, device: torch.device) -> None:
        self.rule = rule
        self._device = device

    @torch.inference_mode()
    def start(
        self, logits: Tensor, draft: Draft, sampling: Sampling, random: Randomness, position: int
    ) -> PendingVerdict:
        numbers, raw = Uniforms.drawn(random, position, len(draft)), _raw_inputs(logits, draft, sampling)
        row = self._row(logits, draft, sampling, random, numbers, raw)
        layout = Layout.of(len(draft), logits.shape[1], raw)
        return partial(_read_verdict, *download(row), layout, draft.drafter, numbers)

    def _row(
        self,
        logits: Tensor,
        draft: Draft,
        sampling: Sampling,
        random: Randomness,
        numbers: Uniforms,
        raw: RawInputs | None,
    ) -> Tensor:
        u = upload(numbers.tensor(self._device), self._device)
        p = _warped(logits, sampling, random, numbers.position)
        return decide(self.rule, p, draft.tokens, draft.probs, u, raw)


class RecordingVerifier(DeviceVerifier):
    """On a device whose passes are recorded: so is the verdict, by shapes and filters."""

    def __init__(self, rule: AcceptanceRule, device: torch.device, recorder: Recorder) -> None:
        super().__init__(rule, device)
        self._recorder = recorder
        self._recordings: dict[Hashable, _Recorded] = {}

    def _row(
        self,
        logits: Tensor,
        draft: Draft,
        sampling: Sampling,
        random: Randomness,
        numbers: Uniforms,
        raw: RawInputs | None,
    ) -> Tensor:
        """Not captured: Gumbel coupling, whose noise is as large as the logits; and drafts that the token budget has cut,
        whose odd lengths would each need a capture that costs ten verdicts.

        A new temperature uses the same graph. A new k, a new filter, or a change between drawn and chosen drafts captures
        once.
        """
        absent = logits.new_empty(0)
        u = numbers.tensor(self._device)
        optional = (draft.probs, *((draft.raw, draft.raw_ids) if sampling.raw else (None, None)))
        given = [logits, draft.tokens, u, *(absent if t is None else t for t in optional)]
        key = (sampling.greedy, sampling.filters, sampling.raw, *((t.shape, t.dtype) for t in given))
        if sampling.coupled or (draft.cut and key not in self._recordings):
            return super()._row(logits, draft, sampling, random, numbers, raw)
        given[2] = upload(u, self._device)
        if key not in self._recordings:
            self._recordings[key] = self._record(sampling, given)
        recorded = self._recordings[key]
        for kept, fresh in zip(recorded.inputs, given, strict=True):
            kept.copy_(fresh)
        recorded.temperature.fill_(sampling.temperature)
        return recorded.replay()[0]

    def _record(self, sampling: Sampling, given: list[Tensor]) -> _Recorded:
        fixed = [torch.zeros(t.shape, dtype=t.dtype, device=self._device) for t in given]
        temperature = torch.ones((), dtype=wide(self._device), device=self._device)
        replay = repeatable(self._recorder, lambda: (self._work(sampling, temperature, *fixed),))
        return _Recorded(fixed, temperature, replay)

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
        inputs = RawInputs(logits, *given[1:]) if sampling.raw and len(tokens) else None
        return decide(self.rule, warp(logits, sampling, temperature), tokens, given[0], u, inputs)


@dataclass(frozen=True, slots=True)
class _Recorded:
    inputs: list[Tensor]
    temperature: Tensor
    replay: Callable[[], tuple[Tensor, ...]]


def _raw_inputs(logits: Tensor, draft: Draft, sampling: Sampling) -> RawInputs | None:
    """None where nobody asked for them, or nothing was drafted. A tree's tokens come from several drafters, with and without
    distributions, of which nothing is told."""
    if not sampling.raw or not len(draft):
        return None
    if draft.parents is not None:
        return RawInputs(logits[[parent + 1 for parent in draft.parents]], None, None)
    return RawInputs(logits, draft.raw, draft.raw_ids)


def _on_tree(
    logits: Tensor, draft: Draft, sampling: Sampling, random: Randomness, numbers: Uniforms, best: list[int] | None
) -> tuple[Evidence, Filtered]:
    """By the token rule, as `verify.trees` has it for trees."""
    assert draft.parents is not None
    rows = [parent + 1 for parent in draft.parents]
    if best is not None:
        places = torch.tensor(best)[rows]
        return decide_greedily_on_tree(best, draft), lambda at: (at == places[:, None]).float()
    p = warp(logits, sampling)
    if sampling.coupled:
        after = [0, *depths(draft.parents)]
        noise = gumbel_noise(random.seed, numbers.position, max(after) + 1, logits.shape[1], logits.device)
        p = coupled(p, noise[after])
    return decide_on_tree(p, draft, numbers), partial(_gathered, p[rows])


def _warped(logits: Tensor, sampling: Sampling, random: Randomness, position: int) -> Tensor:
    """[k + 1, V]: with Gumbel coupling all mass on the token that the noise chooses."""
    p = warp(logits, sampling)
    if not sampling.coupled:
        return p
    rows, vocab = logits.shape
    return coupled(p, gumbel_noise(random.seed, position, rows, vocab, logits.device))


def _gathered(p: Tensor, at: Tensor) -> Tensor:
    return p[: len(at)].gather(1, at)


def _read_verdict(row: Tensor, wait: Callable[[], None], layout: Layout, drafter: str, numbers: Uniforms) -> Verdict:
    wait()
    return verdict_of(unpack(row.tolist(), layout), drafter, numbers)
