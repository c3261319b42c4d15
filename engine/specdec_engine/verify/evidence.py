"""The evidence behind a verdict: one record, however it was worked out, and the row of numbers in which a device sends it.

On a host the record is made as it is. On a device its parts are tensors, which `pack` makes one row of, so that one copy
brings them home; `unpack` makes the record of that row. No other file knows how the row is laid out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import isfinite

import torch
from torch import Tensor

from specdec_engine.core.cycle_types import Verdict
from specdec_engine.core.randomness import Randomness
from specdec_engine.errors import GenerationFailed
from specdec_engine.record.events import Raw
from specdec_engine.verify.sampling import wide

RESIDUAL_TOP, RAW_TOP = 8, 4
"""Entries of the residual, and of raw distributions, that a verdict carries: what a screen can show."""


@dataclass(frozen=True, slots=True)
class Uniforms:
    """The uniform numbers of one cycle's verdict."""

    position: int
    """Tokens in the context when the cycle began, by which they are keyed."""
    accept: list[float]
    """[k]: what each drafted token is held against."""
    final: list[float]
    """[k + 1]: what the cycle's last token is drawn with, by how many were accepted."""

    @classmethod
    def drawn(cls, random: Randomness, position: int, k: int) -> Uniforms:
        return cls(position, random.uniforms(position, "accept", k), random.uniforms(position, "final", k + 1))

    def tensor(self, device: torch.device) -> Tensor:
        """[2, k + 1] on the host, in the dtype that `device` computes with."""
        return torch.tensor([[*self.accept, 0.0], self.final], dtype=wide(device))


@dataclass(frozen=True, slots=True)
class RawInputs:
    """What p and q are made of, where a verdict shall tell what they were before temperature and filters."""

    logits: Tensor
    """[k + 1, V], the target's."""
    q: Tensor | None
    """[k, V'], a draft's distributions; None where there are none."""
    ids: Tensor | None
    """[V']: which id each column of q belongs to; None where it is the column's number."""

    @property
    def sides(self) -> int:
        """1 for the target alone, 2 with the draft."""
        return 1 if self.q is None else 2

    @property
    def entries(self) -> int:
        """How many of each row's entries are reported."""
        return min(RAW_TOP, self.logits.shape[1], RAW_TOP if self.q is None else self.q.shape[1])


@dataclass(frozen=True, slots=True)
class RawRows:
    """One side's raw distributions, a row for each drafted token that was tested, and perhaps for others."""

    drafted: Sequence[float]
    """[m]: the drafted token's probability."""
    before: Sequence[Sequence[float]]
    """[m, n]: the largest raw probabilities."""
    ids: Sequence[Sequence[float]]
    """[m, n]: their token ids."""
    after: Sequence[Sequence[float]]
    """[m, n]: the same entries after temperature and filters."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a rule decided about a draft of k tokens, and on what grounds."""

    accepted: int
    token: int
    """The target's own, that ends the cycle."""
    mass: float
    """Sum of the row that the token was drawn from: 1, if that is made of numbers."""
    drafted: Sequence[int] = ()
    """[k], and so the next three."""
    p: Sequence[float] = ()
    q: Sequence[float] = ()
    overlap: Sequence[float] = ()
    residual: Sequence[tuple[int, float]] = ()
    """The largest entries of what the token was drawn from; where all were accepted they say nothing."""
    raw: Sequence[RawRows] = ()
    """The target's, then the draft's; empty where none was asked for."""
    parents: tuple[int, ...] | None = None
    path: tuple[int, ...] | None = None
    """Of a tree."""
    tested: tuple[int, ...] = ()
    """Places of a tree's tokens that were held against the target; of a chain they are the accepted ones and the next."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How long the parts of a row are."""

    k: int
    residual: int = 0
    sides: int = 0
    entries: int = 0

    @classmethod
    def of(cls, k: int, vocab: int, raw: RawInputs | None) -> Layout:
        """Without a draft nothing but accepted, token and mass."""
        if not k:
            return cls(0)
        return cls(k, min(RESIDUAL_TOP, vocab), *((0, 0) if raw is None else (raw.sides, raw.entries)))


