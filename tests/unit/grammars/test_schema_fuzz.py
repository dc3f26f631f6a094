"""Random schemas: each is refused in one line or held by every finished output, within a time."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import ssd
from ssd import RequestError
from ssd.models.checkpoints.loading import load_tokenizer
from ssd.request.structured import StructuredOutputsParams
from ssd.testing.walks import Walker

VOCABULARY = 4096
SLOW_S = 15.0
"""A schema of the fuzz takes milliseconds; the machine may be busy."""
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
FORMATS = ("date", "time", "date-time", "uuid4", "ipv4", "email", "password", "duration", "binary", "x")
PATTERNS = (
    "^a",
    "[0-9]$",
    "^(x|yz)$",
    "^(?=.*a)[a-c]{1,4}$",
    "^(?!b$)[ab]{1,2}$",
    r"^\w{2,5}$",
    "(",
    "a(?!b)",
    "^.{0,3}$",
)
NAMES = ("a", "b", "kind", "x-1", "é")
VALUES: tuple[Any, ...] = (None, True, False, 0, 1, -3, 2.5, "", "a", "é", 'q"', [], [1, "a"], {}, {"a": 1})


class Maker:
    """Makes schemas, most of them sensible."""

    def __init__(self, seed: int, *, hostile: bool):
        self._rng, self._hostile = random.Random(seed), hostile

    def document(self) -> Any:
        schema = self.schema(3)
        if isinstance(schema, dict):
            schema["$defs"] = {name: self.schema(2) for name in NAMES[:2]}
        return schema

    def schema(self, depth: int) -> Any:
        rng = self._rng
        if rng.random() < 0.05:
            return rng.random() < 0.8
        schema: dict[str, Any] = {}
        kind = rng.choice(TYPES)
        if rng.random() < 0.9:
            schema["type"] = kind if rng.random() < 0.85 else rng.sample(TYPES, 2)
        for _ in range(rng.randint(0, 3)):
            self._add(schema, kind, depth)
        if depth and rng.random() < 0.25:
            self._combine(schema, depth - 1)
        if self._hostile and rng.random() < 0.15:
            schema[rng.choice([*schema, "required", "items", "allOf", "properties", "$ref", "minItems"])] = rng.choice(
                [5, -1, "x", [], [5], {}, {"a": 5}, None, 1e400, "#/$defs/none", [{}], {"a": [1]}]
            )
        return schema

    def _add(self, schema: dict[str, Any], kind: str, depth: int) -> None:
        rng, number = self._rng, self._rng.randint(0, 4)
        options: dict[str, Any] = {"enum": rng.sample(VALUES, rng.randint(1, 4))} if rng.random() < 0.2 else {}
        if kind == "string":
            options |= {"minLength": number, "maxLength": number + 2, "pattern": rng.choice(PATTERNS)}
            options |= {"format": rng.choice(FORMATS)}
        elif kind in ("integer", "number"):
            options |= {
                "minimum": -number,
                "maximum": number * 7,
                "exclusiveMinimum": number - 9,
                "multipleOf": number or 1,
            }
        elif kind == "array":
            options |= {"minItems": number % 3, "maxItems": number, "uniqueItems": True}
            if depth:
                options |= {"items": self.schema(depth - 1), "prefixItems": [self.schema(depth - 1)]}
                options |= {"contains": self.schema(0)} if rng.random() < 0.1 else {}
        elif kind == "object":
            names = rng.sample(NAMES, rng.randint(1, 3))
            options |= {"required": names[:2], "minProperties": number % 3, "maxProperties": number}
            if depth:
                options |= {
                    "properties": {name: self.schema(depth - 1) for name in names},
                    "additionalProperties": self.schema(depth - 1) if rng.random() < 0.5 else False,
                    "patternProperties": {rng.choice(PATTERNS): self.schema(depth - 1)},
                    "dependentRequired": {names[0]: names[1:]},
                    "propertyNames": {"enum": [*NAMES[:3]]} if rng.random() < 0.5 else {"maxLength": 4},
                }
        if options:
            keyword = rng.choice(sorted(options))
            schema[keyword] = options[keyword]
            if keyword == "patternProperties" and rng.random() < 0.5:
                schema["additionalProperties"] = False

    def _combine(self, schema: dict[str, Any], depth: int) -> None:
        keyword = self._rng.choice(["anyOf", "oneOf", "allOf", "not", "$ref", "if", "dependentSchemas"])
        if keyword == "$ref":
            schema["$ref"] = self._rng.choice(["#", "#/$defs/a", "#/$defs/b"])
        elif keyword == "not":
            schema["not"] = self.schema(0)
        elif keyword == "if":
            schema |= {"if": self.schema(0), "then": self.schema(depth), "else": self.schema(depth)}
        elif keyword == "dependentSchemas":
            schema[keyword] = {"a": self.schema(depth)}
        else:
            schema[keyword] = [self.schema(depth) for _ in range(self._rng.randint(1, 3))]


def well_formed(schema: Any) -> bool:
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except (jsonschema.SchemaError, AttributeError):
        return False
    return True


def held(schema: Any) -> Any:
    """Returns the schema without what is not held: ``uniqueItems`` of items that cannot be listed."""
    if isinstance(schema, dict):
        return {key: held(value) for key, value in schema.items() if key != "uniqueItems"}
    return [held(value) for value in schema] if isinstance(schema, list) else schema


@pytest.fixture(scope="module")
def walker() -> Walker:
    tokenizer = load_tokenizer(Path(ssd.__file__).parent / "data/embedded/target")
    return Walker(tokenizer, vocabulary=VOCABULARY, ends=[tokenizer.eos_token_id])


@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("hostile", [False, True], ids=["sensible", "hostile"])
def test_refused_or_held(part: int, hostile: bool, walker: Walker) -> None:
    accepted = 0
    for seed in range(part * 60, (part + 1) * 60):
        schema = Maker(seed, hostile=hostile).document()
        started = time.monotonic()
        try:
            wanted = StructuredOutputsParams(json=json.dumps(schema))
            walker.grammars.matcher(wanted)
        except RequestError as error:
            assert "\n" not in str(error) and str(error).startswith("structured_outputs.json cannot be used: ")
            continue
        finally:
            assert time.monotonic() - started < SLOW_S
        accepted += 1
        if hostile and not well_formed(schema):
            continue  # what was wrong has no meaning here, for example within a keyword that nobody reads
        validator = jsonschema.Draft202012Validator(held(schema))
        for walk in range(3):
            text, complete = walker.walk(wanted, walk, limit=80)
            if complete:
                error = jsonschema.exceptions.best_match(validator.iter_errors(json.loads(text)))
                assert error is None, f"seed {seed}: {text} against {json.dumps(schema)}: {error.message}"
    assert accepted > 5
