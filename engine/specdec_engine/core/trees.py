"""Token trees: drafts that branch (SpecInfer; Miao et al. 2024, arXiv:2305.09781).

A tree of n drafted tokens is its parents: `parents[i]` is the place of the token that token i follows, less than i, or -1 for
the newest token of the context. In the target's pass row 0 is the newest token, and row i + 1 drafted token i.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST = 62
"""Tokens of a tree: `hidden_rows` has a bit for each row of the pass, in 64 bits with a sign."""


def fault_of(parents: Sequence[int], tokens: int, k: int) -> str:
    """Find what is wrong with the parents of a draft of so many tokens and depth k at most; empty for nothing."""
    if len(parents) != tokens or not 0 < tokens <= MOST:
        return f"of {tokens} tokens with {len(parents)} parents, where 1 to {MOST} of each are right"
    if any(not -1 <= parent < place for place, parent in enumerate(parents)):
        return f"in which a token follows one that is not before it: {tuple(parents)}"
    deepest = max(depths(parents))
    return f"of depth {deepest} where {k} was asked for" if deepest > k else ""


def depths(parents: Sequence[int]) -> list[int]:
    """[n]: how many tokens after the newest one each stands."""
    found = list[int]()
    for parent in parents:
        found.append(1 if parent < 0 else found[parent] + 1)
    return found


def children(parents: Sequence[int]) -> dict[int, list[int]]:
    """The places of the tokens that follow each one, in the order in which they are tested."""
    found: dict[int, list[int]] = {place: [] for place in range(-1, len(parents))}
    for place, parent in enumerate(parents):
        found[parent].append(place)
    return found


def first_path(parents: Sequence[int]) -> list[int]:
    """The places of the first token, the first that follows it, and so on: the chain that the tree is without branches."""
    following, place, path = children(parents), -1, list[int]()
    while following[place]:
        place = following[place][0]
        path.append(place)
    return path


def hidden_rows(parents: Sequence[int]) -> list[int]:
    """[n + 1]: for each row of the pass the rows before it that it must not see, as bits; all but those it follows."""
    seen = [0]  # of each row, the rows that it follows, and itself
    seen[0] = 1
    for place, parent in enumerate(parents):
        seen.append(seen[parent + 1] | 1 << (place + 1))
    return [~seen[row] & (1 << row) - 1 for row in range(len(seen))]
