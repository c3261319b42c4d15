"""What drawing takes from an engine that runs on the same cores, and how often to draw so that it takes little."""

from __future__ import annotations

from dataclasses import dataclass, field

SHARE = 0.02
"""Of one core, at most, while an engine runs at full speed. On 2 cores it costs the engine twice that: a thread that makes
way for a screen is waited for by the other."""
LONGEST_S = 1.0
"""But a screen is at most so old, however long one takes to draw."""
_WINDOW_S = 5.0


@dataclass(slots=True)
class DrawThrottle:
    """Decides when the next screen may be drawn. `now` is wall time, `used` the drawing thread's CPU time, in seconds."""

    drawn_at: float = 0.0
    used_before: float = 0.0
    """When the last screen was begun."""
    marks: list[tuple[float, float]] = field(default_factory=list)
    """(now, used) over the last seconds."""

    def may_draw(self, now: float, used: float) -> bool:
        """Whether what the last screen took has been made up for by waiting."""
        waited = now - self.drawn_at
        return waited >= LONGEST_S or used - self.used_before <= SHARE * waited

    def drawing(self, now: float, used: float) -> None:
        """A screen is begun."""
        self.drawn_at, self.used_before = now, used
        self.marks = [*(m for m in self.marks if now - m[0] <= _WINDOW_S), (now, used)]

    @property
    def share(self) -> float | None:
        """Of one core, over the last seconds."""
        if len(self.marks) < 2 or (elapsed := self.marks[-1][0] - self.marks[0][0]) <= 0:
            return None
        return (self.marks[-1][1] - self.marks[0][1]) / elapsed
