"""Which tokens a runtime has cached, as far as the host knows: what another prompt has in common with them is not read again.

Drafted tokens stay on the device, so whoever feeds a runtime notes the text when it knows it. A runtime that is rolled back
cuts what is known, whoever else has used it in between.
"""

from __future__ import annotations

from collections.abc import Sequence


class KnownText:
    """The first so many of a text's tokens are the first that are cached."""

    def __init__(self) -> None:
        self._text: Sequence[int] = ()
        self._count = 0

    def note(self, text: Sequence[int], count: int) -> None:
        """The first `count` tokens of this text are cached, in their places. It may be a list that grows at its end."""
        self._text, self._count = text, count

    def cut(self, to: int) -> None:
        """Only the first `to` cached tokens are kept."""
        self._count = min(self._count, to)

    def common(self, tokens: Sequence[int]) -> int:
        """How many of these tokens are cached already, from the first on."""
        most = min(self._count, len(tokens))
        return next((i for i in range(most) if self._text[i] != tokens[i]), most)
