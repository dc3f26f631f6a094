"""Prepares a JSON schema for the grammar library.

The library compiles a part of JSON Schema. A prepared schema uses that part only, and every output that follows it
follows the schema it was made from. What cannot be said that way is refused with the keyword and its path. There are
three exceptions, which the programs that read the output check themselves: formats that ``formats`` does not have,
``uniqueItems`` of items that cannot be listed (``arrays``), and keywords that JSON Schema does not know.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from . import arrays, formats, patterns
from .document import ROOT, Document
from .exclusive import Exclusion, types
from .negation import NotNegatable, negated
from .shapes import NOT_HELD
from .terms import ANNOTATIONS, SchemaError, is_object, joined

_COPIED = frozenset(
    {
        *("const", "enum", "type", "required", "minItems", "maxItems", "minProperties", "maxProperties"),
        *("minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    }
)
_OF_ARRAYS = frozenset({"type", "items", "minItems", "maxItems", "uniqueItems"})
_APPLICATORS = frozenset({"allOf", "anyOf", "oneOf", "$ref", "if", "not", "dependentSchemas"})
_LAST = frozenset({"not", "if", "dependentRequired", "dependentSchemas", "dependencies", "uniqueItems"})
"""Rewritten to schemas that come last, so that properties keep their order."""
_PARTS = frozenset({"allOf", "not", "if", "then", "else", "dependentSchemas"})
"""Keywords whose schemas describe an object together with others."""
MAX_BRANCHES = 200
"""Most branches of a ``oneOf``: each is compared with each."""
MAX_ARRAYS = 1500
"""Arrays that are listed for ``uniqueItems`` in one schema."""
MAX_PREPARED = 100_000
"""Schemas of a prepared document."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedSchema:
    """A schema that the grammar library compiles."""

    schema: dict[str, Any] | bool
    open_keys: bool
    """Whether an object may have properties whose names the schema does not list."""


def prepare(schema: Any, *, closed: bool = False, at: str = ROOT) -> PreparedSchema:
    """Prepares a parsed JSON schema.

    Args:
        closed: Whether objects that do not mention additional properties have none.
        at: The part of the schema to prepare, as a JSON pointer.

    Raises:
        SchemaError: The schema is wrong or cannot be held. The message names the keyword and its path.
    """
    preparation = _Preparation(Document(schema), closed=closed)
    return PreparedSchema(schema=preparation.result(at), open_keys=preparation.open_keys)


def subschemas(schema: Any) -> list[str]:
    """Returns the JSON pointers of a schema's parts, the innermost first and the schema itself last.

    Parts that are true or false are left out.
    """
    document = Document(schema)
    parts = [path for path in document.paths if not isinstance((document.at(path) or (path, True))[1], bool)]
    return sorted(parts, key=lambda path: (-path.count("/"), path))


