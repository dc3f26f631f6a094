"""Resolves sampling parameters against a vocabulary: checks token ids, turns bad words into ids."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ..errors import RequestError
from ..request.sampling_params import MAX_BAD_WORDS, SamplingParams


def resolve(params: SamplingParams, tokenizer: Any, *, vocabulary: int, ends: Iterable[int]) -> SamplingParams:
    """Returns the parameters as the workers take them.

    Args:
        vocabulary: V.
        ends: End-of-text ids.

    Raises:
        RequestError: A token id is outside the vocabulary, a bad word has no tokens, or the excluded tokens could leave
            nothing to choose from.
    """
    if not (params.processed or params.stop_token_ids):
        return params
    words = tuple(ids for word in params.bad_words for ids in _ids(word, tokenizer))
    if len(words) > MAX_BAD_WORDS:
        raise RequestError(
            f"bad_words must stand for at most {MAX_BAD_WORDS} token sequences; got {len(words)} (a text stands for "
            "two: with and without a space before it)"
        )
    named = {
        "stop_token_ids": params.stop_token_ids,
        "logit_bias": dict(params.logit_bias),
        "allowed_token_ids": params.allowed_token_ids or (),
        "bad_words": [token for word in words for token in word],
    }
    for name, ids in named.items():
        if wrong := [token for token in ids if token >= vocabulary]:
            raise RequestError(f"{name} has token id {wrong[0]}; this model's token ids are below {vocabulary}")
    # A longer bad word excludes its last token only after the others, but that may be when nothing else is allowed.
    excluded = {word[-1] for word in words}
    if params.min_tokens:
        excluded |= {*ends, *params.stop_token_ids}
    allowed = range(vocabulary) if params.allowed_token_ids is None else params.allowed_token_ids
    if excluded and all(token in excluded for token in allowed):
        raise RequestError(
            "bad_words and min_tokens could exclude every token that may be chosen; widen allowed_token_ids or ban less"
        )
    return replace(params, bad_words=words)


def _ids(word: str | tuple[int, ...], tokenizer: Any) -> list[tuple[int, ...]]:
    """Returns the token sequences a bad word stands for.

    As in vLLM, a text stands for its tokens without a leading space, and for those with one if they are as many and
    begin with another token.

    Raises: RequestError: It has no tokens.
    """
    if not isinstance(word, str):
        return [word]
    text = word.lstrip()
    bare = tuple(tokenizer.encode(text, add_special_tokens=False)) if text else ()
    if not bare:
        raise RequestError(f"bad_words: {word!r} is no token; give a text with more than spaces, or token ids")
    spaced = tuple(tokenizer.encode(" " + text, add_special_tokens=False))
    return [bare, spaced] if len(spaced) == len(bare) and spaced[0] != bare[0] else [bare]
