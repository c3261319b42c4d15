"""The prompts of texts that begin together: each is read once, by as few passes as can be.

On a CPU a prompt has the bits that it has alone, whichever way it came into a cache. A recorded runtime pads passes, so that
rounding may differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch

from specdec_engine.core.transfer import upload
from specdec_engine.runtime import PREFILL_CHUNK
from specdec_engine.runtime.lean import LeanRuntime, read_together
from specdec_engine.runtime.target import ModelTarget, lean_runtimes

_Prompts = Mapping[tuple[int, ...], ModelTarget]


def read_prompts(asked: Sequence[tuple[ModelTarget, Sequence[int]]], lanes: Sequence[ModelTarget]) -> None:
    """Cache the tokens of each, and no others. lanes: all targets, of which some may have read such a prompt before."""
    fresh = dict[tuple[int, ...], ModelTarget]()
    for target, tokens in asked:
        if tokens and not any(lane.holds(tokens) for lane in lanes):
            fresh.setdefault(tuple(tokens), target)
    _read(fresh)
    for target, tokens in asked:
        if target.holds(tokens):
            target.rollback(len(tokens))
        elif (source := next((lane for lane in lanes if lane.holds(tokens)), None)) is not None:
            target.take(source, tokens)
        else:
            target.rollback(0)
            target.prefill(tokens)


def _read(prompts: _Prompts) -> None:
    """Read short prompts by one pass over several, where they share a decoder of ours: what a pass takes whatever its rows is
    as much as 30 to 100 of them take (`native.TILED`), or 230 (`torch_forms.WIDE`)."""
    for group in _passes(prompts):
        for target in group.values():
            target.rollback(0)
        if len(group) == 1:
            for tokens, target in group.items():
                target.prefill(tokens)
            continue
        runtimes = [cast(LeanRuntime, target.runtime) for target in group.values()]
        read_together(
            runtimes,
            [upload(torch.tensor(tokens, dtype=torch.long), target.device) for tokens, target in group.items()],
        )
        for tokens, target in group.items():
            target.has_read(tokens)


def _passes(prompts: _Prompts) -> Iterator[_Prompts]:
    """Those that are read in one pass: as many as are no more than a chunk of a long prompt."""
    shares = len(lean_runtimes(list(prompts.values()))) == len(prompts)
    group, rows = dict[tuple[int, ...], ModelTarget](), 0
    for tokens, target in prompts.items():
        if group and (not shares or rows + len(tokens) > PREFILL_CHUNK):
            yield group
            group, rows = {}, 0
        group[tokens] = target
        rows += len(tokens)
    if group:
        yield group
