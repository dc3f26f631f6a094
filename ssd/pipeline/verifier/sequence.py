"""One request inside the verifier: its tokens, what a round adds to them, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...decoding.processors import Constraint
from ...decoding.verify.coupled import FAULT
from ...request.methods import Method
from ...request.output import FinishReason, SpeculationRecord
from ...request.sampling_params import SamplingParams
from ..transport.messages import Admit, Submit

STUCK = (
    "structured_outputs: no token can follow; what else the request excludes (bad_words, allowed_token_ids, "
    "min_tokens) contradicts it, or the tokenizer cannot spell it"
)
NOT_FINITE = (
    "the target's logits are not finite (NaN or infinite) at position {}: float16 overflow? use bfloat16 or float32, "
    "or check the weights"
)


@dataclass(kw_only=True, slots=True)
class TargetSequence:
    """A request from its arrival to its end."""

    request: int
    params: SamplingParams
    method: Method
    tokens: list[int]
    """Prompt and generated tokens, the root excluded. Its length is L."""
    root: int
    """The last certain token. It has no keys and values yet."""
    prompt_length: int
    context_limit: int
    """Number of tokens, prompt included, at which it ends."""
    ends: frozenset[int]
    """Token ids that end it."""
    cached: int = 0
    """How many prompt tokens have keys and values."""
    reused: int = 0
    """How many of those were found in a slot instead of being computed."""
    started_s: float = 0.0
    """When its prompt was complete, on the verifier's clock."""
    constraint: Constraint | None = None
    """The grammar of its output, after the certain tokens."""
    error: str | None = None
    """Why it cannot go on."""
    record: SpeculationRecord = field(default_factory=SpeculationRecord)

    @classmethod
    def of(cls, message: Submit, method: Method, context_limit: int, ends: frozenset[int]) -> TargetSequence:
        """The sequence of a request. ``ends``: end-of-text ids of the model."""
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

    def introduction(self, slot: int, ends: frozenset[int], *, forecasts: bool) -> Admit:
        """The message that makes the sequence known to the draft.

        Args:
            ends: end-of-text ids of the model.
            forecasts: whether the draft prepares for its outcomes, or only drafts on demand.
        """
        return Admit(
            slot=slot,
            tokens=self.certain,
            params=self.params,
            forecasts=forecasts,
            prompt_length=self.prompt_length,
            ends=self.held_off(ends),
        )

    def held_off(self, ends: frozenset[int]) -> list[int]:
        """Ids that may not come before ``min_tokens``. ``ignore_eos`` lets the output continue after an end-of-text
        id; ``min_tokens`` excludes the id all the same (as in vLLM)."""
        return sorted({*self.params.stop_token_ids, *ends}) if self.params.min_tokens else []

    @property
    def reusable(self) -> list[int]:
        """The prompt tokens whose keys may be those of another request: none if the prompt's log-probabilities are
        asked for, since keys are kept and logits are not."""
        return self.tokens if self.params.prompt_logprobs is None else []

    @property
    def generated(self) -> int:
        """Number of generated tokens."""
        return len(self.tokens) + 1 - self.prompt_length

    @property
    def certain(self) -> list[int]:
        """All certain tokens, the root included."""
        return [*self.tokens, self.root]

    def commit(self, path: list[int], bonus: int) -> tuple[list[int], FinishReason | None]:
        """Append a round's tokens: the accepted ones and the bonus, which may be ``FAULT``.

        Returns:
            the tokens that count (cut after the one that ended the request) and why it ended.
        """
        emitted: list[int] = []
        for token in (*path, bonus):
            if token == FAULT:
                self.error = NOT_FINITE.format(len(self.tokens) + 1)
                return emitted, "error"
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
