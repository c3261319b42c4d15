"""Acceptance rules: which drafted tokens survive, and what replaces the first that does not.

p is the target's distribution and q the one the draft was drawn from, as in Leviathan et al. 2023 (arXiv:2211.17192) and Chen
et al. 2023 (arXiv:2302.01318). A rule is three pure functions (`thresholds`, `count`, `final`); `report`, or
`report_on_host`, holds them against uniform numbers. Losslessness is a property of the three, and is proved by enumerating
them (tests/exact), where the token rule's second form, for the host, is held against its first, too. Nothing here runs a
model, keeps state, or knows about temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec_engine.errors import GenerationFailed
from specdec_engine.events import Raw
from specdec_engine.randomness import Randomness
from specdec_engine.sampling import draw, draw_on_host, top, wide
from specdec_engine.types import Draft, Verdict

RESIDUAL_TOP, RAW_TOP = 8, 4
"""Entries of the residual, and of the distributions before warping, that a verdict carries: what a screen can show."""


def accept_prob(p: Tensor, q: Tensor) -> Tensor:  # [k], [k] -> [k]
    """min(1, p/q) at the drafted tokens (Leviathan et al., algorithm 1); 0 where either has no mass.

    In float64, where two tiny float32 probabilities give their ratio and not 0/0.
    """
    q = q.to(wide(q.device))
    return torch.where(q > 0, (p / q).clamp(max=1.0), 0.0)


def residual(p: Tensor, q: Tensor, scale: Tensor | None = None) -> Tensor:  # [V], [V], [] -> [V]
    """max(0, scale · p - q), normalised: what the target wants beyond what the draft already gave. With q = 0 it is p.

    Where nothing is left (p equals q up to rounding) it is p itself: such a rejection has probability zero but for
    rounding, and any other answer would be 0/0.
    """
    left = ((p if scale is None else p * scale) - q).clamp_(min=0.0)
    mass = left.sum()
    return torch.where(mass > 0, left / mass, p)


@dataclass(frozen=True, slots=True)
class Case:
    """One cycle's distributions, as a rule sees them."""

    p: Tensor
    """[k + 1, V]: the target after the newest token and after each drafted one."""
    tokens: Tensor
    """[k], drafted."""
    probs: Tensor | None
    """[k, V]: what each was drawn from; None for a deterministic draft, whose q is one-hot."""
    p_drafted: Tensor
    """[k]: p of the drafted tokens."""
    q_drafted: Tensor
    """[k]: q of the drafted tokens; 1 for a deterministic draft."""

    @classmethod
    def of(cls, p: Tensor, tokens: Tensor, probs: Tensor | None) -> Case:
        at = tokens[:, None]
        p_drafted = p[: tokens.shape[0]].gather(1, at)[:, 0]
        return cls(
            p, tokens, probs, p_drafted, torch.ones_like(p_drafted) if probs is None else probs.gather(1, at)[:, 0]
        )

    def q_row(self, accepted: Tensor) -> Tensor:  # [] -> [V]
        """q at the first rejected position; zeros where all were accepted, which makes the residual the bonus row.

        `accepted` stays on the device: indexing with it, and not with a number, saves a synchronisation. A deterministic
        draft's q is made for this one row only.
        """
        k, row = self.tokens.shape[0], self.p[0]
        if k == 0:
            return torch.zeros_like(row)
        at = accepted.clamp(max=k - 1)[None]
        rejected = (accepted < k).to(row)
        if self.probs is None:
            return torch.zeros_like(row).scatter_(0, self.tokens.index_select(0, at), rejected[None])
        return self.probs.index_select(0, at)[0] * rejected


