"""One request inside the verifier: its tokens, what a round adds to them, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..decoding.ngram import NgramIndex
from ..decoding.processors import Constraint
from ..params import FinishReason, Method, SamplingParams, SpeculationRecord

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
    started_s: float = 0.0
    at_draft: bool = False
    """Whether the draft has it."""
    hit: bool | None = None
    """Whether the tree now under verification was found prepared; None if none was looked up."""
    ngrams: NgramIndex | None = None
    """Of its tokens, where missed rows may take candidates from it."""
    constraint: Constraint | None = None
    """The grammar of its output, after the certain tokens."""
    error: str | None = None
    """Why it cannot go on."""
    record: SpeculationRecord = field(default_factory=SpeculationRecord)

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
