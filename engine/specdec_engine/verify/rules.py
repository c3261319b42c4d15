"""Acceptance rules: which drafted tokens survive, and what replaces the first that does not.

p is the target's distribution and q the one the draft was drawn from, as in Leviathan et al. 2023 (arXiv:2211.17192) and
Chen et al. 2023 (arXiv:2302.01318). A rule is three pure functions (`thresholds`, `count`, `final`); `decide.decide`
compares these with uniform numbers on a device, `apply_rule` on the host. Losslessness is a property of the three:
tests/exact check it by enumeration, and that both forms of the token rule agree. Nothing here runs a model, keeps state,
or knows about temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec_engine.runtime import native
from specdec_engine.verify.sampling import wide


def accept_prob(p: Tensor, q: Tensor) -> Tensor:  # [k], [k] -> [k]
    """min(1, p/q) at the drafted tokens (Leviathan et al., algorithm 1); 0 where either has no mass.

    In float64 (float32 on MPS), where two tiny float32 probabilities give their ratio and not 0/0.
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
class VerifyInputs:
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
    def of(cls, p: Tensor, tokens: Tensor, probs: Tensor | None) -> VerifyInputs:
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

    def thresholds(self, inputs: VerifyInputs) -> Tensor:
        """[k]: position i passes if and only if u_i < thresholds[i]."""
        ...

    def count(self, passed: Tensor) -> Tensor:
        """[k] bool -> []: how many drafted tokens are accepted, given which positions passed."""
        ...

    def final(self, inputs: VerifyInputs, accepted: Tensor) -> Tensor:
        """[V]: the distribution of the token that ends the cycle, after `accepted` drafted tokens; p's last row after all."""
        ...


class TokenRule:
    """The standard rule: test token by token, stop at the first rejection, draw from the residual or the bonus row."""

    name: ClassVar[str] = "token"
    lossless: ClassVar[bool] = True

    def thresholds(self, inputs: VerifyInputs) -> Tensor:
        return accept_prob(inputs.p_drafted, inputs.q_drafted)

    def count(self, passed: Tensor) -> Tensor:
        return passed.cumprod(0, dtype=torch.long).sum()

    def final(self, inputs: VerifyInputs, accepted: Tensor) -> Tensor:
        return residual(inputs.p.index_select(0, accepted[None])[0], inputs.q_row(accepted))


class BlockRule:
    """Block verification (Sun et al. 2024, arXiv:2403.10444): accepts up to the last position that passes, even if
    earlier ones did not.

    Accepts at least as many tokens on average as the token rule, and as many where the draft is deterministic. With
    r_i = min(1, r_{i-1} · p/q) along the draft, position i passes with S_i / (S_i + 1 - r_i), where S_i is what the residual
    max(0, r_i · p - q) at the next position still holds; the last one passes with r_k.
    """

    name: ClassVar[str] = "block"
    lossless: ClassVar[bool] = True

    def thresholds(self, inputs: VerifyInputs) -> Tensor:
        weights = _prefix_weights(inputs)
        left, inner = self._residual_mass(inputs, weights[:-1]), weights[:-1]
        mass = left + 1 - inner
        # Mass 0: a later position passes with certainty, and this one does not matter.
        return torch.cat([torch.where(mass == 0, 0.0, left / mass), weights[-1:]])

    def count(self, passed: Tensor) -> Tensor:
        places = torch.arange(passed.shape[0] + 1, device=passed.device)
        return (places * pad(passed, (1, 0))).amax()

    def final(self, inputs: VerifyInputs, accepted: Tensor) -> Tensor:
        weights = _prefix_weights(inputs)
        whole = torch.cat([weights.new_ones(1), weights])
        scale = torch.where(accepted < inputs.tokens.shape[0], whole.index_select(0, accepted[None])[0], 1.0)
        row = residual(inputs.p.index_select(0, accepted[None])[0], inputs.q_row(accepted), scale.to(inputs.p))
        # Each test looked at the row after it: a NaN there would silently mean "not accepted". It is carried into the row.
        return row + self._residual_mass(inputs, weights[:-1]).sum().to(row) * 0

    def _residual_mass(self, inputs: VerifyInputs, weights: Tensor) -> Tensor:
        """[k - 1]: Σ max(0, r_i · p - q) at the position after the i-th drafted token, i = 1 .. k - 1."""
        if inputs.probs is None:
            left = weights * (1 - inputs.p_drafted[1:])
        else:
            wanted = inputs.p[1 : inputs.tokens.shape[0]] * weights[:, None]
            left = (wanted - inputs.probs[1:]).clamp_(min=0.0).sum(-1)
        return torch.where(weights > 0, left, 0.0)  # the target gives this prefix probability 0