def pack(
    decided: Sequence[Tensor], by_token: Sequence[Tensor], residual: Sequence[Tensor], raw: Sequence[Tensor]
) -> Tensor:
    """One row [n], in the dtype of the mass.

    decided: accepted, token, mass, [] each; by_token: drafted, p, q, overlap, [k] each; residual: ids and their mass; raw: of
    each side drafted [k], before, ids, after, [k, n] each.
    """
    dtype = decided[2].dtype
    return torch.cat([part.flatten().to(dtype) for part in (*decided, *by_token, *residual, *raw)])


def unpack(row: Sequence[float], layout: Layout) -> Evidence:
    """The record in a row that `pack` made."""
    values, k, n = iter(row), layout.k, layout.entries

    def take(count: int) -> list[float]:
        return list(islice(values, count))

    def rows() -> list[list[float]]:
        return [take(n) for _ in range(k)]

    accepted, token, mass = take(3)
    drafted, p, q, overlap = ([int(t) for t in take(k)], take(k), take(k), take(k))
    ids, masses = take(layout.residual), take(layout.residual)
    raw = [RawRows(take(k), rows(), rows(), rows()) for _ in range(layout.sides)]
    residual = [(int(id), mass) for id, mass in zip(ids, masses, strict=True)]
    return Evidence(int(accepted), int(token), mass, drafted, p, q, overlap, residual, raw)


def verdict_of(evidence: Evidence, drafter: str, numbers: Uniforms) -> Verdict:
    """What the loop receives. Raises GenerationFailed where a distribution that mattered is not made of numbers."""
    e, k = evidence, len(numbers.accept)
    n = e.accepted
    tested = range(min(n + 1, k)) if e.parents is None else e.tested
    rejected = n < k if e.parents is None else len(tested) > 0 and (not e.path or e.tested[-1] != e.path[-1])
    _check_finite(e, tested, drafter, numbers.position + n)
    raw = [_raw(rows, k, tested) for rows in e.raw]
    return Verdict(
        drafted=tuple(e.drafted),
        accepted=n,
        token=e.token,
        origin="recovered" if rejected else "bonus",
        p=tuple(_none_where_not_finite(e.p)),
        q=tuple(e.q),
        u=tuple(value if i in tested else None for i, value in enumerate(numbers.accept)),
        overlap=tuple(_none_where_not_finite(e.overlap)),
        residual=tuple((id, mass) for id, mass in e.residual if mass > 0) if rejected else (),
        raw_p=raw[0] if len(raw) > 0 else None,
        raw_q=raw[1] if len(raw) > 1 else None,
        parents=e.parents,
        path=e.path,
    )


def _raw(rows: RawRows, k: int, tested: Sequence[int]) -> Raw:
    """Of a token that was never tested nothing is told: on a host nothing was worked out."""

    def entries(i: int) -> Iterator[tuple[int, float, float]]:
        for id, before, after in zip(rows.ids[i], rows.before[i], rows.after[i], strict=True):
            if isfinite(before) and isfinite(after):
                yield int(id), before, after

    drafted = [rows.drafted[i] if i in tested and isfinite(rows.drafted[i]) else None for i in range(k)]
    return Raw(tuple(drafted), tuple(tuple(entries(i)) if i in tested else () for i in range(k)))


def _none_where_not_finite(values: Sequence[float]) -> list[float | None]:
    """Past a rejection the target may give the prefix probability 0, and numbers are none."""
    return [value if isfinite(value) else None for value in values]


def _check_finite(e: Evidence, places: Sequence[int], drafter: str, position: int) -> None:
    if any(value != value for value in e.q):
        raise GenerationFailed(
            f"the draft {drafter} gave logits that are not numbers near position {position}",
            "try --dtype float32, or another draft",
        )
    tested = [values[place] for values in (e.p, e.overlap) for place in places]
    if not isfinite(e.mass) or any(value != value for value in tested):
        raise GenerationFailed(
            f"the target gave logits that are not finite numbers at position {position}",
            "try --dtype float32; if it persists, the checkpoint is damaged",
        )
