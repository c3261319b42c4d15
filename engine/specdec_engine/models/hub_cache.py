"""Models in the hub's cache on this machine, looked at without loading any. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from specdec_engine.record.files import read_json


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A causal language model with safetensors weights."""

    name: str
    """Hub id."""
    folder: Path
    size: int
    """Bytes of its weights."""
    model_type: str
    tokens: str | None
    """Digest of what each id means, where one file says so; alike for models that can draft for each other."""


@dataclass(frozen=True, slots=True)
class CachedHead:
    """A draft head, and whom its config says that it was made for."""

    name: str
    folder: Path


def cached_models() -> list[CachedModel]:
    """The newest revision of each, smallest first; nothing where there is no cache."""
    found = [model for name, folder in _cached() for model in looked_at(name, folder)]
    return sorted(found, key=lambda model: model.size)


def cached_heads(target: str) -> list[CachedHead]:
    """Heads that name this target as theirs (the speculators library's do), and an assistant that is called after it;
    whether they fit is for others to say."""
    found = list[CachedHead]()
    for name, folder in _cached():
        try:
            about = read_json(folder / "config.json").get("speculators_config")
            verifier = about.get("verifier") if isinstance(about, dict) else None
        except (OSError, ValueError):
            continue
        named = isinstance(verifier, dict) and str(verifier.get("name_or_path")).lower() == target.lower()
        if named or name.lower() == f"{target.lower()}-assistant":
            found.append(CachedHead(name, folder))
    return found


def _cached() -> list[tuple[str, Path]]:
    """Each model's name and its newest revision."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = [repo for repo in scan_cache_dir().repos if repo.repo_type == "model" and repo.revisions]
    except (CacheNotFound, OSError):
        return []
    newest = (max(repo.revisions, key=lambda revision: revision.last_modified) for repo in repos)
    return [(repo.repo_id, revision.snapshot_path) for repo, revision in zip(repos, newest, strict=True)]


def looked_at(name: str, folder: Path) -> list[CachedModel]:
    """The model in a folder, or nothing: one that is not whole or damaged, or generates no text."""
    try:
        config, weights = read_json(folder / "config.json"), list(folder.glob("*.safetensors"))
        architectures = config.get("architectures")
        if not weights or not isinstance(architectures, list) or not any("CausalLM" in str(a) for a in architectures):
            return []
        size = sum(file.stat().st_size for file in weights)
        return [CachedModel(name, folder, size, str(config.get("model_type")), _digest(folder))]
    except (OSError, ValueError):
        return []


def drafts_for(target: CachedModel, models: Sequence[CachedModel]) -> list[CachedModel]:
    """Those that speak the target's tokens and are at most half its size, smallest first."""
    return [m for m in models if target.tokens is not None and m.tokens == target.tokens and 2 * m.size <= target.size]


def _digest(folder: Path) -> str | None:
    try:
        model = read_json(folder / "tokenizer.json").get("model")
    except (OSError, ValueError):
        return None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    return None if vocab is None else hashlib.sha256(json.dumps(vocab, sort_keys=True).encode()).hexdigest()
