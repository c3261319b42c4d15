"""A draft made for one target, as a folder on disk says it, whoever trained it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from specdec_engine.errors import PairIncompatible
from specdec_engine.runtime.head import HeadForm


@dataclass(frozen=True, slots=True)
class TargetLayers:
    """The target's layers whose output a head reads, in the numbering of those who made it."""

    numbers: tuple[int, ...]
    counted: Literal["output", "nvidia", "before", "guessed"] = "output"
    """A number is the index of the layer whose output is read (ours, and in NVIDIA's section); or counts the layers that were
    read before; or was left out, and what most heads of the kind read is taken."""

    def taps(self, layers: int) -> tuple[int, ...]:
        """As our `Taps` number them, for a target of so many layers. Raises PairIncompatible for layers that it lacks."""
        if self.counted == "guessed":  # EAGLE's own code: kept before layers 2, n // 2 and n - 3
            found: tuple[int, ...] = (1, layers // 2 - 1, layers - 4)
        else:
            # In NVIDIA's for gpt-oss the last number is n: what the last layer gives, which has the index n - 1.
            shift = int(self.counted == "before" or (self.counted == "nvidia" and layers in self.numbers))
            found = tuple(number - shift for number in self.numbers)
        if list(found) != sorted(set(found)) or any(not 0 <= tap < layers for tap in found):
            raise PairIncompatible(
                f"the draft reads the layers {', '.join(map(str, found))} of a target that has {layers}",
                "choose the target that it was made for",
            )
        return found


@dataclass(frozen=True, slots=True)
class DraftFolder:
    """A draft made for one target, without its weights."""

    path: Path
    kind: Literal["head", "model", "assistant"]
    config: dict[str, Any]
    layers: TargetLayers
    """Whose output a head reads."""
    tokenizer: str
    """`fingerprint` of the target's tokenizer; empty where its maker does not say."""
    ids: Tensor
    """[V'] the target's id of each of the draft's."""
    form: HeadForm = field(default_factory=HeadForm)
    """Of a head."""
    vocab: int = 0
    """Size of the target's logits; 0 where its maker does not say."""
    made_for: str = ""
    """The target's name, where its maker says it."""
    ours: bool = False
    """Whether `specdec distill` made it."""

    @property
    def name(self) -> str:
        """As a user calls it."""
        return "builtin" if self.path.name == "builtin_draft" else str(self.path)

    def taps_on(self, hidden: int, layers: int) -> tuple[int, ...]:
        """The layers that a head reads of a target so wide and deep. Raises PairIncompatible for one of another size."""
        self.check_width(hidden)
        return self.layers.taps(layers)

    def check_width(self, hidden: int) -> None:
        """Raises PairIncompatible for a target of another width than it reads, and KeyError or TypeError where its config
        does not say that."""
        own = self.config.get("backbone_hidden_size") or self.config.get("target_hidden_size")
        width = int(own or self.config["hidden_size"])
        if width != hidden:
            raise PairIncompatible(
                f"the draft {self.name} reads states of {width} numbers, and the target's have {hidden}",
                "choose the target that it was made for",
            )

    def check(self, tokenizer: Any, target: str, vocab: int) -> None:
        """Raises PairIncompatible for another target's tokenizer or logits: ids would mean other tokens, or none."""
        hint = f"it was made for {self.made_for}" if self.made_for else "choose the target that it was made for"
        if self.vocab not in (0, vocab):
            raise PairIncompatible(
                f"the draft {self.name} is for targets of {self.vocab:,} tokens, and {target} has {vocab:,}", hint
            )
        # A test compares the two that ship together: to read 49,152 tokens takes 0.1 s of a start.
        alike = self.name == target == "builtin" or not self.tokenizer or fingerprint(tokenizer) == self.tokenizer
        if int(self.ids.max()) >= vocab or not alike:
            raise PairIncompatible(f"the draft {self.name} was made for another tokenizer than that of {target}", hint)


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 of which token each id is."""
    tokens = sorted((i, token) for token, i in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()
