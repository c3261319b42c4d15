"""A forward recorded as CUDA graphs: each pass width once, and one step of a draft, which is replayed for every token.

A recording reads and writes tensors that stay where they are. What changes from pass to pass (tokens, the first position,
uniform numbers, temperature) is copied into them before a replay; a step leaves its token and the next position there for
the step after it, so that the host waits for none. Neither a change of temperature nor one of k records anything anew.
Attention looks at a power of two of positions, and crossing one does.

Recording is behind a seam, `Recorder`: the bookkeeping is the same on a CPU, where the tests run it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specdec_engine.runtime import DraftTokens, SampledToken, StopDrafting, TokenSampler
from specdec_engine.runtime.decoder import Decoder
from specdec_engine.runtime.lean import Forward, LeanRuntime
from specdec_engine.runtime.ops import FEW_ROWS
from specdec_engine.runtime.shape import Unsupported
from specdec_engine.system.memory import ran_out
from specdec_engine.system.timing import timer_for

Results = tuple[Tensor, ...]
Replay = Callable[[], Results]
WIDTHS = (1, 2, 4, 6, 8, 12, 16)
"""Passes are padded to one of these; wider ones (prefill) run as they are. Matrix units work on tiles of 8 rows and more, so
padding costs next to nothing, and each width costs a recording."""
_LEAST_SPAN = 256
"""Positions that the shortest recording looks at."""
_AROUND = 192
"""Tokens that a run takes beside its text and what it emits: a chat template's (30 to 100), a draft's (up to 64), and the
rows that a pass is padded with."""


class Recorder(Protocol):
    """**Protocol:** turns work on fixed tensors into something that can be repeated cheaply."""

    def record(self, work: Callable[[], Results]) -> Replay:
        """The replay; what it returns is overwritten by the next replay of any recording.

        The seconds this takes are in no phase of a cycle (`timing.Timer.pause`). Raises, in as many ways as the libraries
        below it, for work that cannot be recorded.
        """
        ...

    def clear(self) -> None:
        """All recordings are gone: whoever had replays has dropped them."""
        ...

    def another(self) -> Recorder:
        """For work whose recordings last longer, or less long, on the same device."""
        ...


class CudaRecorder:
    """`torch.cuda.CUDAGraph`. The recordings of one share a memory pool, since no two run at once.

    Each warms up and captures on a stream of its own, and in a capture cuBLAS makes a workspace of its own, in that pool: it
    keeps one a stream, torch hands out 32 streams in turns, and whoever drops a graph, or compiles another model, drops the
    workspaces of all.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._timer = timer_for(device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Results]) -> Replay:
        # Outside inference mode: what torch keeps for its generators when it first captures would else be inference tensors,
        # which no other graph in this process, transformers' compiled forward for one, may write to.
        with torch.cuda.device(self._device), self._timer.pause(), torch.inference_mode(False):
            self._warm_up(work)
            graph, results = self._captured(work)

        def replay() -> Results:
            graph.replay()
            return results

        return replay

    def clear(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()  # the old one ends with its last graph, and takes no other then

    def another(self) -> CudaRecorder:
        return CudaRecorder(self._device)

    def _warm_up(self, work: Callable[[], Results]) -> None:
        """Libraries set themselves up at the first call, which must not be recorded."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), torch.inference_mode():
            work()
        torch.cuda.current_stream().wait_stream(self._stream)

    def _captured(self, work: Callable[[], Results]) -> tuple[torch.cuda.CUDAGraph, Results]:
        """Other threads may go on using the device: one of a screen, or one that loads the next model."""
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        torch._C._cuda_clearCublasWorkspaces()
        try:
            with capture, torch.inference_mode():
                return graph, work()
        except Exception:  # Triton's compiler has errors of its own
            # What torch does not clear up: it leaves the capture's stream the current one, and its allocator goes on asking
            # the graph which allocations are its own.
            torch.cuda.set_stream(before)
            self._pool = torch.cuda.graph_pool_handle()
            _BROKEN.append(graph)
            raise
        finally:
            torch._C._cuda_clearCublasWorkspaces()


_BROKEN: list[torch.cuda.CUDAGraph] = []
"""Whose capture broke off; kept to the end."""


@dataclass(frozen=True, slots=True)
class _Fixed:
    """What recordings read, and a draft's steps write: one pass runs at a time, so all share them."""

    tokens: Tensor
    """[16] int64; a draft's step leaves the token that it chose as the first."""
    start: Tensor
    """[1] int64: the position of the first token; after a step that of its token."""
    number: Tensor
    """[]: what a step draws with."""
    temperature: Tensor
    """[]"""


class GraphRuntime(LeanRuntime):
    """A `Forward` on one GPU, whose cache stays in place. Several may share one decoder."""

    name = "graph"

    def __init__(self, decoder: Forward, label: str, limit: int | None, capacity: int, recorder: Recorder) -> None:
        """capacity: tokens to make room for at first; the recorder is nobody else's."""
        super().__init__(decoder, label, limit, capacity)
        self.recorder = recorder
        self._recordings: dict[Hashable, Replay] = {}
        numbers = torch.ones(2, dtype=torch.float64, device=self.device)
        self._fixed = _Fixed(
            tokens=torch.zeros(WIDTHS[-1], dtype=torch.long, device=self.device),
            start=torch.zeros(1, dtype=torch.long, device=self.device),
            number=numbers[0],
            temperature=numbers[1],
        )

    @torch.inference_mode()
    def try_out(self) -> None:
        """Record a pass over one token, the first that any run asks for. Raises Unsupported if it cannot be recorded."""
        span = self._span(1, 1)
        try:
            self._recordings["pass", 1, span] = self.recorder.record(self._pass(1, span))
        except Exception as error:
            if ran_out(error):
                raise
            said = str(error).strip().partition("\n")[0]
            raise Unsupported(f"its forward cannot be recorded ({said})") from error

    def first(self, layers: int) -> GraphRuntime:
        assert isinstance(self.decoder, Decoder)
        label = f"{self._label}:{layers}"
        return GraphRuntime(self.decoder.first(layers), label, self.limit, self.capacity, self.recorder.another())

    @torch.inference_mode()
    def forward(self, tokens: Tensor, rows: int, seldom: bool = False) -> Tensor:
        n = tokens.shape[0]
        width = self._width(n, seldom)
        end = self.capacity if self.limit is None else min(self.capacity, self.limit)
        if self._cached + width > end >= self._cached + n:
            width = n  # no new cache for padding alone, and no position that a model with a table of them lacks
        self._make_room(self._cached + width)
        span = self._span(width, self._cached + width)
        if width not in WIDTHS:
            positions = torch.arange(self._cached, self._cached + n, device=self.device)
            logits = self._passed(tokens, positions, span, rows, self._cached)
        else:
            replay = self._recorded(("pass", width, span), self._pass(width, span))
            self._fixed.tokens[:n].copy_(tokens)  # the surplus ones repeat what was there; their rows are cut off
            self._fixed.start.fill_(self._cached)
            logits = replay()[0][n - rows : n].clone()
        self._cached += n
        return logits

    @torch.inference_mode()
    def unroll(
        self, pending: Tensor, u: Tensor, temperature: Tensor, sampler: TokenSampler, stop: StopDrafting | None = None
    ) -> DraftTokens:
        """One replay a token, always k. More than two pending tokens, which is rare, are fed in a pass before."""
        if pending.shape[0] > 2:
            self.forward(pending[:-1], 1)
            pending = pending[-1:]
        m, begin = pending.shape[0], self._cached
        ends = range(begin + m, begin + m + u.shape[0])
        self._make_room(ends[-1])
        # All of them before the first runs: a recording writes to the fixed tensors.
        steps = [self._step(m if end == ends[0] else 1, self._span(1, end), sampler) for end in ends]
        self._fixed.tokens[:m].copy_(pending)
        self._fixed.start.fill_(begin)
        self._fixed.temperature.copy_(temperature)
        results = list[Results]()
        for number, replay in zip(u, steps, strict=True):
            self._fixed.number.copy_(number)
            results.append(tuple(result.clone() for result in replay()))
        self._cached = ends[-1]
        tokens, rows, raw = (torch.cat(parts) for parts in zip(*results, strict=True))
        return DraftTokens(tokens, rows if rows.numel() else None, raw if raw.numel() else None)

    def _span(self, rows: int, end: int) -> int:
        """Positions that a pass of so many rows, which ends there, is recorded for: all, where attention reads on the device
        how many there are."""
        reads = rows <= FEW_ROWS and getattr(self.decoder, "reads_length_on_device", False)
        return self.capacity if reads else span_for(end)

    def _width(self, n: int, seldom: bool) -> int:
        """Of a pass over n tokens. Where they are seldom so many, one that is recorded: at a run's end every cycle is shorter
        than the one before, and each width would cost a recording to save a few rows once."""
        least = next((width for width in WIDTHS if width >= n), n)
        if not seldom:
            return least
        ready = (w for w in WIDTHS if w >= n and ("pass", w, self._span(w, self._cached + w)) in self._recordings)
        return next(ready, least)

    def _pass(self, width: int, span: int) -> Callable[[], Results]:
        """[width, V] logits after that many tokens."""
        fixed = self._fixed

        def work() -> Results:
            positions = fixed.start + torch.arange(width, device=self.device)
            return (self._passed(fixed.tokens[:width], positions, span, width),)

        return work

    def _step(self, m: int, span: int, sampler: TokenSampler) -> Replay:
        """The token [1] chosen after m tokens, and its distributions [1, V]; empty ones where there are none."""
        fixed = self._fixed

        def work() -> Results:
            positions = fixed.start + torch.arange(m, device=self.device)
            logits = self.decoder(fixed.tokens[:m], positions, self._cache, span, 1)
            sampled = sampler(logits, fixed.number, fixed.temperature)
            fixed.tokens[:1].copy_(sampled.token)
            fixed.start.add_(m)
            return _results(sampled)

        return self._recorded(("step", m, span, sampler.key), work)

    def _recorded(self, key: Hashable, work: Callable[[], Results]) -> Replay:
        """The recording for this key, made if it is not there.

        Recording runs the work on zeros, at the positions that the replay will write anyway.
        """
        if key not in self._recordings:
            self._fixed.tokens.zero_()
            self._fixed.start.fill_(self._cached)
            self._fixed.number.fill_(0.5)
            self._fixed.temperature.fill_(1.0)
            self._recordings[key] = repeatable(self.recorder, work)
        return self._recordings[key]

    def tap(self, layers: tuple[int, ...]) -> None:
        self._forget()  # they were made without the taps
        super().tap(layers)

    def _grow(self, end: int) -> None:
        self._forget()  # they hold memory, and the old cache
        super()._grow(end)

    def _forget(self) -> None:
        self._recordings.clear()
        self.recorder.clear()

    def _rounded(self, tokens: int) -> int:
        return span_for(tokens)


def repeatable(recorder: Recorder, work: Callable[[], Results]) -> Replay:
    """A recording of the work; where that fails the work itself, which is slower, and ends no run.

    Raises what says that memory ran out: the work would, too.
    """
    try:
        return recorder.record(work)
    except Exception as error:
        if ran_out(error):
            raise
        return work


def _results(sampled: SampledToken) -> Results:
    nothing = sampled.token.new_empty(0)
    return (sampled.token, *(nothing if t is None else t for t in (sampled.row, sampled.raw)))


def room_for(tokens: int, limit: int | None) -> int:
    """Positions to make room for at first, so that a run of so many tokens, its text and what it emits, stays within them.

    limit: the model's own.
    """
    return span_for(tokens + _AROUND if limit is None else min(tokens + _AROUND, limit))


def span_for(end: int) -> int:
    """The power of two that takes in `end` positions."""
    return max(_LEAST_SPAN, 1 << (end - 1).bit_length())
