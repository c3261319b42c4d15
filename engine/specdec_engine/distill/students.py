"""The two kinds of draft in training: a head on the target's features, and a small language model of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from specdec_engine.distill.head import Head, HeadShape
from specdec_engine.distill.training import Batch, Columns, Teacher
from specdec_engine.models.draft_folder import DraftFolder
from specdec_engine.runtime.shape import Shape

Kind = Literal["head", "model"]
Size = Literal["small", "medium", "large"]


@dataclass(frozen=True, slots=True)
class Dimensions:
    """What a size means."""

    ids: int
    """Draft ids: the target's commonest tokens."""
    intermediate: float
    """Of a head's MLP, in hidden sizes of the target."""
    width: int
    """Hidden size of a draft model."""


SIZES: dict[Size, Dimensions] = {
    "small": Dimensions(ids=4096, intermediate=1.0, width=192),
    "medium": Dimensions(ids=6144, intermediate=1.75, width=256),
    "large": Dimensions(ids=8192, intermediate=2.5, width=384),
}


def shape_for(target: Shape, size: Dimensions, features: int) -> HeadShape:
    """Size a new head for a target of this shape."""
    return HeadShape(
        hidden=target.hidden,
        features=features,
        heads=target.heads,
        kv_heads=target.kv_heads,
        head_size=target.head_size,
        intermediate=-(-int(target.hidden * size.intermediate) // 64) * 64,
        eps=target.eps,
        theta=10_000.0,
        output_normed=True,
    )


def shape_of(draft: DraftFolder) -> HeadShape:
    """Of a head that was made before."""
    config = draft.config
    return HeadShape(
        hidden=config["hidden_size"],
        features=len(draft.layers.numbers) + 1,
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_size=config["head_dim"],
        intermediate=config["intermediate_size"],
        eps=config["rms_norm_eps"],
        theta=config["rope_theta"],
        output_normed=draft.form.output_normed,
    )


class HeadStudent:
    """A `Head`; embeddings and output rows are the target's, and stay as they are."""

    def __init__(self, shape: HeadShape, embedding: Tensor) -> None:
        self.module: Any = Head(shape)
        self._embedding = embedding

    def states(self, batch: Batch, steps: int) -> list[Tensor]:
        embedded = self._embedding[batch.tokens[:, 1:]].float()
        states: list[Tensor] = self.module(batch.features[:, :-1], embedded, steps)
        return states

    def logits(self, states: Tensor, columns: Columns) -> Tensor:
        return states.to(columns.rows) @ columns.rows.T


class ModelStudent:
    """A two-layer Llama over the draft's ids, tied; its embedding starts from the target's own, by SVD.

    Its last id stands for every token that it lacks.
    """

    def __init__(self, size: Dimensions, teacher: Teacher, limit: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        width, ids = size.width, teacher.rows.shape[0]
        config = LlamaConfig(
            vocab_size=ids,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=2,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            max_position_embeddings=limit,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.module: Any = LlamaForCausalLM(config)
        left, values, _ = torch.linalg.svd(teacher.rows.float(), full_matrices=False)
        start = (left * values)[:, :width]  # a target narrower than the draft fills but part of its columns
        self.module.get_input_embeddings().weight.data[:, : start.shape[1]] = (
            start / start.std() * config.initializer_range
        )
        self._own = torch.where(teacher.ids < 0, ids - 1, teacher.ids)

    def states(self, batch: Batch, steps: int) -> list[Tensor]:
        hidden: Tensor = self.module.model(input_ids=self._own[batch.tokens]).last_hidden_state
        return [hidden[:, 1:]]

    def logits(self, states: Tensor, columns: Columns) -> Tensor:
        logits: Tensor = self.module.lm_head(states)
        return logits
