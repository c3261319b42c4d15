"""Names of a vision-language checkpoint's tensors, as their owners wrote them over the years."""

from __future__ import annotations

import pytest

from specdec_engine.models.text_part import causal_name


@pytest.mark.parametrize(
    ("stored", "causal"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.text_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("visual.blocks.0.attn.proj.weight", ""),
        ("model.visual.blocks.0.attn.proj.weight", ""),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", ""),
        ("model.vision_tower.layers.0.mlp.fc1.weight", ""),
        ("multi_modal_projector.linear_1.weight", ""),
        ("model.connector.modality_projection.proj.weight", ""),
    ],
)
def test_text_tensors_get_the_causal_models_names(stored, causal):
    assert causal_name(stored) == causal
