"""How a model's forward pass is run: the layer under target and draft.

A runtime scores tokens that follow what it has cached, and forgets back to a length. The loop does not know which runs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from specdec_engine.runtime.known_text import KnownText
from specdec_engine.runtime.likely import Likely


class SampledToken(NamedTuple):
    """A draft's next token. A tuple, since recordings return tuples of tensors."""

    token: Tensor
    """[1]"""
    row: Tensor | None
    """[1, V], what it was drawn from; None if it was not drawn."""
    confidence: Tensor | float | None
    """[], a number where nothing is recorded: the largest probability of the draft's distribution; None where nobody asks."""
    raw: Tensor | None = None
    """[1, V'], the distribution before temperature and filters over the draft's own ids, where it was asked for."""

    @property
    def sure(self) -> float:
        """The confidence, which was asked for, on the host: waits for a device."""
        assert self.confidence is not None
        return float(self.confidence)


class DraftTokens(NamedTuple):
    """A draft's tokens."""

    tokens: Tensor
    """[k]"""
    rows: Tensor | None
    """[k, V], what they were drawn from; None if they were not drawn."""
    raw: Tensor | None
    """[k, V'], the distributions before temperature and filters over the draft's own ids, where they were asked for."""
    guessed: tuple[int, ...] = ()
    """The places of those that were expected before they were chosen (`guided`)."""
    likeliest: tuple[tuple[Likely, Likely], ...] = ()
    """[k]: each token, and the second likeliest in its place; empty where others than our own kernels chose."""

    @classmethod
    def of(cls, sampled: Sequence[SampledToken], tokens: Sequence[Tensor]) -> DraftTokens:
        """tokens: [1] each; those chosen, or what they are called elsewhere."""
        rows = [one.row for one in sampled if one.row is not None]
        raw = [one.raw for one in sampled if one.raw is not None]
        return cls(torch.cat(list(tokens)), torch.cat(rows) if rows else None, torch.cat(raw) if raw else None)


StopDrafting = Callable[[float], bool]
"""Given how sure the draft was of the token it has just chosen: whether to end the draft with it. It must not look at the
token itself: see `Drafter`."""


class TokenSampler(Protocol):
    """**Protocol:** how a draft's next token follows from its logits; a pure function of tensors, so that it can be
    recorded."""

    @property
    def key(self) -> Hashable:
        """Equal keys do the same with the same tensors."""
        ...

    @property
    def plain(self) -> float | None:
        """The temperature, where our own kernels may choose in its place: the likeliest at 0, and else what a uniform number
        draws of the whole distribution. None where it does more."""
        ...

    def __call__(self, logits: Tensor, u: Tensor, temperature: Tensor) -> SampledToken:
        """[1, V] logits, [] uniform number, [] temperature."""
        ...


