"""Drafts that a target could have: those that need nothing, and those that are on this machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from specdec_engine.errors import PairIncompatible, SpecdecError
from specdec_engine.models.compatibility import Kind, band, member
from specdec_engine.models.hub_cache import cached_heads, cached_models
from specdec_engine.models.loading import Candidate, find_model
from specdec_engine.models.options import LoadOptions
from specdec_engine.runtime.shape import Unsupported

_MOST_LOOKED_AT = 8
"""Cached models that are looked at as drafts, the smallest first: each takes up to a second."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Something that could draft for a target."""

    draft: str
    """As after --draft."""
    kind: Kind
    c: tuple[float, float] | None
    """A draft step's cost in target passes, between what reading the weights costs and what layers cost; None for a lookup,
    which costs next to nothing."""
    speedup: tuple[float, float] | None
    """At the best k, with half of the tokens accepted and with four in five; None where that depends on the text alone."""


def offers(target: str, options: LoadOptions) -> list[Offer]:
    """What could draft for a target, of what needs nothing and of what is on this machine. Raises what loading the target
    would; a model that cannot be looked at is passed over."""
    ours = find_model(target, options).rehearsed()
    if ours.plain_only:
        raise PairIncompatible(ours.plain_only, f"specdec generate -t {ours.name} --draft none decodes it")
    found = [Offer(name, "lookup", None, None) for name in ("ngram", "suffix")]
    if not isinstance(ours.shape, Unsupported) and (layers := ours.shape.layers) > 1:
        n = max(1, layers // 3)
        found.append(Offer(f"self:{n}", "layers", (n / layers, n / layers), None))
    if (mtp := _looked_at(ours, "mtp", "head", options)) is not None:
        found.append(mtp)
    heads = ["builtin"] if ours.name == "builtin" else [head.name for head in cached_heads(ours.name)]
    found += filter(None, (_looked_at(ours, name, "head", options) for name in heads))
    smaller = [model for model in cached_models() if model.name != ours.name and 2 * model.size <= ours.need.weights]
    found += filter(None, (_looked_at(ours, model.name, "model", options) for model in smaller[:_MOST_LOOKED_AT]))
    return found


def _looked_at(ours: Candidate, draft: str, wanted: Literal["head", "model"], options: LoadOptions) -> Offer | None:
    """None for one that does not fit, cannot be had, or is of another kind."""
    try:
        found = member(ours, draft, replace(options, offline=True))
    except SpecdecError:
        return None
    if any(finding.level == "bad" for finding in found.findings) or (found.kind == "head") != (wanted == "head"):
        return None
    c = found.figures.get("c")
    return Offer(draft, found.kind, None, None) if c is None else _offer(draft, found.kind, *c)


def _offer(draft: str, kind: Kind, low: float, high: float) -> Offer:
    return Offer(draft, kind, (low, high), band(low, high))
