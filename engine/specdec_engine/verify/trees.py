"""The token rule on a tree: each node's children are tested in order against what is left of p there.

At a node with the target's row p and children c_1, … c_m, of which c_j was drawn from q_j (all mass on c_j, where it was not
drawn): accept c_j with chance min(1, p_j(c_j) / q_j(c_j)), p_1 = p; after a rejection p_{j+1} = max(0, p_j - q_j), normalised
(recursive rejection; Miao et al. 2024, arXiv:2305.09781; Yang et al. 2024, arXiv:2402.14160). Where none is left to test the
cycle's last token is drawn from what is left. Each step is the rule for one drafted token, so that the text has the target's
distribution whatever the tree, if its shape and each q depend on the context and on tokens already in the tree alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdec_engine.core.cycle_types import Draft
from specdec_engine.core.trees import children
from specdec_engine.verify.evidence import RESIDUAL_TOP, Evidence, Uniforms
from specdec_engine.verify.rules import residual
from specdec_engine.verify.sampling import draw_on_host, top_of_row


@dataclass(frozen=True, slots=True)
class Tested:
    """A token that was held against the target."""

    place: int
    p: float
    """What was left of the target's probability, and how the token had been drawn."""
    q: float
    overlap: float
    """Σ min(p, q) of the two distributions."""


@dataclass(frozen=True, slots=True)
class Way:
    """The way through a tree."""

    path: tuple[int, ...]
    """Places of the accepted tokens, from the root on."""
    tests: tuple[Tested, ...]
    final: Tensor
    """[V]: what the cycle's last token is drawn from."""
    at_leaf: bool
    """Nothing followed the last accepted token."""


def walk(p: Tensor, tokens: Sequence[int], probs: Tensor | None, parents: Sequence[int], u: Sequence[float]) -> Way:
    """Test a tree of n tokens. p [n + 1, V]: the target after the newest token and after each drafted one; probs [n, V]: what
    each was drawn from, None where none was; u [n]: a uniform number each."""
    following, at, path, tests = children(parents), -1, list[int](), list[Tested]()
    while True:
        left, accepted = p[at + 1], None
        for place in following[at]:
            q = _one_hot(left, tokens[place]) if probs is None else probs[place].to(left)
            test = Tested(
                place, float(left[tokens[place]]), float(q[tokens[place]]), float(torch.minimum(left, q).sum())
            )
            tests.append(test)
            if test.q > 0 and u[place] < test.p / test.q:
                accepted = place
                break
            left = residual(left, q)
        if accepted is None:
            return Way(tuple(path), tuple(tests), left, not following[at])
        at = accepted
        path.append(at)


def _one_hot(like: Tensor, token: int) -> Tensor:
    row = torch.zeros_like(like)
    row[token] = 1.0
    return row


def decide_on_tree(p: Tensor, draft: Draft, numbers: Uniforms) -> Evidence:
    """The evidence of a tree's verdict; p as for `walk`."""
    assert draft.parents is not None
    tokens = draft.tokens.tolist()
    found = walk(p, tokens, draft.probs, draft.parents, numbers.accept)
    rows = p[[parent + 1 for parent in draft.parents]]
    drafted = draft.tokens[:, None]
    masses_p = rows.gather(1, drafted)[:, 0].tolist()
    q = [1.0] * len(tokens) if draft.probs is None else draft.probs.gather(1, drafted)[:, 0].tolist()
    overlap = masses_p if draft.probs is None else torch.minimum(rows, draft.probs.to(rows)).sum(-1).tolist()
    evidence = Evidence(
        accepted=len(found.path),
        token=draw_on_host(found.final, numbers.final[len(found.path)]),
        mass=float(found.final.sum()),
        drafted=tokens,
        p=masses_p,
        q=q,
        overlap=list(overlap),
        residual=() if found.at_leaf else top_of_row(found.final, min(RESIDUAL_TOP, len(found.final))),
    )
    return _with_tests(evidence, found.path, found.tests, draft.parents)


def decide_greedily_on_tree(best: Sequence[int], draft: Draft) -> Evidence:
    """The same at temperature 0, without a softmax: best [n + 1] is where each row's mass is, and no token was drawn."""
    assert draft.parents is not None
    tokens, following, at, path, tests = draft.tokens.tolist(), children(draft.parents), -1, list[int](), list[Tested]()
    while True:
        accepted = None
        for place in following[at]:
            right = float(tokens[place] == best[at + 1])
            tests.append(Tested(place, right, 1.0, right))
            if right:
                accepted = place
                break
        if accepted is None:
            break
        at = accepted
        path.append(at)
    p = [float(token == best[parent + 1]) for token, parent in zip(tokens, draft.parents, strict=True)]
    left = [(best[at + 1], 1.0)] if following[at] else []
    evidence = Evidence(len(path), best[at + 1], 1.0, tokens, p, [1.0] * len(tokens), p, left)
    return _with_tests(evidence, path, tests, draft.parents)


def _with_tests(evidence: Evidence, path: Sequence[int], tests: Sequence[Tested], parents: Sequence[int]) -> Evidence:
    """A sibling's p is what was left of it when it was tested."""
    p, q, overlap = list(evidence.p), list(evidence.q), list(evidence.overlap)
    for test in tests:
        p[test.place], q[test.place], overlap[test.place] = test.p, test.q, test.overlap
    tested = tuple(test.place for test in tests)
    return replace(evidence, p=p, q=q, overlap=overlap, parents=tuple(parents), path=tuple(path), tested=tested)
