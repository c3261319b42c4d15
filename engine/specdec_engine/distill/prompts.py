"""Prompts from a file: lines of text, or JSON lines with `prompt` or Spec-Bench's `turns`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from specdec_engine.errors import UsageError

_HINT = "one prompt a line, or JSON lines with `prompt`"


def read_prompts(file: Path) -> Iterator[str]:
    """Raises UsageError for a line that is neither text nor such an object, with its number."""
    try:
        lines = file.read_text("utf-8").split("\n")  # and not at U+2028, which JSON strings may hold
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not text in UTF-8", _HINT) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not line.lstrip().startswith("{"):
            yield line
            continue
        try:
            record = json.loads(line)
            turns = record["turns"] if "prompt" not in record else [record["prompt"]]
            prompt = turns[0]
            if not isinstance(turns, list) or not isinstance(prompt, str):
                raise TypeError
            yield prompt
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise UsageError(f"{file}, line {number}: no JSON object with `prompt`", _HINT) from error
