"""A draft of a head, each of whose steps is one call of our own kernels: its pass, its choice, and what the next one reads.

By operations the Python of a step takes as long as its work: after a pass has filled the caches each costs 5 to 10 µs. So the
place for what a step reads and says is made once, and a draft only says where its own tensors lie.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec_engine.runtime import DraftTokens, StopDrafting
from specdec_engine.runtime.likely import Likely
from specdec_engine.runtime.native import Stack
from specdec_engine.runtime.native_records import Beginning, Drafting, Following, Matrix, PassFields


@dataclass(frozen=True, slots=True)
class Read:
    """The n slots that a draft begins with, as its first step reads them."""

    features: Tensor
    """[n, parts, size] float32"""
    tokens: Tensor
    """[n]"""
    text: PassFields
    """The slots' fields."""
    cache: Tensor
    more: Tensor | None
    """[m, hidden]: output rows besides the head's own."""
    ids: Tensor
    """[V' + m]: the target's id of each column."""


class HeadSteps:
    """The steps of one draft after the other."""

    def __init__(
        self,
        stack: Stack,
        own: Matrix,
        norm: Tensor,
        before: Beginning,
        embedding: Matrix,
        slots: int,
        columns: int,
        *,
        normed: bool,
    ) -> None:
        """own, norm: the output matrix, and what comes before it; before: without what depends on a draft; embedding: of the
        target's ids; slots, columns: room for so many; normed: see `HeadForm.output_normed`."""
        self.slots, self.columns = slots, columns
        self._kernels, self._kept = stack.kernels, (stack, before, norm, embedding)
        hidden = len(norm)
        self._x, self._embedded = torch.empty(slots, hidden), torch.empty(slots, hidden)
        before.embedded = self._embedded.data_ptr()
        rest = Matrix(16, 0, 0, columns - own.N, hidden, None, None, None)
        self._after = Following(slots, norm, (own, rest), 1)
        self._own = own.N
        self._fields = Drafting(layers=stack.layers, many=len(stack.layers), normed=normed, before=before)
        self._fields.after, self._fields.x = self._after.fields, self._x.data_ptr()
        self._fields.embedding = ctypes.pointer(embedding)

    def drawn(self, read: Read, k: int, u: Tensor, temperature: float, stop: StopDrafting | None) -> DraftTokens:
        """Draft at most k tokens, until `stop` ends it; u [k]: uniform numbers, which draw them at a temperature above 0."""
        more = (
            None if read.more is None else read.more.bfloat16().contiguous()
        )  # lives as long as the steps that read it
        self._begin(read, more)
        columns, fields = len(read.ids), self._fields
        rows = torch.empty(k, columns) if temperature > 0 else None
        numbers = [0.0] * k if rows is None else u.tolist()
        tokens, likeliest = list[int](), list[tuple[Likely, Likely]]()
        for i, number in enumerate(numbers):
            row = None if rows is None else rows.data_ptr() + rows.element_size() * columns * i
            self._kernels.draft_token(fields, temperature, number, row)
            tokens.append(fields.token)
            if rows is None:
                first, second = zip(fields.places, fields.shares, strict=True)
                likeliest.append((Likely(*first), Likely(*second)))
            if stop is not None and stop(fields.shares[0]):
                break
        drawn = None if rows is None else rows[: len(tokens)]
        return DraftTokens(torch.tensor(tokens), drawn, None, likeliest=tuple(likeliest))

    def _begin(self, read: Read, more: Tensor | None) -> None:
        n, fields = len(read.tokens), self._fields
        columns = self._own + (0 if more is None else len(more))
        assert n == len(read.features) <= self.slots
        assert len(read.ids) == columns <= self.columns
        assert read.tokens.dtype == read.ids.dtype == torch.long
        assert read.features.dtype == torch.float32
        assert all(t.is_contiguous() for t in (read.tokens, read.ids, read.features, read.cache))
        if more is not None:
            fields.after.matrices[1].N, fields.after.matrices[1].words = len(more), more.data_ptr()
        fields.after.many = 1 if more is None else 2
        fields.before.features, fields.before.parts, fields.before.size = (
            read.features.data_ptr(),
            *read.features.shape[1:],
        )
        fields.text, fields.kept, fields.tiles = read.text, read.cache.data_ptr(), self._kernels.reads_tiled(n)
        fields.tokens, fields.ids = read.tokens.data_ptr(), read.ids.data_ptr()
