"""Between the host's memory and a device's, without waiting where that is safe. Nothing else copies so."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_STAGED = 64 * 2**10
"""Bytes up to which CUDA takes a copy of pageable memory and returns; of more it waits for all that was launched before."""


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Host values on the device, in its current stream's order.

    On CUDA the host does not wait: what the copy reads is pinned, and kept until it is read, or was taken at once. Elsewhere
    it waits. Apple's MPS copies later, from memory that by then may be another tensor's: wrong tokens, and no error.
    """
    if device.type != "cuda":
        return values.to(device)
    if values.nbytes > _STAGED:
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def download(values: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """The values' place on the host, and what waits until they are there; on CUDA an asynchronous copy into pinned memory."""
    if values.device.type != "cuda":
        return values, _at_once
    home = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    home.copy_(values, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(values.device))
    return home, event.synchronize


def _at_once() -> None:
    pass
