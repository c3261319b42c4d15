"""Do two models belong together? By what their token ids mean, not by how many there are.

A draft's ids are the target's own where an id is the same token on both sides; elsewhere `translation` carries its text over.
Sizes may differ: families pad their embeddings differently, and ids that only the target has are simply never drafted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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


def shared_share(target: Any, draft: Any) -> float:
    """Of the target's ordinary tokens, the share that the draft has too, by content and under whatever id."""
    ours, theirs = set(target.get_vocab()), set(draft.get_vocab())
    return len(ours & theirs) / max(len(ours), 1)


def _by_id(tokenizer: Any) -> dict[int, str]:
    return {i: token for token, i in tokenizer.get_vocab().items()}


def _control_ids(tokenizer: Any) -> set[int]:
    return {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
