"""Training a draft on what its target wrote, and how well it would draft, measured on text it has not seen.

The loss is the cross-entropy with the target's whole distribution over the draft's ids, which the kept features give for
one matrix product; a draft that knows how sure its target is knows when to stop. Prompts are the target's own writing, too,
and learnt from like answers; the estimate counts answers only.

Shapes: B sequences of T slots, V' draft ids; slot t predicts token t + 2 from what is known when token t + 1 is the newest.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from specdec_engine.distill.shards import Shard

BATCH_TOKENS = 4096
"""Padded tokens of a step: enough for full matrix units, few enough for many steps."""
MOST_STEPS = 8
"""How deep a draft is unrolled at most."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences padded to one length n = T + 1."""

    tokens: Tensor
    """[B, n] int64"""
    features: Tensor
    """[B, n, F, d]"""
    counts: Tensor
    """[B, T] bool: slots whose prediction counts."""


class Student(Protocol):
    """**Protocol:** a draft in training."""

    module: Any
    """A torch module."""

    def states(self, batch: Batch, steps: int) -> list[Tensor]:
        """`steps` times [B, T, d'], or fewer where further steps would be the same: row t of step s belongs to a draft that
        began s slots before."""
        ...

    def logits(self, states: Tensor) -> Tensor:
        """[n, d'] -> [n, V']"""
        ...


@dataclass(frozen=True, slots=True)
class Teacher:
    """The target's output matrix, cut to the draft's ids."""

    rows: Tensor
    """[V', d]"""
    ids: Tensor
    """[V]: target id -> draft id, -1 where it has none."""

    def probs(self, batch: Batch) -> Tensor:
        """[n, V'], what the target says at the slots that count, among the draft's ids."""
        last = batch.features[:, 1:, -1][batch.counts].to(self.rows)
        probs: Tensor = (last @ self.rows.T).float().softmax(-1)
        return probs

    def said(self, batch: Batch) -> Tensor:
        """[B, T], the draft's id of the token that the target chose; -1 where the draft lacks it, or none followed."""
        following = torch.cat([batch.tokens[:, 2:], torch.zeros_like(batch.tokens[:, :1])], 1)
        return self.ids[following]


def loss_of(student: Student, teacher: Teacher, batch: Batch, steps: int) -> Tensor:
    """Mean cross-entropy over the slots that count, over the steps of a draft."""
    probs, total = teacher.probs(batch), torch.zeros(())
    states = student.states(batch, steps)
    for state in states:
        logits = student.logits(state[batch.counts]).float()
        total = total + (logits.logsumexp(-1) - (probs * logits).sum(-1)).mean()
    return total / len(states)


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
        states, said, probs = student.states(batch, steps), teacher.said(batch), teacher.probs(batch)
        alive = batch.counts.clone()  # row t: the draft that begins at slot t
        seen += len(probs)
        for s in range(steps):
            logits = student.logits(states[min(s, len(states) - 1)][batch.counts]).float()
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
