"""A mixture of experts in a lean layer (Shazeer et al. 2017, arXiv:1701.06538; Jiang et al. 2024, arXiv:2401.04088).

Each row takes the few networks that the router finds likeliest, and adds what they give by their weights. An expert
multiplies the rows that took it together: it is read once, and an expert that no row took is not read at all. So several
rows cost more than one, which is what speculation has to pay here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec_engine.runtime.linear import Projection


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of one layer, and the matrix that chooses among them."""

    router: Projection
    gate_ups: Sequence[Projection]
    downs: Sequence[Projection]
    taken: int
    renormed: bool
    gate: Callable[[Tensor], Tensor] | None = None
    """Another than the layer's."""

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The matrices that multiply rows by an expert's weights."""
        return (*self.gate_ups, *self.downs)

    def __call__(self, x: Tensor, gate: Callable[[Tensor], Tensor], reading: bool = False) -> Tensor:
        """[n, hidden] -> [n, hidden]; a row's sum is taken in the order of the experts, so that it does not depend on the
        rows beside it."""
        gate = self.gate or gate
        weights, chosen = self.router(x).float().softmax(-1).topk(self.taken)
        chosen, order = chosen.sort(-1)
        weights = weights.gather(-1, order)
        if self.renormed:
            weights = weights / weights.sum(-1, keepdim=True)
        chosen = chosen.flatten()
        given = self._of_one(x, chosen, gate) if len(x) == 1 else self._of_several(x, chosen, gate, reading)
        given = given.float().view(len(x), self.taken, -1) * weights[:, :, None]
        out = given[:, 0].clone()
        for i in range(1, self.taken):
            out += given[:, i]
        return out.to(x.dtype)

    def _of_one(self, x: Tensor, chosen: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
        """[1, hidden] -> [taken, hidden], what each chosen expert gives."""
        experts = chosen.tolist()
        gated = gate(torch.cat([self.gate_ups[expert](x) for expert in experts]))
        return torch.cat([self.downs[expert](gated[i : i + 1]) for i, expert in enumerate(experts)])

    def _of_several(self, x: Tensor, chosen: Tensor, gate: Callable[[Tensor], Tensor], reading: bool) -> Tensor:
        """[n, hidden] -> [n · taken, hidden], row by row: each expert multiplies all rows that took it."""
        by_expert = chosen.argsort(stable=True)  # places, counted row by row
        found, counts = torch.unique_consecutive(chosen[by_expert], return_counts=True)
        experts, many = found.tolist(), counts.tolist()
        rows = torch.split(x[by_expert // self.taken], many)
        gated = gate(torch.cat([self.gate_ups[e](own, reading) for e, own in zip(experts, rows, strict=True)]))
        given = torch.cat(
            [self.downs[e](own, reading) for e, own in zip(experts, torch.split(gated, many), strict=True)]
        )
        return torch.empty_like(given).index_copy_(0, by_expert, given)
