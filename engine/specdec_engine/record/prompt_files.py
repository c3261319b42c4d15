"""Prompts from a file, in the shapes that people have them in: the one reader of all commands. No torch.

A file is text, with a prompt a line; or JSON: a document with an array, or a value a line. A value is a prompt's text, a
list of a conversation's turns, or an object with one of `turns` (Spec-Bench, SPEED-Bench), `messages` (OpenAI),
`conversations` (ShareGPT), `prompt`, `question`, `instruction` and `input` (Alpaca) or `text`, or with such an object as its
`body` (an OpenAI batch). Answers that stand in a conversation are left out: the target gives its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from specdec_engine.errors import UsageError, reason
from specdec_engine.record.files import RECODE, decode, parse_json

SHAPES = "turns, messages, conversations, prompt, question, instruction, text or body"
_HINT = f"give a prompt a line, or JSON with one of {SHAPES}"
_JSON = (".json", ".jsonl", ".ndjson")
_TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".xlsx", ".gz", ".zip", ".zst")
_USER, _SYSTEM, _ASSISTANT = ("user", "human"), ("system", "developer"), ("assistant", "gpt", "model", "chatgpt", "bot")


@dataclass(frozen=True, slots=True)
class Question:
    """One conversation: the user's turns."""

    category: str
    turns: tuple[str, ...]
    ids: tuple[int, ...] = ()
    """Of a prompt that came as token ids; it has one turn, whose text is not looked at."""
    system: str = ""
    """What the conversation begins with; empty for none."""
    id: str = field(default="", compare=False)
    """What its file calls it; empty for nothing."""


class _NoPrompt(ValueError):
    """Says what is wrong with a value."""


def read_questions(path: Path) -> list[Question]:
    """All that is in the file. Raises UsageError with the number of the line that is neither a prompt nor blank."""
    if path.suffix.lower() in _TABLES:
        raise UsageError(f"{path} is a {path.suffix[1:]} file, which is not read", "write its prompts as JSONL")
    try:
        text = decode(path.read_bytes())
    except OSError as error:
        hint = "check the path" if str(path) != "-" else "give /dev/stdin for standard input"
        raise UsageError(f"the prompts in {path} cannot be read: {reason(error)}", hint) from error
    except ValueError as error:
        raise UsageError(f"the prompts in {path} cannot be read: {error}", RECODE) from error
    found = list(_questions(text, path))
    if not found:
        raise UsageError(f"{path} has no prompts", _HINT)
    return found


def _questions(text: str, path: Path) -> Iterator[Question]:
    for where, value in _values(text, path):
        try:
            yield _question(value)
        except _NoPrompt as error:
            raise UsageError(f"{where} {error}", _HINT) from error


def _values(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Each prompt's value and where it stands. Lines end at line feeds alone: JSON's strings may hold Unicode's own ends of
    lines, and texts form feeds."""
    numbered = enumerate(text.split("\n"), 1)
    lines = [(f"line {n} of {path}", line.removesuffix("\r")) for n, line in numbered if line.strip()]
    named = path.suffix.lower() in _JSON
    if not lines or not (named or _is_json(lines[0][1]) or _is_array(text)):
        _refuse_broken(text, lines, path)
        return (_said(*line) for line in lines)
    if path.suffix.lower() not in (".jsonl", ".ndjson") and (items := _document(text, lines, path)) is not None:
        return ((f"item {n} of {path}", value) for n, value in enumerate(items, 1))
    return ((where, _parsed(line, where)) if named or _opens(line) else _said(where, line) for where, line in lines)


def _said(where: str, line: str) -> tuple[str, Any]:
    return where, {"text": line, "category": "text"}


def _opens(line: str) -> bool:
    return line.lstrip().startswith("{")


def _refuse_broken(text: str, lines: Sequence[tuple[str, str]], path: Path) -> None:
    """Raises UsageError for text that was meant as JSON."""
    if _BROKEN_ARRAY.match(text):
        _parsed(text, str(path))
    if lines and _opens(lines[0][1]) and any(_is_json(line) for _, line in lines):
        _parsed(lines[0][1], lines[0][0])


def _document(text: str, lines: Sequence[tuple[str, str]], path: Path) -> Sequence[Any] | None:
    """What a file that is one JSON document holds; None for one with a value a line. Raises UsageError for a broken array."""
    try:
        whole = parse_json(text)
    except ValueError:
        whole = None
    if isinstance(whole, list):
        return whole
    if isinstance(whole, Mapping) and len(lines) > 1:
        return [whole]
    if text.lstrip().startswith("[") and not _is_json(lines[0][1]):
        _parsed(text, str(path))
    return None


_BROKEN_ARRAY = re.compile(r"\s*\[\s*[\[{\"].*\]\s*\Z", re.DOTALL)
"""What begins and ends as an array of prompts does, and is none."""


def _parsed(text: str, where: str) -> Any:
    """Parse JSON. Raises UsageError with what is wrong there."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise UsageError(
            f"{where} cannot be read: {error}", "each line is one JSON value, or the file one array"
        ) from error


