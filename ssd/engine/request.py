"""One completion on the front's side: its state, its tokens, and its events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from ..errors import PipelineError
from ..pipeline.transport.messages import Committed, Scored, Submit
from ..request.output import (
    FinishReason,
    Provenance,
    RequestOutput,
    SpeculationRecord,
    StreamEvent,
    TokenLogprob,
)
from ..request.sampling_params import SamplingParams
from .detokenize import Detokenizer


class State(Enum):
    """State of one request."""

    QUEUED = auto()
    """Waiting here. The verifier does not know it."""
    SENT = auto()
    """Sent to the verifier. No token yet."""
    DECODING = auto()
    STOPPED = auto()
    """A stop string is complete and the last event is out. The verifier has been sent a cancel, and holds the request
    until it answers."""
    CANCELLED = auto()
    """The owner cancelled. The verifier has been sent a cancel and its answer is due."""
    DONE = auto()


class Input(Enum):
    """What can happen to one request."""

    SEND = auto()
    SCORE = auto()
    COMMIT = auto()
    STOP = auto()
    CANCEL = auto()
    FINISH = auto()


TRANSITIONS: dict[tuple[State, Input], State] = {
    (State.QUEUED, Input.SEND): State.SENT,
    (State.QUEUED, Input.CANCEL): State.DONE,
    (State.SENT, Input.SCORE): State.SENT,
    (State.SENT, Input.COMMIT): State.DECODING,
    (State.SENT, Input.CANCEL): State.CANCELLED,
    (State.SENT, Input.FINISH): State.DONE,
    (State.DECODING, Input.COMMIT): State.DECODING,
    (State.DECODING, Input.STOP): State.STOPPED,
    (State.DECODING, Input.CANCEL): State.CANCELLED,
    (State.DECODING, Input.FINISH): State.DONE,
    # What was on its way when the cancel was sent.
    (State.STOPPED, Input.COMMIT): State.STOPPED,
    (State.STOPPED, Input.CANCEL): State.STOPPED,
    (State.STOPPED, Input.FINISH): State.DONE,
    (State.CANCELLED, Input.SCORE): State.CANCELLED,
    (State.CANCELLED, Input.COMMIT): State.CANCELLED,
    (State.CANCELLED, Input.CANCEL): State.CANCELLED,
    (State.CANCELLED, Input.FINISH): State.DONE,
}
"""Every other pair is a fault of the pipeline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptTokens:
    """A prompt as text and as token ids."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who a request is for, and what its owner calls it."""

    client: str = ""
    """Clients take turns when slots are short."""
    priority: int = 0
    """Of the requests that wait, those with the lowest value go first, as in vLLM. Nothing that runs is interrupted.
    Values other than 0 need ``engine.scheduling=priority``."""
    label: str = ""
    """The owner's name for the request, for log lines and traces."""
    trace_headers: Mapping[str, str] = field(default_factory=dict)
    """``traceparent`` and ``tracestate`` of the trace that the request belongs to, if it belongs to one."""


@dataclass(kw_only=True, slots=True)
class Steps:
    """Rounds of one request that verified draft tokens, counted as vLLM does. Lists have an entry for each round."""

    by_draft_length: dict[int, list[int]] = field(default_factory=dict)
    """``by_draft_length[k][j]`` rounds accepted j of k draft tokens."""
    accepted: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    committed_s: list[float] = field(default_factory=list)
    """Seconds on the verifier's monotonic clock."""

    def add(self, drafted: int, accepted: int, committed_s: float) -> None:
        """Counts one round."""
        length = max(drafted, accepted)  # a sibling may be accepted where the chain has no token
        if length:
            counts = self.by_draft_length.setdefault(length, [0] * (length + 1))
            counts[accepted] += 1
            self.accepted.append(accepted)
            self.drafted.append(length)
            self.committed_s.append(committed_s)


