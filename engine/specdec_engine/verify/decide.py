"""From distributions to the evidence of a verdict: `decide` for a device, `decide_on_host` where looking costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from specdec_engine.core.cycle_types import Draft
from specdec_engine.verify.evidence import RESIDUAL_TOP, Evidence, RawInputs, RawRows, Uniforms, pack
from specdec_engine.verify.rules import AcceptanceRule, VerifyInputs, apply_rule
from specdec_engine.verify.sampling import draw, draw_on_host, top, top_of_row

Filtered = Callable[[Tensor], Tensor]
"""[m, n] ids -> [m, n]: what the target gives them after temperature and filters, at the first m places."""


def decide(
    rule: AcceptanceRule, p: Tensor, tokens: Tensor, probs: Tensor | None, u: Tensor, raw: RawInputs | None = None
) -> Tensor:
    """The evidence as one row on the device (`evidence.unpack` reads it).

    p [k + 1, V], tokens [k], probs [k, V], u [2, k + 1] (`Uniforms.tensor`). Pure tensor work on fixed shapes, so that it can
    be recorded.
    """
    k = tokens.shape[0]
    if k == 0:
        return pack([torch.zeros_like(u[1, 0]), draw(p[0], u[1, 0]), p[0].sum().to(u)], [], [], [])
    inputs = VerifyInputs.of(p, tokens, probs)
    overlap = inputs.p_drafted if probs is None else torch.minimum(p[:k], probs).sum(-1)
    accepted = rule.count(u[0, :k] < rule.thresholds(inputs))
    final = rule.final(inputs, accepted)
    token = draw(final, u[1].index_select(0, accepted[None])[0])
    masses, ids = top(final[None], min(RESIDUAL_TOP, final.shape[0]))
    return pack(
        [accepted, token, final.sum().to(u)],
        [tokens, inputs.p_drafted, inputs.q_drafted, overlap],
        [ids, masses],
        [] if raw is None else _raw_parts(raw, tokens, lambda at: p[:k].gather(1, at), probs),
    )


@torch.inference_mode()
def decide_on_host(
    rule: AcceptanceRule, p: Tensor, tokens: Tensor, probs: Tensor | None, numbers: Uniforms
) -> Evidence:
    """The same, of which only what the verdict needs is made. Raw distributions are added by `with_raw`."""
    k = tokens.shape[0]
    if k == 0:
        return Evidence(0, draw_on_host(p[0], numbers.final[0]), float(p[0].sum()))
    inputs = VerifyInputs.of(p, tokens, probs)
    overlap = inputs.p_drafted if probs is None else torch.minimum(p[:k], probs).sum(-1)
    outcome = apply_rule(rule, inputs, numbers.accept)
    n, final, residual = outcome.accepted, outcome.final, list[tuple[int, float]]()
    if n < k:
        residual = top_of_row(final, min(RESIDUAL_TOP, p.shape[1]))
    return Evidence(
        accepted=n,
        token=draw_on_host(final, numbers.final[n]),
        mass=float(final.sum()),
        drafted=tokens.tolist(),
        p=inputs.p_drafted.tolist(),
        q=inputs.q_drafted.tolist(),
        overlap=overlap.tolist(),
        residual=residual,
    )


@torch.inference_mode()
def with_raw(evidence: Evidence, raw: RawInputs, draft: Draft, filtered: Filtered) -> Evidence:
    """With the raw distributions of the tokens that were tested."""
    tested = len(draft) if draft.parents is not None else min(evidence.accepted + 1, len(draft))
    q, probs = (None if rows is None else rows[:tested] for rows in (raw.q, draft.probs))
    parts = _raw_parts(RawInputs(raw.logits, q, raw.ids), draft.tokens[:tested], filtered, probs)
    sides = [RawRows(*(part.tolist() for part in parts[4 * i : 4 * i + 4])) for i in range(raw.sides)]
    return replace(evidence, raw=sides)


def _raw_parts(raw: RawInputs, tokens: Tensor, filtered: Filtered, probs: Tensor | None) -> list[Tensor]:
    """By side for each of m drafted tokens: its raw probability [m], the largest ones, where they are, and what became of
    these, [m, n] each."""
    drafted, n = tokens[:, None], raw.entries
    rows = raw.logits[: tokens.shape[0]].float().softmax(-1)
    largest, at = top(rows, n)
    parts = [rows.gather(1, drafted)[:, 0], largest, at, filtered(at)]
    if raw.q is not None:
        largest, at = top(raw.q, n)
        if raw.ids is None:
            mass = raw.q.gather(1, drafted)[:, 0]
        else:
            at, mass = raw.ids[at], (raw.q * (raw.ids == drafted)).sum(-1)
        parts += [mass, largest, at, (at == drafted).float() if probs is None else probs.gather(1, at)]
    return parts
