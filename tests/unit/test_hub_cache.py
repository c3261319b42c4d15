"""What is in the hub's cache, without loading it."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import pytest

from specdec_engine.models import builtin
from specdec_engine.models.hub_cache import CachedModel, drafts_for, looked_at


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


def test_a_built_in_target_that_was_damaged_is_none(tmp_path, monkeypatch):
    """By the same number of bytes, too; what was found whole is not read again."""
    whole = b"weights"
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    monkeypatch.setattr(builtin, "SIZE", len(whole))
    monkeypatch.setattr(builtin, "SHA256", hashlib.sha256(whole).hexdigest())
    place = builtin._place()
    place.parent.mkdir(parents=True)
    assert not builtin.is_cached()
    place.write_bytes(whole)
    assert builtin.is_cached()
    assert builtin.is_cached()
    time.sleep(0.01)
    place.write_bytes(whole[::-1])
    assert not builtin.is_cached()


@pytest.mark.parametrize(
    "config", ["", "[", "[]", "5", '{"architectures": 5}', '{"architectures": {"a": 1}}', "[" * 99_999]
)
def test_a_cached_model_with_an_odd_config_is_left_out_and_breaks_nothing(config, tmp_path):
    made = folder(tmp_path / "a", {"x": 0})
    (made / "config.json").write_text(config)
    assert looked_at("org/odd", made) == []


@pytest.mark.parametrize("tokenizer", ["", "[]", '{"model": []}', '{"model": 5}', "{" * 9])
def test_an_odd_tokenizer_is_like_no_other(tokenizer, tmp_path):
    made = folder(tmp_path / "a", {"x": 0})
    (made / "tokenizer.json").write_text(tokenizer)
    [model] = looked_at("org/odd", made)
    assert model.tokens is None
