"""Checks shared by the values of a request. Every message names the field, its limit and the value given."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from ..errors import RequestError

MAX_TOKEN_ID = 2**31 - 1
SHOWN_CHARACTERS = 60
"""Longest part of a value that an error message quotes."""


def refuse(field: str, rule: str, value: Any) -> RequestError:
    """Returns the error for a value that breaks a rule: one line, ``FIELD must be RULE; got VALUE``."""
    return RequestError(f"{field} must be {rule}; got {shown(value)}")


def shown(value: Any) -> str:
    """Returns a value as an error message quotes it: printable, one line, shortened."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        text = f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."


def is_utf8(text: str) -> bool:
    """Returns whether a text can be encoded: lone surrogates cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def integer(field: str, value: Any, low: int, high: int) -> int:
    """Returns the value as an ``int``.

    Raises:
        RequestError: It is not an integer in [low, high].
    """
    if isinstance(value, Integral) and not isinstance(value, bool):
        exact = int(value)
        if low <= exact <= high:
            return exact
    raise refuse(field, f"an integer in [{low}, {high}]", value)


def number(field: str, value: Any, low: float, high: float) -> float:
    """Returns the value as a ``float``.

    Raises:
        RequestError: It is not a number in [low, high]. NaN is not.
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            exact = float(value)
        except OverflowError:
            exact = math.inf
        if low <= exact <= high:
            return exact
    raise refuse(field, f"a number in [{low:g}, {high:g}]", value)


def boolean(field: str, value: Any) -> bool:
    """Returns the value. Raises: RequestError: It is not True or False."""
    if not isinstance(value, bool):
        raise refuse(field, "true or false", value)
    return value


def text(field: str, value: Any, longest: int | None = None) -> str:
    """Returns the value.

    Raises:
        RequestError: It is not a text of 1 to ``longest`` characters that UTF-8 can encode.
    """
    if not isinstance(value, str) or not value:
        raise refuse(field, "a text that is not empty", value)
    if longest is not None and len(value) > longest:
        raise RequestError(f"{field} must have at most {longest} characters; got {len(value)}: {shown(value)}")
    if not is_utf8(value):
        raise refuse(field, "valid Unicode, without lone surrogates", value)
    return value


def listed(field: str, value: Any, most: int | None = None) -> tuple[Any, ...]:
    """Returns the entries of a list.

    Raises:
        RequestError: It is not a list (texts and mappings are not), or has more than ``most`` entries.
    """
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise refuse(field, "a list", value)
    entries = tuple(value)
    if most is not None and len(entries) > most:
        raise RequestError(f"{field} must have at most {most} entries; got {len(entries)}")
    return entries


def token_ids(field: str, value: Any, most: int | None = None) -> tuple[int, ...]:
    """Returns the entries of a list of token ids.

    Raises:
        RequestError: It is not a list of at most ``most`` integers in [0, ``MAX_TOKEN_ID``].
    """
    ids = listed(field, value, most)
    if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) <= MAX_TOKEN_ID:
        return ids
    return tuple(integer(f"{field}: a token id", token, 0, MAX_TOKEN_ID) for token in ids)
