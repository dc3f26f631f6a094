"""One request inside the verifier: its tokens, what a round adds to them, and when it ends; and what the
draft knows of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...decoding.processors import Constraint
from ...decoding.text.ngram import NgramRounds
from ...request.methods import Method
from ...request.output import FinishReason, SpeculationRecord
from ...request.sampling_params import SamplingParams
from ..policy.pace import Pace
from ..transport.messages import Admit, Submit

STUCK = (
    "structured_outputs: no token can follow; what else the request excludes (bad_words, allowed_token_ids, "
    "min_tokens) contradicts it, or the tokenizer cannot spell it"
)


@dataclass(kw_only=True, slots=True)
class Sequence:
    request: int
    params: SamplingParams
    method: Method
    tokens: list[int]
    """Prompt and generated, the root excluded."""
    root: int
    """Last certain token; it has no keys and values yet."""
    prompt_length: int
    context_limit: int
    """Tokens, prompt included, at which it ends."""
    ends: frozenset[int]
    """Token ids that end it."""
    cached: int = 0
    """Of its prompt: tokens that have keys and values."""
    reused: int = 0
    """How many of them were found in a slot when it came."""
    started_s: float = 0.0
    at_draft: bool = False
    """Whether the draft has it."""
    draft_behind: bool = False
    """Whether the draft is still computing its keys, so that nothing is drafted for it."""
    hit: bool | None = None
    """Whether the tree now under verification was found prepared; None if none was looked up."""
    forecasts: bool = False
    """Whether the draft was told to prepare for its outcomes (``ssd``) or only to serve misses (``sd``)."""
    waited: bool = False
    """Whether the round before ended with a wait for its tree."""
    pace: Pace = field(default_factory=Pace)
    ngrams: NgramRounds | None = None
    """Of its tokens, where it may take candidates from them."""
    constraint: Constraint | None = None
    """The grammar of its output, after the certain tokens."""
    error: str | None = None
    """Why it cannot go on."""
    record: SpeculationRecord = field(default_factory=SpeculationRecord)

    @classmethod
    def of(cls, message: Submit, method: Method, context_limit: int, ends: frozenset[int]) -> Sequence:
        """Of a request. ``ends``: end-of-text ids."""
        params = message.params
        return cls(
            request=message.request,
            params=params,
            method=method,
            tokens=list(message.prompt[:-1]),
            root=message.prompt[-1],
            prompt_length=len(message.prompt),
            context_limit=context_limit,
            ends=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else ends),
        )

    def introduction(self, slot: int, ends: frozenset[int]) -> Admit:
        """What the draft is told of it. ``ends``: end-of-text ids."""
        return Admit(
            slot=slot,
            tokens=[*self.tokens, self.root],
            params=self.params,
            forecasts=self.forecasts,
            prompt_length=self.prompt_length,
            ends=self.held_off(ends),
        )

    def held_off(self, ends: frozenset[int]) -> list[int]:
        """Ids that may not come before ``min_tokens``. ``ignore_eos`` lets the output go on after
        an end-of-text id; ``min_tokens`` holds the id off all the same (as in vLLM)."""
        return sorted({*self.params.stop_token_ids, *ends}) if self.params.min_tokens else []

    @property
    def generated(self) -> int:
        return len(self.tokens) + 1 - self.prompt_length

    def prompt_and_output(self) -> tuple[list[int], list[int]]:
        """All certain tokens, the root among them."""
        certain = [*self.tokens, self.root]
        return certain[: self.prompt_length], certain[self.prompt_length :]

    def commit(self, path: list[int], bonus: int) -> tuple[list[int], FinishReason | None]:
        """Append a round's tokens: accepted ones and the bonus.

        Returns:
            the tokens that count (cut after the one that ended the request) and why it ended.
        """
        emitted: list[int] = []
        for token in (*path, bonus):
            if self.constraint is not None and not self.constraint.advance(token):
                self.error = self.constraint.error or STUCK
                return emitted, "error"
            self.tokens.append(self.root)
            self.root = token
            emitted.append(token)
            if token in self.ends or (self.constraint is not None and self.constraint.complete):
                return emitted, "stop"
            if self.generated >= self.params.max_tokens or len(self.tokens) + 1 >= self.context_limit:
                return emitted, "length"
        return emitted, None
