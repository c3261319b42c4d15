"""What a run says about itself: six frozen records of ids and plain numbers.

No tensors, no text, no torch: the same records are iterated live, written to a trace and read back years later on a
machine without any model. Text is added at the edge (`text.py`); figures are derived in one place (`stats.py`).

Our own engine tells everything. A server that is watched from outside does not: what it leaves out is None, never 0.
The bounds of a type are held when a trace is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from msgspec import Meta

TRACE_SCHEMA = "specdec.trace/2"

End = Literal["recovered", "bonus", "plain", "stop", "length"]
FinishReason = Literal["stop", "length", "cancelled"]
Origin = Literal["accepted", "recovered", "bonus", "plain"]
"""Where an emitted token came from."""
Fate = Literal["accepted", "rejected", "untested"]
"""What became of a drafted token."""
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, Meta(ge=0, lt=2**63)]
Probability = Annotated[float, Meta(ge=-1e-3, le=1 + 1e-3)]
"""A sum of bfloat16 probabilities may pass 1 by as much."""
Logarithm = Annotated[float, Meta(le=1e-3)]
"""Of a probability; of a sum of float32 ones, which may pass 1."""
TokenId = Count | None
"""None where the observer does not tell it."""


def known_ids(tokens: Sequence[TokenId]) -> tuple[int, ...]:
    """The same ids. Raises ValueError if one of them is unknown."""
    known = tuple(token for token in tokens if token is not None)
    if len(known) < len(tokens):
        raise ValueError(f"{len(tokens) - len(known)} of {len(tokens)} token ids are not known")
    return known


@dataclass(frozen=True, slots=True)
class Started:
    """The first event: everything needed to read, or to repeat, the run."""

    prompt: tuple[TokenId, ...]
    """Token ids of the prompt, as the target saw them."""
    settings: Mapping[str, Any]
    """target, draft, rule, coupling, k, temperature, top_k, top_p, min_p, draft_temperature, adaptive, max_tokens, stop,
    generation_config, as in force in the first cycle."""
    seed: int | None
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Versions, device, dtype, runtime; empty when the caller gave none."""
    observer: str = "specdec"
    """The engine that ran it: ours, or the server that is watched."""
    schema: str = TRACE_SCHEMA
    kind: Literal["started"] = "started"


FORCED_BY = "grammar"
"""The drafter of tokens that must come by the run's grammar: free ones, which no figure of drafts counts."""


@dataclass(frozen=True, slots=True)
class Phases:
    """Seconds of a cycle by what it does."""

    draft_s: Seconds
    verify_s: Seconds
    other_s: Seconds

    @classmethod
    def of(cls, draft_s: float | None, verify_s: float | None, other_s: float | None) -> Phases | None:
        """None where one of them is not known."""
        if draft_s is None or verify_s is None or other_s is None:
            return None
        return cls(draft_s, verify_s, other_s)

    @property
    def total_s(self) -> float:
        return self.draft_s + self.verify_s + self.other_s


@dataclass(frozen=True, slots=True)
class Raw:
    """Distributions as they were before temperature and filters, one a drafted token; of one that was never tested nothing is
    told."""

    drafted: tuple[Probability | None, ...]
    """Probability of the drafted token."""
    likeliest: tuple[tuple[tuple[Count, Probability, Probability], ...], ...]
    """The largest entries: id, its probability before, and after."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """The natural logarithm of a token's probability; None where that is 0."""

    id: Count
    logprob: Logarithm | None
    """By the target's own logits."""
    warped_logprob: Logarithm | None
    """By the distribution that was drawn from: after penalties, a grammar, temperature and filters."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of an emitted token, and of the likeliest ones in its place."""

    token: Logprob
    likeliest: tuple[Logprob, ...]
    """Largest first, by the target's own logits."""


