"""A token that a draft could choose, and how likely it is to the draft."""

from __future__ import annotations

from typing import NamedTuple


class Likely(NamedTuple):
    """One of several numbers, and its share of their softmax."""

    place: int
    share: float
