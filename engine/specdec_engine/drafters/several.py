"""Parts of drafters that are made of others: what cascades and trees have in common."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Self

from specdec_engine.drafters.base import Drafter, DraftSetup, another
from specdec_engine.runtime import Runtime


class Several:
    """Some drafters, in order."""

    prefix = ""
    """Before the members' names in its own."""

    def __init__(self, members: Sequence[Drafter], setup: DraftSetup) -> None:
        self._limits, self._device = setup.draft_limits, setup.device
        self.take(members)

    def take(self, members: Sequence[Drafter]) -> None:
        """Have these members."""
        self.name = self.prefix + ",".join(member.name for member in members)
        self._members = tuple(members)

    def _is_followed(self, member: Drafter, k: int) -> bool:
        """Tell whether one after this member may propose anything."""
        later = self._members[self._members.index(member) + 1 :]
        return any(other.name != "none" and self._limits.limit(other.name, k) for other in later)

    def another(self, target: Runtime) -> Self:
        """See `Repeatable`. Raises UsageError where a member can be had only once."""
        made = copy(self)
        made.take([another(member, target) for member in self._members])
        return made

    def begin(self, prompt: Sequence[int]) -> None:
        for member in self._members:
            member.begin(prompt)
