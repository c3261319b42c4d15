"""The work folder of a distillation: how far earlier runs came, so that the same command goes on.

`text/` is the target's text with its features, `runs/` that of recorded runs, `state-KIND-SIZE/` a training,
`ids-N.safetensors` a reduced vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from specdec_engine.errors import UsageError, reason
from specdec_engine.models.draft_folder import fingerprint
from specdec_engine.record.files import parse_record, replace_file, typed

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Spent:
    """On earlier runs."""

    writing_s: float = 0.0
    training_s: float = 0.0
    """Of the training at hand."""
    step: int = 0


@dataclass(frozen=True, slots=True)
class Trained:
    """How far the training beside it is."""

    step: int
    training_s: float
    best: float = 0.0
    """Tokens a cycle that the best draft so far is expected to emit."""
    exported: bool = False
    """True where that one was written: it may be the one gone on from."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose text a folder holds."""

    name: str
    tokenizer: str
    """Fingerprint."""


@dataclass(frozen=True, slots=True)
class Work:
    """The folder."""

    folder: Path

    @property
    def text(self) -> Path:
        """What the target wrote."""
        return self.folder / "text"

    @property
    def runs(self) -> Path:
        """What a user's runs left."""
        return self.folder / "runs"

    def claim(self, name: str, tokenizer: Any) -> None:
        """Begin in it for this target. Raises UsageError where it belongs to another."""
        owner, ours = self.folder / "target.json", Owner(name, fingerprint(tokenizer))
        if owner.is_file():
            theirs = read(owner, Owner)
            if theirs != ours:
                raise UsageError(f"{self.folder} holds text of {theirs.name}, not of {name}", "choose another --out")
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write(owner, ours)

    def spent(self) -> Spent:
        file = self.folder / "progress.json"
        return read(file, Spent) if file.is_file() else Spent()

    def record(self, spent: Spent) -> None:
        write(self.folder / "progress.json", spent)


def read(file: Path, kind: type[T]) -> T:
    """Read what `write` wrote. Raises UsageError for what is damaged."""
    try:
        return typed(parse_record(file.read_bytes()), kind)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{file} cannot be read: {reason(error)}", "choose another --out, or remove that folder to begin anew"
        ) from error


def write(file: Path, content: Any) -> None:
    """Whole or not at all: a dataclass, as JSON."""
    replace_file(file, json.dumps(asdict(content)).encode())