def _is_json(line: str) -> bool:
    """Whether a line of a file that does not call itself JSON is an object of it; braces alone do not make one."""
    try:
        return line.lstrip().startswith("{") and isinstance(parse_json(line), dict)
    except ValueError:
        return False


def _is_array(text: str) -> bool:
    """The same for an array over the whole of it."""
    try:
        return text.lstrip().startswith("[") and isinstance(parse_json(text), list)
    except ValueError:
        return False


def _question(value: Any) -> Question:
    """Raises _NoPrompt."""
    if isinstance(value, str):
        return Question("prompts", (_text(value, "the prompt"),))
    if isinstance(value, list):
        value = {"turns": value}
    if not isinstance(value, Mapping):
        raise _NoPrompt(f"is {brief(value)}, and no prompt")
    body = value.get("body")
    record = body if isinstance(body, Mapping) else value
    system, turns = _conversation(record)
    if not system and (given := record.get("system") or record.get("system_prompt")):
        system = _text(given, "system")
    named = value.get("category")
    category = ", ".join(map(str, named)) if isinstance(named, list) else str(named or "prompts")
    name = next((value[key] for key in ("id", "custom_id", "question_id") if isinstance(value.get(key), str | int)), "")
    return Question(category, turns, system=system, id=str(name))


def _conversation(record: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The system prompt, and the user's turns."""
    names = ("turns", "messages", "conversations", "conversation", "prompt", "question")
    for name in (*names, *(() if record.get("instruction") else ("text",))):  # Alpaca's has the answer in its text
        if not (value := record.get(name)):
            continue
        if isinstance(value, str):
            return "", (_text(value, name),)
        if isinstance(value, list) and all(isinstance(turn, str) for turn in value):
            return "", tuple(_text(turn, name) for turn in value)
        if isinstance(value, list):
            if any(isinstance(turn, str) for turn in value):
                odd = next(turn for turn in value if not isinstance(turn, str))
                raise _NoPrompt(f"has {name} with {brief(odd)} among texts")
            return _spoken(value, name)
        raise _NoPrompt(f"has {name} that is neither text nor a list")
    if record.get("instruction"):
        parts = [record["instruction"], record.get("input") or ""]
        return "", ("\n\n".join(_text(part, "instruction") for part in parts if part),)
    if named := [name for name in record if name in SHAPES.replace(",", "").split()]:
        raise _NoPrompt(f"has an empty {named[0]}")
    keys = [" ".join(str(key).split())[:40] for key in list(record)[:8]]
    raise _NoPrompt(f"has no prompt: its keys are {', '.join(keys)}" if keys else "has no prompt: it is empty")


def _spoken(messages: list[Any], name: str) -> tuple[str, tuple[str, ...]]:
    """Of messages with `role` and `content`, or ShareGPT's `from` and `value`."""
    system, turns = list[str](), list[str]()
    for message in messages:
        if not isinstance(message, Mapping):
            raise _NoPrompt(f"has {name} with {brief(message)}, which is no message")
        role = message.get("role", message.get("from"))
        if role in _ASSISTANT:
            continue
        if role not in (*_USER, *_SYSTEM):
            raise _NoPrompt(f"has a message of the role {brief(role)}, which is not asked with")
        (system if role in _SYSTEM else turns).append(_content(message.get("content", message.get("value")), name))
    if not turns:
        raise _NoPrompt(f"has {name} without a user's turn")
    return "\n\n".join(system), tuple(turns)


def _content(content: Any, name: str) -> str:
    """A message's text; of several parts, joined."""
    if not isinstance(content, list):
        return _text(content, name)
    if no_parts := [part for part in content if not isinstance(part, Mapping)]:
        raise _NoPrompt(f"has {name} with {brief(no_parts[0])}, which is no part of a message")
    kinds = [part.get("type", "text") for part in content]
    if others := [kind for kind in kinds if kind not in ("text", "input_text")]:
        raise _NoPrompt(f"has a part of the kind {brief(others[0])} where only text can be read")
    return _text("\n".join(_text(part.get("text"), name) for part in content), name)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _NoPrompt(f"has {name} that is {brief(value)}, and no text")
    if not value.strip():
        raise _NoPrompt(f"has an empty {name}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a pair that a program cut in two; no tokenizer takes it
        raise _NoPrompt(f"has half a character, \\u{ord(value[error.start]):04x}, in its {name}") from error
    return value
