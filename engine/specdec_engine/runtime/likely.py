"""What a draft says of one of the tokens that it could choose."""

from __future__ import annotations

from typing import NamedTuple


class Likely(NamedTuple):
    """One of several numbers, and its share of their softmax."""

    place: int
    share: float
