"""What loading reports while it takes its time: a stage, what it is about, and how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal["download", "convert", "load"]


@dataclass(frozen=True, slots=True)
class Progress:
    """One report. `done` and `total` are bytes; total is None where it is not known, done equals total at the end."""

    stage: Stage
    what: str
    done: int = 0
    total: int | None = None


Report = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Reports to nobody."""
