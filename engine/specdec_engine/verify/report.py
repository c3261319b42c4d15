"""What a cycle's verdict tells: worked out beside the distributions, brought to the host as one row of numbers, read there.

`report` is for a device, where the row is one copy and can be recorded; `report_on_host` for where looking costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from specdec_engine.core.cycle_types import Draft, Verdict
from specdec_engine.core.randomness import Randomness
from specdec_engine.errors import GenerationFailed
from specdec_engine.record.events import Raw
from specdec_engine.verify.rules import AcceptanceRule, VerifyInputs, apply_rule
from specdec_engine.verify.sampling import draw, draw_on_host, top, wide

RESIDUAL_TOP, RAW_TOP = 8, 4
"""Entries of the residual, and of the distributions before warping, that a verdict carries: what a screen can show."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """The uniform numbers of one cycle's verdict."""

    position: int
    accept: list[float]
    """[k]: what each drafted token is held against."""
    final: list[float]
    """[k + 1]: what the cycle's last token is drawn with, by how many were accepted."""

    @classmethod
    def drawn(cls, random: Randomness, position: int, k: int) -> Numbers:
        return cls(position, random.uniforms(position, "accept", k), random.uniforms(position, "final", k + 1))

    def tensor(self, device: torch.device) -> Tensor:
        """[2, k + 1] on the host, in the dtype that `device` computes with."""
        return torch.tensor([[*self.accept, 0.0], self.final], dtype=wide(device))


@dataclass(frozen=True, slots=True)
class Unwarped:
    """What a report needs to tell what p and q were before temperature and filters."""

    logits: Tensor
    """[k + 1, V], the target's."""
    q: Tensor | None
    """[k, V'], a draft's distributions; None where there are none."""
    ids: Tensor | None
    """[V']: which id each column of q belongs to; None where it is the column's number."""

    @property
    def sides(self) -> int:
        return 1 if self.q is None else 2


def report(
    rule: AcceptanceRule, p: Tensor, tokens: Tensor, probs: Tensor | None, u: Tensor, before: Unwarped | None = None
) -> Tensor:
    """All that the host needs to know, as one row of numbers on the device; `read` turns it into a Verdict.

    Accepted, final token and the final row's mass; per drafted token itself, p, q and overlap; the residual's largest entries
    and where they are; where asked, what p and q were before they were warped. Pure tensor work on fixed shapes, so that it
    can be recorded.
    """
    k = tokens.shape[0]
    if k == 0:
        return torch.stack([torch.zeros_like(u[1, 0]), draw(p[0], u[1, 0]).to(u), p[0].sum().to(u)])
    inputs = VerifyInputs.of(p, tokens, probs)
    overlap = inputs.p_drafted if probs is None else torch.minimum(p[:k], probs).sum(-1)
    accepted = rule.count(u[0, :k] < rule.thresholds(inputs))
    final = rule.final(inputs, accepted)
    token = draw(final, u[1].index_select(0, accepted[None])[0])
    likeliest = top(final[None], min(RESIDUAL_TOP, final.shape[0]))
    parts = [
        accepted[None],
        token[None],
        final.sum()[None],
        tokens,
        inputs.p_drafted,
        inputs.q_drafted,
        overlap,
        *likeliest,
        *(() if before is None else _told(before, tokens, lambda at: p[:k].gather(1, at), probs)),
    ]
    return torch.cat([part.flatten().to(u.dtype) for part in parts])


@torch.inference_mode()
def report_on_host(
    rule: AcceptanceRule, p: Tensor, tokens: Tensor, probs: Tensor | None, numbers: Numbers
) -> list[float]:
    """`report` where looking costs nothing: only what the verdict needs is made, and of a cycle of 12 ms it takes 0.5 where
    a report takes 1.0. What was before warping is told apart, by `told_on_host`."""
    k, shown = tokens.shape[0], min(RESIDUAL_TOP, p.shape[1])
    if k == 0:
        return [0.0, draw_on_host(p[0], numbers.final[0]), float(p[0].sum())]
    inputs = VerifyInputs.of(p, tokens, probs)
    overlap = inputs.p_drafted if probs is None else torch.minimum(p[:k], probs).sum(-1)
    outcome = apply_rule(rule, inputs, numbers.accept)
    n, final = outcome.accepted, outcome.final
    values = [n, draw_on_host(final, numbers.final[n]), float(final.sum()), *tokens.tolist()]
    values += [*inputs.p_drafted.tolist(), *inputs.q_drafted.tolist(), *overlap.tolist()]
    for part in top(final[None], shown) if n < k else ():
        values += part[0].tolist()
    return values + [0.0] * (0 if n < k else 2 * shown)


