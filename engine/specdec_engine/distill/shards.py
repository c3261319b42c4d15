"""Synthesised text on disk, in parts: what is finished survives an interruption."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from specdec_engine.distill.synthesis import Example

SHARD_TOKENS = 16_384


@dataclass(frozen=True, slots=True)
class Shard:
    """Examples one after another; example i is tokens[starts[i] : starts[i + 1]]."""

    tokens: Tensor
    starts: Tensor
    answers: Tensor
    """Index of each answer's first token, within the shard."""
    features: Tensor


def write(folder: Path, examples: Sequence[Example]) -> Path:
    """Atomically, under the next number."""
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.glob("*.safetensors")))
    starts = torch.tensor([0, *(len(e.tokens) for e in examples)]).cumsum(0)
    tensors = {
        "tokens": torch.cat([e.tokens for e in examples]),
        "starts": starts,
        "answers": starts[:-1] + torch.tensor([e.answer for e in examples]),
        "features": torch.cat([e.features for e in examples]).contiguous(),
    }
    path = folder / f"{number:05}.safetensors"
    partial = path.with_suffix(".part")
    save_file(tensors, partial)
    partial.rename(path)
    return path


def collect(folder: Path, examples: Iterable[Example]) -> Iterator[int]:
    """Write examples as they come; yields the tokens of each shard written."""
    waiting: list[Example] = []
    for example in examples:
        waiting.append(example)
        if (count := sum(len(e.tokens) for e in waiting)) >= SHARD_TOKENS:
            write(folder, waiting)
            waiting = []
            yield count


def read(path: Path) -> Shard:
    """Memory-mapped."""
    with safe_open(path, "pt") as file:
        return Shard(**{name: file.get_tensor(name) for name in ("tokens", "starts", "answers", "features")})
