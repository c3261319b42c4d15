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
    size: Size | None = None
    """None: medium, or that of the draft to go on from."""
    minutes: float | None = None
    tokens: int | None = None
    """Of text, where no minutes are given."""
    data: Path | None = None
    documents: Path | None = None
    runs: tuple[Path, ...] = ()
    """Traces to learn from, in place of text that the target writes for it."""
    draft: str | None = None
    """A head to go on from."""
    seed: int = 0

    def __post_init__(self) -> None:
        budget = self.tokens if self.minutes is None else self.minutes
        if budget is None or (self.minutes is not None and self.tokens is not None):
            raise UsageError("give either --minutes or --tokens, not both", "for example --minutes 60")
        if budget <= 0:
            raise UsageError(f"a budget of {budget:g} is nothing", "for example --minutes 60")
        if self.out.exists() and not self.out.is_dir():
            raise UsageError(f"{self.out} is a file", "--out names a folder")
        self._check_text()
        if self.draft is not None and (self.kind == "model" or self.size is not None):
            given = "--kind model" if self.kind == "model" else f"--size {self.size}"
            raise UsageError(f"--draft goes on from a head as it is, and not with {given}", f"leave out {given}")

    def _check_text(self) -> None:
        if self.data is not None and self.documents is not None:
            raise UsageError("--data gives the prompts, and --documents what prompts are about", "give one of them")
        if not self.runs:
            return
        for option, given in (("--data", self.data), ("--documents", self.documents), ("--tokens", self.tokens)):
            if given is not None:
                raise UsageError(
                    f"--from learns from text that is there, and {option} is for text to be written",
                    f"leave out {option}",
                )

    @property
    def work(self) -> Work:
        return Work(self.out / "work")


def taps(layers: int) -> tuple[int, ...]:
    """Layers whose output a head reads: a quarter, a half and three quarters up (EAGLE-3 takes three, too)."""
    return tuple(sorted({layers // 4, layers // 2, min(layers - layers // 4, layers - 1)}))
