"""What is in the hub's cache, without loading it."""

from __future__ import annotations

import json
from pathlib import Path

from specdec_engine.cached import CachedModel, drafts_for, looked_at


def folder(path: Path, vocab, size=100, architecture="LlamaForCausalLM") -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": [architecture], "model_type": "llama"}))
    (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    (path / "model.safetensors").write_bytes(bytes(size))
    return path


def test_a_model_is_described_by_its_files(tmp_path):
    [model] = looked_at("org/name", folder(tmp_path / "a", {"x": 0}, 1000))
    assert (model.name, model.size, model.model_type) == ("org/name", 1000, "llama")


def test_what_is_not_a_language_model_is_left_out(tmp_path):
    assert looked_at("org/vision", folder(tmp_path / "a", {}, architecture="ViTModel")) == []
    (tmp_path / "b").mkdir()
    assert looked_at("org/empty", tmp_path / "b") == []
    broken = folder(tmp_path / "c", {})
    (broken / "config.json").write_text("{")
    assert looked_at("org/broken", broken) == []


def test_a_draft_speaks_the_same_tokens_and_is_smaller(tmp_path):
    [large] = looked_at("large", folder(tmp_path / "l", {"x": 0, "y": 1}, 1000))
    [small] = looked_at("small", folder(tmp_path / "s", {"y": 1, "x": 0}, 300))
    [other] = looked_at("other", folder(tmp_path / "o", {"x": 1, "y": 0}, 300))
    [like] = looked_at("like", folder(tmp_path / "k", {"x": 0, "y": 1}, 900))
    assert drafts_for(large, [small, other, like, large]) == [small]
    assert (
        drafts_for(CachedModel("n", tmp_path, 9, "llama", None), [CachedModel("m", tmp_path, 1, "llama", None)]) == []
    )
