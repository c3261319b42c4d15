"""What there is to show of the decision about one drafted token: values and words, for a panel and for a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specdec_engine.record.events import Cycle, TokenId
from specdec_tui.narrate import held


@dataclass(frozen=True, slots=True)
class Scale:
    """A probability on a scale from 0 to 1; None where it is not told."""

    label: str
    value: float | None
    style: str


@dataclass(frozen=True, slots=True)
class Left:
    """An entry of what is left after a rejection."""

    token: TokenId
    """None for all others together."""
    mass: float
    drawn: bool = False


def scales(cycle: Cycle, at: int, rule: str) -> list[Scale]:
    """q and p, and what the draw is held against where the token rule tested the token."""
    p, q = cycle.p[at], cycle.q[at]
    found = [Scale("q draft", q, "draft"), Scale("p target", p, "target")]
    if rule != "token" or cycle.fate(at) == "untested":  # another test, or none: p then follows a token given up
        return found
    return [*found, Scale("min(1, p/q)", None if p is None or not q else min(1.0, p / q), "ratio")]


def draw(cycle: Cycle, at: int, rule: str) -> float | None:
    """The uniform number, where it decided something."""
    p, q, u = cycle.p[at], cycle.q[at], cycle.u[at]
    if rule != "token" or cycle.fate(at) == "untested" or p is None or not q or p >= q or (p == 0.0 and q == 1.0):
        return None
    return u


def verdict(cycle: Cycle, at: int, rule: str) -> tuple[str, str]:
    """What became of the token, and why."""
    said = {"accepted": "✓ kept", "rejected": "× rejected", "untested": "never tested"}[cycle.fate(at)]
    if rule != "token":
        return said, f"{rule} verification weighs the whole draft"
    if cycle.fate(at) == "untested":
        return said, "another branch was kept" if _beside_a_kept_one(cycle, at) else "a token before it was rejected"
    return said, held(cycle, at)


def _beside_a_kept_one(cycle: Cycle, at: int) -> bool:
    """Of a token tree: whether a sibling of the token, or of one that it follows, was kept."""
    parents, path = cycle.parents, cycle.path
    while parents is not None and path and at >= 0:
        if at not in path and any(parents[kept] == parents[at] for kept in path):
            return True
        at = parents[at]
    return False


def left_title(rule: str) -> str:
    return "what is left: max(0, p − q), normalised" if rule == "token" else "what is left of p"


def left_after(cycle: Cycle, most: int) -> Sequence[Left]:
    """Of a rejection, what the recovered token was drawn from: the largest entries, the drawn one among them, and the rest
    where there is one; a drawn token that is told without its mass comes first, with 0."""
    if cycle.rejected is None or not cycle.residual:
        return ()
    drawn = cycle.emitted[-1] if len(cycle.emitted) > cycle.accepted else None
    known = [entry for entry in cycle.residual if entry[0] == drawn]
    others = [entry for entry in cycle.residual if entry[0] != drawn]
    entries = sorted([*others[: most - len(known)], *known], key=lambda entry: -entry[1])
    found = [Left(token, mass, token == drawn) for token, mass in entries]
    if drawn is not None and not known:
        found.insert(0, Left(drawn, 0.0, drawn=True))
    rest = 1.0 - sum(mass for _, mass in entries)
    return [*found, Left(None, rest)] if rest > 0.005 else found
