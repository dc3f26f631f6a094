"""Request fields of other servers: which values of them are accepted, and what becomes of unknown fields."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches
from typing import Any

from ..http.errors import MAX_NAME, APIError, shown
from .structured import REPLACED

NOTHING: tuple[Any, ...] = (None,)
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": NOTHING,
    "best_of": (None, 1),
    "echo": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, False, True),
    "prediction": NOTHING,
    "reasoning_effort": (None, "none"),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "verbosity": (None, "medium"),
    "web_search_options": NOTHING,
}
"""OpenAI's and vLLM's fields that are not supported, and the values that ask for nothing: those are accepted."""


def supported(known: Collection[str], raw: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a body without those that ask for nothing.

    Args:
        known: fields that the body has.

    Raises:
        APIError: 400: a field that is unknown or not supported.
    """
    given: dict[str, Any] = {}
    for name, value in raw.items():
        if name in known:
            given[name] = value
        elif name in REPLACED:
            raise APIError(400, f"{name} is now {REPLACED[name]}", param=name, code="unknown_parameter")
        elif name not in UNSUPPORTED:
            near = get_close_matches(name[:MAX_NAME], [*known, *UNSUPPORTED], n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise APIError(400, f"unknown parameter '{shown(name)}'{hint}", param=name, code="unknown_parameter")
        elif not any(_same(value, neutral) for neutral in UNSUPPORTED[name]):
            raise APIError(400, f"{name} is not supported by this server", param=name, code="unsupported_parameter")
    return given


def _same(value: Any, neutral: Any) -> bool:
    """Whether a value is a neutral one, where 1.0 counts as 1 but true does not."""
    return value == neutral and (type(value) is type(neutral) or isinstance(value, float))
