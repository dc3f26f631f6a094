"""What a request asks for and what comes back. Values only: no torch, no I/O."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from .errors import RequestError

METHODS = ("none", "none_fast", "sd", "ssd")
Method = Literal["none", "none_fast", "sd", "ssd"]
FinishReason = Literal["stop", "length", "cancelled"]
Origin = Literal["hit", "miss", "plain"]
"""Where the candidates of a round came from: the speculation set of the round before (``hit``), a
draft made while the verifier waited (``miss``: after one, or in every round of ``sd``), nowhere
(``plain``: nothing was drafted)."""
Provenance = Literal["hit", "miss", "bonus", "plain"]
"""How a token came to be: drafted and accepted in a round of origin ``hit`` or ``miss``, the
target's own token after the accepted ones (``bonus``), or decoded without speculation (``plain``)."""
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

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
    max_tokens: int = 256
    seed: int = 0
    """All randomness of a request is a function of its seed and the position."""
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these in the text."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    method: Method | None = None
    """Overrides the configured method for this request. ``none_fast`` is plain decoding one
    row at a time without padding: a baseline to measure against, not bit-equal to the rest."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        checks = (
            (math.isfinite(self.temperature) and self.temperature >= 0, "temperature must be a finite number >= 0"),
            (isinstance(self.top_k, int) and self.top_k >= 0, "top_k must be an integer >= 0 (0 keeps all tokens)"),
            (0 < self.top_p <= 1, "top_p must be in (0, 1]"),
            (0 <= self.min_p <= 1, "min_p must be in [0, 1]"),
            (isinstance(self.max_tokens, int) and self.max_tokens >= 1, "max_tokens must be an integer >= 1"),
            (isinstance(self.seed, int) and 0 <= self.seed <= MAX_SEED, "seed must be an integer in [0, 2**63)"),
            (all(isinstance(s, str) and s for s in self.stop), "stop strings must not be empty"),
            (self.method is None or self.method in METHODS, f"method must be one of {', '.join(METHODS)}"),
        )
        for passed, message in checks:
            if not passed:
                raise RequestError(message)


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
class RequestOutput:
    """One finished request."""

    prompt: str
    prompt_token_ids: tuple[int, ...]
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    speculation: SpeculationRecord
    decode_s: float
    """Seconds from the end of prefill to the last token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamEvent:
    """Text that became certain, and the tokens behind it. The last event of a stream has
    ``output`` set."""

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
