"""Training a draft on what its target wrote, and how well it would draft, measured on text it has not seen.

The loss is the cross-entropy with the target's whole distribution over the draft's ids, which the kept features give for one
matrix product: a draft that knows how sure its target is knows when to stop. Added to it is the chance that a token drawn
from q is rejected, 1 - Σ min(p, q) (DistillSpec's total variation, Zhou et al. 2024, arXiv:2310.08461). A later token of a
head's draft counts by the chance that those before it are accepted: after a rejection nobody looks at it. Prompts are the
target's own writing, too, and learnt from like answers; the estimate counts answers only.

Shapes: B sequences of T slots, V' draft ids; slot t predicts token t + 2 from what is known when token t + 1 is the newest.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from specdec_engine.distill.shards import Shard
from specdec_engine.runtime.shape import Scales

BATCH_TOKENS = 4096
"""Padded tokens of a step: enough for full matrix units, few enough for many steps."""
MOST_STEPS = 8
"""How deep a draft is unrolled at most."""
REJECTED, SHARPER = 8.0, 0.8
"""Weight of rejections in the loss, and the temperature at which they are counted, the higher of the two that answers are
written at. After 100 steps more of one and the same trained head, with weight 0, 2 and 8: overlap with its target on held-out
text 0.630, 0.635 and 0.641; on prompts by hand, at 0.8, 0.524, 0.527 and 0.530, agreement there 0.449, 0.451 and 0.453."""
LEAST = 0.05
"""The chance that a draft gets to a token, below which it does not learn from it."""
_SLICE = 128
"""Rows of logits at a time."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences padded to one length n = T + 1."""

    tokens: Tensor
    """[B, n] int64"""
    features: Tensor
    """[B, n, F, d]"""
    counts: Tensor
    """[B, T] bool: slots whose prediction counts."""


@dataclass(frozen=True, slots=True)
class Columns:
    """What a batch's drafts choose from: the draft's own ids, and those that each text has brought so far, as
    `drafters.context_ids` adds them."""

    rows: Tensor
    """[V' + m, d], of the target's output matrix."""
    ids: Tensor
    """[V]: target id -> column, -1 where there is none."""
    unseen: Tensor
    """[n, m] bool, at the slots that count: ids that the text has not had when the slot's draft begins."""

    def at(self, some: Tensor) -> Columns:
        """[n] bool: for some of the slots that count."""
        return replace(self, unseen=self.unseen[some])

    def masked(self, logits: Tensor) -> Tensor:
        """[n, V' + m] -> the same, with next to nothing for unseen ids."""
        m = self.unseen.shape[1]
        if m == 0:
            return logits
        return torch.cat([logits[:, :-m], logits[:, -m:].masked_fill(self.unseen, _NOTHING)], 1)


_NOTHING = -1e4
"""A logit; infinity times a probability of 0 would be no number."""
_BROUGHT = 256
"""Ids of a batch at most, besides the draft's own."""


class Student(Protocol):
    """**Protocol:** a draft in training."""

    module: Any
    """A torch module."""

    def states(self, batch: Batch, steps: int) -> list[Tensor]:
        """`steps` times [B, T, d'], or fewer where further steps would be the same: row t of step s belongs to a draft that
        began s slots before."""
        ...

    def logits(self, states: Tensor, columns: Columns) -> Tensor:
        """[n, d'] -> [n, V' + m]"""
        ...


@dataclass(frozen=True, slots=True)
class Teacher:
    """The target's output matrix, cut to the draft's ids."""

    rows: Tensor
    """[V', d]"""
    ids: Tensor
    """[V]: target id -> draft id, -1 where it has none."""
    every: Tensor | None = None
    """[V, d]: the whole matrix, of a draft that takes ids of the context besides its own."""
    scales: Scales = field(default_factory=Scales)
    """Factors and caps of the target's logits."""

    def columns(self, batch: Batch) -> Columns:
        """Of the ids that the batch's texts have and the draft lacks, the commonest."""
        brought = batch.tokens.new_empty(0)
        if self.every is not None:
            found, counts = torch.unique(batch.tokens[self.ids[batch.tokens] < 0], return_counts=True)
            brought = found[counts.topk(min(_BROUGHT, len(found))).indices]
        if self.every is None or not len(brought):
            return Columns(self.rows, self.ids, batch.counts.new_empty(int(batch.counts.sum()), 0))
        ids = self.ids.index_put((brought,), len(self.rows) + torch.arange(len(brought), device=brought.device))
        # Slot t's draft begins when token t + 1 is the newest.
        seen = (batch.tokens[:, :, None] == brought).int().cummax(1).values[:, 1:]
        return Columns(torch.cat([self.rows, self.every[brought]]), ids, seen[batch.counts] == 0)

    def logits(self, batch: Batch, columns: Columns) -> Tensor:
        """[n, V' + m], what the target says at the slots that count, of the draft's ids."""
        last = batch.features[:, 1:, -1][batch.counts].to(self.rows)
        return columns.masked(self.scales.of_logits(last @ columns.rows.T))

    def said(self, batch: Batch, columns: Columns) -> Tensor:
        """[B, T], the column of the token that the target chose; -1 where the draft lacks it, or none followed."""
        following = torch.cat([batch.tokens[:, 2:], torch.zeros_like(batch.tokens[:, :1])], 1)
        return columns.ids[following]


