"""`decode`: speculative decoding as one generator of events. This is the program; all else consumes or supplies it.

Pull, not push: a consumer that stops iterating has cancelled, and nothing needs cleaning up, because rollback is to an
absolute length. The loop knows token ids only: no text, no files, no screen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from specdec_engine.constrain.matching import Matching
from specdec_engine.core.cycle_types import Draft, Verdict
from specdec_engine.core.randomness import Randomness
from specdec_engine.core.transfer import upload
from specdec_engine.core.trees import fault_of
from specdec_engine.decoding.control import Controls, Settings, changes
from specdec_engine.decoding.cycle_event import cycle_told
from specdec_engine.decoding.stopping import Clipped, Clipper, Stop
from specdec_engine.drafters.base import Branching, Drafter, empty_draft
from specdec_engine.errors import GenerationFailed, OutOfMemory, SpecdecError, UsageError
from specdec_engine.record.events import (
    FORCED_BY,
    Cycle,
    Event,
    Failed,
    Finished,
    FinishReason,
    SettingChanged,
    Started,
    TokenLogprobs,
)
from specdec_engine.record.text import Tokenizer
from specdec_engine.runtime.target import Target
from specdec_engine.system.memory import peak_bytes, ran_out
from specdec_engine.system.timing import Mark, Timer, timer_for
from specdec_engine.verify.logprobs import logprobs_of
from specdec_engine.verify.processors import Asked, Processed, process
from specdec_engine.verify.rules import TokenRule
from specdec_engine.verify.verifier import PendingVerdict, Verifier, verifier_for


def decode(
    target: Target,
    drafter: Drafter,
    prompt: Sequence[int],
    *,
    controls: Controls,
    stop: Stop,
    random: Randomness,
    verifier: Verifier | None = None,
    tokenizer: Tokenizer | None = None,
    timer: Timer | None = None,
    environment: Mapping[str, Any] | None = None,
    ahead: bool | None = None,
    asked: Asked | None = None,
    grammar: Matching | None = None,
) -> Iterator[Event]:
    """Emit up to `stop.max_tokens` tokens after `prompt`, yielding Started, a Cycle a target pass (a SettingChanged
    before it for each change), then Finished.

    With a lossless rule the emitted tokens have exactly the target's distribution, for any drafter and any k (Leviathan
    et al. 2023); at temperature 0 they are the target's greedy tokens. `verifier` holds the rule (the token rule unless
    given). `tokenizer` is needed for stop strings only. `asked` changes the target's logits, and with them its
    distribution; so does `grammar`, a fresh one, which proposes the tokens that must come, too. With `ahead`, the default
    on a GPU, the next cycle is started before this one's event is yielded, so that the consumer works while the device
    does; settings that it changes then reach the cycle after that one.

    Raises UsageError for a prompt that is empty or fills the target's context, before any event; any error after that is
    yielded as Failed, for traces, and then raised.
    """
    ahead = target.device.type == "cuda" if ahead is None else ahead
    run, started = start(
        target,
        drafter,
        prompt,
        controls=controls,
        stop=stop,
        random=random,
        verifier=verifier,
        tokenizer=tokenizer,
        timer=timer,
        environment=environment,
        asked=asked,
        grammar=grammar,
    )
    yield started
    try:
        yield from run.run_ahead() if ahead else run.run_in_turn()
    except Exception as error:
        reported = _as_ours(error)
        forget(target, drafter)
        yield Failed(type(reported).__name__, reported.message, reported.hint)
        raise reported from (None if reported is error else error)
    except GeneratorExit:  # between two cycles: the caches are sound
        raise
    except BaseException:  # an interrupt in the middle of a pass: some layers have read its tokens
        forget(target, drafter)
        raise


def start(
    target: Target,
    drafter: Drafter,
    prompt: Sequence[int],
    *,
    controls: Controls,
    stop: Stop,
    random: Randomness,
    verifier: Verifier | None = None,
    tokenizer: Tokenizer | None = None,
    timer: Timer | None = None,
    environment: Mapping[str, Any] | None = None,
    asked: Asked | None = None,
    grammar: Matching | None = None,
) -> tuple[Run, Started]:
    """A run that is about to begin, and its first event. For the arguments, and what is raised, see `decode`."""
    verifier, timer = verifier or verifier_for(TokenRule(), target.device), timer or timer_for(target.device)
    clipper = Clipper(stop, _room(prompt, stop, target.limit), tokenizer)
    run = Run(target, drafter, list(prompt), controls, clipper, random, verifier, timer)
    if asked:
        run.process = process(asked, len(prompt), target.device)
    run.grammar = grammar
    coupling = controls.settings.sampling.coupling
    names = {"target": target.name, "draft": drafter.name, "rule": verifier.rule.name, "coupling": coupling}
    budget: dict[str, Any] = {"max_tokens": stop.max_tokens, "stop": [*stop.strings, *stop.marks]}
    if asked:
        budget["generation_config"] = asked.named()
    if grammar is not None:
        budget["grammar"] = grammar.grammar.named()
    settings = {**names, **run.settings.named(), **budget}
    return run, Started(tuple(prompt), settings, random.seed, dict(environment or {}))


def forget(target: Target, drafter: Drafter) -> None:
    """Have the next run read all of its prompt: after a run that broke, what is no number would stay in the caches."""
    with suppress(Exception):  # what broke it is what is to be told
        target.rollback(0)
        drafter.begin(())


@dataclass(frozen=True, slots=True)
class Proposed:
    """A cycle whose draft is made, and is to be scored."""

    changed: Sequence[SettingChanged]
    k: int
    draft: Draft
    drafted: Sequence[int]
    """Its tokens on the host, where a grammar looks at them."""
    marks: list[Mark]


@dataclass(frozen=True, slots=True)
class InFlightCycle:
    """A cycle that was scored, and whose verdict is on its way."""

    proposed: Proposed
    pending: PendingVerdict
    logits: Tensor
    """[k + 1, V], as the target gave them."""
    shaped: Tensor
    """The same after penalties and a grammar."""


class Run:
    """The loop's state: the context, and the settings that the newest cycle was started with."""

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        context: list[int],
        controls: Controls,
        clipper: Clipper,
        random: Randomness,
        verifier: Verifier,
        timer: Timer,
    ) -> None:
        self.settings = controls.settings
        self._target, self._drafter, self._context = target, drafter, context
        self._controls, self._clipper, self._random = controls, clipper, random
        self._verifier, self._timer = verifier, timer
        self.process: Processed | None = None
        self.grammar: Matching | None = None
        self._kept = 0
        self._prompt_tokens, self._cycles_started, self._cycles_done = len(context), 0, 0

    def run_in_turn(self) -> Iterator[Event]:
        """Start a cycle, finish it, yield it."""
        prefill, reason = self.begin(), None
        while reason is None:
            in_flight = self._start_cycle()
            yield from in_flight.proposed.changed
            cycle, reason = self.finish(in_flight)
            yield cycle
        yield self.finished(reason, prefill)

    def run_ahead(self) -> Iterator[Event]:
        """Finish a cycle, start the next, and only then yield."""
        prefill, reason, start_error = self.begin(), None, None
        in_flight = self._start_cycle()
        while reason is None:
            changed = in_flight.proposed.changed
            cycle, reason = self.finish(in_flight)
            if reason is None:
                try:
                    in_flight = self._start_cycle()
                except Exception as error:
                    start_error = error
            yield from changed
            yield cycle
            if start_error is not None:
                raise start_error
        yield self.finished(reason, prefill)

    @property
    def context(self) -> Sequence[int]:
        """Prompt and answer so far."""
        return self._context

    def begin(self) -> tuple[Mark, Mark]:
        """Both caches filled; the marks before and after."""
        began = self.mark()
        self._kept = self._target.prefill(self._context[:-1])
        return began, self.begin_draft()

    def begin_draft(self) -> Mark:
        """The drafter's cache filled, after the target's: some drafters read what that computed."""
        if isinstance(self._drafter, Branching):
            self._drafter.branch(self._takes_trees)
        self._drafter.begin(self._context)
        return self.mark()

    def mark(self) -> Mark:
        """The time now, of the device."""
        return self._timer.mark()

    def _start_cycle(self) -> InFlightCycle:
        proposed = self.propose()
        return self.verify(proposed, self._target.score(self._context, proposed.draft))

    def propose(self) -> Proposed:
        """Begin a cycle: make its draft."""
        target, context = self._target, self._context
        assert target.cached == len(context) - 1, f"{target.cached} cached, {len(context)} in context"
        before, self.settings = self.settings, self._controls.settings  # read once: what is announced is what runs
        changed = changes(self._cycles_started, before, self.settings, self._controls.reason)
        self._cycles_started += 1
        marks = [self._timer.mark()]
        k, draft = self._draft()
        marks.append(self._timer.mark())
        drafted = draft.tokens.tolist() if self.grammar is not None else []  # before the pass, which it would wait for
        return Proposed(changed, k, draft, drafted, marks)

    def verify(self, proposed: Proposed, logits: Tensor) -> InFlightCycle:
        """Start to hold the draft against the target's logits, [k + 1, V]."""
        draft, context, shaped = proposed.draft, self._context, logits
        if self.process is not None:
            shaped = self.process(context, draft.tokens, shaped)
        if self.grammar is not None:
            shaped = shaped.masked_fill(~self.grammar.allowed(proposed.drafted), -torch.inf)
        pending = self._verifier.start(shaped, draft, self.settings.sampling, self._random, len(context))
        proposed.marks.append(self._timer.mark())
        return InFlightCycle(proposed, pending, logits, shaped)

    def _draft(self) -> tuple[int, Draft]:
        """Of so many tokens at most. The last token of the budget is the target's own."""
        settings, room = self.settings, self._clipper.room - 1
        k = min(settings.k, room)
        if (forced := self._forced(room)) is not None:
            return max(k, len(forced)), forced
        draft = (
            _propose(self._drafter, self._context, k, settings, self._random) if k else empty_draft(self._target.device)
        )
        draft = draft if self._takes_trees else draft.as_chain()
        return k, replace(draft, cut=True) if k < settings.k else draft

    @property
    def _takes_trees(self) -> bool:
        """Else a tree's first path is verified alone. Penalties and grammars look at a chain's tokens one after the other,
        and the block rule at all of them."""
        plain = self.process is None and self.grammar is None and type(self._verifier.rule) is TokenRule
        return plain and self._target.trees and self._verifier.trees

    def _forced(self, room: int) -> Draft | None:
        """Tokens that must come by the grammar, if any: free, and so proposed also where drafts do not pay and are off; not
        in plain decoding, nor where a plain pass is to be measured."""
        off = self._controls.auto is not None and self._controls.auto.off
        if self.grammar is None or not (self.settings.k or off):
            return None
        tokens = self.grammar.forced(room)
        # `cut`: of any length, so that nothing is recorded for it.
        return Draft(upload(torch.tensor(tokens), self._target.device), None, FORCED_BY, cut=True) if tokens else None

    def finish(self, in_flight: InFlightCycle) -> tuple[Cycle, FinishReason | None]:
        """Take the verdict: the text grows, both caches keep what is in it."""
        proposed, context, position = in_flight.proposed, self._context, len(self._context)
        draft, marks = proposed.draft, proposed.marks
        marks.append(self._timer.mark())  # the time before this mark is the consumer's: no phase counts it
        verdict = in_flight.pending()
        clipped = self._clipped(verdict)
        logprobs = self._logprobs(in_flight, verdict, clipped.emitted)  # now: the next pass may write over its logits
        context += clipped.emitted
        if verdict.path is not None:
            self._target.keep(verdict.path)
        self._target.rollback(to=len(context) - 1)
        if len(draft) and draft.drafter != FORCED_BY:
            self._drafter.observe(draft, verdict)
        marks.append(self._timer.mark())
        started, drafted, verified, resumed, done = marks
        phases = ((started, drafted), (drafted, verified), (resumed, done))
        seconds = [self._timer.seconds(*phase) for phase in phases]
        cycle = cycle_told(self._cycles_done, proposed.k, draft, verdict, clipped, seconds, position, logprobs)
        self._cycles_done += 1
        if not cycle.forced:  # how tokens fare that must come says nothing of drafts
            self._controls.observe(cycle, draft.parts)
        return cycle, clipped.reason

    def _clipped(self, verdict: Verdict) -> Clipped:
        """By what ends a run; among that is a grammar after which nothing may follow."""
        clipped = self._clipper.clip(verdict.tokens)
        if self.grammar is None:
            return clipped
        count = self.grammar.advance(clipped.emitted)
        return Clipped(clipped.emitted[:count], "stop") if self.grammar.finished else clipped

    def _logprobs(
        self, of: InFlightCycle, verdict: Verdict, emitted: Sequence[int]
    ) -> tuple[TokenLogprobs, ...] | None:
        sampling, logits, shaped = self.settings.sampling, of.logits, of.shaped
        if sampling.logprobs is None:
            return None
        if verdict.path is not None:
            rows = [0, *(place + 1 for place in verdict.path)]
            logits, shaped = logits[rows], shaped[rows]
        return logprobs_of(logits, shaped, sampling, emitted)

    def finished(self, reason: FinishReason, prefill: tuple[Mark, Mark]) -> Finished:
        """The last event; prefill: what `begin` returned."""
        emitted = len(self._context) - self._prompt_tokens
        peak = peak_bytes(self._target.device)
        recording_s = self._timer.paused(prefill[0], self._timer.mark())
        took = self._timer.seconds(*prefill)
        return Finished(reason, emitted, self._cycles_done, took, peak, recording_s, self._kept)


