"""Where the prompt comes from: stdin, then a file, then the argument, joined by newlines."""

from __future__ import annotations

import os
import select
import stat
import sys
from pathlib import Path

from specdec_cli import output
from specdec_cli.startup import served
from specdec_engine.errors import UsageError
from specdec_engine.record.files import RECODE, decode

EXAMPLES = """for example:
  specdec generate "Explain how a lighthouse works."
  specdec generate -f question.txt
  git diff | specdec generate "Write a commit message for this change."
  specdec generate --help"""


def read_prompt(argument: str | None, file: Path | None) -> str:
    """The whole prompt. Raises UsageError if there is none, or if it cannot be read as UTF-8."""
    parts = []
    if argument == "-" or stdin_is_piped():
        parts.append(_decoded(_read_stdin(), "stdin"))
    if file is not None:
        parts.append(_decoded(_read_file(file), str(file)))
    if argument is not None and argument != "-":
        parts.append(_decoded(os.fsencode(argument), "the prompt"))
    prompt = "\n".join(part for part in parts if part.strip())
    if not prompt:
        raise UsageError("the prompt is empty" if parts else "there is no prompt", EXAMPLES)
    return prompt


def stdin_is_piped() -> bool:
    """A pipe, a file or a socket; not a terminal, not /dev/null, and not a browser's keys."""
    if served():
        return False
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):  # closed, or replaced by something without a descriptor
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def _read_stdin() -> bytes:
    waiting = not select.select([sys.stdin], [], [], 1.0)[0]
    if waiting:
        output.note("reading the prompt from stdin until it ends (Ctrl-D; or give `< /dev/null`)")
    return sys.stdin.buffer.read()


def _read_file(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"the prompt file {file} cannot be read: {error.strerror}", "check the path") from error


def _decoded(data: bytes, name: str) -> str:
    try:
        return decode(data)
    except ValueError as error:
        raise UsageError(f"{name} cannot be read: {error}", RECODE) from error
