"""What a request asks for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import RequestError
from .methods import METHODS, Method
from .structured import StructuredOutputsParams

MAX_SEED = 2**63 - 1
MAX_COMPLETIONS = 128
MAX_LOGPROBS = 20
"""As the OpenAI API's and vLLM's default: what crosses the control lane stays small."""
MAX_LOGIT_BIAS = 100.0
MAX_PENALTY = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to choose tokens, and when to stop. Names and meanings are vLLM's.

    Raises:
        RequestError: a value out of range; the message names it.
    """

    temperature: float = 0.0
    """0 is greedy; otherwise logits are divided by it."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens whose probability reaches this."""
    min_p: float = 0.0
    """Drop tokens less probable than this share of the most probable one."""
    repetition_penalty: float = 1.0
    """Logits of tokens of the prompt or the output are divided by this where positive and
    multiplied by it where negative; 1 does nothing."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token of the output."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token for every time it is in the output."""
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    """Added to the logits of these token ids, in [-100, 100]. Kept as sorted pairs."""
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    """Texts, or sequences of token ids, that the output must not contain: the last token of one
    is excluded where it would complete it. A text stands for its tokens with and without a space
    before it, as in vLLM; other tokens may still spell it."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Only these tokens are chosen from; None allows all."""
    n: int = 1
    """Completions of the prompt; see ``completion_seed``."""
    max_tokens: int = 256
    min_tokens: int = 0
    """No end-of-text id, stop token id or stop string ends the output before so many tokens: the
    ids are excluded (``ignore_eos`` or not), the strings not looked for."""
    seed: int = 0
    """All randomness of a request is a function of its seed and the position."""
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these in the text."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    """Leave the stop string, or the text of the stop token, at the end of the text."""
    logprobs: int | None = None
    """Report every token's log-probability and those of so many most probable tokens, of the
    target's own distribution (before temperature, filters, penalties and biases: vLLM's
    ``raw_logprobs``)."""
    structured_outputs: StructuredOutputsParams | None = None
    """What the output must look like: a JSON schema, a regular expression, a grammar. A mapping of its
    fields does too."""
    method: Method | None = None
    """Overrides the configured method for this request. ``none_fast`` is plain decoding one
    row at a time without padding: a baseline to measure against, not bit-equal to the rest."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids, "stop_token_ids"))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        object.__setattr__(self, "bad_words", _words(self.bad_words))
        object.__setattr__(self, "structured_outputs", StructuredOutputsParams.of(self.structured_outputs))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", _token_ids(self.allowed_token_ids, "allowed_token_ids"))
        penalties = self.presence_penalty, self.frequency_penalty
        checks = (
            (math.isfinite(self.temperature) and self.temperature >= 0, "temperature must be a finite number >= 0"),
            (isinstance(self.top_k, int) and self.top_k >= 0, "top_k must be an integer >= 0 (0 keeps all tokens)"),
            (0 < self.top_p <= 1, "top_p must be in (0, 1]"),
            (0 <= self.min_p <= 1, "min_p must be in [0, 1]"),
            (
                math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
                "repetition_penalty must be a finite number > 0 (1 does nothing)",
            ),
            (
                all(abs(penalty) <= MAX_PENALTY for penalty in penalties),
                "presence_penalty and frequency_penalty must be in [-2, 2]",
            ),
            (self.allowed_token_ids != (), "allowed_token_ids must name at least one token; leave it out to allow all"),
            (
                isinstance(self.n, int) and 1 <= self.n <= MAX_COMPLETIONS,
                f"n must be an integer in [1, {MAX_COMPLETIONS}]",
            ),
            (
                self.n == 1 or self.temperature > 0,
                "n > 1 needs a temperature above 0: at temperature 0 all completions are the same",
            ),
            (isinstance(self.max_tokens, int) and self.max_tokens >= 1, "max_tokens must be an integer >= 1"),
            (
                isinstance(self.min_tokens, int) and 0 <= self.min_tokens <= self.max_tokens,
                "min_tokens must be an integer in [0, max_tokens]",
            ),
            (
                self.logprobs is None or (isinstance(self.logprobs, int) and 0 <= self.logprobs <= MAX_LOGPROBS),
                f"logprobs must be an integer in [0, {MAX_LOGPROBS}], or None for none",
            ),
            (isinstance(self.seed, int) and 0 <= self.seed <= MAX_SEED, "seed must be an integer in [0, 2**63)"),
            (all(isinstance(s, str) and s for s in self.stop), "stop strings must not be empty"),
            (self.method is None or self.method in METHODS, f"method must be one of {', '.join(METHODS)}"),
        )
        for passed, message in checks:
            if not passed:
                raise RequestError(message)

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
    """Seed of completion ``index`` of a request with ``n`` > 1, in [0, 2**63).

    Completion 0 has the request's own seed, so it is what ``n=1`` gives. The others take the
    outputs of SplitMix64 started at the seed (Steele, Lea, Flood 2014), less their sign bit: a
    completion does not depend on how many others there are.
    """
    if index == 0:
        return seed
    mask = 2**64 - 1
    z = (seed + index * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) & MAX_SEED


def _token_ids(given: Iterable[Any], name: str) -> tuple[int, ...]:
    ids = () if isinstance(given, str) else tuple(given)
    if isinstance(given, str) or not all(isinstance(token, int) and token >= 0 for token in ids):
        raise RequestError(f"{name} must be token ids, integers >= 0")
    return ids


def _biases(given: Mapping[Any, Any] | Iterable[Any]) -> tuple[tuple[int, float], ...]:
    try:
        # JSON objects have text for keys.
        pairs = {int(token): float(bias) for token, bias in dict(given).items()}
    except (TypeError, ValueError):
        raise RequestError("logit_bias must map token ids to numbers") from None
    if not all(token >= 0 and abs(bias) <= MAX_LOGIT_BIAS for token, bias in pairs.items()):
        raise RequestError("logit_bias must map token ids >= 0 to numbers in [-100, 100]")
    return tuple(sorted(pairs.items()))


def _words(given: Iterable[Any]) -> tuple[str | tuple[int, ...], ...]:
    message = "bad_words must be a list of texts or of lists of token ids, none of them empty"
    if isinstance(given, str):
        raise RequestError(message)
    words: list[str | tuple[int, ...]] = []
    for word in given:
        if not isinstance(word, str | list | tuple) or not word:
            raise RequestError(message)
        words.append(word if isinstance(word, str) else _token_ids(word, "bad_words"))
    return tuple(words)
