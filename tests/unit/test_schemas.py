"""Two hundred schemas, of the kinds that JSON Schema's own test suite has: whatever is drawn at temperature 1 is valid."""

from __future__ import annotations

import json
import random

import jsonschema
import pytest

from specdec_engine.constrain.wanted import by_json_schema, schema_of
from specdec_engine.core.cycle_types import Sampling
from specdec_engine.errors import UsageError
from specdec_engine.record.events import Cycle
from specdec_engine.runtime.target import ModelTarget
from tests.contracts.cases import TOKENIZER, parts
from tests.fakes import run
from tests.unit.test_grammar import END, matching

LEAVES = [
    {"type": "null"}, {"type": "boolean"}, {"const": 5}, {"const": "the light"}, {"const": None}, {"const": {"a": [1, None]}},
    {"enum": [1, "two", None, [3], {"four": 4}]}, {"enum": ["a\"b", "c\\d", "é", "☃"]},
    {"type": "integer", "minimum": 0, "maximum": 9}, {"type": "integer", "minimum": -120, "maximum": -7},
    {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 6}, {"type": "integer", "minimum": 98, "maximum": 1002},
    {"type": "integer", "multipleOf": 3, "minimum": 0, "maximum": 30},
    {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25},
    {"type": "string", "maxLength": 0}, {"type": "string", "maxLength": 3},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "string", "pattern": "^[a-c]{2,4}$"}, {"type": "string", "pattern": "^(yes|no)$"},
    {"type": "string", "pattern": r"^\d{3}-\d{2}$"}, {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"}, {"type": "string", "format": "ipv4"},
    {"type": ["string", "null"], "maxLength": 3}, {"type": ["boolean", "null"], "description": "either", "default": None},
    {"anyOf": [{"type": "boolean"}, {"type": "integer", "minimum": 1, "maximum": 3}]},
    {"oneOf": [{"type": "string", "maxLength": 2}, {"type": "integer", "minimum": 0, "maximum": 5}]},
    {"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 9}]},
]  # fmt: skip
NODE = {
    "type": "object",
    "properties": {"v": {"enum": [1, 2]}, "next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}},
    "required": ["v", "next"],
    "additionalProperties": False,
}
RECURSIVE = {"$defs": {"n": NODE}, "$ref": "#/$defs/n"}


def made(rng):
    """A schema of a kind that holds others."""

    def some():
        return rng.choice(LEAVES)

    names = rng.sample(["a", "the light", "night", "x y", "é", "0", 'with "quotes"', "last"], 3)
    return rng.choice(
        [
            lambda: {"type": "array", "items": some(), "maxItems": rng.randint(0, 3)},
            lambda: {"type": "array", "items": some(), "minItems": 1, "maxItems": 2},
            lambda: {"type": "array", "prefixItems": [some(), some()], "items": False, "minItems": 2},
            lambda: {"type": "object", "properties": {n: some() for n in names}, "additionalProperties": False},
            lambda: {"type": "object", "properties": {n: some() for n in names}, "required": names[:2],
                     "additionalProperties": False},
            lambda: {"type": "object", "properties": {names[0]: {"type": "array", "items": some(), "maxItems": 2}},
                     "required": names[:1], "additionalProperties": False},
            lambda: {"type": "object", "properties": {names[0]: {"type": "object", "properties": {names[1]: some()},
                     "required": [names[1]], "additionalProperties": False}}, "required": names[:1],
                     "additionalProperties": False},
            lambda: {"anyOf": [some(), {"type": "array", "items": some(), "maxItems": 1}]},
            lambda: {"$defs": {"d": some()}, "type": "array", "items": {"$ref": "#/$defs/d"}, "minItems": 1, "maxItems": 2},
        ]
    )()  # fmt: skip


SCHEMAS = [*LEAVES, RECURSIVE, *(made(random.Random(seed)) for seed in range(200 - len(LEAVES) - 1))]


@pytest.fixture(scope="module")
def pair():
    drafter, runtime = parts("lean@ngram,model:small")
    return drafter, ModelTarget(runtime, "tiny")


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_what_is_drawn_is_valid(pair, number):
    drafter, target = pair
    grammar = schema_of(SCHEMAS[number])
    found = run(target, drafter, [5, 6, 7], k=3, sampling=Sampling(1.0), seed=number, grammar=matching(grammar),
                max_tokens=600, stop_ids=[END])  # fmt: skip
    ids = [t for event in found if isinstance(event, Cycle) for t in event.emitted if t != END]
    assert found[-1].reason == "stop"
    text = TOKENIZER.decode(ids)
    value = json.loads(text)
    jsonschema.validate(value, SCHEMAS[number], format_checker=jsonschema.FormatChecker())
    assert len(json.dumps(value, separators=(",", ":"))) >= len(text) - text.count("\\") - 8, (
        "no blanks between its parts"
    )


@pytest.mark.parametrize(
    "schema",
    [
        {"not": {"type": "string"}},
        {"uniqueItems": True},
        {"if": {}, "then": {}},
        {"contains": {}},
        {"propertyNames": {}},
    ],
    ids=str,
)
def test_what_cannot_be_followed_is_refused_and_named(schema):
    with pytest.raises(UsageError, match=next(iter(schema))):
        by_json_schema(json.dumps(schema))
