"""Request bodies of a front door: read with pydantic, and errors that name the field at fault."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from . import strict_json
from .errors import APIError, shown

MAX_ITEMS = 4096
"""Items of a list. Validating more would keep other requests waiting."""
SHORT: Any = Field(max_length=MAX_ITEMS, fail_fast=True)
"""For lists in bodies: they are bounded, and the first wrong item is the error."""
_SHOULD_BE = "Input should be "
"""How pydantic's messages about types begin."""


class Fields(BaseModel):
    """An object within a body. Fields that are not declared do not concern the answer and are dropped."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, populate_by_name=True)


class Body(BaseModel):
    """A whole body. Fields that are not declared are kept in ``model_extra``."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


Read = TypeVar("Read", bound=BaseModel)


def read_body(cls: type[Read], raw: bytes) -> Read:
    """Reads the bytes of a body.

    Raises:
        APIError: 400, naming the field.
    """
    given = strict_json.parse(raw)
    if not isinstance(given, dict):
        raise APIError(400, "the body must be a JSON object")
    strict_json.check(given)
    return read_fields(cls, given)


def read_fields(cls: type[Read], given: dict[str, Any]) -> Read:
    """Reads fields, as of a query. Raises: APIError: 400, naming the field."""
    try:
        return cls.model_validate(given)
    except ValidationError as error:
        raise invalid(error, given) from None


def invalid(error: ValidationError, given: dict[str, Any]) -> APIError:
    """Returns the error answer to a body that pydantic refused.

    The answer is about the first wrong field. A value that may be of several types fails once for each, and an error
    within the value is about the type that was meant. Of what is left, an error about a value comes before one about a
    type, then the deepest does. If several types are wrong there, the message names all of them.
    """
    everything = error.errors(include_url=False)
    of_first = [one for one in everything if one["loc"][:1] == everything[0]["loc"][:1]]
    everywhere = [(_path(one["loc"], one["type"], given), one) for one in of_first]
    found = [
        (path, one)
        for path, one in everywhere
        if not _about_form(one) or not any(at[: len(path)] == path and len(at) > len(path) for at, _ in everywhere)
    ]
    path, first = max(found, key=lambda one: (_about_value(one[1]) > 0, len(one[0]), _about_value(one[1])))
    said = [_told(one) for at, one in found if at == path]
    message = _told(first)
    if not _about_value(first) and all(text.startswith(_SHOULD_BE) for text in said):
        message = _SHOULD_BE + " or ".join(dict.fromkeys(text.removeprefix(_SHOULD_BE) for text in said))
    where = ".".join(shown(str(part)) for part in path)
    return APIError(400, f"{where}: {message}", param=str(path[0]) if path else None, code="invalid_value")


def passed_on(
    extra: Mapping[str, Any], *, foreign: Mapping[str, Any], refused: Collection[str], door: str
) -> dict[str, Any]:
    """Returns the fields of a body that are not its door's own, and that its chat body takes as they are. Null is not
    taken: it asks for nothing.

    Args:
        extra: all fields that are not the door's own.
        foreign: fields of the door's protocol that are not supported, and the values that ask for nothing: those are
            dropped. None allows any value.
        refused: fields of a chat body that the door has no use for.
        door: the door's path, for messages.

    Raises:
        APIError: 400: a field is refused.
    """
    kept: dict[str, Any] = {}
    for name, value in extra.items():
        if value is None:
            continue
        if name in foreign:
            if foreign[name] is not None and not any(_same(value, neutral) for neutral in foreign[name]):
                raise APIError(400, f"{name} is not supported by this server", param=name, code="unsupported_parameter")
        elif name in refused:
            raise APIError(400, f"{name} is not a parameter of {door}", param=name, code="unknown_parameter")
        else:
            kept[name] = value
    return kept


def _same(value: Any, neutral: Any) -> bool:
    """Whether a value is a neutral one, where true is not 1."""
    return type(value) is type(neutral) and value == neutral


def renamed(error: APIError, names: Mapping[str, str]) -> APIError:
    """Returns an error about chat fields as one about the fields of the body that the client sent. A chat field that
    the client sent itself, and that the door does not have, keeps its name.

    Args:
        names: the client's name of each chat field.
    """
    param = error.param or ""
    if param not in names or error.code == "unknown_parameter":
        return error
    name, rest = names[param], error.message.removeprefix(param)
    told = name + rest if rest != error.message else error.message
    return APIError(error.status, told, param=name, code=error.code, kind=error.kind)


def _path(loc: tuple[int | str, ...], kind: str, given: Any) -> list[int | str]:
    """Returns where in the body an error lies: pydantic's location without the names of types."""
    path: list[int | str] = []
    for part in loc:
        inner = _inner(given, part)
        if inner:
            path.append(part)
            given = inner[0]
    if kind == "missing":
        path.append(loc[-1])
    return path


def _inner(value: Any, part: int | str) -> tuple[Any, ...]:
    """Returns the item or field of a value, if it has such a one."""
    if isinstance(value, dict):
        return (value[part],) if part in value else ()
    return tuple(value[part : part + 1]) if isinstance(value, list) and isinstance(part, int) else ()


def _about_value(error: ErrorDetails) -> int:
    """Returns how sure it is that an error is about a value of the right type."""
    if error["type"] == "union_tag_invalid":
        return 2
    return int(not error["type"].endswith("_type"))


def _about_form(error: ErrorDetails) -> bool:
    """Whether an error says no more than that a value has not one of the forms it may have."""
    return error["type"].endswith("_type") or error["type"] == "literal_error"


def _told(error: ErrorDetails) -> str:
    """Returns what is wrong with a value. Where only certain values are supported, the message names the one given."""
    context = error.get("ctx", {})
    if error["type"] == "union_tag_invalid":
        name, given, expected = context["discriminator"].strip("'"), context["tag"], context["expected_tags"]
        return f"{name} '{shown(given)}' is not supported by this server; it can be {expected}"
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        return f"{error['msg']}; '{shown(error['input'])}' is not supported by this server"
    if error["type"] == "too_long":
        return f"at most {context['max_length']} items are allowed"
    return error["msg"]
