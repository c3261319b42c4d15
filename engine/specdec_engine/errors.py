"""What can go wrong, as a tree. Each error says what, with which value; `hint` says what to do next.

    SpecdecError
    ├── UsageError          a value that cannot be used; nothing was run
    ├── ModelUnavailable    a model that cannot be had: unknown, not cached, gated, damaged, unsafe format
    ├── ServerUnavailable   a server that cannot be had: not there, another one, without the key, not ready
    ├── PairIncompatible    two models, or a model and speculation, that do not fit together
    ├── OutOfMemory         weights, caches or buffers larger than what is free
    ├── GenerationFailed    the run broke: logits that are not numbers, a drafter that breaks its contract
    ├── CheckFailed         what was measured contradicts itself: a bug
    └── TraceError          a trace that cannot be written or read

Exit codes are the command line's contract and live there. Programming mistakes raise `ValueError`.
"""

from __future__ import annotations

from collections.abc import Iterator


class SpecdecError(Exception):
    """Base of all errors a user can meet; catch it to catch them all."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def reason(error: Exception) -> str:
    """What the system or a parser says, without the number and the path that an OSError repeats."""
    return str(getattr(error, "strerror", None) or error)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it came of, newest first."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def first_line(error: BaseException) -> str:
    """Shorten what another library says, which may take a page for it, to one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if isinstance(error, KeyError):
        return f"there is no {lines[0]}"
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


class UsageError(SpecdecError):
    """A value that cannot be used: a negative temperature, an empty prompt, a prompt longer than the context."""


class ModelUnavailable(SpecdecError):
    """A model that cannot be had: unknown, offline and not cached, gated, damaged, or pickled."""


class ServerUnavailable(SpecdecError):
    """A server that cannot be had: nothing answers, it is none that is known, or it wants a key."""


class PairIncompatible(SpecdecError):
    """Two models whose tokenizers differ, or a model whose cache cannot be rolled back."""


class OutOfMemory(SpecdecError):
    """More memory needed than is free, found out before loading or while running."""


class GenerationFailed(SpecdecError):
    """The run broke after it had started; what was emitted until then is valid."""


class CheckFailed(SpecdecError):
    """Counters that contradict each other: no figure made of them is worth anything."""


class TraceError(SpecdecError):
    """A trace that cannot be written (path, disk) or read (not ours, damaged, another schema)."""
