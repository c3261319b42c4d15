"""The `Drafter` protocol: what proposes tokens, and what it owes the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from specdec_engine.adaptive.limits import DraftLimits
from specdec_engine.constrain.matching import Matching
from specdec_engine.core.cycle_types import Draft, Sampling, Verdict
from specdec_engine.core.randomness import Randomness
from specdec_engine.errors import UsageError
from specdec_engine.models.translation import Translation
from specdec_engine.runtime import Runtime
from specdec_engine.runtime.linear import Quantize


class Drafter(Protocol):
    """**Protocol:** proposes tokens for the target to verify.

    The contract, checked for every drafter in tests/contracts:

    - `propose` returns 0 to k tokens, each a valid id of the target, on the target's device; or a token tree of depth k at
      most, whose `parents` say what follows what (`core.trees`): a sibling's row is then what it was drawn from given that it
      is none of those before it;
    - if it draws tokens, `probs[i]` is the exact distribution of token i over the target's vocabulary, and the uniform
      numbers come from `random` under the purpose "draft"; otherwise `probs` is None;
    - a draft depends on nothing that an earlier run drew: a run with the same seed would be tested with the very numbers
      that made its draft, and that would bias the output;
    - it may stop early because of what it knows *before* drawing a token, or after including one; it never drops a drawn
      token because of its value, which would bias the output;
    - it may ask `setup.draft_limits` how far to go, and need not: the loop's k is the most in any case;
    - `observe` follows each `propose` that gave tokens and tells what became of them; own state is rolled back there.
      It is not called in every cycle: the context is the truth, and the drafter catches up with it.
    """

    name: str

    def begin(self, prompt: Sequence[int]) -> None:
        """Forget what earlier runs said; a run with this prompt follows. What was read of the same first tokens may be
        kept; of an empty prompt nothing is."""
        ...

    def propose(self, context: Sequence[int], k: int, sampling: Sampling, random: Randomness) -> Draft:
        """0 to k tokens that may follow `context`, or a tree of that depth; k is at least 1."""
        ...

    def observe(self, draft: Draft, verdict: Verdict) -> None: ...


@runtime_checkable
class AcceptanceAlong(Protocol):
    """**Protocol:** a drafter that can tell its acceptance probabilities along a given text, without drafting. Of other
    drafters `propose` is called at each place instead, which says the same where drafts are not drawn."""

    def acceptance_along(
        self, context: Sequence[int], p: Sequence[float], k: int, sampling: Sampling
    ) -> list[list[float]]:
        """For each of the last len(p) tokens of `context`, which the target has read but for the very last: row i, column j
        is the probability that token j of a draft that begins before token i is accepted, if all before it were; p: the
        target's probabilities of these tokens. A row ends with the text, and where next to no draft gets that far; it is
        empty where none is proposed. `sampling` is the draft's."""
        ...


@runtime_checkable
class Repeatable(Protocol):
    """**Protocol:** a drafter that can be had several times, for several texts at once."""

    def another(self, target: Runtime) -> Drafter:
        """The same, for another text; target: the runtime on which that text is read."""
        ...


@runtime_checkable
class Branching(Protocol):
    """**Protocol:** a drafter that proposes token trees."""

    def branch(self, allowed: bool) -> None:
        """Told before a run's first draft: whether trees are verified in it, or chains alone."""
        ...


def another(drafter: Drafter, target: Runtime) -> Drafter:
    """Raises UsageError for a drafter that there is only once."""
    if not isinstance(drafter, Repeatable):
        raise UsageError(
            f"the draft {drafter.name} drafts for one text at a time", "choose another draft, or --batch 1"
        )
    return drafter.another(target)


@runtime_checkable
class Guesser(Protocol):
    """**Protocol:** a lookup that can draft for a draft model, too."""

    def begin(self, prompt: Sequence[int]) -> None: ...

    def guess(self, context: Sequence[int], said: Sequence[int], k: int) -> list[int]:
        """Expect at most k tokens after the context and what a draft has said after it; the latter is not remembered."""
        ...


@dataclass(frozen=True, slots=True)
class LoadedDraft:
    """A draft model."""

    runtime: Runtime
    ids: Tensor | None = None
    """[V']: the target's id of each draft id, for a reduced vocabulary."""
    translation: Translation | None = None
    """Between the tokenizers, where the draft's ids mean other tokens than the target's."""
    mask: int | None = None
    """The token that masks places, of a model that fills them in (PARD)."""


@dataclass(slots=True)
class RunGrammar:
    """What the run's text must follow: drafts on the host may look."""

    matching: Matching | None = None


@dataclass(frozen=True, slots=True)
class DraftSetup:
    """What a drafter may know about the target it drafts for, when it is built."""

    name: str
    """The target's."""
    tokenizer: Any
    vocab: int
    """Size of the target's logits: V."""
    device: torch.device
    load_draft: Callable[[str], LoadedDraft]
    """Loads a causal LM by name (hub id, folder, .gguf), checked against the target's tokenizer."""
    target: Callable[[], Runtime]
    """The target's own runtime, for drafters that use it; its weights are read at the first call."""
    output_rows: Callable[[Tensor], Tensor]
    """[n] ids -> [n, hidden]: those rows of the target's output matrix."""
    draft_quantize: Quantize = "auto"
    draft_limits: DraftLimits = field(default_factory=DraftLimits)
    """Asked by drafters that can stop early."""
    grammar: RunGrammar = field(default_factory=RunGrammar)
    """Looked at by drafters whose proposals follow it where that costs next to nothing; none has to."""
    find: Callable[[str], Path] = Path
    """The files of a draft by its name (hub id, folder, .gguf), fetched if need be."""
    checkpoint: Path | None = None
    """The target's files: a folder, or a GGUF."""
    models: dict[str, ModelInfo] = field(default_factory=dict)
    """Filled while drafters are built: each model in use, by name."""
    notes: list[str] = field(default_factory=list)
    """Filled while drafters are built: what a user should know, in sentences."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model in use, as environments and `-v` describe it."""

    name: str
    model_type: str
    parameters: int
    vocab: int
    context: int | None
    runtime: str
    dtype: str
    weights: str
    weight_bytes: int = 0
    """Bytes of its own weights in memory."""
    token_bytes: int | None = None
    """Bytes of its cache for each token; None where that is not known."""
    revision: str | None = None
    by_text: bool = False
    """A draft with another tokenizer than the target's, whose text is proposed in the target's tokens."""


def empty_draft(device: torch.device, drafter: str = "none") -> Draft:
    """The empty draft."""
    return Draft(torch.empty(0, dtype=torch.long, device=device), None, drafter)
