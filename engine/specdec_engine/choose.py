"""How a draft chooses its next token from its logits."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec_engine.coupling import choice, gumbel_noise
from specdec_engine.randomness import Randomness
from specdec_engine.runtime import Chosen
from specdec_engine.sampling import draw, warp, wide
from specdec_engine.types import Sampling


@dataclass(frozen=True, slots=True)
class DraftChoice:
    """The likeliest token at temperature 0; otherwise one drawn under the run's sampling settings (`runtime.Choose`).

    With Gumbel coupling `u` is not a number but the [V] noise of the token's position.
    """

    sampling: Sampling
    vocab: int
    """Ids that may be chosen: the first so many."""

    @property
    def key(self) -> Hashable:
        return (self.sampling.greedy, self.sampling.coupled, *self.sampling.filters, self.vocab)

    def __call__(self, logits: Tensor, u: Tensor, temperature: Tensor) -> Chosen:
        logits = logits[:, : self.vocab]
        if self.sampling.greedy:
            sure, at = logits.float().softmax(-1).max(-1)
            return Chosen(at, None, sure)
        row = warp(logits, self.sampling, temperature)
        if self.sampling.coupled:
            return Chosen(choice(row, u[None, : self.vocab]), None, row.amax())
        return Chosen(draw(row[0], u)[None], row, row.amax())


def draft_numbers(
    random: Randomness, sampling: Sampling, position: int, k: int, vocab: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What `Runtime.unroll` takes: [k] uniform numbers (with Gumbel coupling [k, vocab] noise), and the temperature []."""
    if sampling.coupled:
        temperature = torch.tensor(sampling.temperature, dtype=wide(device)).to(device, non_blocking=True)
        return gumbel_noise(random.seed, position, k, vocab, device), temperature
    uniforms = [0.0] * k if sampling.greedy else random.uniforms(position, "draft", k)
    numbers = torch.tensor([*uniforms, sampling.temperature], dtype=wide(device)).to(device, non_blocking=True)
    return numbers[:k], numbers[k]