@dataclass(frozen=True, slots=True)
class Cycle:
    """One draft, one target pass, one verdict. Lists by position have one entry a drafted token."""

    index: Count
    drafter: str
    """Who proposed; `none` when nothing was drafted."""
    k: Count | None
    """Tokens asked of the drafter; it may propose fewer."""
    drafted: tuple[TokenId, ...]
    accepted: Count
    """Drafted tokens the rule kept, before stop clipping."""
    emitted: tuple[TokenId, ...]
    """accepted + 1 tokens, clipped by stop ids, stop strings and the token budget."""
    end: End
    """How the cycle ended; `stop` and `length` take precedence over where the last token came from."""
    p: tuple[Probability | None, ...]
    """Target's probability of each drafted token, after warping. Past the first rejection the prefix is a dead one. Of a
    tree's sibling that was tested, what those before it had left of that, normalised; so is `overlap`."""
    q: tuple[Probability | None, ...]
    """Probability with which the draft drew each token; 1 for a deterministic draft."""
    u: tuple[Probability | None, ...]
    """The uniform draw each tested token was held against; None where it was never tested."""
    overlap: tuple[Probability | None, ...]
    """Σ min(p, q) over the vocabulary: the acceptance probability before the token was drawn."""
    residual: tuple[tuple[Count, Probability], ...]
    """After a rejection, the largest entries (id, mass) of the distribution the recovered token was drawn from."""
    draft_s: Seconds | None
    verify_s: Seconds | None
    other_s: Seconds | None
    """Seconds of the three phases: all known, or none."""
    context: Count | None
    """Tokens in the context when the cycle began."""
    cycle_s: Seconds | None = None
    """Seconds of the whole cycle, where its phases are not known."""
    exactness: Literal["exact", "inferred"] = "exact"
    """Whether the cycle was seen as it was, or deduced from what came out of the engine."""
    parents: tuple[int, ...] | None = None
    """Of a token tree: each drafted token's parent, as its place in `drafted`; -1 is the token before the draft. None for
    a chain."""
    path: tuple[Count, ...] | None = None
    """Of a token tree: the places in `drafted` of the accepted tokens, from the root on."""
    guessed: tuple[Count, ...] = ()
    """The places in `drafted` of tokens that a lookup had expected of the draft model, which then chose them itself
    (`ngram+MODEL`): a pass of that model that was saved, each."""
    raw_p: Raw | None = None
    """The target's distributions before temperature and filters; None where the run was not asked for them."""
    raw_q: Raw | None = None
    """The draft's; None also for one that has none."""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One entry an emitted token; None where the run was not asked for them."""
    kind: Literal["cycle"] = "cycle"

    @property
    def phases(self) -> Phases | None:
        """None where they are not known."""
        return Phases.of(self.draft_s, self.verify_s, self.other_s)

    @property
    def seconds(self) -> float | None:
        """Of the whole cycle: its phases together, or what its observer says of it."""
        return self.cycle_s if (phases := self.phases) is None else phases.total_s

    @property
    def forced(self) -> bool:
        """Whether its drafted tokens had to come by the run's grammar."""
        return self.drafter == FORCED_BY

    def fate(self, place: int) -> Fate:
        """What became of the drafted token at this place. Of a tree's siblings those were rejected that were held against a
        number, or the first where no number is told."""
        if place in (range(self.accepted) if self.path is None else self.path):
            return "accepted"
        if place == self.rejected or (self.parents is not None and self.u[place] is not None):
            return "rejected"
        return "untested"

    @property
    def rejected(self) -> int | None:
        """Place of the drafted token that ended the cycle; None where all were accepted, or nothing was drafted."""
        if self.parents is None:
            return self.accepted if self.accepted < len(self.drafted) else None
        last = self.path[-1] if self.path else -1
        return self.parents.index(last) if last in self.parents else None

    @property
    def depth(self) -> int:
        """Levels of the draft: its length, or a tree's longest path."""
        if self.parents is None:
            return len(self.drafted)
        levels = list[int]()
        for parent in self.parents:
            levels.append(1 if parent < 0 else levels[parent] + 1)
        return max(levels, default=0)

    @property
    def tested(self) -> int:
        """Levels of the draft held against the target: those of the accepted tokens, and the one of the rejection."""
        if self.parents is None:
            return min(self.accepted + 1, len(self.drafted))
        return self.accepted + (self.rejected is not None)

    @property
    def tests(self) -> tuple[int, ...]:
        """The places in `drafted` of the tokens that were held against the target, in that order."""
        if self.parents is None:
            return tuple(range(self.tested))
        if any(number is not None for number in self.u):
            return tuple(place for place, number in enumerate(self.u) if number is not None)
        return (*(self.path or ()), *([] if self.rejected is None else [self.rejected]))

    @property
    def origins(self) -> tuple[Origin, ...]:
        """Where each emitted token came from."""
        final: Origin = "plain" if not self.drafted else "bonus" if self.rejected is None else "recovered"
        return tuple("accepted" if i < self.accepted else final for i in range(len(self.emitted)))


def known_phases(cycle: Cycle) -> Phases:
    """Of a cycle of our own engine. Raises ValueError for one whose observer does not tell them."""
    if (phases := cycle.phases) is None:
        raise ValueError(f"the phases of cycle {cycle.index} are not known")
    return phases


@dataclass(frozen=True, slots=True)
class SettingChanged:
    """A setting took a new value between two cycles."""

    cycle: Count
    """Index of the first cycle that runs with the new value."""
    name: str
    old: Any
    new: Any
    reason: str
    kind: Literal["setting_changed"] = "setting_changed"


@dataclass(frozen=True, slots=True)
class Counters:
    """Totals since the engine began, of one that reports no cycles."""

    at_s: Seconds
    """Seconds since the watching began."""
    cycles: Count
    """Those that verified a draft."""
    drafted: Count
    accepted: Count
    emitted: Count
    """Those of cycles without a draft, too."""
    accepted_at: tuple[Count, ...] = ()
    """Accepted tokens by their position in the draft; empty when it is not known."""
    tested: Count | None = None
    """Drafted tokens that were held against the target; None when it is not known."""
    kind: Literal["counters"] = "counters"


@dataclass(frozen=True, slots=True)
class Finished:
    """The run ended as it should: a stop, the budget, or a consumer that cancelled it, which then records this event
    itself."""

    reason: FinishReason
    emitted: Count
    cycles: Count
    prefill_s: Seconds | None
    """Seconds to read the prompt into both caches, before the first cycle, with the prompts that are read together with it;
    None when it is not known."""
    peak_bytes: Count | None = None
    """The most memory until then: allocated on the GPU, elsewhere the process's own; None when it is not known."""
    recording_s: Seconds | None = None
    """Seconds in which passes were recorded as graphs. They are in none of a cycle's phases, nor in `prefill_s`; None when
    it is not known."""
    cached_tokens: Count | None = None
    """Tokens of the prompt that the target had cached from before, and did not read again; None when it is not known."""
    kind: Literal["finished"] = "finished"


@dataclass(frozen=True, slots=True)
class Failed:
    """The run broke; all cycles before this are valid."""

    error: str
    """Name of the exception class."""
    message: str
    hint: str
    kind: Literal["failed"] = "failed"


Event = Started | Cycle | SettingChanged | Counters | Finished | Failed
