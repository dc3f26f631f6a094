"""What a request asks for: how tokens are chosen, and when generation stops."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import RequestError
from . import checks
from .checks import MAX_TOKEN_ID
from .methods import METHODS, Method
from .structured import StructuredOutputsParams

MAX_SEED = 2**63 - 1
MAX_TOKENS = 2**31 - 1
MAX_TOP_K = 2**31 - 1
MAX_COMPLETIONS = 128
MAX_LOGPROBS = 20
"""The OpenAI API's limit and vLLM's default. It keeps messages small."""
MAX_TEMPERATURE = 100.0
MIN_TOP_P = 1e-6
MAX_PENALTY = 2.0
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0
MAX_LOGIT_BIAS = 100.0
MAX_LOGIT_BIASES = 4096
MAX_ALLOWED_TOKEN_IDS = 2**20
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_BAD_WORDS = 1024
MAX_BAD_WORD_LENGTH = 1024
"""Characters, or token ids, of one bad word."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to choose tokens, and when to stop. Names and meanings are vLLM's.

    Values are normalised when the object is made: lists become tuples, numbers ``int`` or ``float``, and None becomes
    the value it stands for.

    Raises:
        RequestError: A value is out of range. The message names the field, its limit and the value.
    """

    temperature: float = 0.0
    """In [0, 100]. 0 is greedy decoding; otherwise logits are divided by it."""
    top_k: int = 0
    """Keep the k most probable tokens, at most 2**31 - 1. 0 keeps all."""
    top_p: float = 1.0
    """In [1e-6, 1]. Keep the smallest set of most probable tokens whose probability reaches this."""
    min_p: float = 0.0
    """In [0, 1]. Drop tokens that are less probable than this share of the most probable one."""
    repetition_penalty: float = 1.0
    """In [0.01, 100]. Positive logits of tokens in the prompt or the output are divided by it, negative ones
    multiplied; 1 has no effect."""
    presence_penalty: float = 0.0
    """In [-2, 2]. Subtracted from the logit of every token in the output."""
    frequency_penalty: float = 0.0
    """In [-2, 2]. Subtracted from the logit of a token once for each time it is in the output."""
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    """Added to the logits of these token ids, each in [-100, 100]. Kept as sorted pairs."""
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    """Texts, or sequences of token ids, that must not occur in the output: the last token of one is excluded
    where it would complete it. As in vLLM, a text stands for its tokens with and without a space before it;
    other tokens may still spell it."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Choose from these tokens only. None allows all."""
    n: int = 1
    """Completions of the prompt, at most 128. ``completion_seed`` gives their seeds."""
    max_tokens: int = 256
    """Most tokens to generate. None generates until the context is full; 0 generates nothing, so that only the
    prompt is computed (and scored, with ``prompt_logprobs``)."""
    min_tokens: int = 0
    """Fewest tokens to generate: before, end-of-text ids and stop token ids are excluded (also with
    ``ignore_eos``) and stop strings are not looked for."""
    seed: int = 0
    """In [0, 2**63). All randomness of a request is a function of its seed and the position. None draws a random
    seed when the object is made, so the same object gives the same tokens again."""
    stop: tuple[str, ...] = ()
    """A text, or several: generation ends before the first of them. None is none."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end generation. None is none."""
    ignore_eos: bool = False
    """Do not stop at an end-of-text id."""
    include_stop_str_in_output: bool = False
    """Keep the stop string, or the text of the stop token, at the end of the text."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text. Stop strings that contain one are found nevertheless."""
    logprobs: int | None = None
    """Report the log-probability of every token, and of this many most probable tokens (at most 20). They are of
    the target's own distribution, before temperature, filters, penalties and biases (vLLM's ``raw_logprobs``)."""
    prompt_logprobs: int | None = None
    """As ``logprobs``, for the tokens of the prompt. The first one has none, for nothing stands before it. Such a
    prompt is computed as a whole, whatever the prefix cache holds."""
    structured_outputs: StructuredOutputsParams | None = None
    """What the output must look like: a JSON schema, a regular expression, a grammar. A mapping of its fields is
    accepted."""
    method: Method | None = None
    """Overrides the configured method for this request."""

    def __post_init__(self) -> None:
        for name, value in self._checked().items():
            object.__setattr__(self, name, value)
        if self.min_tokens > self.max_tokens:
            raise checks.refuse("min_tokens", f"at most max_tokens={self.max_tokens}", self.min_tokens)
        if self.n > 1 and self.temperature == 0:
            raise RequestError(
                f"n must be 1, or the temperature above 0: all completions would be equal; got n={self.n}"
            )

    def _checked(self) -> dict[str, Any]:
        """Returns the normalised value of every field. Raises: RequestError."""
        integer, number, boolean, token_ids = checks.integer, checks.number, checks.boolean, checks.token_ids
        max_tokens = MAX_TOKENS if self.max_tokens is None else self.max_tokens
        seed = secrets.randbelow(MAX_SEED + 1) if self.seed is None else self.seed
        return {
            "temperature": number("temperature", self.temperature, 0, MAX_TEMPERATURE),
            "top_k": integer("top_k", self.top_k, 0, MAX_TOP_K),
            "top_p": number("top_p", self.top_p, MIN_TOP_P, 1),
            "min_p": number("min_p", self.min_p, 0, 1),
            "repetition_penalty": number(
                "repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY
            ),
            "presence_penalty": number("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY),
            "frequency_penalty": number("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY),
            "logit_bias": _biases(self.logit_bias),
            "bad_words": _bad_words(self.bad_words),
            "allowed_token_ids": _allowed(self.allowed_token_ids),
            "n": integer("n", self.n, 1, MAX_COMPLETIONS),
            "max_tokens": integer("max_tokens", max_tokens, 0, MAX_TOKENS),
            "min_tokens": integer("min_tokens", self.min_tokens, 0, MAX_TOKENS),
            "seed": integer("seed", seed, 0, MAX_SEED),
            "stop": _stops(self.stop),
            "stop_token_ids": token_ids("stop_token_ids", _none_is_empty(self.stop_token_ids), MAX_STOP_TOKEN_IDS),
            "ignore_eos": boolean("ignore_eos", self.ignore_eos),
            "include_stop_str_in_output": boolean("include_stop_str_in_output", self.include_stop_str_in_output),
            "skip_special_tokens": boolean("skip_special_tokens", self.skip_special_tokens),
            "logprobs": _count("logprobs", self.logprobs),
            "prompt_logprobs": _count("prompt_logprobs", self.prompt_logprobs),
            "structured_outputs": StructuredOutputsParams.of(self.structured_outputs),
            "method": _method(self.method),
        }

    @property
    def processed(self) -> bool:
        """Whether anything but temperature and filters changes the logits."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.bad_words
            or self.allowed_token_ids is not None
            or self.min_tokens
            or self.structured_outputs is not None
        )


def completion_seed(seed: int, index: int) -> int:
    """Returns the seed of completion ``index`` of a request with ``n`` > 1, in [0, 2**63).

    Completion 0 has the request's own seed, so it equals the completion of ``n=1``. The others take the outputs of
    SplitMix64 started at the seed (Steele, Lea, Flood 2014), without the sign bit. A completion does not depend on
    how many others there are.
    """
    if index == 0:
        return seed
    mask = 2**64 - 1
    z = (seed + index * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) & MAX_SEED


def _none_is_empty(given: Any) -> Any:
    """Returns a list as given; None stands for an empty one."""
    return () if given is None else given


def _count(name: str, given: Any) -> int | None:
    """Returns a number of most probable tokens as given; None asks for no log-probabilities."""
    return None if given is None else checks.integer(name, given, 0, MAX_LOGPROBS)


def _method(given: Any) -> Any:
    if given is not None and given not in METHODS:
        raise checks.refuse("method", f"one of {', '.join(METHODS)}", given)
    return given


def _stops(given: Any) -> tuple[str, ...]:
    stops = (given,) if isinstance(given, str) else checks.listed("stop", _none_is_empty(given), MAX_STOPS)
    return tuple(checks.text("stop", stop, MAX_STOP_CHARACTERS) for stop in stops)


def _allowed(given: Any) -> tuple[int, ...] | None:
    if given is None:
        return None
    ids = checks.token_ids("allowed_token_ids", given, MAX_ALLOWED_TOKEN_IDS)
    if not ids:
        raise checks.refuse("allowed_token_ids", "at least one token id, or left out to allow all", ids)
    return ids


def _biases(given: Any) -> tuple[tuple[int, float], ...]:
    try:
        pairs = dict(_none_is_empty(given))
    except (TypeError, ValueError):
        raise checks.refuse("logit_bias", "a mapping of token ids to numbers", given) from None
    if len(pairs) > MAX_LOGIT_BIASES:
        raise RequestError(f"logit_bias must have at most {MAX_LOGIT_BIASES} entries; got {len(pairs)}")
    biases = {}
    for token, bias in pairs.items():
        if isinstance(token, str) and token.isascii() and token.isdecimal() and len(token) <= len(str(MAX_TOKEN_ID)):
            token = int(token)  # the keys of a JSON object are texts
        key = checks.integer("logit_bias: a token id", token, 0, MAX_TOKEN_ID)
        biases[key] = checks.number("logit_bias", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
    return tuple(sorted(biases.items()))


def _bad_words(given: Any) -> tuple[str | tuple[int, ...], ...]:
    words: list[str | tuple[int, ...]] = []
    for word in checks.listed("bad_words", _none_is_empty(given), MAX_BAD_WORDS):
        if isinstance(word, str):
            words.append(checks.text("bad_words", word, MAX_BAD_WORD_LENGTH))
        elif isinstance(word, list | tuple) and word:
            words.append(checks.token_ids("bad_words", word, MAX_BAD_WORD_LENGTH))
        else:
            raise checks.refuse("bad_words", "texts or lists of token ids, none of them empty", word)
    return tuple(words)
