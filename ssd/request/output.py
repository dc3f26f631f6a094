"""What a request gets back: tokens, text, and what speculation did for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]
Origin = Literal["hit", "miss", "plain"]
"""Where the candidates of a round came from: the speculation set of the round before (``hit``), a
draft made while the verifier waited (``miss``: after one, or in every round of ``sd`` and ``self``), nowhere
(``plain``: nothing was drafted)."""
Provenance = Literal["hit", "miss", "bonus", "plain"]
"""How a token came to be: drafted and accepted in a round of origin ``hit`` or ``miss``, the
target's own token after the accepted ones (``bonus``), or decoded without speculation (``plain``)."""


@dataclass(kw_only=True, slots=True)
class SpeculationRecord:
    """What speculation did for one request. Counts; rates derive from them."""

    rounds: int = 0
    """Target forwards after the prompt."""
    tokens: int = 0
    """Tokens the rounds produced (before any cut by a stop rule)."""
    drafted: int = 0
    """Draft tokens verified: the depth of each round's tree (siblings not counted)."""
    accepted: int = 0
    """Draft tokens accepted (siblings counted when accepted)."""
    lookups: int = 0
    """Rounds after which an outcome was looked up in a speculation set."""
    hits: int = 0
    """Lookups that found the outcome."""
    accepted_histogram: list[int] = field(default_factory=list)
    """``accepted_histogram[k]`` rounds accepted k draft tokens."""

    @property
    def acceptance_rate(self) -> float | None:
        """accepted / drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def acceptance_length(self) -> float | None:
        """Tokens per round, bonus included: 1 + accepted / rounds."""
        return 1 + self.accepted / self.rounds if self.rounds else None

    @property
    def hit_rate(self) -> float | None:
        return self.hits / self.lookups if self.lookups else None

    def count_round(self, *, drafted: int, accepted: int) -> None:
        """Count one round."""
        self.rounds += 1
        self.tokens += accepted + 1
        self.drafted += drafted
        self.accepted += accepted
        missing = accepted + 1 - len(self.accepted_histogram)
        self.accepted_histogram.extend([0] * missing)
        self.accepted_histogram[accepted] += 1

    def count_lookup(self, hit: bool) -> None:
        self.lookups += 1
        self.hits += hit

    def add(self, other: SpeculationRecord) -> None:
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
    """Log-probability (natural) of one token of the output, of the target's own distribution."""

    token_id: int
    logprob: float
    rank: int
    """1 for the most probable token."""
    top: tuple[tuple[int, float], ...]
    """Token id and log-probability of the most probable tokens, as many as asked for, best first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutput:
    """One finished completion. Tokens, text and log-probabilities end at the same place."""

    prompt: str
    prompt_token_ids: tuple[int, ...]
    text: str
    token_ids: tuple[int, ...]
    """All tokens that count, the one that ended the completion included."""
    finish_reason: FinishReason
    speculation: SpeculationRecord
    decode_s: float
    """Seconds from the end of prefill to the last token."""
    stop_reason: str | int | None = None
    """The stop string found, or the token id that ended it (None for ``max_tokens`` and so on)."""
    error: str | None = None
    """Why it could not go on, where ``finish_reason`` is ``error``; the tokens so far stand."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One for every token, if asked for."""
    index: int = 0
    """Which of the prompt's ``n`` completions this is."""
    num_cached_tokens: int = 0
    """Tokens of the prompt whose keys and values were found, not computed (prefix caching)."""
    others: tuple[RequestOutput, ...] = ()
    """Completions 1 .. n - 1, at completion 0 of ``LLM.generate``."""

    @property
    def outputs(self) -> tuple[RequestOutput, ...]:
        """All ``n`` completions."""
        return self, *self.others

    @property
    def cumulative_logprob(self) -> float | None:
        """Log-probability of the whole completion."""
        return None if self.logprobs is None else math.fsum(token.logprob for token in self.logprobs)


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamEvent:
    """Text that became certain, and the tokens behind it. The last event of a completion has
    ``output`` set; with ``n`` > 1 the events of the completions mix."""

    text: str
    token_ids: tuple[int, ...]
    accepted: int
    """How many of the tokens were drafted and accepted (the rest are the target's own)."""
    output: RequestOutput | None = None
    pieces: tuple[str, ...] = ()
    """Text that became certain with each token (``""`` while held back); together ``text``, but for
    what the end of the request releases."""
    provenance: tuple[Provenance, ...] = ()
    """Of each token."""
    drafted: int = 0
    """Draft tokens the round verified."""
    committed_s: float = 0.0
    """When the round committed, on the verifier's monotonic clock: only differences mean something."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One for every token, if asked for."""
    index: int = 0
    """Which of the prompt's ``n`` completions this is of."""
