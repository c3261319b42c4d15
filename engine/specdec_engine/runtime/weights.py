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
"""Weights along K that share a scale: GGUF's block, and the finest that torch's int4 kernel takes."""


@dataclass(frozen=True, slots=True)
class Grouped:
    """Packed weights as they lie in a file: w = q · scale + offset, per group of 32 (Q6_K: 16) along K."""

    q: Tensor
    """[N, K] int8: 0 to 15 for 4 bits, -128 to 127 for 8."""
    scale: Tensor
    """[N, K / group] float32."""
    offset: Tensor | None
    """[N, K / group] float32; None where the weights lie around 0."""
    bits: int = 4

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.scale.shape[1]

    @property
    def layout(self) -> tuple[int, int, bool]:
        """Matrices that can be stacked have the same."""
        return self.bits, self.group, self.offset is not None

    def rows(self, order: Tensor) -> Grouped:
        offset = None if self.offset is None else self.offset.index_select(0, order)
        return Grouped(self.q.index_select(0, order), self.scale.index_select(0, order), offset, self.bits)

    def dense_rows(self, order: Tensor | slice) -> Tensor:
        """[n] -> [n, K] float32."""
        return self.dense()[order] if isinstance(order, slice) else self.rows(order).dense()

    def dense(self) -> Tensor:
        """[N, K] float32."""
        blocks = self.q.view(*self.scale.shape, self.group) * self.scale[..., None]
        if self.offset is not None:
            blocks += self.offset[..., None]
        return blocks.flatten(1)


class Weights(Protocol):
    """**Protocol:** named tensors of one checkpoint."""

    @property
    def names(self) -> frozenset[str]: ...

    def size(self, name: str) -> tuple[int, ...]:
        """Rows first. Reads no more than the file's header. Raises KeyError for a name that is not there."""
        ...

    def dense(self, name: str) -> Tensor:
        """As stored, or as float32 where it is packed. Raises KeyError for a name that is not there."""
        ...

    def stored(self, name: str) -> Tensor | Grouped:
        """As stored: packed, where its format is one that is multiplied packed."""
        ...


class SafetensorsWeights:
    """The shards of a folder."""

    def __init__(self, files: Sequence[Path]) -> None:
        opened: list[Any] = [safe_open(file, "pt") for file in files]
        self._where: dict[str, Any] = {name: file for file in opened for name in file.keys()}  # noqa: SIM118

    @property
    def coded(self) -> str:
        """A matrix that is stored in integers or 8-bit floats, which mean nothing without scales, and in what; empty if there
        is none."""
        kinds = ((name, file.get_slice(name)) for name, file in self._where.items())
        found = (
            f"{name} in {part.get_dtype()}"
            for name, part in kinds
            if len(part.get_shape()) in (2, 3) and _is_coded(part)
        )
        return next(found, "")

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._where)

    def size(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name].get_slice(name).get_shape())

    def dense(self, name: str) -> Tensor:
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor

    stored = dense


def _is_coded(part: Any) -> bool:
    kind = str(part.get_dtype())
    return kind != "I64" and kind.startswith(("I", "U", "F8", "F4"))  # I64 is for tables of indices


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
    plus: float = 0.0
    """A number that is added to each of its own."""
    part: int = 0
    """The number of the file that has it, of a GGUF that is cut into several."""