class AcceptanceRule(Protocol):
    """**Protocol:** a rule, as three pure functions of one cycle's distributions."""

    name: ClassVar[str]
    lossless: ClassVar[bool]
    """Declares that the emitted text has exactly the target's distribution; the exact test then checks it."""

    def thresholds(self, case: Case) -> Tensor:
        """[k]: position i passes if and only if u_i < thresholds[i]."""
        ...

    def count(self, passed: Tensor) -> Tensor:
        """[k] bool -> []: how many drafted tokens are accepted, given which positions passed."""
        ...

    def final(self, case: Case, accepted: Tensor) -> Tensor:
        """[V]: the distribution of the token that ends the cycle, after `accepted` drafted tokens; p's last row after all."""
        ...


class TokenRule:
    """The standard rule: test token by token, stop at the first rejection, draw from the residual or the bonus row."""

    name: ClassVar[str] = "token"
    lossless: ClassVar[bool] = True

    def thresholds(self, case: Case) -> Tensor:
        return accept_prob(case.p_drafted, case.q_drafted)

    def count(self, passed: Tensor) -> Tensor:
        return passed.cumprod(0, dtype=torch.long).sum()

    def final(self, case: Case, accepted: Tensor) -> Tensor:
        return residual(case.p.index_select(0, accepted[None])[0], case.q_row(accepted))


class BlockRule:
    """Block verification (Sun et al. 2024, arXiv:2403.10444): the longest prefix that passes, rejections before it or not.

    Accepts at least as many tokens on average as the token rule, and as many where the draft is deterministic. With
    r_i = min(1, r_{i-1} · p/q) along the draft, position i passes with S_i / (S_i + 1 - r_i), where S_i is what the residual
    max(0, r_i · p - q) at the next position still holds; the last one passes with r_k.
    """

    name: ClassVar[str] = "block"
    lossless: ClassVar[bool] = True

    def thresholds(self, case: Case) -> Tensor:
        reach = _reach(case)
        left, inner = self._left(case, reach[:-1]), reach[:-1]
        mass = left + 1 - inner
        # Where nothing is left a later one passes surely.
        return torch.cat([torch.where(mass == 0, 0.0, left / mass), reach[-1:]])

    def count(self, passed: Tensor) -> Tensor:
        places = torch.arange(passed.shape[0] + 1, device=passed.device)
        return (places * pad(passed, (1, 0))).amax()

    def final(self, case: Case, accepted: Tensor) -> Tensor:
        reach = _reach(case)
        whole = torch.cat([reach.new_ones(1), reach])
        scale = torch.where(accepted < case.tokens.shape[0], whole.index_select(0, accepted[None])[0], 1.0)
        row = residual(case.p.index_select(0, accepted[None])[0], case.q_row(accepted), scale.to(case.p))
        # Each test looked at the row after it: a NaN there would pass for "never", and must be found.
        return row + self._left(case, reach[:-1]).sum().to(row) * 0

    def _left(self, case: Case, reach: Tensor) -> Tensor:
        """[k - 1]: Σ max(0, r_i · p - q) at the position after the i-th drafted token, i = 1 .. k - 1."""
        if case.probs is None:
            left = reach * (1 - case.p_drafted[1:])
        else:
            wanted = case.p[1 : case.tokens.shape[0]] * reach[:, None]
            left = (wanted - case.probs[1:]).clamp_(min=0.0).sum(-1)
        return torch.where(reach > 0, left, 0.0)  # a prefix that the target never takes is a dead one


class SyntheticRule:
    """Accepts each drafted token with a chance that was chosen, whatever the target says: what a machine would give with a
    better draft. The text is no one's, and nothing about it is lossless."""

    name: ClassVar[str] = "synthetic"
    lossless: ClassVar[bool] = False

    def __init__(self, chance: float) -> None:
        self._chance = chance

    def thresholds(self, case: Case) -> Tensor:
        return torch.full_like(case.p_drafted, self._chance, dtype=wide(case.p_drafted.device))

    def count(self, passed: Tensor) -> Tensor:
        return TokenRule().count(passed)

    def final(self, case: Case, accepted: Tensor) -> Tensor:
        """The target's own row: there may be nothing left of it after what was accepted."""
        return case.p.index_select(0, accepted[None])[0]


