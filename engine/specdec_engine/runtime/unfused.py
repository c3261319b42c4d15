"""Weights that a checkpoint keeps in one tensor, by the names of the several matrices that they are."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from specdec_engine.runtime.weights import GROUP, MXFP4, Grouped, Weights


class Unfused:
    """Weights whose queries, keys and values are one matrix, and whose gate and up are another, as if they were several."""

    def __init__(self, weights: Weights, queries: int, keys: int) -> None:
        """queries, keys: rows of each; as many are values as keys."""
        self._weights = weights
        fused = [name for name in weights.names if ".qkv_proj." in name or ".gate_up_proj." in name]
        self._where: dict[str, tuple[str, int, int]] = {}
        for name in fused:
            rows = weights.size(name)[0]
            parts = (
                {"q_proj": (0, queries), "k_proj": (queries, queries + keys), "v_proj": (queries + keys, rows)}
                if "qkv_proj" in name
                else {"gate_proj": (0, rows // 2), "up_proj": (rows // 2, rows)}
            )
            for part, (first, end) in parts.items():
                self._where[name.replace("qkv_proj", part).replace("gate_up_proj", part)] = (name, first, end)
        self._others = weights.names - set(fused)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._where) | self._others

    def size(self, name: str) -> tuple[int, ...]:
        if name not in self._where:
            return self._weights.size(name)
        whole, first, end = self._where[name]
        return (end - first, *self._weights.size(whole)[1:])

    def dense(self, name: str) -> Tensor:
        if name not in self._where:
            return self._weights.dense(name)
        whole, first, end = self._where[name]
        return self._weights.dense(whole)[first:end]

    def stored(self, name: str) -> Tensor | Grouped:
        if name not in self._where:
            return self._weights.stored(name)
        whole, first, end = self._where[name]
        found = self._weights.stored(whole)
        return found.rows(torch.arange(first, end)) if isinstance(found, Grouped) else found[first:end]


class SplitExperts:
    """GPT-OSS's weights, with the matrices of each expert by themselves.

    A layer has two tensors of all its experts: [experts, in, out], where columns of gate and up take turns. Or the same as
    MXFP4: groups of 32 along the inputs, numbers of 4 bits, and a power of two for each group.
    """

    def __init__(self, weights: Weights) -> None:
        """Raises ValueError for sizes that do not belong together: kernels read as far as these say."""
        self._weights = weights
        self._read: Callable[[str], Tensor] = lru_cache(3)(weights.dense)  # experts are asked for one after another
        self._where: dict[str, tuple[str, int, slice]] = {}
        whole = [name for name in weights.names if _STACKED.search(name)]
        for name in whole:
            _check(weights, name)
            if name.endswith("_scales"):
                continue
            stem, kind, suffix = _STACKED.findall(name)[0]
            of = "bias" if suffix == "_bias" else "weight"
            parts = {"down_proj": slice(None)}
            if kind == "gate_up_proj":
                parts = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
            for expert in range(weights.size(name)[0]):
                self._where |= {f"{stem}{expert}.{part}.{of}": (name, expert, rows) for part, rows in parts.items()}
        self._others = weights.names - set(whole)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._where) | self._others

    def size(self, name: str) -> tuple[int, ...]:
        if name not in self._where:
            return self._weights.size(name)
        whole, _, rows = self._where[name]
        _, *sizes = self._weights.size(whole)
        if whole.endswith("_blocks"):
            sizes = [sizes[0], sizes[1] * GROUP]
        elif not whole.endswith("_bias"):
            sizes.reverse()
        return len(range(sizes[0])[rows]), *sizes[1:]

    def dense(self, name: str) -> Tensor:
        found = self.stored(name)
        return found.dense() if isinstance(found, Grouped) else found

    def stored(self, name: str) -> Tensor | Grouped:
        if name not in self._where:
            return self._weights.stored(name)
        whole, expert, rows = self._where[name]
        found = self._read(whole)[expert]
        if whole.endswith("_blocks"):
            scales = self._read(whole.replace("_blocks", "_scales"))[expert]
            return _mxfp4(found[rows], scales[rows])
        return found[rows] if whole.endswith("_bias") else found[:, rows].T.contiguous()


_STACKED = re.compile(r"(.*\.mlp\.experts\.)(gate_up_proj|down_proj)(|_bias|_blocks|_scales)$")


def _check(weights: Weights, name: str) -> None:
    size = weights.size(name)
    stem, _, suffix = name.rpartition("_")
    if suffix in ("blocks", "scales"):
        blocks, scales = f"{stem}_blocks", f"{stem}_scales"
        both = blocks in weights.names and scales in weights.names and stem not in weights.names
        if not both:
            raise ValueError(f"it has not one {blocks} and one {scales}, or {stem} besides")
        fit = weights.size(blocks) == (*weights.size(scales), GROUP // 2) and len(weights.size(scales)) == 3
    else:
        fit = len(size) == (2 if suffix == "bias" else 3)
    if not fit:
        raise ValueError(f"its {name} has the size {size}, which is not that of experts")


def _mxfp4(blocks: Tensor, scales: Tensor) -> Grouped:
    """[N, groups, 16] bytes, of two numbers each, the low half first, and [N, groups] powers of two, 127 for 1 -> the very
    numbers, in 8 bits."""
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ValueError(f"codes of 4 bits are stored as {blocks.dtype}, and their scales as {scales.dtype}")
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(1)
    return Grouped(MXFP4[codes.int()], torch.exp2(scales.float() - 128.0), None, bits=8)
