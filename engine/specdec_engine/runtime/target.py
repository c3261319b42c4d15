"""The target: the model whose distribution is kept. Prefills, scores a draft in one pass, rolls back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Protocol, cast

import torch
from torch import Tensor

from specdec_engine.core.cycle_types import Draft
from specdec_engine.core.transfer import upload
from specdec_engine.runtime import Runtime, prefill
from specdec_engine.runtime.decoder import Decoder
from specdec_engine.runtime.lean import LeanRuntime, forward_together
from specdec_engine.system.threads import FollowedThreads


class Target(Protocol):
    """**Protocol:** what the loop needs of the target; `ModelTarget` is the real one, tests have a table."""

    name: str
    limit: int | None
    device: torch.device
    trees: bool
    """Whether `score` takes token trees."""

    @property
    def cached(self) -> int: ...

    def prefill(self, tokens: Sequence[int]) -> int:
        """Cache these tokens and no others. Returns how many of them, from the first on, were cached already."""
        ...

    def score(self, context: Sequence[int], draft: Draft) -> Tensor:
        """[k + 1, V] logits: after the context, all of which but its newest token is cached, and after each drafted token.
        Caches all k + 1. The context may be a list that grows at its end."""
        ...

    def keep(self, path: Sequence[int]) -> None:
        """Of the tree that was scored last keep the tokens at these places, as a chain."""
        ...

    def rollback(self, to: int) -> None:
        """Keep the first `to` cached tokens; absolute and idempotent."""
        ...


class ModelTarget:
    """A target on a runtime. followed: threads that its passes are made on."""

    def __init__(self, runtime: Runtime, name: str, followed: FollowedThreads | None = None) -> None:
        self.name = name
        self.followed = followed
        self.runtime = runtime
        self.limit = runtime.limit
        self.device = runtime.device
        self.trees = takes_trees(runtime)
        self._read = tuple[int, ...]()

    @property
    def cached(self) -> int:
        return self.runtime.cached

    def prefill(self, tokens: Sequence[int]) -> int:
        common = self.runtime.known.common(tokens)
        self.runtime.rollback(common)
        kept = min(common, self.runtime.ready)
        if common < len(tokens):
            prefill(self.runtime, upload(torch.tensor(tokens[common:]), self.device))
            self._read = tuple(tokens) if common == 0 else ()
        self.runtime.known.note(tokens, len(tokens))
        return kept

    def has_read(self, tokens: Sequence[int]) -> None:
        """Another has had the runtime read these, from the first on, and it had cached none."""
        self._read = tuple(tokens)
        self.runtime.known.note(tokens, len(tokens))

    def holds(self, prompt: Sequence[int]) -> bool:
        """Whether these tokens are cached as they are when they are read alone and from the first on."""
        return self._read == tuple(prompt) and self.runtime.known.common(prompt) == len(prompt)

    def take(self, other: ModelTarget, prompt: Sequence[int]) -> None:
        """Cache a prompt that the other one, of the same model, holds: a copy, where both run on our own forward."""
        self.rollback(0)
        if len(lean_runtimes([self, other])) < 2:
            self.prefill(prompt)
            return
        cast(LeanRuntime, self.runtime).take(cast(LeanRuntime, other.runtime), len(prompt))
        self.has_read(prompt)

    def score(self, context: Sequence[int], draft: Draft) -> Tensor:
        tokens = torch.cat([upload(torch.tensor([context[-1]]), self.device), draft.tokens])
        with self.followed or nullcontext():
            if draft.parents is None:
                logits = self.runtime.forward(tokens, len(draft) + 1, seldom=draft.cut)
            else:
                logits = cast(LeanRuntime, self.runtime).forward_tree(tokens, draft.parents)
        self.runtime.known.note(context, len(context))
        return logits

    def keep(self, path: Sequence[int]) -> None:
        cast(LeanRuntime, self.runtime).keep(path)

    def rollback(self, to: int) -> None:
        self.runtime.rollback(to)


def takes_trees(runtime: Runtime) -> bool:
    """Whether a target on this runtime verifies token trees."""
    return isinstance(runtime, LeanRuntime) and runtime.trees


def lean_runtimes(targets: Sequence[ModelTarget]) -> list[LeanRuntime]:
    """The runtimes of those that run on a decoder of ours, which can read several texts in one pass."""
    runtimes = [target.runtime for target in targets]
    return [r for r in runtimes if isinstance(r, LeanRuntime) and isinstance(r.decoder, Decoder)]


def score_together(asked: Sequence[tuple[ModelTarget, Sequence[int], Draft]]) -> list[Tensor]:
    """As `Target.score` of each, in one pass where they share a decoder of ours, and else one after the other."""
    lean = lean_runtimes([target for target, _, _ in asked])
    if len(lean) < max(2, len(asked)):
        return [target.score(context, draft) for target, context, draft in asked]
    tokens = [torch.cat([upload(torch.tensor([c[-1]]), t.device), draft.tokens]) for t, c, draft in asked]
    with asked[0][0].followed or nullcontext():
        logits = forward_together(lean, tokens, [draft.parents for _, _, draft in asked])
    for target, context, _ in asked:
        target.runtime.known.note(context, len(context))
    return logits
