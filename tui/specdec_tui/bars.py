"""Bars and strips of blocks, drawn from zero. No braille: fonts of exported pictures lack it."""

from __future__ import annotations

from collections.abc import Sequence

_LEVELS = " ▁▂▃▄▅▆▇█"
_EIGHTHS = " ▏▎▍▌▋▊▉"


def bar(share: float, width: int) -> str:
    """A horizontal bar of a share of `width` cells, padded to it."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def changed(before: float, after: float, width: int) -> str:
    """One bar for two shares: what both hold, then what was gained (▒) or lost (░) on the way."""
    first, second = (round(max(0.0, min(1.0, share)) * width) for share in (before, after))
    beyond = "▒" * (second - first) if second > first else "░" * (first - second)
    return ("█" * min(first, second) + beyond).ljust(width)


def columns(values: Sequence[float | None], top: float, width: int, height: int = 1) -> list[str]:
    """The last `width` values as columns from zero to `top`, `height` rows, newest at the right; None is a gap."""
    shown = [None] * max(0, width - len(values)) + list(values[-width:])
    rows = []
    for row in range(height - 1, -1, -1):
        cells = []
        for value in shown:
            eighths = 0 if value is None or top <= 0 else round(min(1.0, value / top) * height * 8) - row * 8
            cells.append(_LEVELS[max(0, min(8, eighths))])
        rows.append("".join(cells))
    return rows


def dart(at: float, width: int) -> str:
    """A mark on a line from 0 to 1."""
    return " " * min(width - 1, max(0, int(at * width))) + "▲"


def stacked(shares: Sequence[float], width: int) -> list[int]:
    """Cells of each part of a whole; every part that is not nothing gets one, the largest gives way."""
    total = sum(shares)
    if not total or width < 1:
        return [0] * len(shares)
    cells = [max(1, round(share / total * width)) if share > 0 else 0 for share in shares]
    cells[cells.index(max(cells))] += width - sum(cells)
    return cells
