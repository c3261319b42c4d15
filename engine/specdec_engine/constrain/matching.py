"""Where a text stands in its grammar: which tokens may follow it, and what must.

A grammar makes the target another one, which says only what is allowed: p is masked and normalised at each place, before
temperature and filters. So every rule stays lossless, for any draft; what a draft says outside the grammar has p = 0. It is
not the target conditioned on its whole text being allowed, which no decoder from left to right draws from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec_engine.constrain.wanted import Grammar, in_a_line
from specdec_engine.core.transfer import upload
from specdec_engine.errors import GenerationFailed, UsageError, first_line

MOST_FORCED = 7
"""Tokens that are proposed at once: a pass of eight rows, as far as `-k auto` goes as well."""


class Matching:
    """A run's text in its grammar, without end tokens: those the matcher counts at some times and not at others."""

    def __init__(
        self, grammar: Grammar, tokenizer: Any, vocab: int, ends: frozenset[int], device: torch.device
    ) -> None:
        """vocab: size of the logits; ends: tokens that end a text. Raises UsageError for a tokenizer or a grammar that cannot
        be followed."""
        from llguidance import LLMatcher

        self.grammar, self._vocab, self._ends, self._device = grammar, vocab, ends, device
        self._matcher = LLMatcher(
            _vocabulary(tokenizer, vocab, tuple(sorted(e for e in ends if e < vocab))), grammar.compiled
        )
        self._check(UsageError, "mend it, or say it another way")
        if self._matcher.is_stopped():
            raise UsageError(
                f"the {grammar.word} has no text that ends", "does it refer to itself, and to nothing else?"
            )
        self.finished = False
        """Whether nothing may follow."""

    def forced(self, most: int) -> list[int]:
        """The tokens that must come next, in the tokenizer's own way of writing them; at most so many."""
        most = min(most, MOST_FORCED)
        return [] if self.finished or most < 1 else list(self._matcher.compute_ff_tokens())[:most]

    def allowed(self, drafted: Sequence[int]) -> Tensor:
        """[k + 1, V] bool, after the text and after each of k drafted tokens. Rows after one that may not come are all true:
        the rule does not reach them. Raises GenerationFailed where nothing may come."""
        rows = np.full((len(drafted) + 1, -(-self._vocab // 32) * 4), 0xFF, dtype=np.uint8)
        consumed = 0
        for i in range(len(drafted) + 1):
            self._matcher.unsafe_compute_mask_ptr(rows[i].ctypes.data, rows.shape[1])
            if i < len(drafted) and (drafted[i] in self._ends or not self._matcher.try_consume_tokens([drafted[i]])):
                break
            consumed += i < len(drafted)
        if consumed:
            self._matcher.rollback(consumed)
        self._check(GenerationFailed, "the grammar may be too complex")
        bits = np.unpackbits(rows, axis=1, bitorder="little")[:, : self._vocab]
        if not bits[0].any():  # in a later row it matters only if the rule gets there, which then says so
            raise GenerationFailed("the grammar allows no token of the target here", "say it in other characters")
        return upload(torch.from_numpy(bits.astype(bool)), self._device)

    @contextmanager
    def ahead(self) -> Iterator[Walk]:
        """For a draft that looks at the grammar while it is made; afterwards the text is where it was."""
        walk = Walk(self._matcher, self._vocab, self._ends)
        try:
            yield walk
        finally:
            if walk.consumed:
                self._matcher.rollback(walk.consumed)

    def advance(self, emitted: Sequence[int]) -> int:
        """Take these tokens into the text; how many of them there are until nothing may follow. Raises GenerationFailed for
        one that may not come."""
        for count, token in enumerate(emitted, 1):
            if token in self._ends:
                return count
            if not self._matcher.try_consume_tokens([token]):
                self._check(GenerationFailed, "the grammar may be too complex")
                raise GenerationFailed(f"token {token} is not in the grammar", "this is a bug in specdec")
            if self._matcher.is_stopped():
                self.finished = True
                return count
        return len(emitted)

    def _check(self, kind: type[UsageError | GenerationFailed], hint: str) -> None:
        if self._matcher.is_error():
            raise kind(f"the grammar cannot be followed: {in_a_line(self._matcher.get_error())}", hint)


class Walk:
    """Ahead of the text, token by token."""

    def __init__(self, matcher: Any, vocab: int, ends: frozenset[int]) -> None:
        self._matcher, self._ends, self._vocab = matcher, ends, vocab
        self._inside = True
        self.consumed = 0

    def allowed(self) -> Tensor | None:
        """[V] bool; None once a token was taken that may not come, or that ends the text."""
        if not self._inside:
            return None
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._vocab].astype(bool))

    def take(self, token: int) -> None:
        if self._inside and token not in self._ends and self._matcher.try_consume_tokens([token]):
            self.consumed += 1
        else:
            self._inside = False


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Any, vocab: int, ends: tuple[int, ...]) -> Any:
    """llguidance's own tokenizer: 0.4 s for 49,152 tokens, so it is kept. Raises UsageError for one that it cannot read."""
    from llguidance.hf import from_tokenizer

    if not ends:
        raise UsageError(
            "structured output needs a token that ends a text; this target has none", "choose another target"
        )
    try:
        return from_tokenizer(tokenizer, n_vocab=vocab, eos_token=list(ends))
    except Exception as error:  # its own are ValueErrors, and what a strange tokenizer.json does is not known
        said = f"structured output cannot read this tokenizer: {first_line(error)}"
        raise UsageError(said, "choose a target with a tokenizer.json") from error
