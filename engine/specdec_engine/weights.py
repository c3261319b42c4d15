"""A checkpoint's tensors by their Hugging Face names, one at a time, whatever files they lie in.

Both kinds are mapped into memory: what is not asked for is not read.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

GROUP = 32
"""Weights along K that share a scale: GGUF's block, and the finest that the int4 kernel takes."""


@dataclass(frozen=True, slots=True)
class Grouped:
    """Packed weights as they lie in a file: w = q · scale + offset, per group of 32 along K."""

    q: Tensor
    """[N, K] int8: 0 to 15 for 4 bits, -128 to 127 for 8."""
    scale: Tensor
    """[N, K / 32] float32."""
    offset: Tensor | None
    """[N, K / 32] float32; None for 8 bits, which are symmetric."""

    def rows(self, order: Tensor) -> Grouped:
        offset = None if self.offset is None else self.offset.index_select(0, order)
        return Grouped(self.q.index_select(0, order), self.scale.index_select(0, order), offset)

    def dense(self) -> Tensor:
        """[N, K] float32."""
        blocks = self.q.view(*self.scale.shape, GROUP) * self.scale[..., None]
        if self.offset is not None:
            blocks += self.offset[..., None]
        return blocks.flatten(1)


class Weights(Protocol):
    """**Protocol:** named tensors of one checkpoint."""

    @property
    def names(self) -> frozenset[str]: ...

    def dense(self, name: str) -> Tensor:
        """As stored, or as float32 where it is packed. Raises KeyError for a name that is not there."""
        ...

    def stored(self, name: str) -> Tensor | Grouped:
        """As stored: packed, where its format is one that the int4 kernel multiplies."""
        ...


class SafetensorsWeights:
    """The shards of a folder."""

    def __init__(self, files: Sequence[Path]) -> None:
        opened: list[Any] = [safe_open(file, "pt") for file in files]
        self._where: dict[str, Any] = {name: file for file in opened for name in file.keys()}  # noqa: SIM118

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._where)

    def dense(self, name: str) -> Tensor:
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor

    stored = dense


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a GGUF keeps a tensor."""

    kind: str
    """GGUF's name of the format, such as Q4_1."""
    shape: tuple[int, ...]
    """Rows first, as torch has it."""
    offset: int
    """From the start of the file, in bytes."""
    size: int
    heads: int = 0
    """Not 0: rows are stored with each head's two halves interleaved, as llama.cpp rotates them."""


class GgufWeights:
    """A GGUF file, read in place: Q4_0, Q4_1, Q4_K and Q8_0 stay packed, the rest is dequantised by the gguf library."""

    def __init__(self, file: Path, entries: dict[str, Entry]) -> None:
        self._bytes = np.memmap(file, np.uint8, "r")
        self._entries = entries

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._entries)

    def dense(self, name: str) -> Tensor:
        stored = self.stored(name)
        return stored.dense() if isinstance(stored, Grouped) else stored

    def stored(self, name: str) -> Tensor | Grouped:
        entry = self._entries[name]
        raw = self._bytes[entry.offset : entry.offset + entry.size]
        found = _UNPACK[entry.kind](raw, entry.shape) if entry.kind in _UNPACK else _dequantised(raw, entry)
        if not entry.heads:
            return found
        order = torch.arange(entry.shape[0]).view(entry.heads, -1, 2).transpose(1, 2).flatten()
        return found.rows(order) if isinstance(found, Grouped) else found[order]


def _dequantised(raw: np.ndarray, entry: Entry) -> Tensor:
    from gguf import GGMLQuantizationType, dequantize

    if entry.kind in _PLAIN:
        plain, dtype = _PLAIN[entry.kind]
        with warnings.catch_warnings():  # torch knows no read-only memory; nothing here writes to weights
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(raw.view(plain).reshape(entry.shape)).view(dtype)
    rows = raw.reshape(*entry.shape[:-1], -1)
    return torch.from_numpy(dequantize(rows, GGMLQuantizationType[entry.kind]).reshape(entry.shape))


def _blocks(raw: np.ndarray, shape: Sequence[int], header: int, body: int) -> tuple[np.ndarray, np.ndarray]:
    """Each block's float16 numbers [N, K / 32, header] as float32, and its bytes [N, K / 32, body]."""
    blocks = raw.reshape(shape[0], -1, 2 * header + body)
    return blocks[..., : 2 * header].copy().view(np.float16).astype(np.float32), blocks[..., 2 * header :]


def _nibbles(body: np.ndarray, shape: Sequence[int]) -> Tensor:
    """A block's first 16 weights are its bytes' low halves, the last 16 the high ones."""
    halves = np.concatenate([body & 15, body >> 4], -1)
    return torch.from_numpy(halves.astype(np.int8).reshape(tuple(shape)))


def _q4_0(raw: np.ndarray, shape: Sequence[int]) -> Grouped:
    head, body = _blocks(raw, shape, 1, GROUP // 2)
    scale = torch.from_numpy(head[..., 0])
    return Grouped(_nibbles(body, shape), scale, -8 * scale)


def _q4_1(raw: np.ndarray, shape: Sequence[int]) -> Grouped:
    head, body = _blocks(raw, shape, 2, GROUP // 2)
    return Grouped(_nibbles(body, shape), torch.from_numpy(head[..., 0]), torch.from_numpy(head[..., 1]))


def _q8_0(raw: np.ndarray, shape: Sequence[int]) -> Grouped:
    head, body = _blocks(raw, shape, 1, GROUP)
    q = np.ascontiguousarray(body).view(np.int8).reshape(tuple(shape))
    return Grouped(torch.from_numpy(q), torch.from_numpy(head[..., 0]), None)


def _q4_k(raw: np.ndarray, shape: Sequence[int]) -> Grouped:
    """256 weights a block: d and dmin, a 6-bit scale and minimum for each 32; w = d · scale · q - dmin · minimum."""
    blocks = raw.reshape(-1, 144)
    d, dmin = blocks[:, :4].copy().view(np.float16).astype(np.float32).T[..., None]  # [blocks, 1] each
    packed, body = blocks[:, 4:16], blocks[:, 16:].reshape(-1, 4, 32)
    low, high, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, (rest & 15) | (low >> 6) << 4], 1)
    minima = np.concatenate([high & 63, (rest >> 4) | (high >> 6) << 4], 1)
    q = np.stack([body & 15, body >> 4], 2)  # [blocks, 4, 2, 32]: low halves are one group of 32, high ones the next
    groups = (shape[0], shape[1] // GROUP)
    return Grouped(
        torch.from_numpy(q.astype(np.int8).reshape(tuple(shape))),
        torch.from_numpy((d * scales).reshape(groups)),
        torch.from_numpy((-dmin * minima).reshape(groups)),
    )


_PLAIN = {
    "F32": (np.float32, torch.float32),
    "F16": (np.float16, torch.float16),
    "BF16": (np.int16, torch.bfloat16),
}
_UNPACK = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k, "Q8_0": _q8_0}
PACKED = frozenset(_UNPACK)
"""GGUF formats that stay packed."""
