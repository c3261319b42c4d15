"""What a run says about itself: five frozen records of ids and plain numbers.

No tensors, no text, no torch: the same records are iterated live, written to a trace and read back years later on a
machine without any model. Text is added at the edge (`text.py`); figures are derived in one place (`stats.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

TRACE_SCHEMA = "specdec.trace/1"

End = Literal["recovered", "bonus", "plain", "stop", "length"]
FinishReason = Literal["stop", "length", "cancelled"]
Origin = Literal["accepted", "recovered", "bonus", "plain"]
"""Where an emitted token came from."""


@dataclass(frozen=True, slots=True)
class Started:
    """The first event: everything needed to read, or to repeat, the run."""

    prompt: tuple[int, ...]
    """Token ids of the prompt, as the target saw them."""
    settings: Mapping[str, Any]
    """target, draft, rule, coupling, k, temperature, top_k, top_p, min_p, draft_temperature, adaptive, max_tokens, stop
    as in force in the first cycle."""
    seed: int
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Versions, device, dtype, runtime; empty when the caller gave none."""
    schema: str = TRACE_SCHEMA
    kind: Literal["started"] = "started"


@dataclass(frozen=True, slots=True)
class Source:
    """Who observed a cycle, and whether it was seen (`exact`) or deduced from outside (`inferred`)."""

    engine: str = "specdec"
    exactness: Literal["exact", "inferred"] = "exact"


@dataclass(frozen=True, slots=True)
class Raw:
    """Distributions as they were before temperature and filters, one a drafted token; of one that was never tested nothing is
    told."""

    drafted: tuple[float | None, ...]
    """Probability of the drafted token."""
    likeliest: tuple[tuple[tuple[int, float, float], ...], ...]
    """The largest entries: id, its probability before, and after."""


@dataclass(frozen=True, slots=True)
class Cycle:
    """One draft, one target pass, one verdict. Lists by position have one entry a drafted token."""

    index: int
    drafter: str
    """Who proposed; `none` when nothing was drafted."""
    k: int
    """Tokens asked of the drafter; it may propose fewer."""
    drafted: tuple[int, ...]
    accepted: int
    """Drafted tokens the rule kept, before stop clipping."""
    emitted: tuple[int, ...]
    """accepted + 1 tokens, clipped by stop ids, stop strings and the token budget."""
    end: End
    """How the cycle ended; `stop` and `length` take precedence over where the last token came from."""
    p: tuple[float | None, ...]
    """Target's probability of each drafted token, after warping. Past the first rejection the prefix is a dead one."""
    q: tuple[float | None, ...]
    """Probability with which the draft drew each token; 1 for a deterministic draft."""
    u: tuple[float | None, ...]
    """The uniform draw each tested token was held against; None where it was never tested."""
    overlap: tuple[float | None, ...]
    """Σ min(p, q) over the vocabulary: the acceptance probability before the token was drawn."""
    residual: tuple[tuple[int, float], ...]
    """After a rejection, the largest entries (id, mass) of the distribution the recovered token was drawn from."""
    draft_s: float
    verify_s: float
    other_s: float
    context: int
    """Tokens in the context when the cycle began."""
    source: Source = Source()
    raw_p: Raw | None = None
    """The target's distributions before temperature and filters; None where the run was not asked for them."""
    raw_q: Raw | None = None
    """The draft's; None also for one that has none."""
    kind: Literal["cycle"] = "cycle"

    @property
    def tested(self) -> int:
        """Drafted tokens held against the target: the accepted ones and the first rejected."""
        return min(self.accepted + 1, len(self.drafted))

    @property
    def origins(self) -> tuple[Origin, ...]:
        """Where each emitted token came from."""
        final: Origin = "plain" if not self.drafted else "bonus" if self.accepted == len(self.drafted) else "recovered"
        return tuple("accepted" if i < self.accepted else final for i in range(len(self.emitted)))


@dataclass(frozen=True, slots=True)
class SettingChanged:
    """A setting took a new value between two cycles."""

    cycle: int
    """Index of the first cycle that runs with the new value."""
    name: str
    old: Any
    new: Any
    reason: str
    kind: Literal["setting_changed"] = "setting_changed"


@dataclass(frozen=True, slots=True)
class Finished:
    """The run ended as it should: a stop, the budget, or the consumer's wish, who then records `cancelled` itself."""

    reason: FinishReason
    emitted: int
    cycles: int
    prefill_s: float | None
    """Seconds to read the prompt into both caches, before the first cycle; None when it is not known."""
    peak_bytes: int | None = None
    """The most memory until then: allocated on the GPU, elsewhere the process's own; None when it is not known."""
    recording_s: float | None = None
    """Seconds in which passes were recorded as graphs. They are in none of a cycle's phases, nor in `prefill_s`; None when
    it is not known."""
    kind: Literal["finished"] = "finished"


@dataclass(frozen=True, slots=True)
class Failed:
    """The run broke; all cycles before this are valid."""

    error: str
    """Name of the exception class."""
    message: str
    hint: str
    kind: Literal["failed"] = "failed"


Event = Started | Cycle | SettingChanged | Finished | Failed