class SyntheticRule:
    """Accepts each drafted token with a chance that was chosen, whatever the target says: to measure speed at a given
    acceptance. The output is not the target's."""

    name: ClassVar[str] = "synthetic"
    lossless: ClassVar[bool] = False

    def __init__(self, chance: float) -> None:
        self._chance = chance

    def thresholds(self, inputs: VerifyInputs) -> Tensor:
        return torch.full_like(inputs.p_drafted, self._chance, dtype=wide(inputs.p_drafted.device))

    def count(self, passed: Tensor) -> Tensor:
        return TokenRule().count(passed)

    def final(self, inputs: VerifyInputs, accepted: Tensor) -> Tensor:
        """The target's own row: there may be nothing left of it after what was accepted."""
        return inputs.p.index_select(0, accepted[None])[0]


def _prefix_weights(inputs: VerifyInputs) -> Tensor:
    """[k]: r_i of `BlockRule`, min(1, r_{i-1} · p/q) along the draft."""
    weights, all_weights = torch.ones_like(inputs.q_drafted[:1]), []
    ratio = torch.where(inputs.q_drafted > 0, inputs.p_drafted / inputs.q_drafted, 0.0)
    for i in range(ratio.shape[0]):
        weights = (weights * ratio[i : i + 1]).clamp(max=1.0)
        all_weights.append(weights)
    return torch.cat(all_weights) if all_weights else inputs.q_drafted


RULES: dict[str, AcceptanceRule] = {rule.name: rule for rule in (TokenRule(), BlockRule())}
"""Every rule, by name; those that declare `lossless` are picked up by the exact test."""


@dataclass(frozen=True, slots=True)
class RuleOutcome:
    """What a rule has made of a cycle, on the host."""

    accepted: int
    final: Tensor
    """[V]: what the cycle's last token is drawn from."""


def apply_rule(rule: AcceptanceRule, inputs: VerifyInputs, u: Sequence[float]) -> RuleOutcome:
    """The rule's outcome for [k] uniform numbers."""
    if type(rule) is TokenRule:  # not a rule derived from it
        return apply_token_rule(inputs, u)
    accepted = rule.count(torch.tensor(u, dtype=wide(inputs.p.device)) < rule.thresholds(inputs))
    n = int(accepted)
    whole = n == len(u)  # where all are accepted, every rule draws from p's last row
    return RuleOutcome(n, inputs.p[n] if whole else rule.final(inputs, accepted))


def apply_token_rule(inputs: VerifyInputs, u: Sequence[float]) -> RuleOutcome:
    """TokenRule once more, in Python and numpy: after a forward pass 0.1 ms where its three functions take 0.4.

    That both say the same is part of the exact test.
    """
    n = 0
    for p, q, number in zip(inputs.p_drafted.tolist(), inputs.q_drafted.tolist(), u, strict=True):
        if not (q > 0 and number < p / q):
            break
        n += 1
    row = inputs.p[n]
    if n == len(u):
        return RuleOutcome(n, row)
    q = None if inputs.probs is None else inputs.probs[n].to(row)
    if (kernels := native.of_rows(row)) is not None:
        left_over = kernels.residual(row, q, int(inputs.tokens[n]))
        return RuleOutcome(n, row if left_over is None else left_over)
    left = row.numpy().copy()
    if q is None:
        left[int(inputs.tokens[n])] -= 1
    else:
        left -= q.numpy()
    mass = float(np.maximum(left, 0, out=left).sum())
    return RuleOutcome(n, torch.from_numpy(np.divide(left, mass, out=left)) if mass > 0 else row)
