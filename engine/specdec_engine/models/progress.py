"""What loading reports while it takes its time: a stage, what it is about, and how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal["download", "convert", "compile", "load"]


@dataclass(frozen=True, slots=True)
class Progress:
    """One report. `done` and `total` are in `unit`; total is None where it is not known, done equals total at the end."""

    stage: Stage
    what: str
    done: int = 0
    total: int | None = None
    unit: Literal["bytes", "tokens"] = "bytes"

    @property
    def doing(self) -> str:
        """Such as `fetching org/model`."""
        return f"{_DOING[self.stage]} {self.what}"

    @property
    def amount(self) -> str:
        """Such as `12 of 98 MB`, `98 MB` at both ends, `120,000 of 262,144 tokens`; empty where the total is not known."""
        if not self.total:
            return ""
        scale, unit = (1e6, "MB") if self.unit == "bytes" else (1.0, self.unit)
        of = f"{self.done / scale:,.0f} of " if 0 < self.done < self.total else ""
        return f"{of}{self.total / scale:,.0f} {unit}"


_DOING: dict[Stage, str] = {"download": "fetching", "convert": "converting", "compile": "compiling", "load": "loading"}

Report = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Reports to nobody."""
