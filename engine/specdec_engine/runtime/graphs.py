"""A forward recorded as CUDA graphs: each pass width once, and the whole k-step draft loop as one graph.

A recording reads and writes tensors that stay where they are. What changes from pass to pass (tokens, the first position,
uniform numbers, temperature) is copied into them before a replay, so a change of temperature records nothing anew, and a
new k or width once. Attention looks at a power of two of positions, and crossing one records anew too.

Recording is behind a seam, `Recorder`: the bookkeeping is the same on a CPU, where the tests run it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specdec_engine.runtime import Choose, Chosen, Enough, Unrolled
from specdec_engine.runtime.decoder import Decoder
from specdec_engine.runtime.lean import Forward, LeanRuntime
from specdec_engine.timing import timer_for

Results = tuple[Tensor, ...]
WIDTHS = (1, 2, 4, 6, 8, 12, 16)
"""Passes are padded to one of these; wider ones (prefill) run as they are. Matrix units work on tiles of 8 rows and more, so
padding costs next to nothing, and each width costs a recording."""
_LEAST_SPAN = 256
"""Positions that the shortest recording looks at."""


class Recorder(Protocol):
    """**Protocol:** turns work on fixed tensors into something that can be repeated cheaply."""

    def record(self, work: Callable[[], Results]) -> Callable[[], Results]:
        """The replay; what it returns is overwritten by the next replay.

        The seconds this takes are in no phase of a cycle (`timing.Timer.pause`).
        """
        ...


class CudaRecorder:
    """`torch.cuda.CUDAGraph`; all recordings share one memory pool, since no two run at once."""

    def __init__(self, device: torch.device) -> None:
        self._timer = timer_for(device)
        self._pool = torch.cuda.graph_pool_handle()
        # One for all: cuBLAS keeps a workspace for every stream.
        self._aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def record(self, work: Callable[[], Results]) -> Callable[[], Results]:
        with self._timer.pause():
            self._aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._aside):
                work()  # libraries set themselves up at the first call, which must not be recorded
            torch.cuda.current_stream().wait_stream(self._aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                results = work()

        def replay() -> Results:
            graph.replay()
            return results

        return replay


@dataclass(frozen=True, slots=True)
class Recorded:
    """A recording and the tensors it reads."""

    tokens: Tensor
    """[width] int64"""
    start: Tensor
    """[1] int64: the position of the first token."""
    numbers: Tensor
    """[k + 1] uniform numbers and the temperature; empty for a plain pass."""
    replay: Callable[[], Results]


class GraphRuntime(LeanRuntime):
    """A `Forward` on one GPU, whose cache stays in place. Several may share one decoder."""

    name = "graph"

    def __init__(self, decoder: Forward, label: str, limit: int | None, capacity: int, recorder: Recorder) -> None:
        """capacity: tokens to make room for at first."""
        super().__init__(decoder, label, limit, capacity)
        self.recorder = recorder
        self._recordings: dict[Hashable, Recorded] = {}

    def first(self, layers: int) -> GraphRuntime:
        assert isinstance(self.decoder, Decoder)
        label = f"{self._label}:{layers}"
        return GraphRuntime(self.decoder.first(layers), label, self.limit, self.capacity, self.recorder)

    @torch.inference_mode()
    def forward(self, tokens: Tensor, rows: int) -> Tensor:
        n = tokens.shape[0]
        width = next((width for width in WIDTHS if width >= n), n)
        if self._cached + width > self.capacity >= self._cached + n:
            width = n  # no new cache for padding alone
        self._make_room(self._cached + width)
        span = span_for(self._cached + width)
        if width not in WIDTHS:
            positions = torch.arange(self._cached, self._cached + n, device=self.device)
            logits = self._passed(tokens, positions, span, rows)
        else:
            recorded = self._recorded(("pass", width, span), width, 0, lambda *fixed: self._pass(span, *fixed))
            recorded.tokens[:n].copy_(tokens)  # the surplus ones repeat what was there; their rows are cut off
            recorded.start.fill_(self._cached)
            logits = recorded.replay()[0][n - rows : n].clone()
        self._cached += n
        return logits

    @torch.inference_mode()
    def unroll(
        self, pending: Tensor, u: Tensor, temperature: Tensor, choose: Choose, enough: Enough | None = None
    ) -> Unrolled:
        """One replay, always of k tokens. More than two pending tokens, which is rare, are fed in a pass before."""
        if pending.shape[0] > 2:
            self.forward(pending[:-1], 1)
            pending = pending[-1:]
        m, k = pending.shape[0], u.shape[0]
        self._make_room(self._cached + m + k)
        span = span_for(self._cached + m + k)
        recorded = self._recorded(
            ("loop", m, k, span, choose.key), m, k + 1, lambda *fixed: self._loop(span, choose, *fixed)
        )
        recorded.tokens.copy_(pending)
        recorded.start.fill_(self._cached)
        recorded.numbers[:k].copy_(u)
        recorded.numbers[k:].copy_(temperature)
        tokens, rows, raw = (result.clone() for result in recorded.replay())
        self._cached += m + k - 1
        return Unrolled(tokens, rows if rows.numel() else None, raw if raw.numel() else None)

    def _pass(self, span: int, tokens: Tensor, start: Tensor, numbers: Tensor) -> Results:
        positions = start + torch.arange(tokens.shape[0], device=self.device)
        return (self._passed(tokens, positions, span, tokens.shape[0]),)

    def _loop(self, span: int, choose: Choose, tokens: Tensor, start: Tensor, numbers: Tensor) -> Results:
        """k forwards, each feeding the token that the one before chose."""
        positions = start + torch.arange(tokens.shape[0], device=self.device)
        chosen = list[Chosen]()
        for number in numbers[:-1]:
            chosen.append(choose(self.decoder(tokens, positions, self._cache, span, 1), number, numbers[-1]))
            tokens, positions = chosen[-1].token, positions[-1:] + 1
        found, nothing = Unrolled.of(chosen, [one.token for one in chosen]), numbers.new_empty(0)
        return (found.tokens, *(nothing if t is None else t for t in (found.rows, found.raw)))

    def _recorded(self, key: Hashable, width: int, numbers: int, work: Callable[..., Results]) -> Recorded:
        """The recording for this key, made if it is not there.

        Recording runs the work on zeros, at the positions that the replay will write anyway.
        """
        if key not in self._recordings:
            tokens = torch.zeros(width, dtype=torch.long, device=self.device)
            start = torch.full((1,), self._cached, dtype=torch.long, device=self.device)
            values = torch.ones(numbers, dtype=torch.float64, device=self.device).div_(2)
            replay = self.recorder.record(lambda: work(tokens, start, values))
            self._recordings[key] = Recorded(tokens, start, values, replay)
        return self._recordings[key]

    def tap(self, layers: tuple[int, ...]) -> None:
        self._recordings.clear()  # made without the taps
        super().tap(layers)

    def _grow(self, end: int) -> None:
        self._recordings.clear()  # they hold memory, and the old cache
        super()._grow(end)

    def _rounded(self, tokens: int) -> int:
        return span_for(tokens)


def span_for(end: int) -> int:
    """The power of two that takes in `end` positions."""
    return max(_LEAST_SPAN, 1 << (end - 1).bit_length())
