"""A cycle as its event tells it."""

from __future__ import annotations

from collections.abc import Sequence

from specdec_engine.core.cycle_types import Draft, Verdict
from specdec_engine.decoding.stopping import Clipped
from specdec_engine.record.events import Cycle, End, TokenLogprobs


def cycle_told(
    index: int,
    k: int,
    draft: Draft,
    verdict: Verdict,
    clipped: Clipped,
    seconds: Sequence[float],
    position: int,
    logprobs: tuple[TokenLogprobs, ...] | None,
) -> Cycle:
    """Put a cycle into its event. k: tokens asked for; seconds: of draft, verify and other; position: tokens in the context
    when it began."""
    end: End = clipped.reason or (verdict.origin if verdict.drafted else "plain")
    draft_s, verify_s, other_s = seconds
    return Cycle(
        index=index,
        drafter=draft.drafter if verdict.drafted else "none",
        k=k,
        drafted=verdict.drafted,
        accepted=verdict.accepted,
        emitted=clipped.emitted,
        end=end,
        p=verdict.p,
        q=verdict.q,
        u=verdict.u,
        overlap=verdict.overlap,
        residual=verdict.residual,
        guessed=draft.guessed,
        raw_p=verdict.raw_p,
        raw_q=verdict.raw_q,
        draft_s=draft_s,
        verify_s=verify_s,
        other_s=other_s,
        context=position,
        parents=verdict.parents,
        path=verdict.path,
        logprobs=logprobs,
    )