def loss_of(student: Student, teacher: Teacher, batch: Batch, steps: int) -> Tensor:
    """Mean over the slots that count and the steps of a draft, each by the chance that a draft gets so far: cross-entropy,
    and `REJECTED` times the chance of a rejection at temperature `SHARPER`."""
    columns = teacher.columns(batch)
    wanted, said = teacher.logits(batch, columns), teacher.said(batch, columns)[batch.counts]
    reached = batch.counts.float()  # [B, T]: of step s, by a draft that began s slots before
    total = weight = torch.zeros((), device=batch.tokens.device)
    for state in student.states(batch, steps):
        slots = batch.counts & (reached > LEAST)
        some, chances = slots[batch.counts], reached[slots]
        here = columns.at(some)
        logits = here.masked(student.logits(state[slots], here))
        loss, accepted = _Loss.apply(logits, wanted[some], said[some], chances)  # type: ignore[no-untyped-call]
        total, weight = total + loss, weight + chances.sum()
        reached = _shifted_on(torch.zeros_like(reached).masked_scatter(slots, chances * accepted))
    return total / weight.clamp_min(1.0)


def _shifted_on(rows: Tensor) -> Tensor:
    """[B, T], row t of which is row t - 1 of the given; 0 at first."""
    return torch.cat([torch.zeros_like(rows[:, :1]), rows[:, :-1]], 1)


