"""Acceptance rules: which drafted tokens survive, and what replaces the first that does not.

p is the target's distribution and q the one the draft was drawn from, as in Leviathan et al. 2023 (arXiv:2211.17192) and
Chen et al. 2023 (arXiv:2302.01318). A rule is three pure functions (`thresholds`, `count`, `final`) and `decide`, which
holds them against uniform numbers. Losslessness is a property of the three, and is proved by enumerating them
(tests/exact); nothing here runs a model, keeps state, or knows about temperature.
"""

from __future__ import annotations

from math import isfinite
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from specdec_engine.errors import GenerationFailed
from specdec_engine.randomness import Randomness
from specdec_engine.sampling import draw, top, wide
from specdec_engine.types import Draft, Verdict

RESIDUAL_TOP = 8
"""Entries of the residual that a verdict carries: what a screen can show."""


def accept_prob(p: Tensor, q: Tensor) -> Tensor:  # [k], [k] -> [k]
    """min(1, p/q) at the drafted tokens (Leviathan et al., algorithm 1); 0 where either has no mass.

    In float64, where two tiny float32 probabilities give their ratio and not 0/0.
    """
    q = q.to(wide(q.device))
    return torch.where(q > 0, (p / q).clamp(max=1.0), 0.0)


def residual(p: Tensor, q: Tensor) -> Tensor:  # [V], [V] -> [V]
    """max(0, p - q), normalised: what the target wants beyond what the draft already gave. With q = 0 it is p.

    Where nothing is left (p equals q up to rounding) it is p itself: such a rejection has probability zero but for
    rounding, and any other answer would be 0/0.
    """
    left = (p - q).clamp(min=0.0)
    mass = left.sum()
    return torch.where(mass > 0, left / mass, p)


class AcceptanceRule(Protocol):
    """**Protocol:** a rule, as pure functions of one cycle's distributions.

    p [k + 1, V] is the target after the newest token and after each drafted one; p_drafted, q_drafted [k] are both
    models' probabilities of the drafted tokens; q_drafted is 1 for a deterministic draft.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool]
    """Declares that the emitted text has exactly the target's distribution; the exact test then checks it."""

    def thresholds(self, p_drafted: Tensor, q_drafted: Tensor) -> Tensor:
        """[k]: position i passes if and only if u_i < thresholds[i]."""
        ...

    def count(self, passed: Tensor) -> Tensor:
        """[k] bool -> []: how many drafted tokens are accepted, given which positions passed."""
        ...

    def final(self, p: Tensor, tokens: Tensor, probs: Tensor | None, accepted: Tensor) -> Tensor:
        """[V]: the distribution of the token that ends the cycle, after `accepted` drafted tokens."""
        ...


class TokenRule:
    """The standard rule: test token by token, stop at the first rejection, draw from the residual or the bonus row."""

    name: ClassVar[str] = "token"
    lossless: ClassVar[bool] = True

    def thresholds(self, p_drafted: Tensor, q_drafted: Tensor) -> Tensor:
        return accept_prob(p_drafted, q_drafted)

    def count(self, passed: Tensor) -> Tensor:
        return passed.cumprod(0, dtype=torch.long).sum()

    def final(self, p: Tensor, tokens: Tensor, probs: Tensor | None, accepted: Tensor) -> Tensor:
        row = p.index_select(0, accepted[None])[0]
        return residual(row, draft_row(tokens, probs, accepted, row))


def draft_row(tokens: Tensor, probs: Tensor | None, accepted: Tensor, like: Tensor) -> Tensor:
    """[V]: q at the first rejected position; zeros where all were accepted, which makes the residual the bonus row.

    `accepted` stays on the device: indexing with it, and not with a number, saves a synchronisation. A deterministic
    draft's q is one-hot, made for this one row only.
    """
    k = tokens.shape[0]
    if k == 0:
        return torch.zeros_like(like)
    at = accepted.clamp(max=k - 1)[None]
    rejected = (accepted < k).to(like)
    if probs is None:
        return torch.zeros_like(like).scatter_(0, tokens.index_select(0, at), rejected[None])
    return probs.index_select(0, at)[0] * rejected


