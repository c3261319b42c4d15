"""A cycle as one row: what was drafted, what became of it, the target's own token, and the time."""

from __future__ import annotations

from rich.cells import cell_len

from specdec_engine.record.events import Cycle, TokenId
from specdec_tui.frame import Step
from specdec_tui.panels import Line
from specdec_tui.pieces import Name, alone

MARKS = {"accepted": "✓", "rejected": "×", "untested": "·", "recovered": "↳", "bonus": "+", "plain": "", "drafted": "?"}
LEGEND = " ".join(
    f"{MARKS[kind]} {word}"
    for kind, word in zip(
        ("accepted", "rejected", "untested", "recovered", "bonus"),
        ("kept", "rejected", "untested", "recovered", "bonus"),
        strict=True,
    )
)
GUESSED, FORCED = "»", "≡"
"""Before a token that a lookup had expected of the draft model."""

_MARK_STYLES = {"rejected": "refused", "untested": "muted"}


def row(cycle: Cycle, name: Name, width: int, partial: Step | None = None) -> Line:
    """At most `width` cells; partial: how much of the cycle is shown, None for all of it."""
    number, k = f"{cycle.index + 1:>5} ", len(cycle.drafted)
    whole = partial is None or partial.final
    kept = f"{cycle.accepted}/{k} " if whole and k else "    "
    took = f"{1e3 * cycle.seconds:.1f}ms" if cycle.seconds else ""  # a server's first token has none of its own
    time = (took if whole else "").rjust(9)
    parts: Line = [(number, "muted"), (kept, "")]
    room = width - len(number) - len(kept) - len(time)
    for place, (token, kind) in enumerate(pieces(cycle, partial)):
        before = FORCED if cycle.forced and place < k else GUESSED if place in cycle.guessed else ""
        text = before + (alone(token, name).strip() or "␣")
        parents = cycle.parents or ()
        branch = "/ " if 0 < place < len(parents) and parents[place] != place - 1 else ""
        piece = f"{branch}{MARKS[kind]}{text} "
        if cell_len(piece) > room:
            parts.append(("…"[:room], "muted"))
            room -= len("…"[:room])
            break
        # The mark is not struck out with its token.
        parts += [(branch, "muted"), (MARKS[kind], _MARK_STYLES.get(kind, kind)), (text, kind), (" ", "")]
        room -= cell_len(piece)
    return [*parts, (" " * max(0, room), ""), (time, "muted")]


def pieces(cycle: Cycle, partial: Step | None) -> list[tuple[TokenId, str]]:
    """Tokens of a cycle that are shown, each with its kind: the drafted ones, then the target's own."""
    drafted = cycle.drafted if partial is None else cycle.drafted[: partial.drafted]
    tested = range(len(drafted)) if partial is None or partial.final else cycle.tests[: partial.tested]
    kinds = [cycle.fate(i) if i in tested else "drafted" for i in range(len(drafted))]
    found: list[tuple[TokenId, str]] = list(zip(drafted, kinds, strict=True))
    if (partial is None or partial.final) and len(cycle.emitted) > cycle.accepted:
        found.append((cycle.emitted[-1], cycle.origins[-1]))
    return found
