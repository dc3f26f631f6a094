"""Request fields of other servers: which are accepted, which are refused, and what becomes of unknown ones."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from ..http.errors import MAX_NAME, APIError, shown
from .structured import REPLACED

log = logging.getLogger(__name__)

IGNORED_HEADER = "x-ssd-ignored-parameters"
"""Names the unknown fields of a request, in its answer."""
MAX_SHOWN = 8
"""Unknown fields that the header names; further ones are ``...``."""
MAX_LOGGED = 256
"""Unknown fields that are logged in the life of a server, each once."""

HARMLESS = frozenset(
    {
        "guided_decoding_backend",
        "metadata",
        "moderation",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "return_mm_kwargs",
        "return_token_offsets",
        "safety_identifier",
        "service_tier",
        "session_id",
        "store",
        "stream_interval",
        "truncation_side",
        "user",
        "verbosity",
    }
)
"""Fields without effect on the text: bookkeeping, hints about speed, what only matters beside a refused field."""

NOTHING: tuple[Any, ...] = (None,)
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": NOTHING,
    "best_of": (None, 1),
    "cache_salt": NOTHING,
    "early_stopping": (None, False),
    "ec_transfer_params": (None, {}),
    "echo": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "include_reasoning": (None, True),
    "kv_transfer_params": (None, {}),
    "length_penalty": (None, 1),
    "logprob_token_ids": NOTHING,
    "media_io_kwargs": (None, {}),
    "mm_payload": NOTHING,
    "mm_processor_kwargs": (None, {}),
    "modalities": (None, ["text"]),
    "prompt_embeds": NOTHING,
    "repetition_detection": NOTHING,
    "return_prompt_text": (None, False),
    "routed_experts_prompt_start": (None, 0),
    "spaces_between_special_tokens": (None, True, False),
    "suffix": (None, ""),
    "thinking_token_budget": (None, -1),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "truncate_prompt_tokens": NOTHING,
    "use_beam_search": (None, False),
    "vllm_xargs": (None, {}),
    "watermarking": (None, False),
    "web_search_options": NOTHING,
}
"""OpenAI's and vLLM's fields that are not supported, and the values that ask for nothing: those are accepted."""

WHY = {
    "audio": "this server answers with text",
    "best_of": "use n",
    "cache_salt": "prefixes are shared between requests; engine.prefix_caching=false ends that for all of them",
    "early_stopping": "there is no beam search",
    "function_call": "it is OpenAI's old name of tool_choice",
    "functions": "it is OpenAI's old name of tools",
    "length_penalty": "there is no beam search",
    "media_io_kwargs": "this server reads text",
    "mm_payload": "this server reads text",
    "mm_processor_kwargs": "this server reads text",
    "modalities": "this server answers with text",
    "prompt_embeds": "this server reads text and token ids",
    "suffix": "text is only generated at the end of a prompt",
    "tool_choice": "it is a field of /v1/chat/completions",
    "tools": "they are a field of /v1/chat/completions",
}
"""What the error says beside the field's name."""

CONSTRAINTS = {
    **REPLACED,
    "ebnf": "structured_outputs.grammar",
    "grammar": "structured_outputs.grammar",
    "json_schema": "response_format or structured_outputs.json",
    "regex": "structured_outputs.regex",
}
"""Other servers' fields that constrain the text, and what they are called here. Text that ignores them would be
wrong, so they are never ignored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SortedFields:
    """The fields of a request."""

    known: dict[str, Any]
    unknown: tuple[str, ...]


def sort_fields(known: Collection[str], raw: Mapping[str, Any]) -> SortedFields:
    """Returns the fields of a body without those that ask for nothing.

    Args:
        known: fields that the body has.

    Raises:
        APIError: 400: a field asks for something that is not supported.
    """
    given: dict[str, Any] = {}
    unknown: list[str] = []
    for name, value in raw.items():
        if name in known:
            given[name] = value
        elif name in CONSTRAINTS:
            if value is not None:
                raise APIError(400, f"{name} is called {CONSTRAINTS[name]} here", param=name, code="unknown_parameter")
        elif name in UNSUPPORTED:
            if not any(_same(value, neutral) for neutral in UNSUPPORTED[name]):
                why = f": {WHY[name]}" if name in WHY else " by this server"
                raise APIError(400, f"{name} is not supported{why}", param=name, code="unsupported_parameter")
        elif name not in HARMLESS:
            unknown.append(name)
    return SortedFields(known=given, unknown=tuple(unknown))


class UnknownFields:
    """Ignores unknown fields, or refuses them. Safe to call from any thread.

    Args:
        policy: ``server.unknown_parameters``.
    """

    def __init__(self, policy: Literal["ignore", "refuse"]):
        self._refusing = policy == "refuse"
        self._logged: set[str] = set()

    def take(self, names: Sequence[str], known: Collection[str]) -> dict[str, str]:
        """Takes in the unknown fields of one request. The log names each field once.

        Args:
            known: fields that the body has; the most similar one is given as a hint.

        Returns: headers of the answer.

        Raises: APIError: 400: unknown fields are refused.
        """
        if not names:
            return {}
        hints = {name: _nearest(name, known) for name in names[:MAX_SHOWN]}
        if self._refusing:
            name, near = next(iter(hints.items()))
            hint = f" (did you mean {near!r}?)" if near else ""
            param = name.partition(".")[0]
            raise APIError(400, f"unknown parameter '{shown(name)}'{hint}", param=param, code="unknown_parameter")
        for name in names:
            if len(self._logged) < MAX_LOGGED and shown(name) not in self._logged:
                self._logged.add(shown(name))
                log.warning("unknown request parameter '%s' is ignored (server.unknown_parameters)", shown(name))
        listed = [_quoted(name) + (f"; did-you-mean={_quoted(near)}" if near else "") for name, near in hints.items()]
        return {IGNORED_HEADER: ", ".join([*listed, *(["..."] if len(names) > MAX_SHOWN else [])])}


def _nearest(name: str, known: Collection[str]) -> str | None:
    if "." in name:  # a field of a field, which is similar to its other fields
        return None
    near = get_close_matches(name[:MAX_NAME], [*known, *UNSUPPORTED, *HARMLESS], n=1)
    return near[0] if near else None


def _quoted(name: str) -> str:
    """Returns a name for a header: quoted, short, and in ASCII."""
    return json.dumps(name[:MAX_NAME])


def _same(value: Any, neutral: Any) -> bool:
    """Whether a value is a neutral one, where 1.0 counts as 1 but true does not."""
    return value == neutral and (type(value) is type(neutral) or isinstance(value, float))
