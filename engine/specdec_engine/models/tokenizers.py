"""Do two models belong together? By what their token ids mean, not by how many there are.

A draft is useful only where an id is the same token on both sides. Sizes may differ: families pad their embeddings
differently, and ids that only the target has are simply never drafted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specdec_engine.errors import PairIncompatible

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Difference:
    """An id that means one token to the target and another to the draft."""

    id: int
    target: str
    draft: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """Ids in both tokenizers whose tokens differ."""

    ordinary: tuple[Difference, ...]
    special: tuple[Difference, ...]
    """Those that are control tokens on both sides: they cost acceptance at the turn's end, not sense."""


def compare_tokenizers(target: Any, draft: Any) -> Comparison:
    """Every id that both tokenizers know, compared by content."""
    ours, theirs = _by_id(target), _by_id(draft)
    control = _control_ids(target) & _control_ids(draft)
    differing = [Difference(i, ours[i], theirs[i]) for i in sorted(ours.keys() & theirs.keys()) if ours[i] != theirs[i]]
    return Comparison(
        ordinary=tuple(d for d in differing if d.id not in control),
        special=tuple(d for d in differing if d.id in control),
    )


def check_pair(target_name: str, target: Any, draft_name: str, draft: Any) -> Comparison:
    """The comparison, if the pair can work. Raises PairIncompatible, with the first differing ids, if it cannot."""
    comparison = compare_tokenizers(target, draft)
    if comparison.ordinary:
        first = "; ".join(f"{d.id} is {d.target!r} and {d.draft!r}" for d in comparison.ordinary[:_SHOWN])
        raise PairIncompatible(
            f"the tokenizers of {target_name} and {draft_name} differ in {len(comparison.ordinary)} tokens: {first}",
            "choose a draft of the target's own family, or `--draft ngram`, which fits every target",
        )
    return comparison


def _by_id(tokenizer: Any) -> dict[int, str]:
    return {i: token for token, i in tokenizer.get_vocab().items()}


def _control_ids(tokenizer: Any) -> set[int]:
    return {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