RULES: dict[str, AcceptanceRule] = {rule.name: rule for rule in (TokenRule(),)}
"""Every rule, by name; those that declare `lossless` are picked up by the exact test."""


@torch.inference_mode()
def decide(rule: AcceptanceRule, draft: Draft, p: Tensor, random: Randomness, position: int) -> Verdict:
    """Hold a draft against the target's distributions p [k + 1, V]; one device-to-host copy, and no other.

    Raises GenerationFailed where a distribution that mattered is not made of numbers.
    """
    k = len(draft)
    accept_u, final_u = random.uniforms(position, "accept", k), random.uniforms(position, "final", k + 1)
    u = torch.tensor([[*accept_u, 0.0], final_u], dtype=wide(p.device)).to(p.device, non_blocking=True)

    parts = _judged(rule, draft, p, u) if k else [u.new_zeros(1), draw(p[0], u[1, 0])[None], p[0].sum()[None]]
    # Mixed dtypes: cat widens them to float64, which MPS has not.
    host = torch.cat([part.to(u.dtype) for part in parts] if p.device.type == "mps" else parts).tolist()

    head, rest = host[:3], host[3:]
    drafted, p_host, q_host, overlap_host = (tuple(rest[i * k : (i + 1) * k]) for i in range(4))
    n, token_id, mass = int(head[0]), int(head[1]), head[2]
    _check_numbers(mass, (*p_host[: n + 1], *overlap_host[: n + 1]), q_host, draft.source, position + n)
    shown = (len(rest) - 4 * k) // 2
    values, ids = rest[4 * k : 4 * k + shown], rest[4 * k + shown :]
    rejected = n < k
    return Verdict(
        drafted=tuple(int(t) for t in drafted),
        accepted=n,
        token=token_id,
        origin="recovered" if rejected else "bonus",
        p=_known(p_host),
        q=q_host,
        u=tuple(value if i <= n else None for i, value in enumerate(accept_u)),
        overlap=_known(overlap_host),
        residual=tuple((int(i), v) for i, v in zip(ids, values, strict=True) if v > 0) if rejected else (),
    )


def _judged(rule: AcceptanceRule, draft: Draft, p: Tensor, u: Tensor) -> list[Tensor]:
    """On the device: accepted, final token and the final row's mass; per drafted token itself, p, q and overlap; the
    residual's top."""
    k, at = len(draft), draft.tokens[:, None]
    p_drafted = p[:k].gather(1, at)[:, 0]
    if draft.probs is None:
        q_drafted, overlap = torch.ones_like(p_drafted), p_drafted
    else:
        q_drafted = draft.probs.gather(1, at)[:, 0]
        overlap = torch.minimum(p[:k], draft.probs).sum(-1)
    accepted = rule.count(u[0, :k] < rule.thresholds(p_drafted, q_drafted))
    final = rule.final(p, draft.tokens, draft.probs, accepted)
    token = draw(final, u[1].index_select(0, accepted[None])[0])
    likeliest = top(final, min(RESIDUAL_TOP, final.shape[0]))
    return [accepted[None], token[None], final.sum()[None], draft.tokens, p_drafted, q_drafted, overlap, *likeliest]


def _known(values: tuple[float, ...]) -> tuple[float | None, ...]:
    """Past a rejection the prefix is a dead one, and its numbers may be none."""
    return tuple(value if isfinite(value) else None for value in values)


def _check_numbers(mass: float, p: tuple[float, ...], q: tuple[float, ...], drafter: str, position: int) -> None:
    if any(value != value for value in q):
        raise GenerationFailed(
            f"the draft {drafter} gave logits that are not numbers near position {position}",
            "try --dtype float32, or another draft",
        )
    if mass != mass or any(value != value for value in p):
        raise GenerationFailed(
            f"the target gave logits that are not finite numbers at position {position}",
            "try --dtype float32; if it persists, the checkpoint is damaged",
        )
