"""Which tokens a draft knows. The output matrix dominates a small draft, and most of a vocabulary is hardly ever said;
where the draft lacks a token q is 0, which costs an acceptance and nothing else."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdec_engine.distill.shards import Shard
from specdec_engine.errors import UsageError, first_line

_SAMPLED = 60_000
"""Positions looked at."""


def draft_ids(rows: Tensor, text: list[Shard], n: int, folder: Path) -> Tensor:
    """The n tokens that the target finds likeliest [n], rising; kept in this folder, for a training that goes on.

    rows: the target's output matrix [V, d]. By its whole distribution at some positions of its own text, which knows more
    than counts: tokens that the text happens not to have.
    """
    kept = folder / f"ids-{n}.safetensors"
    if kept.is_file():
        try:
            return load_file(kept)["ids"]
        except (OSError, KeyError, SafetensorError) as error:
            raise UsageError(
                f"{kept} cannot be read: {first_line(error)}", "remove that file: it is made anew"
            ) from error
    rows, generator = rows.to(torch.bfloat16), torch.Generator().manual_seed(0)
    total = torch.zeros(rows.shape[0], dtype=torch.float64)
    each = max(1, _SAMPLED // len(text))
    for shard in text:
        places = torch.randint(len(shard.tokens), (each,), generator=generator)
        for last in torch.split(shard.features[places, -1].to(torch.bfloat16), 256):
            total += (last @ rows.T).float().softmax(-1).sum(0)
        total += torch.bincount(shard.tokens.long(), minlength=rows.shape[0]) * (0.5 * each / len(shard.tokens))
    ids = total.topk(min(n, rows.shape[0])).indices.sort().values
    save_file({"ids": ids}, kept)
    return ids