def _propose(drafter: Drafter, context: Sequence[int], k: int, settings: Settings, random: Randomness) -> Draft:
    draft = drafter.propose(context, k, settings.draft_sampling, random)
    if draft.parents is not None and (wrong := fault_of(draft.parents, len(draft), k)):
        raise GenerationFailed(f"the drafter {draft.drafter} proposed a tree {wrong}")
    if draft.parents is None and len(draft) > k:
        raise GenerationFailed(f"the drafter {draft.drafter} proposed {len(draft)} tokens where {k} were asked for")
    return draft


def _room(context: Sequence[int], stop: Stop, limit: int | None) -> int:
    if not context:
        raise UsageError("the prompt is empty", "give at least one token to continue from")
    if limit is not None and len(context) >= limit:
        raise UsageError(
            f"the prompt has {len(context)} tokens and the target's context ends at {limit}",
            "shorten the prompt, or choose a target with a longer context",
        )
    return stop.max_tokens if limit is None else min(stop.max_tokens, limit - len(context))


def _as_ours(error: Exception) -> SpecdecError:
    """Any exception as one of ours; memory that ran out has a type of its own."""
    if isinstance(error, SpecdecError):
        return error
    if ran_out(error):
        return OutOfMemory(
            f"out of memory while generating: {error}", "lower --max-tokens, or use a smaller dtype or model"
        )
    return GenerationFailed(f"{type(error).__name__}: {error}", "run again with --debug for the traceback")