Warped = Callable[[Tensor], Tensor]
"""[m, n] ids -> [m, n]: what the target gives them after warping, at the first m places."""


@torch.inference_mode()
def told_on_host(accepted: int, before: Unwarped, draft: Draft, p: Warped) -> list[float]:
    """What a report ends with where it tells more; zeros for what was never tested."""
    k, tested = len(draft), min(accepted + 1, len(draft))
    q, probs = (None if rows is None else rows[:tested] for rows in (before.q, draft.probs))
    found = list[float]()
    for part in _told(Unwarped(before.logits, q, before.ids), draft.tokens[:tested], p, probs):
        found += [*part.flatten().tolist(), *[0.0] * ((k - tested) * part[0].numel())]
    return found


def _told(before: Unwarped, tokens: Tensor, p: Warped, probs: Tensor | None) -> list[Tensor]:
    """By side for each of m drafted tokens: its probability before warping [m], the largest ones, where they are, and what
    became of these, [m, n] each."""
    drafted, m = tokens[:, None], tokens.shape[0]
    n = min(RAW_TOP, before.logits.shape[1], RAW_TOP if before.q is None else before.q.shape[1])
    rows = before.logits[:m].float().softmax(-1)
    values, at = top(rows, n)
    told = [rows.gather(1, drafted), values, at, p(at)]
    if before.q is not None:
        values, at = top(before.q, n)
        if before.ids is None:
            mass = before.q.gather(1, drafted)
        else:
            at, mass = before.ids[at], (before.q * (before.ids == drafted)).sum(-1)
        told += [mass, values, at, (at == drafted).float() if probs is None else probs.gather(1, at)]
    return told


def read(values: list[float], source: str, numbers: Numbers, vocab: int, sides: int = 0) -> Verdict:
    """The verdict in a report; sides: 1 if it tells what p was before warping, 2 with q, else 0.

    Raises GenerationFailed where a distribution that mattered is not made of numbers.
    """
    k = len(numbers.accept)
    head, rest = values[:3], values[3:]
    drafted, p_host, q_host, overlap_host = (tuple(rest[i * k : (i + 1) * k]) for i in range(4))
    n, token_id, mass = int(head[0]), int(head[1]), head[2]
    _check_numbers(mass, (*p_host[: n + 1], *overlap_host[: n + 1]), q_host, source, numbers.position + n)
    shown, rest = min(RESIDUAL_TOP, vocab) * bool(k), rest[4 * k :]
    largest, ids, rest = rest[:shown], rest[shown : 2 * shown], rest[2 * shown :]
    told = [_raw(rest[i * len(rest) // sides :][: len(rest) // sides], k, min(n + 1, k)) for i in range(sides)]
    rejected = n < k
    return Verdict(
        drafted=tuple(int(t) for t in drafted),
        accepted=n,
        token=token_id,
        origin="recovered" if rejected else "bonus",
        p=_known(p_host),
        q=q_host,
        u=tuple(value if i <= n else None for i, value in enumerate(numbers.accept)),
        overlap=_known(overlap_host),
        residual=tuple((int(i), v) for i, v in zip(ids, largest, strict=True) if v > 0) if rejected else (),
        raw_p=told[0] if sides > 0 else None,
        raw_q=told[1] if sides > 1 else None,
    )


def _raw(values: Sequence[float], k: int, tested: int) -> Raw:
    """One side's. Of a token that was never tested nothing is told: on the host nothing was worked out."""
    n, drafted, rest = (len(values) // k - 1) // 3, values[:tested], values[k:]
    before, ids, after = (rest[k * n * part : k * n * (part + 1)] for part in range(3))

    def row(i: int) -> tuple[tuple[int, float, float], ...]:
        entries = zip(*(part[i * n : (i + 1) * n] for part in (ids, before, after)), strict=True)
        return tuple((int(token), was, now) for token, was, now in entries if isfinite(was) and isfinite(now))

    untested = k - tested
    return Raw((*_known(tuple(drafted)), *[None] * untested), (*map(row, range(tested)), *[()] * untested))


def _known(values: tuple[float, ...]) -> tuple[float | None, ...]:
    """Past a rejection the prefix is a dead one, and its numbers may be none."""
    return tuple(value if isfinite(value) else None for value in values)


def _check_numbers(mass: float, p: tuple[float, ...], q: tuple[float, ...], drafter: str, position: int) -> None:
    if any(value != value for value in q):
        raise GenerationFailed(
            f"the draft {drafter} gave logits that are not numbers near position {position}",
            "try --dtype float32, or another draft",
        )
    if not isfinite(mass) or any(value != value for value in p):
        raise GenerationFailed(
            f"the target gave logits that are not finite numbers at position {position}",
            "try --dtype float32; if it persists, the checkpoint is damaged",
        )