def _reach(case: Case) -> Tensor:
    """[k]: r_i, the probability that a draft as likely as this one up to i is wanted by the target."""
    reach, reaches = torch.ones_like(case.q_drafted[:1]), []
    ratio = torch.where(case.q_drafted > 0, case.p_drafted / case.q_drafted, 0.0)
    for i in range(ratio.shape[0]):
        reach = (reach * ratio[i : i + 1]).clamp(max=1.0)
        reaches.append(reach)
    return torch.cat(reaches) if reaches else case.q_drafted


RULES: dict[str, AcceptanceRule] = {rule.name: rule for rule in (TokenRule(), BlockRule())}
"""Every rule, by name; those that declare `lossless` are picked up by the exact test."""


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
    case = Case.of(p, tokens, probs)
    overlap = case.p_drafted if probs is None else torch.minimum(p[:k], probs).sum(-1)
    accepted = rule.count(u[0, :k] < rule.thresholds(case))
    final = rule.final(case, accepted)
    token = draw(final, u[1].index_select(0, accepted[None])[0])
    likeliest = top(final[None], min(RESIDUAL_TOP, final.shape[0]))
    parts = [
        accepted[None],
        token[None],
        final.sum()[None],
        tokens,
        case.p_drafted,
        case.q_drafted,
        overlap,
        *likeliest,
        *(() if before is None else _told(before, tokens, lambda at: p[:k].gather(1, at), probs)),
    ]
    return torch.cat([part.flatten().to(u.dtype) for part in parts])


@dataclass(frozen=True, slots=True)
class Settled:
    """What a rule has made of a cycle, on the host."""

    accepted: int
    final: Tensor
    """[V]"""


def _settled(rule: AcceptanceRule, case: Case, u: Sequence[float]) -> Settled:
    """The rule, held against [k] uniform numbers."""
    if type(rule) is TokenRule:  # not a rule derived from it
        return settled_by_token(case, u)
    accepted = rule.count(torch.tensor(u, dtype=wide(case.p.device)) < rule.thresholds(case))
    n = int(accepted)
    return Settled(
        n, case.p[n] if n == len(u) else rule.final(case, accepted)
    )  # what every rule makes of a whole draft


def settled_by_token(case: Case, u: Sequence[float]) -> Settled:
    """TokenRule once more, in Python and numpy: after a forward pass 0.1 ms where its three functions take 0.4.

    That both say the same is part of the exact test.
    """
    n = 0
    for p, q, number in zip(case.p_drafted.tolist(), case.q_drafted.tolist(), u, strict=True):
        if not (q > 0 and number < p / q):
            break
        n += 1
    row = case.p[n]
    if n == len(u):
        return Settled(n, row)
    left = row.numpy().copy()
    if case.probs is None:
        left[int(case.tokens[n])] -= 1
    else:
        left -= case.probs[n].to(row).numpy()
    mass = float(np.maximum(left, 0, out=left).sum())
    return Settled(n, torch.from_numpy(np.divide(left, mass, out=left)) if mass > 0 else row)


@torch.inference_mode()
def report_on_host(
    rule: AcceptanceRule, p: Tensor, tokens: Tensor, probs: Tensor | None, numbers: Numbers
) -> list[float]:
    """`report` where looking costs nothing: only what the verdict needs is made, and of a cycle of 12 ms it takes 0.5 where
    a report takes 1.0. What was before warping is told apart, by `told_on_host`."""
    k, shown = tokens.shape[0], min(RESIDUAL_TOP, p.shape[1])
    if k == 0:
        return [0.0, draw_on_host(p[0], numbers.final[0]), float(p[0].sum())]
    case = Case.of(p, tokens, probs)
    overlap = case.p_drafted if probs is None else torch.minimum(p[:k], probs).sum(-1)
    settled = _settled(rule, case, numbers.accept)
    n, final = settled.accepted, settled.final
    values = [n, draw_on_host(final, numbers.final[n]), float(final.sum()), *tokens.tolist()]
    values += [*case.p_drafted.tolist(), *case.q_drafted.tolist(), *overlap.tolist()]
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
