"""The states that a model computed last of each token, behind its last norm: its logits are made of them."""

from __future__ import annotations

from torch import Tensor

_KEPT = 4096
"""Tokens of which states are kept at most. A draft reads one, of the newest token; `tune` reads as many as an answer has."""


class LastStates:
    """The states of the newest tokens, by position; there may be gaps."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, Tensor]] = []  # begin, [n, hidden]

    def add(self, states: Tensor, end: int) -> None:
        """[n, hidden], of the n tokens before position `end`."""
        self._parts.append((end - len(states), states))
        while end - self._parts[0][0] > _KEPT + len(self._parts[0][1]):
            del self._parts[0]

    def cut(self, to: int) -> None:
        """Forget all from position `to` on."""
        while self._parts and self._parts[-1][0] >= to:
            self._parts.pop()
        if self._parts:
            begin, states = self._parts[-1]
            self._parts[-1] = begin, states[: to - begin]

    def at(self, position: int) -> Tensor | None:
        """[1, hidden], after the token at this position; None where it is not kept."""
        for begin, states in reversed(self._parts):
            if begin <= position < begin + len(states):
                return states[position - begin, None]
        return None
