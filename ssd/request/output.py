"""What a request gets back: tokens, text, and what speculation did for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]
Origin = Literal["hit", "miss", "plain"]
"""Where the candidates of a round came from: the speculation set of the round before (``hit``), a draft made while
the verifier waited (``miss``: after a miss, or in every round of ``sd`` and ``self``), or nowhere (``plain``: nothing
was drafted)."""
Provenance = Literal["hit", "miss", "bonus", "plain"]
"""Where a token came from: drafted and accepted in a round of origin ``hit`` or ``miss``, the target's own token
after the accepted ones (``bonus``), or decoded without speculation (``plain``)."""


@dataclass(kw_only=True, slots=True)
class SpeculationRecord:
    """What speculation did for one request. Fields are counts; rates derive from them."""

    rounds: int = 0
    """Target forwards after the prompt."""
    tokens: int = 0
    """Tokens the rounds produced, before any cut by a stop rule."""
    drafted: int = 0
    """Draft tokens verified: the depth of each round's tree. Siblings are not counted."""
    accepted: int = 0
    """Draft tokens accepted. Accepted siblings are counted."""
    lookups: int = 0
    """Rounds after which an outcome was looked up in a speculation set."""
    hits: int = 0
    """Lookups that found the outcome."""
    accepted_histogram: list[int] = field(default_factory=list)
    """``accepted_histogram[k]`` rounds accepted k draft tokens."""

    @property
    def acceptance_rate(self) -> float | None:
        """accepted / drafted; None if nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def acceptance_length(self) -> float | None:
        """Tokens per round, bonus included: 1 + accepted / rounds. None without rounds."""
        return 1 + self.accepted / self.rounds if self.rounds else None

    @property
    def hit_rate(self) -> float | None:
        """hits / lookups; None without lookups."""
        return self.hits / self.lookups if self.lookups else None

    def count_round(self, *, drafted: int, accepted: int) -> None:
        """Counts one round."""
        self.rounds += 1
        self.tokens += accepted + 1
        self.drafted += drafted
        self.accepted += accepted
        missing = accepted + 1 - len(self.accepted_histogram)
        self.accepted_histogram.extend([0] * missing)
        self.accepted_histogram[accepted] += 1

    def count_lookup(self, hit: bool) -> None:
        """Counts one lookup."""
        self.lookups += 1
        self.hits += hit

    def add(self, other: SpeculationRecord) -> None:
        """Adds the counts of another record."""
        self.rounds += other.rounds
        self.tokens += other.tokens
        self.drafted += other.drafted
        self.accepted += other.accepted
        self.lookups += other.lookups
        self.hits += other.hits
        longer = len(other.accepted_histogram) - len(self.accepted_histogram)
        self.accepted_histogram.extend([0] * longer)
        for depth, count in enumerate(other.accepted_histogram):
            self.accepted_histogram[depth] += count


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    """Log-probability (natural) of one token under the target's own distribution."""

    token_id: int
    logprob: float
    rank: int
    """1 for the most probable token."""
    top: tuple[tuple[int, float], ...]
    """Token id and log-probability of the most probable tokens, as many as requested, best first."""

    @classmethod
    def from_columns(cls, tokens: Iterable[int], columns: Sequence[Sequence[Any]]) -> tuple[TokenLogprob, ...]:
        """Reads the columns of a ``Committed`` or ``Scored`` message.

        Args:
            tokens: The T tokens to read, the first of the message.
            columns: Log-probabilities ``[T]``, ranks ``[T]``, most probable token ids ``[T][n]`` and their
                log-probabilities ``[T][n]``.
        """
        return tuple(
            cls(token_id=token, logprob=value, rank=rank, top=tuple(zip(ids, values, strict=True)))
            for token, value, rank, ids, values in zip(tokens, *columns, strict=False)
        )

    @classmethod
    def from_dicts(cls, given: Iterable[Mapping[str, Any]] | None) -> tuple[TokenLogprob, ...] | None:
        """Reads what ``dataclasses.asdict`` made, also after a format without tuples. None stays None."""
        return None if given is None else tuple(map(cls.from_dict, given))

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> TokenLogprob:
        """Reads one of ``from_dicts``."""
        return cls(**{**given, "top": tuple(map(tuple, given["top"]))})


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutput:
    """One finished completion. Tokens, text and log-probabilities end at the same place."""

    prompt: str
    prompt_token_ids: tuple[int, ...]
    text: str
    token_ids: tuple[int, ...]
    """All tokens that count, including the one that ended the completion."""
    finish_reason: FinishReason
    speculation: SpeculationRecord
    decode_s: float
    """Seconds from the end of prefill to the last token."""
    stop_reason: str | int | None = None
    """The stop string found, or the stop token id. None for every other end."""
    error: str | None = None
    """Why the request failed, if ``finish_reason`` is ``error``. The tokens so far are valid."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One for every token, if requested."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """One for every prompt token, if requested. The first is None."""
    index: int = 0
    """Which of the prompt's ``n`` completions this is."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values came from the prefix cache."""
    others: tuple[RequestOutput, ...] = ()
    """Completions 1 to n - 1, on completion 0 of ``LLM.generate``."""

    @property
    def outputs(self) -> tuple[RequestOutput, ...]:
        """All ``n`` completions."""
        return self, *self.others

    @property
    def cumulative_logprob(self) -> float | None:
        """Log-probability of the whole completion, if requested."""
        return None if self.logprobs is None else math.fsum(token.logprob for token in self.logprobs)

    @classmethod
    def joined(cls, completions: Iterable[RequestOutput]) -> RequestOutput:
        """Returns completion 0 of a prompt with the others attached. Order does not matter; at least one is needed."""
        first, *others = sorted(completions, key=lambda output: output.index)
        return replace(first, others=tuple(others)) if others else first

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> RequestOutput:
        """Reads what ``dataclasses.asdict`` made, also after a format without tuples.

        Raises: TypeError, KeyError: The fields are not those of an output.
        """
        scored = given["prompt_logprobs"]
        read = {
            "prompt_token_ids": tuple(given["prompt_token_ids"]),
            "prompt_logprobs": scored and (None, *map(TokenLogprob.from_dict, scored[1:])),
            "token_ids": tuple(given["token_ids"]),
            "speculation": SpeculationRecord(**given["speculation"]),
            "logprobs": TokenLogprob.from_dicts(given["logprobs"]),
            "others": tuple(cls.from_dict(other) for other in given["others"]),
        }
        return cls(**{**given, **read})


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamEvent:
    """Text that became final, and its tokens. The last event of a completion has ``output`` set. With ``n`` > 1
    the events of the completions interleave."""

    text: str
    token_ids: tuple[int, ...]
    accepted: int
    """How many of the tokens were drafted and accepted. The rest are the target's own."""
    output: RequestOutput | None = None
    pieces: tuple[str, ...] = ()
    """Text that became final with each token (``""`` while held back). Joined they are ``text``, except for text
    that the end of the request releases."""
    provenance: tuple[Provenance, ...] = ()
    """Where each token came from."""
    drafted: int = 0
    """Draft tokens the round verified."""
    committed_s: float = 0.0
    """When the round committed, on the verifier's monotonic clock. Only differences have a meaning."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One for every token, if requested."""
    index: int = 0
    """Which of the prompt's ``n`` completions this belongs to."""

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> StreamEvent:
        """Reads what ``dataclasses.asdict`` made, also after a format without tuples.

        Raises: TypeError, KeyError: The fields are not those of an event.
        """
        read = {
            "token_ids": tuple(given["token_ids"]),
            "pieces": tuple(given["pieces"]),
            "provenance": tuple(given["provenance"]),
            "logprobs": TokenLogprob.from_dicts(given["logprobs"]),
            "output": None if given["output"] is None else RequestOutput.from_dict(given["output"]),
        }
        return cls(**{**given, **read})
