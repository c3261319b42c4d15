"""The work folder of a distillation: how far earlier runs came, so that the same command goes on.

`text/` is the target's text with its features, `state-KIND-SIZE/` a training, `ids-N.safetensors` a reduced vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specdec_engine.draft_files import fingerprint
from specdec_engine.errors import UsageError


@dataclass(frozen=True, slots=True)
class Spent:
    """On earlier runs."""

    writing_s: float = 0.0
    training_s: float = 0.0
    """Of the training at hand."""
    step: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """The folder."""

    folder: Path

    @property
    def text(self) -> Path:
        return self.folder / "text"

    def claim(self, name: str, tokenizer: Any) -> None:
        """Begin in it for this target. Raises UsageError where it belongs to another."""
        owner, ours = self.folder / "target.json", {"name": name, "tokenizer": fingerprint(tokenizer)}
        if owner.is_file():
            theirs = json.loads(owner.read_text("utf-8"))
            if theirs != ours:
                raise UsageError(f"{self.folder} holds text of {theirs['name']}, not of {name}", "choose another --out")
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(owner, ours)

    def spent(self) -> Spent:
        file = self.folder / "progress.json"
        return Spent(**json.loads(file.read_text("utf-8"))) if file.is_file() else Spent()

    def record(self, spent: Spent) -> None:
        _write(self.folder / "progress.json", asdict(spent))


def _write(file: Path, content: Any) -> None:
    """Atomically."""
    partial = file.with_suffix(".part")
    partial.write_text(json.dumps(content), "utf-8")
    partial.replace(file)
