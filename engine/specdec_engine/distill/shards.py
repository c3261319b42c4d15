"""Synthesised text on disk, in parts: what is finished survives an interruption."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from specdec_engine.distill.synthesis import Example
from specdec_engine.errors import GenerationFailed, UsageError, first_line

SHARD_TOKENS = 16_384


@dataclass(frozen=True, slots=True)
class Shard:
    """Examples one after another; example i is tokens[starts[i] : starts[i + 1]]."""

    tokens: Tensor
    starts: Tensor
    answers: Tensor
    """Index of each answer's first token, within the shard."""
    features: Tensor

    def part(self, examples: Sequence[int]) -> Shard:
        """These examples alone."""
        spans = [(int(self.starts[i]), int(self.starts[i + 1])) for i in examples]
        places = torch.cat([torch.arange(start, end) for start, end in spans])
        starts = torch.tensor([0, *(end - start for start, end in spans)]).cumsum(0)
        answers = starts[:-1] + torch.tensor([int(self.answers[i] - self.starts[i]) for i in examples])
        return Shard(self.tokens[places], starts, answers, self.features[places])


def write(folder: Path, examples: Sequence[Example]) -> Path:
    """Atomically, under the next number."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(file.stem) for file in folder.glob("*.safetensors") if file.stem.isdecimal()), default=-1)
    starts = torch.tensor([0, *(len(e.tokens) for e in examples)]).cumsum(0)
    tensors = {
        "tokens": torch.cat([e.tokens for e in examples]),
        "starts": starts,
        "answers": starts[:-1] + torch.tensor([e.answer for e in examples]),
        "features": torch.cat([e.features for e in examples]).contiguous(),
    }
    path = folder / f"{number:05}.safetensors"
    partial = path.with_suffix(".part")
    try:
        save_file(tensors, partial)
        partial.rename(path)
    except (OSError, SafetensorError) as error:
        size = sum(t.nbytes for t in tensors.values()) / len(tensors["tokens"]) / 1000
        raise GenerationFailed(
            f"{path} could not be written: {error}", f"a million tokens of text take {size:.1f} GB with this target"
        ) from error
    return path


def collect(folder: Path, examples: Iterable[Example]) -> Iterator[int]:
    """Write examples as they come, the last ones also when interrupted; yields the tokens of each."""
    waiting: list[Example] = []
    try:
        for example in examples:
            waiting.append(example)
            if sum(len(e.tokens) for e in waiting) >= SHARD_TOKENS:
                write(folder, waiting)
                waiting = []
            yield len(example.tokens)
    finally:
        if waiting:
            write(folder, waiting)


def read(path: Path) -> Shard:
    """Memory-mapped. Raises UsageError for one that is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return Shard(**{name: file.get_tensor(name) for name in ("tokens", "starts", "answers", "features")})
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"{path} cannot be read: {first_line(error)}", "remove that file: its text is written anew"
        ) from error