class _Loss(torch.autograd.Function):
    """Logits [n, V'] of a draft and of its target, the columns [n] of what the target said, and weights [n] -> the weighted
    sum of their losses, whose gradient is worked out on the way; and [n], the chance that what it said is accepted.

    A slice of rows at a time, and not by autograd, which writes and reads seven tables of n x V' numbers: so a step takes on
    2 cores, rejections counted, what it took there with cross-entropy alone (1.0 s).
    """

    @staticmethod
    def forward(context: Any, logits: Tensor, wanted: Tensor, said: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        gradient, total = torch.empty_like(logits), torch.zeros((), device=logits.device)
        accepted = torch.empty_like(weights)
        for at in range(0, len(logits), _SLICE):
            rows = slice(at, at + _SLICE)
            found = _row_losses(logits[rows].float(), wanted[rows].float(), said[rows])
            total += (found.loss * weights[rows]).sum()
            gradient[rows] = found.gradient * weights[rows, None]
            accepted[rows] = found.accepted
        context.save_for_backward(gradient)
        context.mark_non_differentiable(accepted)
        return total, accepted

    @staticmethod
    @once_differentiable
    def backward(context: Any, outer: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = context.saved_tensors
        return gradient * outer.to(gradient), None, None, None


@dataclass(frozen=True, slots=True)
class _RowLosses:
    """The losses of some rows, and what comes with them."""

    loss: Tensor
    """[n]"""
    gradient: Tensor
    """[n, V'], by logit."""
    accepted: Tensor
    """[n]: the chance that what the target said was drafted and is accepted, given that it said it: min(1, q / p)."""


def _row_losses(logits: Tensor, wanted: Tensor, said: Tensor) -> _RowLosses:
    p, log_q = wanted.softmax(-1), logits.log_softmax(-1)
    sharp_p, sharp_q = (wanted / SHARPER).softmax(-1), (log_q / SHARPER).softmax(-1)
    # Accepted is Σ min(p, q), to which q adds only where it is below p.
    below = sharp_q * (sharp_q < sharp_p)
    loss = -(p * log_q).sum(-1) + REJECTED * (1 - torch.minimum(sharp_p, sharp_q).sum(-1))
    gradient = log_q.exp_() - p
    gradient += (REJECTED / SHARPER) * (sharp_q * below.sum(-1, keepdim=True) - below)
    drawn, right = (of.gather(1, said.clamp_min(0)[:, None])[:, 0] for of in (sharp_q, sharp_p))
    accepted = (drawn / right.clamp_min(1e-30)).clamp_max(1.0)
    return _RowLosses(loss, gradient, accepted.masked_fill(said < 0, 0.0))


@dataclass(frozen=True, slots=True)
class Estimate:
    """How a draft would do, from one pass over text that its target wrote: no generation (teacher forcing)."""

    agreement: tuple[float, ...]
    """By position in the draft: how often its likeliest token is the target's, given that all before were."""
    overlap: tuple[float, ...]
    """By position: Σ min(p, q) at temperature 1 along the target's own text."""

    def emitted(self, k: int) -> float:
        """Expected tokens a cycle at temperature 0."""
        return 1.0 + sum(math.prod(self.agreement[:i]) for i in range(1, k + 1))


@torch.no_grad()
def estimate(student: Student, teacher: Teacher, batches: Sequence[Batch], steps: int) -> Estimate:
    """Of a student over held-out batches."""
    hits, tried, overlap, seen = [0] * steps, [0] * steps, [0.0] * steps, 0
    for batch in batches:
        columns, states = teacher.columns(batch), student.states(batch, steps)
        said, probs = teacher.said(batch, columns), teacher.logits(batch, columns).float().softmax(-1)
        alive = batch.counts.clone()  # row t: the draft that begins at slot t
        seen += len(probs)
        for s in range(steps):
            logits = columns.masked(student.logits(states[min(s, len(states) - 1)][batch.counts], columns)).float()
            right = torch.zeros_like(alive)
            right[batch.counts] = logits.argmax(-1) == said[batch.counts]
            began = alive & _shifted(batch.counts, s + 1)  # s + 1: the target's own choice is the token after
            alive = began & _shifted(right, s)
            hits[s] += int(alive.sum())
            tried[s] += int(began.sum())
            overlap[s] += float(torch.minimum(probs, logits.softmax(-1)).sum())
    return Estimate(
        tuple(h / max(t, 1) for h, t in zip(hits, tried, strict=True)), tuple(o / max(seen, 1) for o in overlap)
    )


def _shifted(rows: Tensor, s: int) -> Tensor:
    """[B, T], row t of which is row t + s of the given; False past the end."""
    return rows if s == 0 else torch.cat([rows[:, s:], torch.zeros_like(rows[:, :s])], 1)


def batches(shards: Sequence[Shard], seed: int, tokens: int = BATCH_TOKENS, *, prompts: bool = True) -> Iterator[Batch]:
    """Once through all examples, of like length together, in random order. prompts: whether those count as well."""
    order = random.Random(seed)
    examples = [(shard, i) for shard in shards for i in range(len(shard.answers))]
    order.shuffle(examples)
    examples.sort(key=lambda e: int(e[0].starts[e[1] + 1] - e[0].starts[e[1]]) // 32)
    groups: list[list[tuple[Shard, int]]] = [[]]
    longest = 0
    for shard, i in examples:
        longest = max(longest, int(shard.starts[i + 1] - shard.starts[i]))
        if (len(groups[-1]) + 1) * longest > tokens:
            groups.append([])
            longest = int(shard.starts[i + 1] - shard.starts[i])
        groups[-1].append((shard, i))
    order.shuffle(groups)
    shared = {id(shard): shared_prefix(shard) for shard in shards}
    yield from (_batch(group, shared if prompts else None) for group in groups if group)


def shared_prefix(shard: Shard) -> int:
    """Tokens that all examples begin with: the chat template's."""
    examples = [shard.tokens[a:b] for a, b in zip(shard.starts[:-1].tolist(), shard.starts[1:].tolist(), strict=True)]
    n = min(len(tokens) for tokens in examples)
    same = (torch.stack([tokens[:n] for tokens in examples]) == examples[0][:n]).all(0)
    return int(same.long().cumprod(0).sum())


def _batch(examples: Sequence[tuple[Shard, int]], shared: Mapping[int, int] | None) -> Batch:
    """shared: where prompts begin, by shard; None if only answers count."""
    spans = [(int(s.starts[i]), int(s.starts[i + 1])) for s, i in examples]
    n = max(end - start for start, end in spans)
    features = examples[0][0].features
    tokens = torch.zeros(len(spans), n, dtype=torch.long)
    kept = torch.zeros(len(spans), n, *features.shape[1:], dtype=features.dtype)
    counts = torch.zeros(len(spans), n - 1, dtype=torch.bool)
    for row, ((shard, i), (start, end)) in enumerate(zip(examples, spans, strict=True)):
        tokens[row, : end - start] = shard.tokens[start:end]
        kept[row, : end - start] = shard.features[start:end]
        answer = int(shard.answers[i]) - start
        first = answer if shared is None else min(answer, shared[id(shard)])
        # A draft's later steps mean nothing in the first slots of a sequence.
        counts[row, max(first - 2, MOST_STEPS) : end - start - 1] = True
    return Batch(tokens, kept, counts)
