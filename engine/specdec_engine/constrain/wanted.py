"""What the output is to follow, checked before any model is loaded; by llguidance."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from specdec_engine.errors import UsageError, first_line
from specdec_engine.record.files import parse_json

Kind = Literal["json_schema", "regex", "grammar"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """A language of texts."""

    kind: Kind
    text: str
    """As it was given."""
    compiled: str
    """As llguidance reads it."""
    warnings: tuple[str, ...] = ()
    """What of it is not followed, in llguidance's words."""

    @property
    def word(self) -> str:
        """What it is, in words."""
        return _WORDS[self.kind]

    def named(self) -> dict[str, str]:
        """As in settings."""
        return {"kind": self.kind, "text": self.text}


def by_json_schema(text: str) -> Grammar:
    """JSON that a schema describes, written without blanks between its parts: where blanks are free, models have filled whole
    answers with them. Raises UsageError for what is no schema, and for one that nothing meets."""
    try:
        schema = parse_json(text)
    except ValueError as error:
        raise UsageError(f"the JSON schema cannot be read: {error}", _SCHEMA_HINT) from error
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        why = "allows nothing" if schema is False else "is neither an object nor true"
        raise UsageError(f"the JSON schema {why}", _SCHEMA_HINT)
    of = _library().LLMatcher
    return _checked("json_schema", text, of.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False}))


def by_regex(text: str) -> Grammar:
    """The whole answer matches (Rust's syntax). Raises UsageError for what is no regular expression."""
    if not text:
        raise UsageError("the regular expression is empty", "it describes the whole answer, for example '[A-Z][a-z]+'")
    return _checked("regex", text, _library().LLMatcher.grammar_from_regex(text))


def by_grammar(text: str) -> Grammar:
    """A grammar in Lark's form, or in llama.cpp's (GBNF). Raises UsageError for what is none."""
    if not text.strip():
        raise UsageError("the grammar is empty", 'give rules, for example: start: "yes" | "no"')
    library = _library()
    if "::=" in text:
        from llguidance.gbnf_to_lark import gbnf_to_lark

        try:
            text_as_lark = gbnf_to_lark(text)
        except Exception as error:  # the converter's own, of several kinds
            raise UsageError(
                f"the grammar cannot be read: {first_line(error)}", "it was taken for GBNF, by its ::="
            ) from error
    else:
        text_as_lark = text
    return _checked("grammar", text, library.LLMatcher.grammar_from_lark(text_as_lark))


_SCHEMA_HINT = """give a file, or an object, for example '{"type": "array", "items": {"type": "integer"}}'"""
_WORDS: dict[Kind, str] = {"json_schema": "JSON schema", "regex": "regular expression", "grammar": "grammar"}


def _checked(kind: Kind, text: str, compiled: str) -> Grammar:
    """Raises UsageError where llguidance refuses it."""
    broken, said = _library().LLMatcher.validate_grammar_with_warnings(compiled, None)
    if broken:
        raise UsageError(
            f"the {_WORDS[kind]} cannot be followed: {in_a_line(said[0])}", "mend it, or say it another way"
        )
    # Without a tokenizer it cannot look at the special tokens that a grammar names; with one it does.
    return Grammar(kind, text, compiled, tuple(in_a_line(one) for one in said if "no tokenizer" not in one))


def in_a_line(said: str) -> str:
    """llguidance draws where an error is, on further lines."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    named = next(
        (line for line in lines if line.startswith("error: ")), None
    )  # of the regex library, which knows its place
    return lines[0] if named is None else named.removeprefix("error: ")


def _library() -> Any:
    """Raises UsageError where it is not installed."""
    try:
        import llguidance
    except ImportError:
        raise UsageError("structured output needs llguidance", "pip install 'specdec-cli[structured]'") from None
    return llguidance


def schema_of(value: Any) -> Grammar:
    """The same from an object in memory."""
    return by_json_schema(json.dumps(value))
