"""Several texts of one target that go on side by side, token by token: how it writes its own training text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from specdec_engine.core.transfer import upload
from specdec_engine.distill.batch import Batch
from specdec_engine.runtime.decoder import Decoder
from specdec_engine.runtime.lean import LeanRuntime, forward_together


class Lanes(Protocol):
    """**Protocol:** `count` texts, numbered from 0; any of them may begin anew at any time."""

    count: int

    def begin(self, lane: int, tokens: Sequence[int]) -> None:
        """A new text; all of its tokens but the last are read."""
        ...

    def step(self, tokens: Mapping[int, int]) -> Tensor:
        """A token more of each of these lanes -> [lanes, V] logits after it, in their order."""
        ...

    def features(self, lane: int) -> Tensor:
        """[n, taps + 1, hidden]: what the target computed of the n tokens that it has read there; see `Taps`."""
        ...


def lanes_of(runtime: LeanRuntime, taps: tuple[int, ...], capacity: int) -> Lanes:
    """capacity: tokens of the longest text."""
    return RunLanes(runtime, taps) if runtime.device.type == "cpu" else BatchLanes(runtime, taps, capacity)


class RunLanes:
    """On a CPU, as runs side by side: packed weights are unpacked once for all, and each text is looked at as far as it goes.

    On 2 cores with AMX the built-in target writes 610 tokens a second after 100 tokens, and 455 after 300, where 64 rows of
    torch's bfloat16 in one tensor, `Batch`, wrote 760 and 400, and 245 after 600; twice as many lanes were no faster.
    """

    count = 32

    def __init__(self, runtime: LeanRuntime, taps: tuple[int, ...]) -> None:
        self._runtimes = [runtime.another() for _ in range(self.count)]
        for each in self._runtimes:
            each.tap(taps)

    def begin(self, lane: int, tokens: Sequence[int]) -> None:
        self._runtimes[lane].rollback(0)
        if len(tokens) > 1:
            self._runtimes[lane].forward(torch.tensor(tokens[:-1]), 1)

    def step(self, tokens: Mapping[int, int]) -> Tensor:
        own = [torch.tensor([token]) for token in tokens.values()]
        return torch.cat(forward_together([self._runtimes[lane] for lane in tokens], own))

    def features(self, lane: int) -> Tensor:
        return self._runtimes[lane].features(0, self._runtimes[lane].cached)


class BatchLanes:
    """On a GPU, in one cache: a kernel over all texts costs what it costs for one."""

    count = 64

    def __init__(self, runtime: LeanRuntime, taps: tuple[int, ...], capacity: int) -> None:
        decoder = runtime.decoder
        assert isinstance(decoder, Decoder)
        self._reader = LeanRuntime(decoder, "", runtime.limit, capacity)
        self._reader.tap(taps)
        self._batch = Batch(decoder, self.count, capacity, taps)
        size = (self.count, capacity, len(taps) + 1, decoder.shape.hidden)
        self._features = torch.zeros(size, dtype=decoder.dtype, device=decoder.device)
        self._read, self._device = [0] * self.count, decoder.device

    def begin(self, lane: int, tokens: Sequence[int]) -> None:
        n = self._read[lane] = len(tokens) - 1
        self._reader.rollback(0)
        if n:
            self._reader.forward(upload(torch.tensor(tokens[:-1]), self._device), 1)
            self._batch.take(lane, self._reader.keys_and_values(n))
            self._features[lane, :n] = self._reader.features(0, n)

    def step(self, tokens: Mapping[int, int]) -> Tensor:
        fed, positions = [tokens.get(lane, 0) for lane in range(self.count)], list(self._read)
        logits, features = self._batch.step(
            upload(torch.tensor(fed), self._device), upload(torch.tensor(positions), self._device)
        )
        lanes = upload(torch.tensor(list(tokens)), self._device)
        self._features[lanes, upload(torch.tensor([positions[lane] for lane in tokens]), self._device)] = features[
            lanes
        ]
        for lane in tokens:
            self._read[lane] += 1
        return logits[lanes]

    def features(self, lane: int) -> Tensor:
        return self._features[lane, : self._read[lane]]
