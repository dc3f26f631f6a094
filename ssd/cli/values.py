"""Options of the ``ssd`` command, from texts to values."""

from __future__ import annotations

from pathlib import Path

from ..errors import RequestError, UsageError
from ..request.structured import StructuredOutputsParams


def bias(given: str) -> tuple[int, float]:
    token, _, bias = given.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise RequestError(f"--logit-bias {given!r} must look like ID=BIAS, for example 42=-1.5") from None


def ids(given: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(token) for token in given.split(","))
    except ValueError:
        raise RequestError(f"{option} {given!r} must be token ids with commas between, for example 13,198") from None


def structured(schema: Path | None, regex: str | None) -> StructuredOutputsParams | None:
    if schema is None and regex is None:
        return None
    try:
        text = None if schema is None else schema.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--json-schema {schema}: cannot be read ({error})") from None
    # In one line: small models indent for ever where they may.
    return StructuredOutputsParams(json=text, regex=regex, disable_any_whitespace=schema is not None)
