"""CUDA graphs as they are, on a CPU: Python runs once, and a replay repeats the recorded operations on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specdec_engine.runtime.graphs import Replay, Results
from specdec_engine.system.timing import HostTimer
from specdec_engine.verify import sampling

ATEN = torch.ops.aten
WAITS = {
    ATEN.item.default,
    ATEN.is_nonzero.default,
    ATEN._local_scalar_dense.default,
    ATEN.nonzero.default,
    ATEN.masked_select.default,
    ATEN.lift_fresh.default,
}
"""Values that are looked at, sizes that depend on them, and values from the host: what a capture does not allow."""


@dataclass(frozen=True)
class Step:
    """An operation on its tensors."""

    work: Any
    args: tuple[Any, ...]
    options: dict[str, Any]
    results: tuple[Any, ...]

    def again(self) -> None:
        fresh = tree_leaves(self.work(*self.args, **self.options))
        for kept, new in zip(self.results, fresh, strict=True):
            if isinstance(kept, Tensor) and kept.numel() and kept.data_ptr() != new.data_ptr():
                kept.copy_(new)


class Tape(TorchDispatchMode):
    """Notes every operation. What it writes to is afterwards as before: a capture computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = list[Step]()
        self._before = dict[int, tuple[Tensor, Tensor]]()

    def __torch_dispatch__(self, work: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        by_mask = work is ATEN.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if work in WAITS or by_mask:
            raise AssertionError(f"{work} inside a capture")
        for argument, value in zip(work._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(value)
        for argument in work._schema.arguments:
            if argument.name in options and argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(options[argument.name])
        results = work(*args, **options)
        self.steps.append(Step(work, args, options, tuple(tree_leaves(results))))
        return results

    def _keep(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._before:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._before[storage.data_ptr()] = whole, whole.clone()

    def undo(self) -> None:
        for whole, before in self._before.values():
            whole.copy_(before)


@dataclass
class Log:
    """What a recorder and all that were made from it have done."""

    recordings: int = 0
    returned: list[Results] = field(default_factory=list)


class TapeRecorder:
    """A `Recorder`. A replay spoils what all other recordings have returned, as a pool of memory may that they share; one
    that was cleared fails."""

    def __init__(
        self, timer: HostTimer | None = None, clock: Any = None, seconds: float = 0.0, log: Log | None = None
    ) -> None:
        """timer: paused while recording, which takes so many seconds of the clock."""
        self._timer, self._clock, self._seconds = timer or HostTimer(), clock, seconds
        self._log, self._generation = log or Log(), 0

    @property
    def recordings(self) -> int:
        """Of this one, and of all that were made from it."""
        return self._log.recordings

    def clear(self) -> None:
        self._generation += 1

    def another(self) -> TapeRecorder:
        return TapeRecorder(self._timer, self._clock, self._seconds, self._log)

    @torch.inference_mode()
    def record(self, work: Callable[[], Results]) -> Replay:
        with self._timer.pause():
            if self._clock is not None:
                self._clock.now += self._seconds
            self._log.recordings += 1
            with patch.object(
                sampling, "_LIKELIEST", ()
            ):  # a CPU looks whether they suffice, which a GPU would wait for
                work()
                with Tape() as tape:
                    results = work()
            tape.undo()
        self._log.returned.append(results)
        _spoil(results)
        generation = self._generation

        @torch.inference_mode()
        def replay() -> Results:
            assert generation == self._generation, "a recording that was cleared is replayed"
            for others in self._log.returned:
                if others is not results:
                    _spoil(others)
            for step in tape.steps:
                step.again()
            return results

        return replay


def _spoil(results: Results) -> None:
    for tensor in results:
        tensor.fill_(float("nan") if tensor.is_floating_point() else 7)
