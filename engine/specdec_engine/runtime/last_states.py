"""The states that a model computed last of each token, behind its last norm: its logits are made of them."""

from __future__ import annotations

from torch import Tensor


class LastStates:
    """Those of all tokens of the text, without a gap."""

    def __init__(self) -> None:
        self.count = 0
        self._kept: Tensor | None = None  # [room, hidden]

    def add(self, states: Tensor, end: int) -> None:
        """[n, hidden], of the n tokens before position `end`; those that were there are written anew."""
        begin = end - len(states)
        assert 0 <= begin <= self.count
        if self._kept is None or end > len(self._kept):
            wider = states.new_empty(max(_ROOM, 2 * end), states.shape[1])
            if self._kept is not None:
                wider[: self.count] = self._kept[: self.count]
            self._kept = wider
        self._kept[begin:end] = states
        self.count = end

    def cut(self, to: int) -> None:
        """Forget all from position `to` on."""
        self.count = min(self.count, to)

    def between(self, begin: int, end: int) -> Tensor:
        """[end - begin, hidden], a view, good until the next pass."""
        assert self._kept is not None
        assert end <= self.count
        return self._kept[begin:end]


_ROOM = 512
"""Tokens to make room for at first."""
