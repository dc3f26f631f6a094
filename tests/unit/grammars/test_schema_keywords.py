"""Keywords of JSON Schema: held in every output, or refused by name; and how long an output may stand still."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import ssd
from ssd import RequestError
from ssd.grammars import compiler
from ssd.grammars.keys import KeyScan
from ssd.models.checkpoints.loading import load_tokenizer
from ssd.request.structured import StructuredOutputsParams
from ssd.testing.walks import Walker

VOCABULARY = 4096
AB = {"a": {"type": "integer"}, "b": {"type": "boolean"}}
CLOSED = {"type": "object", "additionalProperties": False}
HELD: dict[str, Any] = {
    "uniqueItems": {"type": "array", "uniqueItems": True, "items": {"enum": ["a", "b", 1, None]}, "minItems": 1},
    "uniqueItems bounded": {
        "type": "array",
        "uniqueItems": True,
        "items": {"type": "integer", "maximum": 7, "minimum": 1},
    },
    "uniqueItems of ref": {
        "type": "object",
        "properties": {"c": {"type": ["array", "null"], "uniqueItems": True, "items": {"$ref": "#/$defs/c"}}},
        "required": ["c"],
        "$defs": {"c": {"enum": ["x", "y", "z"]}},
    },
    "oneOf types": {"oneOf": [{"type": "integer"}, {"type": "string"}, {"type": "null"}]},
    "oneOf const": {
        "oneOf": [
            {"type": "object", "properties": {"k": {"const": "p"}, "v": {"type": "integer"}}, "required": ["k", "v"]},
            {"type": "object", "properties": {"k": {"enum": ["q", "r"]}}, "required": ["k"]},
        ]
    },
    "oneOf ranges": {"oneOf": [{"type": "integer", "maximum": 3}, {"type": "integer", "minimum": 4}]},
    "oneOf overlap": {"oneOf": [{"type": "number", "minimum": 3}, {"type": "number", "maximum": 5}]},
    "oneOf required": {**CLOSED, "properties": AB, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
    "oneOf closed": {
        "oneOf": [
            {**CLOSED, "properties": AB, "required": ["a"]},
            {**CLOSED, "properties": {"z": {}}, "required": ["z"]},
        ]
    },
    "not enum": {"type": "string", "maxLength": 3, "not": {"enum": ["a", "ab", ""]}},
    "not const number": {"type": "integer", "minimum": 0, "maximum": 3, "not": {"const": 2}},
    "not type": {"not": {"type": ["string", "array", "object"]}},
    "not required": {"type": "object", "properties": AB, "not": {"required": ["a", "b"]}},
    "not anyOf": {"not": {"anyOf": [{"type": "string"}, {"minimum": 4}, {"type": ["object", "array"]}]}},
    "not not": {"not": {"not": {"type": "boolean"}}},
    "if then else": {
        **CLOSED,
        "properties": {"kind": {"enum": ["x", "y"]}, **AB},
        "required": ["kind"],
        "if": {"properties": {"kind": {"const": "x"}}},
        "then": {"required": ["a"]},
        "else": {"required": ["b"]},
    },
    "patternProperties": {"type": "object", "patternProperties": {"^x": {"type": "integer"}, "^y": {"type": "null"}}},
    "patternProperties min": {
        "type": "object",
        "patternProperties": {"^a": {"type": "integer"}},
        "additionalProperties": False,
        "minProperties": 3,
        "maxProperties": 4,
    },
    "patternProperties words": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "patternProperties": {"^(p|q-1)$": {"const": 1}},
        "additionalProperties": False,
    },
    "additionalProperties min": {"type": "object", "additionalProperties": {"type": "boolean"}, "minProperties": 3},
    "propertyNames enum": {
        "type": "object",
        "propertyNames": {"enum": ["a", "b"]},
        "additionalProperties": {"type": "null"},
    },
    "propertyNames pattern": {
        "type": "object",
        "propertyNames": {"pattern": "^[a-c]+$"},
        "additionalProperties": {"const": 1},
    },
    "dependentRequired": {**CLOSED, "properties": AB, "dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {
        **CLOSED,
        "properties": AB,
        "dependentSchemas": {"b": {"properties": {"a": {"minimum": 5}}, "required": ["a"]}},
    },
    "unevaluatedProperties": {"type": "object", "properties": AB, "unevaluatedProperties": False},
    "prefixItems": {
        "type": "array",
        "prefixItems": [{"type": "integer"}, {"const": "x"}],
        "items": False,
        "minItems": 1,
    },
    "allOf": {"allOf": [{"type": "string", "pattern": "a"}, {"pattern": "b"}, {"maxLength": 6}]},
    "look-ahead": {"type": "string", "pattern": r"^(?=.*[a-z])(?=.*\d)[a-z\d]{2,5}$"},
    "look-ahead words": {"type": "string", "pattern": r"^(?!(?:ab|c)$)[a-d]{1,2}$"},
    "anchors": {"type": "string", "pattern": r"^[a-f]{1,3}\Z"},
    "int32": {"type": "integer", "format": "int32", "minimum": -(2**31), "maximum": 2**31 - 1},
    "exclusive": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "ref anywhere": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"$ref": "#/properties/a"}},
        "required": ["b"],
    },
    "ref by anchor": {"$ref": "#it", "$defs": {"x y/z": {"$anchor": "it", "enum": [4, 5]}}},
    "ref quoted": {"$ref": "#/$defs/x%20y~1z", "$defs": {"x y/z": {"enum": [4, 5]}}},
    "ref to the root": {"type": "object", "properties": {"n": {"$ref": "#"}}, "additionalProperties": False},
    "ref with id": {"$id": "http://a/b", "$ref": "http://a/b#/$defs/c", "$defs": {"c": {"type": "null"}}},
    "unknown format": {"type": "string", "format": "phone", "maxLength": 3},
    "annotations": {"type": "integer", "readOnly": True, "deprecated": True, "x-y": 1, "example": 3, "$comment": "c"},
    "options of the library": {"x-guidance": {"lenient": True}, "type": "integer", "maximum": 3, "minimum": 3},
}
REFUSED: dict[str, tuple[Any, str]] = {
    "contains": ({"properties": {"a": {"items": {"contains": {"type": "null"}}}}}, "contains at #/properties/a/items"),
    "not pattern": (
        {"properties": {"a": {"not": {"pattern": "x"}}}},
        "not at #/properties/a cannot be held around pattern",
    ),
    "oneOf": ({"items": {"oneOf": [{"type": "string"}, {"pattern": "a"}]}}, "oneOf at #/items .* branches 0 and 1"),
    "look-behind": ({"properties": {"p": {"pattern": "(?<=a)b"}}}, "pattern at #/properties/p has look-around"),
    "look-ahead within": ({"pattern": "^a(?!b)c"}, "pattern at # has look-around"),
    "key with look-ahead": ({"patternProperties": {"^(?=a)b": {}}}, "patternProperties at # "),
    "back reference": ({"properties": {"p": {"type": "string", "pattern": r"(a)\1"}}}, "at #/properties/p"),
    "other document": ({"$ref": "http://example.com/x"}, r"\$ref at # refers to another document"),
    "missing": ({"anyOf": [{"$ref": "#/$defs/x"}]}, r"\$ref at #/anyOf/0 names '#/\$defs/x'"),
    "circle": (
        {"$ref": "#/$defs/x", "$defs": {"x": {"$ref": "#/$defs/y"}, "y": {"$ref": "#/$defs/x"}}},
        "back to itself",
    ),
    "dynamic": ({"$dynamicRef": "#a"}, r"\$dynamicRef at #"),
    "names": ({"propertyNames": {"pattern": "a", "maxLength": 3}}, "propertyNames at #"),
    "unevaluated": ({"unevaluatedProperties": False, "allOf": [{}]}, "unevaluatedProperties at #"),
    "misspelt": ({"type": "object", "properties": {"a": {"minimun": 3}}}, "minimun at #/properties/a .* 'minimum'"),
    "type": ({"properties": {"a": {"type": "int"}}}, "type at #/properties/a must be one or several of"),
    "shape": ({"items": {"required": "a"}}, "required at #/items must be a list of texts; got 'a'"),
    "no schema": ({"items": 5}, "the schema at #/items must be an object"),
    "optional minimum": (
        {"properties": {"q": {"type": "object", "properties": AB, "minProperties": 2}}},
        "min/maxProperties .*at #/properties/q",
    ),
    "impossible": (
        {"items": {"type": "array", "uniqueItems": True, "items": {"enum": [1]}, "minItems": 2}},
        "uniqueItems at #/items",
    ),
    "nothing": ({"type": "string", "enum": [1, 2]}, "nsatisfiable"),
}


@pytest.fixture(scope="module")
def walker() -> Walker:
    tokenizer = load_tokenizer(Path(ssd.__file__).parent / "data/embedded/target")
    return Walker(tokenizer, vocabulary=VOCABULARY, ends=[tokenizer.eos_token_id])


def wanted(schema: Any, **options: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(json=schema, **options)


@pytest.mark.parametrize("name", HELD)
def test_it_is_held(name: str, walker: Walker) -> None:
    finished = set()
    for seed in range(12):
        text, complete = walker.walk(wanted(HELD[name]), seed, limit=120)
        if complete:
            finished.add(text)
            jsonschema.Draft202012Validator(HELD[name]).validate(json.loads(text))
    assert finished


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name(name: str, walker: Walker) -> None:
    schema, message = REFUSED[name]
    with pytest.raises(RequestError, match=message) as caught:
        walker.grammars.matcher(wanted(schema))
    assert str(caught.value).startswith("structured_outputs.json cannot be used: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_every_order_of_few_items_is_possible(walker: Walker) -> None:
    asked = wanted({"type": "array", "uniqueItems": True, "items": {"enum": [1, 2, 3]}}, disable_any_whitespace=True)
    texts = {walker.walk(asked, seed)[0] for seed in range(300)}
    assert len(texts) == 1 + 3 + 6 + 6


@pytest.mark.parametrize(
    "schema",
    [{"type": "object"}, {"type": "array", "items": {"type": "array"}}, {"type": "object", "properties": AB}],
    ids=str,
)
def test_blanks_between_tokens_have_an_end(schema: Any, walker: Walker) -> None:
    blank = walker.blanks()
    matcher, written = walker.grammars.matcher(wanted(schema)), 0
    for token in walker.tokens("{" if schema["type"] == "object" else "["):
        assert matcher.advance(token)
    while allowed := [token for token in blank if matcher.allowed([()])[0, token]]:
        assert matcher.advance(allowed[0])
        written += 1
    assert written <= 26


@pytest.mark.parametrize(
    "text", ['{\n  "a": 1,\n  "b": true\n}', '{"a": 1, "b": true}', '{"a":1,"b":true}', '{\r\n\t"a":1}'], ids=repr
)
def test_usual_layouts_are_allowed(text: str, walker: Walker) -> None:
    matcher = walker.grammars.matcher(wanted({"type": "object", "properties": AB}))
    assert all(matcher.advance(token) for token in walker.tokens(text))


@pytest.mark.parametrize("schema", [{"type": "object"}, {"additionalProperties": {"type": "object"}}, True], ids=str)
def test_no_key_comes_twice(schema: Any, walker: Walker) -> None:
    asked = StructuredOutputsParams(json=json.dumps(schema))
    for start in ('{"a": 1, "ab": {"a": 2, "', '{"ab": {}, "a": [{"b": 1}], "'):
        matcher = walker.grammars.matcher(asked)
        if not all(matcher.advance(token) for token in walker.tokens(start)):
            continue
        keys = KeyScan().after(start.encode()).open[-1] or frozenset()
        for key in keys:
            *path, quote = walker.tokens(f'{key.decode()}"')
            assert not matcher.allowed([path])[0, quote]
            assert matcher.allowed([walker.tokens(f"{key.decode()}z")])[0, quote]


@pytest.mark.parametrize(
    ("text", "keys", "repeated"),
    [
        ('{"a": 1, "b', {b"a"}, False),
        ('{"a": 1, "a"', {b"a"}, True),
        ('{"a": {"a": 1', {b"a"}, False),
        ('{"a": "x, \\"a\\": 1", "b": ["a", "a"], "c":', {b"a", b"b", b"c"}, False),
        ('{"a\\"": 1, "a\\"":', {b'a\\"'}, True),
        ('[{"a": 1}, {"a": 1', {b"a"}, False),
    ],
    ids=["one", "twice", "in another", "in a text", "escaped", "in neighbours"],
)
def test_the_scanner_reads_any_chunking(text: str, keys: set[bytes], repeated: bool) -> None:
    for size in range(1, len(text) + 1):
        scan = KeyScan()
        for start in range(0, len(text), size):
            scan = scan.after(text[start : start + size].encode())
        assert scan.open[-1] == keys and scan.repeated == repeated


def test_closed_objects(walker: Walker) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "object", "properties": AB}}, "required": ["a"]}
    for seed in range(6):
        text, complete = walker.walk(wanted(schema, disable_additional_properties=True), seed)
        value = json.loads(text)
        assert complete and set(value) == {"a"} and set(value["a"]) <= {"a", "b"}


@pytest.mark.parametrize(
    "asked",
    [
        {"regex": "(a{1000}){1000}"},
        {"regex": "(a|aa|aaa|aaaa)*b(.{1,100}|x){50}"},
        {
            "json": {
                "type": "object",
                "properties": {"a": {"type": "string", "pattern": "^(a{1000}){1000}$"}},
                "required": ["a"],
            }
        },
        {"grammar": "start: /((a|b|c|d){1,100}(a|b){1,100}){1,100}/"},
    ],
    ids=["regex", "regex of many paths", "json", "grammar"],
)
def test_what_is_too_large_is_refused_at_once(asked: dict[str, Any], walker: Walker) -> None:
    kind = next(iter(asked))
    with pytest.raises(RequestError, match=rf"structured_outputs\.{kind} cannot be used: it is too large"):
        walker.grammars.matcher(StructuredOutputsParams(**asked))


def test_what_turns_out_too_large_later_says_so(walker: Walker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "TRIALS", 0)
    matcher = walker.grammars.matcher(StructuredOutputsParams(regex="(a{1000}){999}"))
    token = walker.tokens("a")[0]
    while matcher.allowed([()]).any() and matcher.advance(token):
        pass
    assert not matcher.advance(token)
    assert re.match(r"structured_outputs\.regex cannot continue: it is too large", matcher.error or "")


def test_compiling_has_a_time_limit(walker: Walker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "COMPILE_S", 0.0)
    with pytest.raises(RequestError, match=r"structured_outputs\.regex cannot be used: .* within 0 s"):
        walker.grammars.matcher(StructuredOutputsParams(regex="[a-z]{3}never-seen"))