class GgufWeights:
    """A GGUF, read in place: four to eight bits stay packed, the rest is dequantised by the gguf library."""

    def __init__(self, files: Sequence[Path], entries: dict[str, Entry]) -> None:
        """files: all that it is cut into."""
        self._bytes = {part: np.memmap(files[part], np.uint8, "r") for part in {e.part for e in entries.values()}}
        self._entries = entries

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._entries)

    def size(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dense(self, name: str) -> Tensor:
        stored = self.stored(name)
        return stored.dense() if isinstance(stored, Grouped) else stored

    def stored(self, name: str) -> Tensor | Grouped:
        entry = self._entries[name]
        raw = self._bytes[entry.part][entry.offset : entry.offset + entry.size]
        found = _UNPACK[entry.kind](raw, entry.shape) if entry.kind in _UNPACK else _dequantised(raw, entry)
        if entry.plus and not isinstance(found, Grouped):
            found = found + entry.plus
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
    halves = np.empty((*body.shape[:-1], GROUP), np.uint8)
    np.bitwise_and(body, 15, out=halves[..., : GROUP // 2])
    np.right_shift(body, 4, out=halves[..., GROUP // 2 :])
    return torch.from_numpy(halves.view(np.int8).reshape(tuple(shape)))


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
    return Grouped(torch.from_numpy(q), torch.from_numpy(head[..., 0]), None, bits=8)


def _fifth_bits(packed: np.ndarray, body: np.ndarray) -> np.ndarray:
    """[..., 4] and [..., 16] bytes -> [..., 32]: bit i of the first belongs to weight i."""
    high = np.unpackbits(packed, axis=-1, bitorder="little")
    q: np.ndarray = np.concatenate([body & 15, body >> 4], -1) | high << 4
    return q


def _q5_0(raw: np.ndarray, shape: Sequence[int]) -> Grouped:
    head, body = _blocks(raw, shape, 1, 20)
    q = _fifth_bits(body[..., :4], body[..., 4:]).astype(np.int8) - 16
    return Grouped(torch.from_numpy(q.reshape(tuple(shape))), torch.from_numpy(head[..., 0]), None, bits=8)


def _q5_1(raw: np.ndarray, shape: Sequence[int]) -> Grouped:
    head, body = _blocks(raw, shape, 2, 20)
    q = torch.from_numpy(_fifth_bits(body[..., :4], body[..., 4:]).astype(np.int8).reshape(tuple(shape)))
    return Grouped(q, torch.from_numpy(head[..., 0]), torch.from_numpy(head[..., 1]), bits=8)


def _k_constants(blocks: np.ndarray, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Scales and offsets [N, K / 32] of Q4_K and Q5_K: w = d · scale · q - dmin · minimum, with 6 bits of either a group."""
    d, dmin = blocks[:, :4].copy().view(np.float16).astype(np.float32).T[..., None]  # [blocks, 1] each
    low, high, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([low & 63, (rest & 15) | (low >> 6) << 4], 1)
    minima = np.concatenate([high & 63, (rest >> 4) | (high >> 6) << 4], 1)
    groups = (shape[0], shape[1] // GROUP)
    return torch.from_numpy((d * scales).reshape(groups)), torch.from_numpy((-dmin * minima).reshape(groups))


def _k_nibbles(body: np.ndarray) -> np.ndarray:
    """[blocks, 128] bytes -> [blocks, 8, 32]: low halves are one group of 32, high ones the next."""
    body = body.reshape(-1, 4, 32)
    groups: np.ndarray = np.stack([body & 15, body >> 4], 2).reshape(-1, 8, 32)
    return groups


def _q4_k(raw: np.ndarray, shape: Sequence[int]) -> Grouped:
    blocks = raw.reshape(-1, 144)
    q = _k_nibbles(blocks[:, 16:]).astype(np.int8).reshape(tuple(shape))
    return Grouped(torch.from_numpy(q), *_k_constants(blocks, shape))


def _q5_k(raw: np.ndarray, shape: Sequence[int]) -> Grouped:
    """Bit g of a block's i-th byte of high bits belongs to weight i of group g."""
    blocks = raw.reshape(-1, 176)
    high = np.unpackbits(blocks[:, 16:48, None], axis=-1, bitorder="little").transpose(0, 2, 1)
    q = (_k_nibbles(blocks[:, 48:]) | high << 4).astype(np.int8).reshape(tuple(shape))
    return Grouped(torch.from_numpy(q), *_k_constants(blocks, shape), bits=8)


def _q6_k(raw: np.ndarray, shape: Sequence[int]) -> Grouped:
    """256 weights a block in groups of 16: w = d · scale · (q - 32), scale a signed byte."""
    blocks = raw.reshape(-1, 210)
    low, high = blocks[:, :128].reshape(-1, 2, 64), blocks[:, 128:192].reshape(-1, 2, 32)
    four = np.concatenate([low & 15, low >> 4], -1).reshape(-1, 2, 4, 32)
    two = np.stack([high & 3, high >> 2 & 3, high >> 4 & 3, high >> 6], 2)
    q = (four | two << 4).astype(np.int8) - 32
    scales = blocks[:, 192:208].view(np.int8) * blocks[:, 208:].copy().view(np.float16).astype(np.float32)
    grouped = torch.from_numpy(scales.reshape(shape[0], shape[1] // 16))
    return Grouped(torch.from_numpy(q.reshape(tuple(shape))), grouped, None, bits=8)


def _mxfp4(raw: np.ndarray, shape: Sequence[int]) -> Grouped:
    """A power of two for each group of 32, 127 for 1, and codes of 4 bits; kept in 8 bits, which hold each number."""
    blocks = raw.reshape(shape[0], -1, 1 + GROUP // 2)
    scale = torch.exp2(torch.from_numpy(blocks[..., 0].astype(np.float32)) - 128.0)
    return Grouped(MXFP4[_nibbles(blocks[..., 1:], shape).int()], scale, None, bits=8)


MXFP4 = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.int8)
"""Twice the number that each of its 16 codes stands for (Open Compute Project 2023)."""
_PLAIN = {
    "F32": (np.float32, torch.float32),
    "F16": (np.float16, torch.float16),
    "BF16": (np.int16, torch.bfloat16),
}
_UNPACK = {
    "MXFP4": _mxfp4,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q4_K": _q4_k,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "Q8_0": _q8_0,
}
PACKED = frozenset(_UNPACK)
"""GGUF formats that stay packed."""
