"""Prompts as callers give them, paired with their sampling parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

from ..errors import RequestError
from . import checks
from .sampling_params import SamplingParams

Prompt = str | Sequence[int]
"""Text, or token ids."""
Prompts = Prompt | Sequence[str] | Sequence[Sequence[int]]
"""One prompt, or a list of them."""


class Asked(NamedTuple):
    """A prompt with its parameters."""

    prompt: str | list[int]
    params: SamplingParams


def pair(prompts: Prompts, params: SamplingParams | Sequence[SamplingParams] | None = None) -> list[Asked]:
    """Returns every prompt with its parameters.

    Args:
        prompts: One prompt, or a list. A list of integers is one prompt of token ids.
        params: For all prompts, or one for each. None is the defaults.

    Raises:
        RequestError: A prompt is neither text nor token ids, or there are not as many parameters as prompts.
    """
    if isinstance(prompts, str) or _is_token_ids(prompts):
        listed: list[Any] = [prompts]
    else:
        listed = list(checks.listed("prompts", prompts))
    if params is None or isinstance(params, SamplingParams):
        each: list[Any] = [params] * len(listed)
    else:
        each = list(checks.listed("params", params))
    if len(each) != len(listed):
        raise RequestError(f"{len(listed)} prompts but {len(each)} sampling parameters")
    return [one(prompt, own) for prompt, own in zip(listed, each, strict=True)]


def one(prompt: Prompt, params: SamplingParams | None = None) -> Asked:
    """Returns one prompt with its parameters.

    Raises:
        RequestError: The prompt is neither text that UTF-8 can encode nor token ids; the parameters are not
            ``SamplingParams``.
    """
    if params is not None and not isinstance(params, SamplingParams):
        raise checks.refuse("params", "SamplingParams", params)
    if isinstance(prompt, str):
        if not checks.is_utf8(prompt):
            raise checks.refuse("prompt", "valid Unicode, without lone surrogates", prompt)
        return Asked(prompt, params or SamplingParams())
    if isinstance(prompt, bytes | Mapping) or not isinstance(prompt, Iterable):
        raise checks.refuse("prompt", "text or a list of token ids", prompt)
    return Asked(list(checks.token_ids("prompt", prompt)), params or SamplingParams())


def _is_token_ids(given: Any) -> bool:
    """Whether this is a list of integers, and not empty: an empty list is no prompt rather than an empty one."""
    if isinstance(given, bytes | Mapping) or not isinstance(given, Sequence) or not given:
        return False
    return all(isinstance(token, Integral) for token in given)
