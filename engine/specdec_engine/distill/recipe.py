"""What to make, and of how much."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from specdec_engine.distill.students import Kind, Size
from specdec_engine.distill.work import Work
from specdec_engine.errors import UsageError


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to make. Raises UsageError where it contradicts itself."""

    out: Path
    kind: Kind = "head"
    size: Size = "medium"
    minutes: float | None = None
    tokens: int | None = None
    """Of text, where no minutes are given."""
    data: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        budget = self.tokens if self.minutes is None else self.minutes
        if budget is None or (self.minutes is not None and self.tokens is not None):
            raise UsageError("give either --minutes or --tokens, not both", "for example --minutes 60")
        if budget <= 0:
            raise UsageError(f"a budget of {budget:g} is nothing", "for example --minutes 60")
        if self.out.exists() and not self.out.is_dir():
            raise UsageError(f"{self.out} is a file", "--out names a folder")

    @property
    def work(self) -> Work:
        return Work(self.out / "work")


def taps(layers: int) -> tuple[int, ...]:
    """Layers whose output a head reads: a quarter, a half and three quarters up (EAGLE-3 takes three, too)."""
    return tuple(sorted({layers // 4, layers // 2, min(layers - layers // 4, layers - 1)}))
