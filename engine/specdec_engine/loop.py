"""`decode`: speculative decoding as one generator of events. This is the program; all else consumes or supplies it.

Pull, not push: a consumer that stops iterating has cancelled, and nothing needs cleaning up, because rollback is to an
absolute length. The loop knows token ids only: no text, no files, no screen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from specdec_engine.acceptance import AcceptanceRule, TokenRule, decide
from specdec_engine.control import Controls, Settings, changes
from specdec_engine.drafters.base import Drafter, nothing
from specdec_engine.errors import GenerationFailed, OutOfMemory, SpecdecError, UsageError
from specdec_engine.events import Cycle, End, Event, Failed, Finished, Started
from specdec_engine.randomness import Randomness
from specdec_engine.sampling import warp
from specdec_engine.stopping import Clipped, Clipper, Stop
from specdec_engine.target import Target
from specdec_engine.text import Tokenizer
from specdec_engine.timing import Timer, timer_for
from specdec_engine.types import Draft, Verdict


def decode(
    target: Target,
    drafter: Drafter,
    prompt: Sequence[int],
    *,
    controls: Controls,
    stop: Stop,
    random: Randomness,
    rule: AcceptanceRule | None = None,
    tokenizer: Tokenizer | None = None,
    timer: Timer | None = None,
    environment: Mapping[str, Any] | None = None,
) -> Iterator[Event]:
    """Emit up to `stop.max_tokens` tokens after `prompt`, yielding Started, a Cycle a draft, then Finished.

    With a lossless rule the emitted tokens have exactly the target's distribution, for any drafter and any k (Leviathan
    et al. 2023); at temperature 0 they are the target's greedy tokens. `tokenizer` is needed for stop strings only.

    Raises UsageError for a prompt that is empty or fills the target's context, before any event; any error after that is
    yielded as Failed, for traces, and then raised.
    """
    rule, timer = rule or TokenRule(), timer or timer_for(target.device)
    clipper = Clipper(stop, _room(prompt, stop, target.limit), tokenizer)
    settings = controls.settings
    names = {"target": target.name, "draft": drafter.name, "rule": rule.name}
    limits = {"max_tokens": stop.max_tokens, "stop": list(stop.strings)}
    yield Started(tuple(prompt), {**names, **settings.named(), **limits}, random.seed, dict(environment or {}))
    try:
        yield from _cycles(target, drafter, list(prompt), settings, controls, clipper, random, rule, timer)
    except Exception as error:
        known = _understood(error)
        yield Failed(type(known).__name__, known.message, known.hint)
        raise known from (None if known is error else error)


def _cycles(
    target: Target,
    drafter: Drafter,
    context: list[int],
    settings: Settings,
    controls: Controls,
    clipper: Clipper,
    random: Randomness,
    rule: AcceptanceRule,
    timer: Timer,
) -> Iterator[Event]:
    prompt_tokens, index = len(context), 0
    began = timer.mark()
    drafter.begin(context)
    target.prefill(context[:-1])
    ready, reason = timer.mark(), None
    while reason is None:
        assert target.cached == len(context) - 1, f"{target.cached} cached, {len(context)} in context"
        before, settings = settings, controls.settings  # read once: what is announced is what runs
        yield from changes(index, before, settings, controls.reason)
        marks, position = [timer.mark()], len(context)

        k = min(settings.k, clipper.room - 1)  # the last token of the budget is the target's own
        draft = _propose(drafter, context, k, settings, random) if k else nothing(target.device)
        marks.append(timer.mark())

        p = warp(target.score(context[-1], draft), settings.sampling)
        verdict = decide(rule, draft, p, random, position)
        marks.append(timer.mark())

        clipped = clipper.clip(verdict.tokens)
        context += clipped.emitted
        target.rollback(to=len(context) - 1)
        if len(draft):
            drafter.observe(draft, verdict)
        marks.append(timer.mark())

        yield _cycle(index, k, draft, verdict, clipped, [timer.seconds(a, b) for a, b in pairwise(marks)], position)
        index, reason = index + 1, clipped.reason
    yield Finished(reason, len(context) - prompt_tokens, index, timer.seconds(began, ready))


def _propose(drafter: Drafter, context: Sequence[int], k: int, settings: Settings, random: Randomness) -> Draft:
    draft = drafter.propose(context, k, settings.sampling, random)
    if len(draft) > k:
        raise GenerationFailed(f"the drafter {draft.source} proposed {len(draft)} tokens where {k} were asked for")
    return draft


def _cycle(
    index: int, k: int, draft: Draft, verdict: Verdict, clipped: Clipped, seconds: Sequence[float], position: int
) -> Cycle:
    end: End = clipped.reason or (verdict.origin if verdict.drafted else "plain")
    draft_s, verify_s, other_s = seconds
    return Cycle(
        index=index,
        drafter=draft.source if verdict.drafted else "none",
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
        draft_s=draft_s,
        verify_s=verify_s,
        other_s=other_s,
        context=position,
    )


def _room(context: Sequence[int], stop: Stop, limit: int | None) -> int:
    if not context:
        raise UsageError("the prompt is empty", "give at least one token to continue from")
    if limit is not None and len(context) >= limit:
        raise UsageError(
            f"the prompt has {len(context)} tokens and the target's context ends at {limit}",
            "shorten the prompt, or choose a target with a longer context",
        )
    return stop.max_tokens if limit is None else min(stop.max_tokens, limit - len(context))


def _understood(error: Exception) -> SpecdecError:
    """Any exception as one of ours: memory is recognised, the rest keeps its own words."""
    if isinstance(error, SpecdecError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return OutOfMemory(
            f"out of memory while generating: {error}", "lower --max-tokens, or use a smaller dtype or model"
        )
    return GenerationFailed(f"{type(error).__name__}: {error}", "run again with --debug for the traceback")