class _Preparation:
    def __init__(self, document: Document, *, closed: bool):
        self._document, self._closed = document, closed
        self._exclusion = Exclusion(document)
        self._names: dict[tuple[str, str | None], str] = {}
        self._waiting: deque[tuple[str, Any, str]] = deque()
        self._left = MAX_PREPARED
        self._arrays_left = MAX_ARRAYS
        self.open_keys = False

    def result(self, at: str) -> dict[str, Any] | bool:
        found = self._document.at(at)
        assert found is not None, at
        path, schema = found
        prepared = self._prepared(schema, path)
        definitions: dict[str, Any] = {}
        while self._waiting:
            name, schema, path = self._waiting.popleft()
            definitions[name] = self._prepared(schema, path)
        if isinstance(prepared, bool) or not definitions:
            return prepared
        return {**prepared, "$defs": definitions}

    def _prepared(self, given: Any, path: str) -> Any:
        self._left -= 1
        if self._left < 0:
            raise SchemaError("the schema", path, f"is beyond the {MAX_PREPARED} schemas it is rewritten to")
        if isinstance(given, bool):
            self.open_keys |= given
            return given
        if (wrong := next((keyword for keyword in NOT_HELD if keyword in given), None)) is not None:
            raise SchemaError(wrong, path, "cannot be held")
        if (listed := self._listed(given, path)) is not None:
            return listed
        out: dict[str, Any] = {}
        beside: list[Any] = []
        for keyword, value in given.items():
            if keyword in _COPIED:
                out[keyword] = value
            elif (rule := getattr(self, _RULES.get(keyword, ""), None)) is not None:
                for key, part in rule(given, value, joined(path, keyword)).items():
                    if key == "properties":
                        out[key] = {**out.get(key, {}), **part}
                    elif key in out or keyword in _LAST or (key in given and key != keyword):
                        beside.append({key: part})
                    else:
                        out[key] = part
        if "propertyNames" in given:
            self._limit_names(given, out, path)
        elif _names_patterns_only(given) and "/allOf/" not in path:
            # Pydantic writes a dictionary of constrained names so, and means no others.
            out["additionalProperties"] = False
        elif self._closed and _is_whole_object(given, path):
            out.setdefault("additionalProperties", False)
        if out.get("additionalProperties") is not False and _describes_object(given):
            self.open_keys = True
        return {"allOf": [out, *beside]} if beside else out

    def _named(self, schema: Any, path: str, tag: str | None = None) -> dict[str, Any]:
        """Returns a reference to the prepared form of a schema.

        Args:
            tag: A property that is required besides.
        """
        key = path, tag
        if key not in self._names:
            self._names[key] = f"s{len(self._names)}"
            if tag is not None:
                schema = {**schema, "required": [*dict.fromkeys([*schema.get("required", []), tag])]}
            self._waiting.append((self._names[key], schema, path))
        return {"$ref": f"#/$defs/{self._names[key]}"}

    def _ref(self, given: dict[str, Any], value: str, path: str) -> dict[str, Any]:
        below = path.rpartition("/")[0]
        where, schema = self._document.target(value, below)
        self._document.followed({"$ref": value}, below)
        return self._named(schema, where)

    def _all(self, given: dict[str, Any], value: list[Any], path: str) -> dict[str, Any]:
        keyword = path.rpartition("/")[2]
        return {keyword: [self._prepared(part, joined(path, index)) for index, part in enumerate(value)]}

    def _each(self, given: dict[str, Any], value: dict[str, Any], path: str) -> dict[str, Any]:
        return {"properties": {name: self._prepared(part, joined(path, name)) for name, part in value.items()}}

    def _one_of(self, given: dict[str, Any], value: list[Any], path: str) -> dict[str, Any]:
        if len(value) > MAX_BRANCHES:
            raise SchemaError("oneOf", path.rpartition("/")[0], f"has more than {MAX_BRANCHES} branches; use anyOf")
        branches, prepared = [], []
        for index, branch in enumerate(value):
            where = joined(path, index)
            tagged = self._tagged(given, branch, where)
            branches.append(branch if tagged is None else tagged[0])
            prepared.append(self._prepared(branch, where) if tagged is None else tagged[1])
        others: list[list[Any]] = [[] for _ in branches]
        for first, second in self._exclusion.overlaps(branches, path):
            # Exactly one of two that overlap: none holds where the other does.
            for one, other in ((first, second), (second, first)):
                try:
                    opposite = negated(branches[other], self._document, path)
                except NotNegatable:
                    raise SchemaError(
                        "oneOf",
                        path.rpartition("/")[0],
                        f"cannot be held: branches {first} and {second} may both be valid; use anyOf, or give each a "
                        "required property with a const that differs",
                    ) from None
                others[one].append(self._prepared(opposite, path))
        return {"anyOf": [{"allOf": [own, *rest]} if rest else own for own, rest in zip(prepared, others, strict=True)]}

    def _tagged(self, given: dict[str, Any], branch: Any, path: str) -> tuple[Any, Any] | None:
        """Returns a branch of a discriminated union, as it was given and prepared, with its tag required: programs that
        read the output need it. None if the branch has no such property."""
        tag = given["discriminator"].get("propertyName") if is_object(given.get("discriminator")) else None
        if not is_object(branch) or not isinstance(tag, str):
            return None
        where, schema = self._document.target(branch["$ref"], path) if "$ref" in branch else (path, branch)
        if not is_object(schema) or tag not in schema.get("properties", {}):
            return None
        required = {**schema, "required": [*dict.fromkeys([*schema.get("required", []), tag])]}
        return required, self._named(schema, where, tag)

    def _not(self, given: dict[str, Any], value: Any, path: str) -> dict[str, Any]:
        try:
            opposite = negated(value, self._document, path)
        except NotNegatable as error:
            inside = "" if str(error) == "not" else f" around {error}"
            raise SchemaError("not", path.rpartition("/")[0], f"cannot be held{inside}") from None
        return {"allOf": [self._prepared(opposite, path)]}

    def _if(self, given: dict[str, Any], value: Any, path: str) -> dict[str, Any]:
        below = path.rpartition("/")[0]
        try:
            opposite = negated(value, self._document, path)
        except NotNegatable as error:
            raise SchemaError("if", below, f"cannot be held: its opposite cannot be said ({error})") from None
        branches = [
            [(value, path), (given.get("then", True), joined(below, "then"))],
            [(opposite, path), (given.get("else", True), joined(below, "else"))],
        ]
        return {"allOf": [{"anyOf": [{"allOf": [self._prepared(*part) for part in parts]} for parts in branches]}]}

    def _dependent(self, given: dict[str, Any], value: dict[str, Any], path: str) -> dict[str, Any]:
        """``dependentRequired``, ``dependentSchemas`` and their forerunner ``dependencies``."""
        every = []
        for name, needed in value.items():
            schema = {"required": needed} if isinstance(needed, list) else needed
            present = {"allOf": [{"required": [name]}, self._prepared(schema, joined(path, name))]}
            every.append({"anyOf": [{"properties": {name: False}}, present]})
        return {"allOf": every} if every else {}

    def _additional(self, given: dict[str, Any], value: Any, path: str) -> dict[str, Any]:
        return {"additionalProperties": self._prepared(value, path)}

    def _unevaluated(self, given: dict[str, Any], value: Any, path: str) -> dict[str, Any]:
        below, _, keyword = path.rpartition("/")
        if value is True or value == {}:
            return {}
        if given.keys() & _APPLICATORS:
            raise SchemaError(keyword, below, "cannot be held beside schemas that are combined")
        twin = "additionalProperties" if keyword == "unevaluatedProperties" else "items"
        return {} if twin in given else {twin: self._prepared(value, path)}

    def _items(self, given: dict[str, Any], value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, list):  # before draft 2020-12
            first = {"prefixItems": [self._prepared(part, joined(path, index)) for index, part in enumerate(value)]}
            rest = given.get("additionalItems", True)
            return first if rest is True else {**first, "items": self._prepared(rest, path)}
        return {"items": self._prepared(value, path)}

    def _listed(self, given: dict[str, Any], path: str) -> dict[str, Any] | None:
        """Returns the arrays of an array schema with ``uniqueItems`` whose items are a few listed values."""
        if not given.get("uniqueItems") or given.get("type") != "array" or given.keys() - _OF_ARRAYS - ANNOTATIONS:
            return None
        found = self._distinct(given, path)
        return found if "anyOf" in found else None

    def _distinct(self, given: dict[str, Any], path: str) -> dict[str, Any]:
        found = arrays.of_distinct(given, self._document, path, most_arrays=self._arrays_left) or {}
        self._arrays_left -= len(found.get("anyOf", ()))
        return found

    def _unique(self, given: dict[str, Any], value: bool, path: str) -> dict[str, Any]:
        if not value:
            return {}
        found = self._distinct(given, path.rpartition("/")[0])
        others = [one for one in sorted(types(given)) if one != "array"]
        return {"anyOf": [{"type": others}, *found["anyOf"]]} if others and "anyOf" in found else found

    def _format(self, given: dict[str, Any], value: str, path: str) -> dict[str, Any]:
        if value in formats.LIBRARY:
            return {"format": value}
        found = formats.pattern(value)
        return {"pattern": found} if found is not None else {}

    def _pattern(self, given: dict[str, Any], value: str, path: str) -> dict[str, Any]:
        try:
            found = patterns.conditions(value)
        except ValueError as error:
            raise SchemaError("pattern", path.rpartition("/")[0], str(error)) from None
        if len(found) == 1:
            return {"pattern": found[0]}
        return {"allOf": [{"pattern": one} for one in found]}

    def _pattern_properties(self, given: dict[str, Any], value: dict[str, Any], path: str) -> dict[str, Any]:
        named: dict[str, Any] = {}
        open_: dict[str, Any] = {}
        for pattern, schema in value.items():
            prepared = self._prepared(schema, joined(path, pattern))
            words = patterns.listed(pattern)
            if words is not None and not given.get("properties", {}).keys() & set(words):
                named.update(dict.fromkeys(words, prepared))
                continue
            try:
                conditions = patterns.conditions(pattern)
            except ValueError as error:
                raise SchemaError("patternProperties", path.rpartition("/")[0], f"{pattern!r} {error}") from None
            if len(conditions) > 1:
                why = f"{pattern!r} has look-ahead that cannot be held"
                raise SchemaError("patternProperties", path.rpartition("/")[0], why)
            open_[conditions[0]] = prepared
        if open_:
            self.open_keys = True
        return ({"patternProperties": open_} if open_ else {}) | ({"properties": named} if named else {})

    def _limit_names(self, given: dict[str, Any], out: dict[str, Any], path: str) -> None:
        """Rewrites ``propertyNames`` to properties that are listed, or to a pattern of names."""
        names: Any = self._document.followed(given["propertyNames"], path)
        rest = out.get("additionalProperties", True)
        if names is True or names == {} or (is_object(names) and names.keys() <= {"type", "title", "description"}):
            return
        if "patternProperties" in given:
            raise SchemaError("propertyNames", path, "cannot be held beside patternProperties")
        allowed = arrays.listed(names, self._document, path) if names is not False else []
        if allowed is not None:
            known = out.get("properties", {})
            out["properties"] = {name: known.get(name, rest) for name in allowed if isinstance(name, str)}
            out["additionalProperties"] = False
            return
        if given.get("properties"):
            raise SchemaError("propertyNames", path, "cannot be held beside properties, unless it lists the names")
        pattern = self._name_pattern(names, path)
        out["patternProperties"], out["additionalProperties"] = {pattern: rest}, False
        self.open_keys = True

    def _name_pattern(self, names: Any, path: str) -> str:
        prepared = self._prepared(names, joined(path, "propertyNames"))
        asked = prepared.keys() - {"type"} if is_object(prepared) else {"propertyNames"}
        if asked == {"pattern"}:
            return prepared["pattern"]
        if asked and asked <= {"minLength", "maxLength"}:
            return f"^(?s:.{{{prepared.get('minLength', 0)},{prepared.get('maxLength', '')}}})$"
        raise SchemaError("propertyNames", path, "can only be held as a list of names, one pattern, or lengths")


