"""Conversations as files: a line that says whose, then a message a line. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from specdec_engine.errors import UsageError, reason
from specdec_engine.record.files import decode, parse_record, replace_file, typed

SCHEMA = "specdec.chat/1"
Role = Literal["system", "user", "assistant"]
_HINT = "give a file that /save wrote"


@dataclass(frozen=True, slots=True)
class Message:
    """What somebody said."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class _Head:
    schema: str
    target: str


def write_chat(path: Path, target: str, messages: Sequence[Message], again: bool = False) -> None:
    """Whole or not at all. again: over what is there. Raises UsageError for a place that cannot be written, and for a file
    that is there already."""
    if not again and _holds_something(path):
        raise UsageError(f"{path} is there already", "choose another name")
    lines = [{"schema": SCHEMA, "target": target}, *map(asdict, messages)]
    try:
        replace_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {reason(error)}", "choose another name") from error


def _holds_something(path: Path) -> bool:
    """Raises UsageError for a name that cannot be looked at."""
    try:
        return path.exists() and path.stat().st_size > 0
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {reason(error)}", "choose another name") from error


def read_chat(path: Path, target: str) -> list[Message]:
    """The messages. Raises UsageError for what is no chat, for one that is broken, with the line, and for one with another
    target."""
    lines = _lines(path)
    found = _head(path)
    if found.target != target:
        raise UsageError(
            f"{path} is a chat with {found.target}, and this is {target}", f"specdec chat -t {found.target}"
        )
    messages = list[Message]()
    for number, line in lines[1:]:
        try:
            messages.append(typed(parse_record(line), Message))
        except ValueError as error:
            raise UsageError(f"{path}, line {number}: {error}", _HINT) from error
    roles = [message.role for message in messages]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise UsageError(f"{path}: user and assistant do not take turns, or the last answer is missing", _HINT)
    return messages


def _lines(path: Path) -> list[tuple[int, str]]:
    """With their numbers, without blank ones."""
    try:
        text = decode(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {reason(error)}", _HINT) from error
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _head(path: Path) -> _Head:
    try:
        _, first = next(iter(_lines(path)), (0, ""))
        found = typed(parse_record(first), _Head)
    except ValueError as error:
        raise UsageError(f"{path} is no chat: {error}", _HINT) from error
    if found.schema != SCHEMA:
        raise UsageError(f"{path} is {found.schema}, not {SCHEMA}", _HINT)
    return found
