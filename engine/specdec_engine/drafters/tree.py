"""Several drafters at once, whose drafts are merged into one token tree: what they begin with alike is verified once.

A lookup and a head disagree on the next token in 72 of 100 places, and are then right 28 and 37 times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from operator import mul
from time import perf_counter

import torch
from torch import Tensor

from specdec_engine.core.cycle_types import Draft, Part, Sampling, Verdict
from specdec_engine.core.randomness import Purpose, Randomness
from specdec_engine.core.registry import TREE
from specdec_engine.core.transfer import upload
from specdec_engine.core.trees import MOST
from specdec_engine.drafters.base import Drafter, DraftSetup, empty_draft
from specdec_engine.drafters.several import Several


class TreeDrafter(Several):
    """All members propose; the first one's draft is the tree's first path."""

    prefix = TREE

    def __init__(self, members: Sequence[Drafter], setup: DraftSetup) -> None:
        super().__init__(members, setup)
        self.branch(True)

    def take(self, members: Sequence[Drafter]) -> None:
        super().take(members)
        self._proposed: list[tuple[Drafter, Draft]] = []

    def branch(self, allowed: bool) -> None:
        """See `Branching`: where trees are not verified the first that proposes wins, as in a cascade."""
        self._limits.merging = allowed

    def propose(self, context: Sequence[int], k: int, sampling: Sampling, random: Randomness) -> Draft:
        """A chain where one member alone proposes."""
        self._proposed, parts, self._limits.drafted = [], list[Part](), 0
        for number, member in enumerate(self._members):
            others = {part.drafter: len(part.tokens) for part in parts}
            own = self._limits.limit(member.name, k)
            if not own or not self._limits.should_join(member.name, others):
                continue
            self._limits.followed = not self._limits.merging and self._is_followed(member, k)
            began = perf_counter()
            draft = member.propose(context, own, sampling, _Later(random, number * k))
            if len(draft):
                self._proposed.append((member, draft))
                part = (
                    draft.parts[0] if draft.parts else Part(member.name, tuple(draft.as_chain().tokens.tolist()), 0.0)
                )
                parts.append(replace(part, seconds=perf_counter() - began))
                self._limits.drafted += len(draft)
                if not self._limits.merging:
                    break
        drafts = [draft for _, draft in self._proposed]
        if len(drafts) < 2:
            return told_alone(drafts[0], parts) if drafts else empty_draft(self._device)
        return replace(merged(drafts, self._device), parts=tuple(parts))

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        """Each member is told how far its own draft agrees with what was emitted."""
        for member, own in self._proposed:
            tokens = own.as_chain().tokens.tolist()
            agreed = sum(accumulate((a == b for a, b in zip(tokens, verdict.tokens, strict=False)), mul))
            accepted = min(agreed, verdict.accepted)
            member.observe(
                own,
                Verdict(
                    drafted=tuple(tokens),
                    accepted=accepted,
                    token=verdict.tokens[accepted],
                    origin="recovered" if accepted < len(tokens) else "bonus",
                    p=(),
                    q=(),
                    u=(),
                    overlap=(),
                    residual=(),
                ),
            )


def told_alone(draft: Draft, parts: Sequence[Part]) -> Draft:
    """The draft of one member, of which all is known without parts if it is a chain."""
    return draft if draft.parents is None else replace(draft, parts=tuple(parts))


class _Later:
    """A `Randomness` that leaves out the first so many numbers, with which others draw: two that drew with the same ones
    would know of each other."""

    def __init__(self, of: Randomness, skipped: int) -> None:
        self.seed = of.seed
        self._of, self._skipped = of, skipped

    def uniforms(self, position: int, purpose: Purpose, n: int) -> list[float]:
        return self._of.uniforms(position, purpose, self._skipped + n)[self._skipped :]


@dataclass(slots=True)
class _Tree:
    """A tree that grows."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    rows: list[Tensor | None] = field(default_factory=list)
    """What each token was drawn from; None where it was not."""

    def child(self, parent: int, token: int) -> int | None:
        return next((i for i in self._children(parent) if self.tokens[i] == token), None)

    def add(self, parent: int, token: int, row: Tensor | None) -> int:
        """A new child, the last of its siblings. It is another token than they are: what it was drawn from is the row given
        that, or a draft's tokens would be tested against a distribution that they do not have."""
        siblings = [self.tokens[i] for i in self._children(parent)]
        if row is not None and siblings:
            row = row.clone()
            row[siblings] = 0.0
            row /= row.sum()
        self.tokens.append(token)
        self.parents.append(parent)
        self.rows.append(row)
        return len(self.tokens) - 1

    def _children(self, parent: int) -> list[int]:
        return [i for i, of in enumerate(self.parents) if of == parent]


def merged(drafts: Sequence[Draft], device: torch.device) -> Draft:
    """One tree of several drafts, or the chain that they all are; whoever proposed, it is called a tree."""
    tree = _Tree()
    for draft in drafts:
        places: dict[int, int] = {-1: -1}  # of its tokens in the tree
        for i, token in enumerate(draft.tokens.tolist()):
            at = places.get(i - 1 if draft.parents is None else draft.parents[i])
            if at is None:
                continue
            there = tree.child(at, token)
            if there is None and len(tree.tokens) < MOST:
                there = tree.add(at, token, None if draft.probs is None else draft.probs[i])
            if there is not None:
                places[i] = there
    parents = tuple(tree.parents)
    chain = parents == tuple(range(-1, len(parents) - 1))
    return Draft(upload(torch.tensor(tree.tokens), device), _rows(tree), "tree", parents=None if chain else parents)


def _rows(tree: _Tree) -> Tensor | None:
    """[n, V], one-hot for tokens that were not drawn; None where none was."""
    like = next((row for row in tree.rows if row is not None), None)
    if like is None:
        return None
    rows = []
    for token, row in zip(tree.tokens, tree.rows, strict=True):
        if row is None:
            row = torch.zeros_like(like)
            row[token] = 1.0
        rows.append(row)
    return torch.stack(rows)
