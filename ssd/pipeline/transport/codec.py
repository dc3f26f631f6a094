"""The wire codec: dataclasses as msgpack maps with a ``type`` key.

Both lanes use it, the control lane (``messages``) and the client lane (``serving.lane.wire``). What arrives is
checked against the annotations of the message's fields before the message is made. Sizes and lengths are bounded,
nothing is pickled, and msgpack's extension and binary types are refused.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import types
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import msgpack

from ...errors import PipelineError, RequestError

Table = dict[type, Callable[[Any], Any] | None]
"""The msgpack types a field accepts, each with the function that turns such a value into the field's. None keeps it."""
_NONE_TYPE = type(None)
_packers = threading.local()


class Codec:
    """Encodes and decodes the messages of one lane.

    Args:
        messages: the dataclasses that may cross the lane. Their fields are numbers, texts, flags,
            None, lists, tuples, maps, and dataclasses of these.
        max_bytes: largest message accepted.
        lane: name of the lane, for error messages.
    """

    def __init__(self, *messages: type, max_bytes: int, lane: str):
        self.types = {cls.__name__: cls for cls in messages}
        self.max_bytes, self._lane = max_bytes, lane

    def encode(self, message: Any) -> bytes:
        """Returns the message as bytes.

        Raises:
            RequestError: a value is out of the wire's range, such as an integer of more than 64
                bits or a text that is not UTF-8.
        """
        packer = getattr(_packers, "packer", None)
        if packer is None:
            packer = _packers.packer = msgpack.Packer(default=_nested)
        names, values = _fields(type(message))
        try:
            return cast(bytes, packer.pack(dict(zip(names, values(message), strict=True))))
        except (ValueError, OverflowError, TypeError) as error:
            raise RequestError(f"{type(message).__name__} cannot be sent: {error}") from error

    def decode(self, raw: bytes) -> Any:
        """Returns the message that the bytes hold.

        Raises:
            PipelineError: these are not the bytes of a message of this lane.
            RequestError: sampling parameters are out of range.
        """
        if len(raw) > self.max_bytes:
            raise PipelineError(f"a message of {len(raw)} bytes on the {self._lane}; at most {self.max_bytes} fit")
        try:
            body: dict[str, Any] = msgpack.unpackb(raw, max_ext_len=0, max_bin_len=0)
            return _read(self.types[body.pop("type")], body)
        except RequestError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, msgpack.UnpackException) as error:
            raise PipelineError(f"not a message of the {self._lane}: {error}") from error


@functools.cache
def _fields(cls: type) -> tuple[tuple[str, ...], Callable[[Any], tuple[Any, ...]]]:
    """Names of a message's fields after ``type``, and a function that reads their values."""
    names = tuple(field.name for field in dataclasses.fields(cls))
    if not names:
        return ("type",), lambda message: (type(message).__name__,)
    return ("type", *names), attrgetter("__class__.__name__", *names)


def _nested(value: Any) -> dict[str, Any]:
    """A dataclass inside a message, as msgpack asks for it."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"{type(value).__name__} is not a type of the wire")
    names, values = _fields(type(value))
    return dict(zip(names[1:], values(value)[1:], strict=True))


def _read(cls: type, body: Any) -> Any:
    tables = _tables(cls)
    for name, value in body.items():
        try:
            convert = tables[name][type(value)]
        except KeyError:
            raise TypeError(f"{cls.__name__} takes no {name} of type {type(value).__name__}") from None
        if convert is not None:
            body[name] = convert(value)
    return cls(**body)


@functools.cache
def _tables(cls: type) -> dict[str, Table]:
    hints = get_type_hints(cls)
    return {field.name: _table(hints[field.name]) for field in dataclasses.fields(cls)}


class _Anything(Table):
    """The table of a field that takes every value as it is."""

    def __missing__(self, key: type) -> None:
        return None


def _table(hint: Any) -> Table:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        tables = [_table(member) for member in inner]
        if any(isinstance(table, _Anything) for table in tables):
            return _Anything()
        return {key: convert for table in reversed(tables) for key, convert in table.items()}
    if origin is Literal:
        return {type(value): None for value in inner}
    if hint in (int, str, bool, _NONE_TYPE):
        return {hint: None}
    if hint is float:
        return {float: None, int: None}
    if dataclasses.is_dataclass(hint):
        return {dict: functools.partial(_read, hint)}
    if (origin or hint) is list:
        return {list: _elements(_table(inner[0])) if inner else None}
    if (origin or hint) is tuple:
        if len(inner) == 2 and inner[1] is ...:
            elements = _elements(_table(inner[0]))
            return {list: tuple if elements is None else lambda values: tuple(elements(values))}
        return {list: functools.partial(_places, [_elements(_table(member)) for member in inner])}
    if (origin or hint) in (dict, Mapping):
        return {dict: None}
    return _Anything()


def _elements(table: Table) -> Callable[[list[Any]], list[Any]] | None:
    """Returns what checks and converts the elements of a list, or None if every element is kept."""
    if isinstance(table, _Anything):
        return None
    allowed = frozenset(table)

    def checked(values: list[Any]) -> list[Any]:
        if not allowed.issuperset(map(type, values)):
            raise TypeError(f"a list may hold {', '.join(sorted(kind.__name__ for kind in allowed))} only")
        return values

    def converted(values: list[Any]) -> list[Any]:
        return [convert(value) if (convert := table[type(value)]) else value for value in checked(values)]

    return converted if any(table.values()) else checked


def _places(places: list[Callable[[list[Any]], list[Any]] | None], values: list[Any]) -> tuple[Any, ...]:
    """Returns a tuple with a type for each place."""
    return tuple(place([value])[0] if place else value for place, value in zip(places, values, strict=True))
