"""The knobs that may turn between two cycles.

`decode` reads them at the top of each cycle and turns a difference into a `SettingChanged` event, so a consumer that
holds the same object (a screen, a controller) steers the run by assignment.
"""

from __future__ import annotations

from dataclasses import dataclass

from specdec_engine.errors import UsageError
from specdec_engine.events import SettingChanged
from specdec_engine.types import Sampling


@dataclass(frozen=True, slots=True)
class Settings:
    """One cycle's settings."""

    k: int
    sampling: Sampling

    def __post_init__(self) -> None:
        if self.k < 0:
            raise UsageError(f"k {self.k} is negative", "0 is plain decoding, 3 is usual")

    def named(self) -> dict[str, float]:
        """Name to value, as in events and JSON."""
        sampling = self.sampling
        return {
            "k": self.k,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
        }


class Controls:
    """Mutable holder of the `Settings` in force from the next cycle on; `reason` says why they were last changed."""

    def __init__(self, k: int = 3, sampling: Sampling | None = None) -> None:
        self.settings = Settings(k, sampling or Sampling())
        self.reason = ""

    def change(self, *, k: int | None = None, sampling: Sampling | None = None, reason: str = "") -> None:
        """Take effect from the next cycle. Raises UsageError for a value out of range, and changes nothing then."""
        self.settings = Settings(
            self.settings.k if k is None else k, self.settings.sampling if sampling is None else sampling
        )
        self.reason = reason


def changes(cycle: int, old: Settings, new: Settings, reason: str) -> list[SettingChanged]:
    """One event for each setting that differs."""
    before, after = old.named(), new.named()
    return [
        SettingChanged(cycle, name, before[name], after[name], reason) for name in after if before[name] != after[name]
    ]