class Request:
    """One completion. Times are seconds of the front's monotonic clock.

    Args:
        number: Unique within the front.
        params: Resolved (``resolve``).
        context_limit: Most tokens of prompt and output together.
        ends: Token ids that end the request. They are not part of its text.
        index: Which of its prompt's completions this is.
    """

    def __init__(
        self,
        *,
        number: int,
        prompt: PromptTokens,
        params: SamplingParams,
        detokenizer: Detokenizer,
        context_limit: int,
        ends: frozenset[int] = frozenset(),
        index: int = 0,
        caller: Caller | None = None,
    ):
        caller = caller or Caller()
        self.number, self.prompt, self.prompt_ids, self.params = number, prompt.text, prompt.token_ids, params
        self.detokenizer, self.ends, self.index = detokenizer, ends, index
        self.client, self.priority, self.label = caller.client, caller.priority, caller.label
        self.trace_headers = caller.trace_headers
        self.state = State.QUEUED
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self.prompt_logprobs: list[TokenLogprob | None] | None = None if params.prompt_logprobs is None else [None]
        """Of the prompt's first tokens, as far as they are scored. Complete before the first event."""
        self.record = SpeculationRecord()
        """Counts of the rounds received so far. Final where the front ends the request."""
        self.steps = Steps()
        self.cached = 0
        """Prompt tokens found in the prefix cache."""
        self.output: RequestOutput | None = None
        self.added_s = 0.0
        self.sent_s: float | None = None
        self.first_s: float | None = None
        self.last_s: float | None = None
        self.cost = min(len(self.prompt_ids) + params.max_tokens, context_limit)
        """Most tokens it may occupy."""

    @property
    def message(self) -> Submit:
        """The message that sends it to the verifier."""
        return Submit(request=self.number, prompt=list(self.prompt_ids), params=self.params)

    def score(self, message: Scored) -> None:
        """Adds the log-probabilities of the next prompt tokens."""
        if self.prompt_logprobs is not None:
            left = self.prompt_ids[len(self.prompt_logprobs) :]
            self.prompt_logprobs.extend(TokenLogprob.from_columns(left, message.logprobs))

    def commit(self, message: Committed) -> StreamEvent:
        """Adds a round's tokens, up to the one that completes a stop string (``detokenizer.stopped``)."""
        self.cached = message.cached
        self.record.count_round(drafted=message.drafted, accepted=message.depth)
        if message.hit is not None:
            self.record.count_lookup(message.hit)
        pieces = self._pieces(message.tokens)
        kept = tuple(message.tokens[: len(pieces)])
        accepted = min(message.accepted, len(kept))
        rest: Provenance = "plain" if message.origin == "plain" else "bonus"
        self.token_ids.extend(kept)
        self.steps.add(message.drafted, message.accepted, message.committed_s)
        logprobs = None
        if self.logprobs is not None and message.logprobs is not None:
            logprobs = TokenLogprob.from_columns(kept, message.logprobs)
            self.logprobs.extend(logprobs)
        return StreamEvent(
            text="".join(pieces),
            token_ids=kept,
            accepted=accepted,
            pieces=pieces,
            provenance=tuple(message.origin if i < accepted else rest for i in range(len(kept))),
            drafted=message.drafted,
            committed_s=message.committed_s,
            logprobs=logprobs,
            index=self.index,
        )

    def _pieces(self, tokens: Sequence[int]) -> tuple[str, ...]:
        """Returns the text that becomes final with each token that counts."""
        pieces: list[str] = []
        for token in tokens:
            # As in vLLM, the token that ends a request is not part of its text.
            visible = token not in self.ends or self.params.include_stop_str_in_output
            pieces.append(self.detokenizer.add([token]) if visible else "")
            if self.detokenizer.stopped:
                break
        return tuple(pieces)

    def end(
        self, reason: FinishReason, record: SpeculationRecord, decode_s: float, error: str | None = None
    ) -> StreamEvent:
        """Returns the last event, with the output."""
        text = self.detokenizer.finish()
        # Bytes held back may complete a stop string at the very end.
        if self.detokenizer.stopped and reason != "cancelled":
            reason, error = "stop", None
        last = self.token_ids[-1] if self.token_ids else None
        stopped_by = self.detokenizer.found or (last if last in self.params.stop_token_ids else None)
        self.output = RequestOutput(
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids,
            text=self.detokenizer.text,
            token_ids=tuple(self.token_ids),
            finish_reason=reason,
            speculation=record,
            decode_s=decode_s,
            stop_reason=stopped_by if reason == "stop" else None,
            error=error if reason == "error" else None,
            logprobs=None if self.logprobs is None else tuple(self.logprobs),
            prompt_logprobs=None if self.prompt_logprobs is None else tuple(self.prompt_logprobs),
            index=self.index,
            num_cached_tokens=self.cached,
        )
        return StreamEvent(text=text, token_ids=(), accepted=0, output=self.output, index=self.index)

    def move(self, what: Input) -> None:
        """Changes the state. Raises: PipelineError: The input is not allowed in this state."""
        try:
            self.state = TRANSITIONS[self.state, what]
        except KeyError:
            raise PipelineError(
                f"request {self.number} is {self.state.name.lower()}: {what.name.lower()} is out of turn"
            ) from None
