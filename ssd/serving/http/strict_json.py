"""JSON from clients, parsed strictly: what passes is UTF-8 text, finite numbers and bounded nesting."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from .errors import APIError, shown

MAX_DEPTH = 100
"""Nested arrays and objects."""
MIN_INTEGER, MAX_INTEGER = -(2**63), 2**64 - 1
"""What 64 bits hold, signed or not. Fields that are numbers have narrower bounds."""


def parse(raw: bytes, what: str = "the body") -> Any:
    """Parses JSON.

    Args:
        what: what messages call it.

    Raises:
        APIError: 400: not UTF-8, not JSON, a key twice in an object, ``NaN`` or ``Infinity``, a number of too
            many digits, too deep nesting. Values are not checked: see ``check``.
    """
    if not raw.strip():
        raise APIError(400, f"{what} is empty; send a JSON object")
    try:
        return json.loads(raw.decode(), object_pairs_hook=_object, parse_constant=_constant)
    except UnicodeDecodeError as error:
        raise APIError(400, f"{what} is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise APIError(400, f"{what} is not valid JSON: {error}") from None
    except RecursionError:
        raise APIError(400, f"{what} is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError:  # Python's limit on the digits of an integer
        raise APIError(400, f"{what} has a number of too many digits") from None


def check(value: Any) -> None:
    """Checks every text and number of a parsed body.

    Raises:
        APIError: 400, naming the field: a lone surrogate, a number beyond 64 bits or infinite, too deep nesting.
    """
    _check(value, ())


def _check(value: Any, path: tuple[str | int, ...]) -> None:
    if isinstance(value, str):
        if not value.isascii():
            _check_text(value, path)
    elif isinstance(value, int):
        if not MIN_INTEGER <= value <= MAX_INTEGER:
            _refuse(path, "the number is too large")
    elif isinstance(value, float):
        if not math.isfinite(value):
            _refuse(path, "the number is too large")
    elif isinstance(value, list | dict):
        if len(path) >= MAX_DEPTH:
            _refuse(path[:1], f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(value, dict):
            for name, item in value.items():
                _check_text(name, path or (name,))
                _check(item, (*path, name))
        else:
            for index, item in enumerate(value):
                _check(item, (*path, index))


def _check_text(text: str, path: tuple[str | int, ...]) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        _refuse(path, f"lone surrogate U+{ord(text[error.start]):04X} at character {error.start}: not Unicode text")


def _refuse(path: tuple[str | int, ...], why: str) -> NoReturn:
    where = ".".join(shown(str(part)) for part in path[:8])
    raise APIError(400, f"{where}: {why}" if where else why, param=str(path[0]) if path else None, code="invalid_value")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names: set[str] = set()
        for name, _ in pairs:
            if name in names:
                raise APIError(400, f"{shown(name)} is given twice", param=name, code="invalid_value")
            names.add(name)
    return found


def _constant(name: str) -> NoReturn:
    raise APIError(400, f"{name} is not valid JSON")