class Runtime(Protocol):
    """**Protocol:** one model with one cache."""

    name: str
    vocab: int
    """Size of the logits' last dimension, padding included."""
    limit: int | None
    """Positions the model was made for; None where its config does not say."""
    device: torch.device
    known: KnownText
    """What of the cached tokens the host knows; `rollback` cuts it."""

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are kept."""
        ...

    @property
    def ready(self) -> int:
        """Cached tokens that the next pass does not read again; less than `cached` where a state cannot go back to them."""
        ...

    def forward(self, tokens: Tensor, rows: int, seldom: bool = False) -> Tensor:
        """[n] tokens that follow the cached ones -> [rows, V] logits after the last `rows` of them; caches all n.

        seldom: so many tokens are hardly asked for again, and nothing is to be prepared for them.
        """
        ...

    def rollback(self, to: int) -> None:
        """Forget all but the first `to` tokens; idempotent, and nothing happens if fewer are cached."""
        ...

    def another(self) -> Runtime:
        """The same model on a cache of its own, for another text."""
        ...

    def unroll(
        self, pending: Tensor, u: Tensor, temperature: Tensor, sampler: TokenSampler, stop: StopDrafting | None = None
    ) -> DraftTokens:
        """[m] pending tokens and [k] uniform numbers -> [k] tokens, each chosen after the one before.

        Fewer than k where `stop` says so; a runtime that records does not ask. Caches the pending tokens and all chosen
        ones but the last.
        """
        ...


PREFILL_CHUNK = 512
"""Tokens a prefill pass takes: at 512 the passes are compute-bound everywhere, and activations stay small."""


def prefill(runtime: Runtime, tokens: Tensor) -> None:
    """Cache [n] tokens in chunks, and keep no logits."""
    for chunk in torch.split(tokens, PREFILL_CHUNK):
        runtime.forward(chunk, 1, seldom=True)


@torch.inference_mode()
def step_by_step(
    runtime: Runtime,
    pending: Tensor,
    u: Tensor,
    temperature: Tensor,
    sampler: TokenSampler,
    stop: StopDrafting | None = None,
) -> DraftTokens:
    """`Runtime.unroll` by one forward a token."""
    sampled = list[SampledToken]()
    for number in u:
        sampled.append(sampler(runtime.forward(pending, 1), number, temperature))
        pending = sampled[-1].token
        if stop is not None and stop(sampled[-1].sure):
            break
    return DraftTokens.of(sampled, [one.token for one in sampled])


@torch.inference_mode()
def in_one_pass(
    runtime: Runtime,
    mask: int,
    pending: Tensor,
    u: Tensor,
    temperature: Tensor,
    sampler: TokenSampler,
    stop: StopDrafting | None = None,
) -> DraftTokens:
    """`Runtime.unroll` by a model that fills in masked places (PARD; An et al. 2025, arXiv:2504.18583): one forward over the
    pending tokens and k - 1 masks. A row knows nothing of the tokens drafted before it. Caches the pending tokens alone."""
    masks = torch.full((len(u) - 1,), mask, dtype=pending.dtype, device=pending.device)
    rows = runtime.forward(torch.cat([pending, masks]), len(u))
    runtime.rollback(runtime.cached - len(masks))
    sampled = list[SampledToken]()
    for i, number in enumerate(u):
        sampled.append(sampler(rows[i : i + 1], number, temperature))
        if stop is not None and stop(sampled[-1].sure):
            break
    return DraftTokens.of(sampled, [one.token for one in sampled])


@torch.inference_mode()
def guided(
    runtime: Runtime,
    guess: Callable[[Sequence[int], int], Sequence[int]],
    pending: Tensor,
    u: Tensor,
    temperature: Tensor,
    sampler: TokenSampler,
    stop: StopDrafting | None = None,
) -> DraftTokens:
    """`Runtime.unroll` by fewer forwards: each takes the tokens that `guess` expects, given those chosen and how many, and
    goes on from the first that was not chosen (Chen et al. 2023, arXiv:2312.11462, "vertical cascade").

    The tokens are those of `step_by_step` to rounding, whatever is guessed: each is chosen from the row after those before
    it, with its own uniform number.
    """
    sampled, chosen, guessed = list[SampledToken](), list[int](), list[int]()

    def drafted() -> DraftTokens:
        return DraftTokens.of(sampled, [one.token for one in sampled])._replace(guessed=tuple(guessed))

    while len(chosen) < len(u):
        expected = list(guess(chosen, len(u) - len(chosen) - 1))
        tokens = torch.cat([pending, torch.tensor(expected, dtype=pending.dtype).to(pending.device)])
        before = runtime.cached + len(pending)
        rows = runtime.forward(tokens, len(expected) + 1)
        for i in range(len(expected) + 1):
            sampled.append(sampler(rows[i : i + 1], u[len(chosen)], temperature))
            chosen.append(int(sampled[-1].token))
            fits = i < len(expected) and chosen[-1] == expected[i]
            if fits:
                guessed.append(len(chosen) - 1)
            if stop is not None and stop(sampled[-1].sure):
                runtime.rollback(before + i)
                return drafted()
            if not fits:
                break
        runtime.rollback(before + i)
        pending = sampled[-1].token
    return drafted()