_RULES = {
    "$ref": "_ref",
    "allOf": "_all",
    "anyOf": "_all",
    "oneOf": "_one_of",
    "not": "_not",
    "if": "_if",
    "properties": "_each",
    "patternProperties": "_pattern_properties",
    "additionalProperties": "_additional",
    "unevaluatedProperties": "_unevaluated",
    "unevaluatedItems": "_unevaluated",
    "dependentRequired": "_dependent",
    "dependentSchemas": "_dependent",
    "dependencies": "_dependent",
    "prefixItems": "_all",
    "items": "_items",
    "uniqueItems": "_unique",
    "format": "_format",
    "pattern": "_pattern",
}
"""Keyword and the method that rewrites it: ``(schema, value, path of the value)`` to keywords that replace it."""


def _names_patterns_only(schema: dict[str, Any]) -> bool:
    """Whether the schema is of objects whose names follow patterns, and says no more."""
    told = schema.keys() - ANNOTATIONS
    return told <= {"type", "patternProperties", "minProperties", "maxProperties"} and "patternProperties" in told


def _is_whole_object(schema: dict[str, Any], path: str) -> bool:
    """Whether the schema alone says which properties an object has."""
    if schema.keys() & {*_APPLICATORS, "patternProperties"} or _PARTS & {*path.split("/")}:
        return False
    return "properties" in schema or schema.get("type") == "object"


def _describes_object(schema: dict[str, Any]) -> bool:
    """Whether the schema itself, not one it refers to, describes objects."""
    if "type" in schema:
        return "object" in types(schema)
    return bool(schema.keys() & {"properties", "patternProperties", "additionalProperties", "required"}) or not (
        schema.keys() & {*_APPLICATORS, "const", "enum"}
    )
