"""Arrays whose items differ (``uniqueItems``).

No grammar can compare items. Where the items are a few listed values, the arrays are listed instead: in every order,
or, with more values, in the order of the list. Elsewhere ``uniqueItems`` is not held.
"""

from __future__ import annotations

from itertools import combinations, permutations
from math import comb, perm
from typing import Any

from .document import Document
from .exclusive import same, type_of, types, values
from .terms import ANNOTATIONS, SchemaError, is_object

MAX_IN_ANY_ORDER = 5
"""Most values whose arrays are listed in every order (326 arrays)."""
MAX_IN_ORDER = 8
"""Most values whose arrays are listed in the order of the values (256 arrays)."""
MAX_LISTED = 256
_RANGE = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})


def listed(schema: Any, document: Document, path: str) -> list[Any] | None:
    """Returns all values that are valid under a schema, or None if they are not a short list."""
    schema = document.followed(schema, path)
    if not is_object(schema):
        return None
    told = schema.keys() - ANNOTATIONS - {"type"}
    found: list[Any] | None = None
    if told and told <= {"const", "enum"}:
        found = values(schema)
    elif not told:
        found = {"boolean": [False, True], "null": [None]}.get(str(schema.get("type")))
    elif told <= _RANGE and schema.get("type") == "integer":
        found = _range(schema)
    elif told == {"anyOf"} and "type" not in schema:
        parts = [listed(branch, document, path) for branch in schema["anyOf"]]
        found = [value for part in parts for value in part or ()] if None not in parts else None
    if found is None or len(found) > MAX_LISTED:
        return None
    kinds, distinct = types(schema), list[Any]()
    for value in found:
        if ("anyOf" in told or type_of(value) in kinds) and not any(same(value, one) for one in distinct):
            distinct.append(value)
    return distinct


def of_distinct(schema: dict[str, Any], document: Document, path: str, *, most_arrays: int) -> dict[str, Any] | None:
    """Returns what to add to an array schema with ``uniqueItems``; None if nothing makes its items distinct.

    Args:
        most_arrays: How many arrays may be listed.

    Raises:
        SchemaError: No array is valid.
    """
    least, most = schema.get("minItems", 0), schema.get("maxItems")
    if most is not None and most <= 1:
        return {}
    if schema.get("prefixItems"):
        return None
    options = listed(schema.get("items", True), document, path)
    if options is None:
        return None
    longest = len(options) if most is None else min(most, len(options))
    if least > longest:
        raise SchemaError("uniqueItems", path, f"allows {longest} items at most; minItems is {least}")
    count, lengths = len(options), range(least, longest + 1)
    if count <= MAX_IN_ANY_ORDER and sum(perm(count, length) for length in lengths) <= most_arrays:
        ways: Any = permutations
    elif count <= MAX_IN_ORDER and sum(comb(count, length) for length in lengths) <= most_arrays:
        ways = combinations
    else:
        return {"maxItems": longest}
    arrays = [array for length in lengths for array in ways(options, length)]
    return {"anyOf": [_array(array) for array in arrays]}


def _array(items: tuple[Any, ...]) -> dict[str, Any]:
    fixed = {"type": "array", "minItems": len(items), "maxItems": len(items)}
    return {**fixed, "prefixItems": [{"const": item} for item in items], "items": False} if items else fixed


def _range(schema: dict[str, Any]) -> list[Any] | None:
    low, high = schema.get("minimum"), schema.get("maximum")
    if isinstance(schema.get("exclusiveMinimum"), int) and low is None:
        low = schema["exclusiveMinimum"] + 1
    if isinstance(schema.get("exclusiveMaximum"), int) and high is None:
        high = schema["exclusiveMaximum"] - 1
    if not isinstance(low, int) or not isinstance(high, int):
        return None
    return list(range(low, high + 1)) if high - low < MAX_LISTED else None
