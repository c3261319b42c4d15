"""Exit codes: part of the command line's contract, so they live here and not beside the errors."""

from __future__ import annotations

from enum import IntEnum

from specdec_engine import errors


class ExitCode(IntEnum):
    OK = 0
    FAILED = 1
    """The run broke, or its trace could not be written."""
    USAGE = 2
    """A value that cannot be used; nothing was run."""
    MODEL = 3
    """A model, or a server, that cannot be had."""
    INCOMPATIBLE = 4
    """Two models, or a model and speculation, that do not fit together."""
    MEMORY = 5
    CHECK = 6
    """A threshold was not met, or greedy text was not the target's own."""
    INTERRUPTED = 130


_BY_ERROR: dict[type[errors.SpecdecError], ExitCode] = {
    errors.UsageError: ExitCode.USAGE,
    errors.ModelUnavailable: ExitCode.MODEL,
    errors.ServerUnavailable: ExitCode.MODEL,
    errors.PairIncompatible: ExitCode.INCOMPATIBLE,
    errors.OutOfMemory: ExitCode.MEMORY,
    errors.CheckFailed: ExitCode.CHECK,
}


def exit_code(error: errors.SpecdecError) -> ExitCode:
    return _BY_ERROR.get(type(error), ExitCode.FAILED)
