"""The records that the loop passes around.

Shapes: k drafted tokens, V the target's vocabulary (its logits' last dimension), batch always 1 and left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from specdec_engine.core.trees import first_path
from specdec_engine.errors import UsageError
from specdec_engine.record.events import Raw

if TYPE_CHECKING:
    from torch import Tensor


Coupling = Literal["independent", "gumbel"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How logits become a distribution: temperature, then top-k, top-p, min-p, in transformers' order.

    Temperature 0 is greedy: all mass on the largest logit. `top_k=0`, `top_p=1.0` and `min_p=0.0` are off.
    Raises UsageError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    coupling: Coupling = "independent"
    """How target and draft share random numbers; `gumbel`: see `verify/coupling.py`. Without effect when greedy."""
    raw: bool = False
    """Whether cycles tell too what p and q were before all this: a softmax over the vocabulary a row, and a search for its
    largest entries."""
    logprobs: int | None = None
    """Cycles tell how likely each emitted token was, and so many of the likeliest in its place; None: they do not."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature {self.temperature} is not 0 or more", "0 is greedy, 0.7 is usual, 1 is raw")
        if self.top_k < 0:
            raise UsageError(f"top-k {self.top_k} is negative", "0 turns it off, 40 is usual")
        if not 0.0 < self.top_p <= 1.0:
            raise UsageError(f"top-p {self.top_p} is not above 0 and at most 1", "1 turns it off, 0.9 is usual")
        if not 0.0 <= self.min_p <= 1.0:
            raise UsageError(f"min-p {self.min_p} is not between 0 and 1", "0 turns it off, 0.05 is usual")
        if self.logprobs is not None and self.logprobs < 0:
            raise UsageError(f"logprobs {self.logprobs} is negative", "0 tells of the emitted tokens alone")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def coupled(self) -> bool:
        return self.coupling == "gumbel" and not self.greedy

    @property
    def filters(self) -> tuple[int, float, float]:
        """All but the temperature."""
        return self.top_k, self.top_p, self.min_p

    @property
    def filtered(self) -> bool:
        """True where any filter leaves tokens out."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


@dataclass(frozen=True, slots=True)
class Sibling:
    """A drafter's second candidate for a token of its draft."""

    place: int
    """That token's in the draft, from 0 on."""
    token: int
    chance: float
    """The drafter's own probability of it."""


@dataclass(frozen=True, slots=True)
class Part:
    """One drafter's share of a token tree."""

    drafter: str
    tokens: tuple[int, ...]
    seconds: float
    """The host's clock tells how long making it took."""
    siblings: tuple[Sibling, ...] = ()
    """Second candidates beside its tokens, none of which is followed by others."""


@dataclass(frozen=True, slots=True)
class Draft:
    """What a drafter proposes: 0 to k tokens and, if it drew them, from what."""

    tokens: Tensor
    """[k] int64, on the target's device: it is read on the host only with the verdict, in one copy."""
    probs: Tensor | None
    """[k, V], the distribution each token was *actually drawn from*; None for a deterministic draft (q is 1)."""
    drafter: str
    """Which drafter; a cascade forwards the member's name."""
    raw: Tensor | None = None
    """[k, V'], the distributions before temperature and filters; None where they were not asked for, or there are none."""
    raw_ids: Tensor | None = None
    """[V']: the target's id of each column of `raw`; None where it is the column's number."""
    guessed: tuple[int, ...] = ()
    """The places of tokens that a lookup had expected before the draft model chose them."""
    cut: bool = False
    """Whether the run's end made it shorter: others of its length are not to be expected."""
    parents: tuple[int, ...] | None = None
    """The token that each follows in a tree, see `core.trees`; None for a chain."""
    parts: tuple[Part, ...] = ()
    """The share that each drafter had in a tree."""

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def as_chain(self) -> Draft:
        """Of a tree the first path alone; a chain as it is."""
        if self.parents is None:
            return self
        kept = first_path(self.parents)
        probs, raw = (None if rows is None else rows[kept] for rows in (self.probs, self.raw))
        return replace(self, tokens=self.tokens[kept], probs=probs, raw=raw, guessed=(), parents=None, parts=())


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rule decided about a draft, with the evidence, on the host."""

    drafted: tuple[int, ...]
    accepted: int
    token: int
    """The target's own token that ends the cycle."""
    origin: Literal["recovered", "bonus"]
    p: tuple[float | None, ...]
    q: tuple[float, ...]
    u: tuple[float | None, ...]
    overlap: tuple[float | None, ...]
    residual: tuple[tuple[int, float], ...]
    raw_p: Raw | None = None
    raw_q: Raw | None = None
    """Before temperature and filters; None unless asked for, or where a draft has no distribution."""
    parents: tuple[int, ...] | None = None
    path: tuple[int, ...] | None = None
    """Of a token tree: which of its tokens follows which, and the places of the accepted ones."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """The accepted + 1 tokens of the cycle, before stop clipping."""
        path = range(self.accepted) if self.path is None else self.path
        return (*(self.drafted[place] for place in path), self.token)
