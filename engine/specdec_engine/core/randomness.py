"""Uniform numbers as a pure function of (seed, position, purpose): no state, the same on every device.

`position` is that of the cycle's first new token, and a cycle takes its numbers as a row from there. Rows never repeat
(each cycle emits at least one token), so the number that drew a *discarded* draft token is not used again: were it, a
controller that looks at discarded drafts could bias the output.
"""

from __future__ import annotations

import struct
from hashlib import blake2b
from typing import Literal, Protocol

Purpose = Literal["draft", "accept", "final"]

_PERSON: dict[Purpose, bytes] = {"draft": b"specdec.draft", "accept": b"specdec.accept", "final": b"specdec.final"}
_PER_DIGEST = 8


class Randomness(Protocol):
    """**Protocol:** where the loop, the rule and the drafters take their uniform numbers from."""

    seed: int

    def uniforms(self, position: int, purpose: Purpose, n: int) -> list[float]:
        """n numbers strictly between 0 and 1 for the cycle that starts at `position`."""
        ...


class KeyedRandomness:
    """BLAKE2b of (seed, position, block), personalised by purpose; 52 bits a number, centred in their cell."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def uniforms(self, position: int, purpose: Purpose, n: int) -> list[float]:
        values: list[float] = []
        for block in range(-(-n // _PER_DIGEST)):
            key = struct.pack("<QQQ", self.seed % 2**64, position, block)
            words = struct.unpack("<8Q", blake2b(key, digest_size=64, person=_PERSON[purpose]).digest())
            # Centred on 52 bits: with 53 the largest would round to 1.0, and u must lie strictly inside (0, 1).
            values += [((word >> 12) + 0.5) * 2.0**-52 for word in words]
        return values[:n]
