"""The knobs that may turn between two cycles.

`decode` reads them at the top of each cycle and turns a difference into a `SettingChanged` event, so a consumer that
holds the same object (a screen, a controller) steers the run by assignment.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

from specdec_engine.adaptive.controller import AutoK
from specdec_engine.core.cycle_types import Part, Sampling
from specdec_engine.errors import UsageError
from specdec_engine.record.events import Cycle, SettingChanged


@dataclass(frozen=True, slots=True)
class Settings:
    """One cycle's settings."""

    k: int
    sampling: Sampling
    draft_temperature: float | None = None
    """The draft's own, where it is drawn at all; None for the target's."""
    adaptive: bool = False
    """Whether a controller chooses k."""

    def __post_init__(self) -> None:
        if self.draft_temperature is not None:
            replace(self.sampling, temperature=self.draft_temperature)  # raises UsageError for one out of range
        if self.k < 0:
            raise UsageError(f"k {self.k} is negative", "0 is plain decoding, 3 is usual")

    @property
    def draft_sampling(self) -> Sampling:
        """How a draft draws: at its own temperature, sharper or flatter than the target's; q is then that distribution."""
        if self.draft_temperature is None or self.sampling.greedy:
            return self.sampling
        return replace(self.sampling, temperature=self.draft_temperature)

    def named(self) -> dict[str, float]:
        """Name to value, as in events and JSON."""
        sampling = self.sampling
        return {
            "k": self.k,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "draft_temperature": self.draft_sampling.temperature,
            "adaptive": self.adaptive,
        }


class Controls:
    """Mutable holder of the `Settings` in force from the next cycle to be started (on a GPU one is always in
    flight); `reason` says why they were last changed."""

    def __init__(
        self, k: int | AutoK = 3, sampling: Sampling | None = None, draft_temperature: float | None = None
    ) -> None:
        self.auto = k if isinstance(k, AutoK) else None
        first = k.k if isinstance(k, AutoK) else k
        self.settings = Settings(first, sampling or Sampling(), draft_temperature, self.auto is not None)
        self.reason = ""
        self._lock = threading.Lock()  # a screen changes settings while the engine's thread does

    def change(self, *, k: int | None = None, sampling: Sampling | None = None, reason: str = "") -> None:
        """Take effect from the next cycle. Raises UsageError for a value out of range, and changes nothing then."""
        with self._lock:
            now = self.settings
            self.settings = replace(
                now, k=now.k if k is None else k, sampling=now.sampling if sampling is None else sampling
            )
            self.reason = reason

    def adapt(self, auto: AutoK | None, reason: str = "") -> None:
        """From the next cycle on let this controller choose k; None to hold it where it is."""
        with self._lock:
            self.auto = auto
            k = self.settings.k if auto is None else auto.k
            self.settings = replace(self.settings, k=k, adaptive=auto is not None)
            self.reason = reason

    def observe(self, cycle: Cycle, parts: Sequence[Part] = ()) -> None:
        """A cycle ended: with a controller, k may change from the next one. parts: see `Draft`."""
        if self.auto is not None and (reason := self.auto.observe(cycle, parts)):
            self.change(k=self.auto.k, reason=reason)


def changes(cycle: int, old: Settings, new: Settings, reason: str) -> list[SettingChanged]:
    """One event for each setting that differs."""
    if old is new:  # as between most cycles
        return []
    before, after = old.named(), new.named()
    return [
        SettingChanged(cycle, name, before[name], after[name], reason) for name in after if before[name] != after[name]
    ]
