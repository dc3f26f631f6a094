"""The book of requests: where each one stands, as a state machine without I/O.

Fronts (``LLM``, ``AsyncEngine``) put requests in and the verifier's messages; out come events for
the requests' owners and messages for the verifier. Every request gets exactly one last event: when
the verifier has let go of it, or, where the front finds a stop string, at once.

::

    QUEUED ──send──► SENT ──commit──► DECODING ──stop──► STOPPED
       │              │                  │                  │
       │            cancel             cancel             finish
       │              ▼                  ▼                  ▼
       └──cancel──► (DONE)          CANCELLED ──finish──► DONE
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from ..errors import OverloadedError, PipelineError
from ..pipeline.transport.messages import Cancel, Committed, Finished, Submit
from ..request.output import FinishReason, Provenance, RequestOutput, SpeculationRecord, StreamEvent, TokenLogprob
from ..request.sampling_params import SamplingParams
from .detokenize import Detokenizer
from .fair_queue import FairQueue


class State(Enum):
    """Of one request."""

    QUEUED = auto()
    """Here; the verifier does not know it."""
    SENT = auto()
    """The verifier has it; no token yet."""
    DECODING = auto()
    STOPPED = auto()
    """A stop string is complete and the last event is out; the verifier was told, and has the request
    until it answers."""
    CANCELLED = auto()
    """Its owner gave up; the verifier was told, its account of the request is due."""
    DONE = auto()


class Input(Enum):
    """What can happen to one request."""

    SEND = auto()
    COMMIT = auto()
    STOP = auto()
    CANCEL = auto()
    FINISH = auto()


TRANSITIONS: dict[tuple[State, Input], State] = {
    (State.QUEUED, Input.SEND): State.SENT,
    (State.QUEUED, Input.CANCEL): State.DONE,
    (State.SENT, Input.COMMIT): State.DECODING,
    (State.SENT, Input.CANCEL): State.CANCELLED,
    (State.SENT, Input.FINISH): State.DONE,
    (State.DECODING, Input.COMMIT): State.DECODING,
    (State.DECODING, Input.STOP): State.STOPPED,
    (State.DECODING, Input.CANCEL): State.CANCELLED,
    (State.DECODING, Input.FINISH): State.DONE,
    # What was committed before the verifier took in our message.
    (State.STOPPED, Input.COMMIT): State.STOPPED,
    (State.STOPPED, Input.CANCEL): State.STOPPED,
    (State.STOPPED, Input.FINISH): State.DONE,
    (State.CANCELLED, Input.COMMIT): State.CANCELLED,
    (State.CANCELLED, Input.CANCEL): State.CANCELLED,
    (State.CANCELLED, Input.FINISH): State.DONE,
}
"""Everything else is a fault of the pipeline."""


@dataclass(kw_only=True, slots=True)
class Steps:
    """Rounds of one request that verified draft tokens, in vLLM's terms."""

    by_draft_length: dict[int, list[int]] = field(default_factory=dict)
    """``by_draft_length[k][j]`` rounds accepted j of k draft tokens."""

    def add(self, drafted: int, accepted: int) -> None:
        length = max(drafted, accepted)  # a sibling may be accepted where the chain has no token
        if length:
            counts = self.by_draft_length.setdefault(length, [0] * (length + 1))
            counts[accepted] += 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What may be in flight at once; None is no limit."""

    queue: int | None = None
    """Requests that wait."""
    tokens: int | None = None
    """Prompt and ``max_tokens`` of all requests, waiting or running."""
    sent: int | None = None
    """Requests the verifier knows. Those beyond wait here, where clients take turns."""


class Request:
    """One completion on the front's side. Times are the front's monotonic clock, seconds.

    Args:
        params: resolved (``resolve``). ends: token ids that end it; they are none of its text.
        index: which of its prompt's completions it is. priority: lower values leave the queue first.
    """

    def __init__(
        self,
        *,
        number: int,
        prompt: str,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
        detokenizer: Detokenizer,
        context_limit: int,
        ends: frozenset[int] = frozenset(),
        index: int = 0,
        client: str = "",
        priority: int = 0,
    ):
        self.number, self.prompt, self.prompt_ids, self.params = number, prompt, prompt_ids, params
        self.detokenizer, self.ends, self.index = detokenizer, ends, index
        self.client, self.priority = client, priority
        self.label = ""
        """What whoever asked calls it."""
        self.state = State.QUEUED
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self.record = SpeculationRecord()
        """Of the rounds heard of: what counts where only the front knows the end."""
        self.steps = Steps()
        self.cached = 0
        """Tokens of the prompt whose keys and values an earlier one had left."""
        self.output: RequestOutput | None = None
        self.added_s = 0.0
        self.sent_s: float | None = None
        self.first_s: float | None = None
        self.cost = min(len(prompt_ids) + params.max_tokens, context_limit)
        """Tokens it may come to occupy."""

    def commit(self, message: Committed) -> StreamEvent:
        """Take in a round's tokens, to the one that completes a stop string (``detokenizer.stopped``)."""
        self.cached = message.cached
        self.record.count_round(drafted=message.drafted, accepted=message.depth)
        if message.hit is not None:
            self.record.count_lookup(message.hit)
        # One at a time: tokens after the one that completed a stop string do not count.
        pieces: list[str] = []
        for token in message.tokens:
            # The token that ends a request is none of its text, as in vLLM.
            said = token not in self.ends or self.params.include_stop_str_in_output
            pieces.append(self.detokenizer.add([token]) if said else "")
            if self.detokenizer.stopped:
                break
        kept = tuple(message.tokens[: len(pieces)])
        accepted = min(message.accepted, len(kept))
        rest: Provenance = "plain" if message.origin == "plain" else "bonus"
        self.token_ids.extend(kept)
        self.steps.add(message.drafted, message.accepted)
        logprobs = None
        if self.logprobs is not None and message.logprobs is not None:
            logprobs = read_logprobs(kept, message.logprobs)
            self.logprobs.extend(logprobs)
        return StreamEvent(
            text="".join(pieces),
            token_ids=kept,
            accepted=accepted,
            pieces=tuple(pieces),
            provenance=tuple(message.origin if i < accepted else rest for i in range(len(kept))),
            drafted=message.drafted,
            committed_s=message.committed_s,
            logprobs=logprobs,
            index=self.index,
        )

    def end(
        self, reason: FinishReason, record: SpeculationRecord, decode_s: float, error: str | None = None
    ) -> StreamEvent:
        """The last event, with the output."""
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
            index=self.index,
            num_cached_tokens=self.cached,
        )
        return StreamEvent(text=text, token_ids=(), accepted=0, output=self.output, index=self.index)

    def move(self, what: Input) -> None:
        try:
            self.state = TRANSITIONS[self.state, what]
        except KeyError:
            raise PipelineError(
                f"request {self.number} is {self.state.name.lower()}: {what.name.lower()} is out of turn"
            ) from None


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What follows from an input."""

    events: list[tuple[Request, StreamEvent]] = field(default_factory=list)
    send: list[Submit | Cancel] = field(default_factory=list)
    """For the verifier, in order."""


class RequestBook:
    """Requests from their coming to their last event.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, limits: Limits | None = None, clock: Callable[[], float] = time.perf_counter):
        self.limits, self._clock = limits or Limits(), clock
        self.live: dict[int, Request] = {}
        """Waiting, or known to the verifier."""
        self._queue = FairQueue()
        self.tokens = 0
        """What ``limits.tokens`` bounds."""

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def sent(self) -> int:
        """Requests the verifier knows."""
        return len(self.live) - len(self._queue)

    def add(self, request: Request) -> Step:
        """Raises: OverloadedError, and the book stays as it was."""
        waits = self.limits.sent is not None and self.sent >= self.limits.sent
        if waits and self.limits.queue is not None and self.queued >= self.limits.queue:
            raise OverloadedError(f"{self.queued} requests wait already (server.max_queue); try again later")
        if self.limits.tokens is not None and self.tokens + request.cost > self.limits.tokens:
            raise OverloadedError(
                f"{self.tokens} tokens are in flight and this request may need {request.cost} more than "
                f"server.max_tokens_in_flight={self.limits.tokens} allows; try again later or lower max_tokens"
            )
        request.added_s = self._clock()
        self.live[request.number] = request
        self.tokens += request.cost
        self._queue.push(request.client, request.number, request.priority)
        return Step(send=self._dispatch())

    def cancel(self, number: int) -> Step:
        """Give a request up; one that is over already is left alone. Its last event comes at once if
        it waited here, otherwise when the verifier has let go of it: within a round."""
        request = self.live.get(number)
        if request is None:
            return Step()
        before = request.state
        request.move(Input.CANCEL)
        if request.state is State.DONE:
            self._queue.remove(request.client, number, request.priority)
            return Step(events=self._close(request, "cancelled", SpeculationRecord(), 0.0), send=self._dispatch())
        return Step(send=[Cancel(request=number)] if before in (State.SENT, State.DECODING) else [])

    def handle(self, message: Committed | Finished) -> Step:
        """Take in what the verifier says of a request. What crossed with our own cancelling of one
        that was over then is dropped.

        Raises: PipelineError if it cannot be.
        """
        request = self.live.get(message.request)
        if request is None:
            return Step()
        if isinstance(message, Committed):
            return self._commit(request, message)
        reason = "cancelled" if request.state is State.CANCELLED else message.reason
        request.move(Input.FINISH)
        closed = self._close(request, reason, message.record, message.decode_s, message.error)
        return Step(events=closed, send=self._dispatch())

    def fail(self) -> list[Request]:
        """The pipeline is gone: forget all requests, none gets another event. Returns them."""
        lost, self.live, self._queue, self.tokens = list(self.live.values()), {}, FairQueue(), 0
        for request in lost:
            request.state = State.DONE
        return lost

    def _dispatch(self) -> list[Submit | Cancel]:
        """Hand on what the verifier may know."""
        send: list[Submit | Cancel] = []
        while self._queue and (self.limits.sent is None or self.sent < self.limits.sent):
            request = self.live[self._queue.pop()]
            request.move(Input.SEND)
            request.sent_s = self._clock()
            send.append(Submit(request=request.number, prompt=list(request.prompt_ids), params=request.params))
        return send

    def _commit(self, request: Request, message: Committed) -> Step:
        request.move(Input.COMMIT)
        if request.state is not State.DECODING:
            return Step()
        if request.first_s is None:
            request.first_s = self._clock()
        event = request.commit(message)
        if request.detokenizer.stopped:
            # The rest of the block, and what the verifier decodes until it hears of it, does not count.
            request.move(Input.STOP)
            last = request.end("stop", request.record, message.decode_s)
            return Step(events=[(request, event), (request, last)], send=[Cancel(request=request.number)])
        return Step(events=[(request, event)])

    def _close(
        self,
        request: Request,
        reason: FinishReason,
        record: SpeculationRecord,
        decode_s: float,
        error: str | None = None,
    ) -> list[tuple[Request, StreamEvent]]:
        """Nobody has the request any more. Its last event, if that is not out."""
        del self.live[request.number]
        self.tokens -= request.cost
        if request.output is not None:
            return []
        decode_s = decode_s or self._clock() - (request.first_s or request.added_s)
        return [(request, request.end(reason, record, decode_s, error))]


def read_logprobs(tokens: Sequence[int], columns: Sequence[Sequence[Any]]) -> tuple[TokenLogprob, ...]:
    """Of the first tokens of a ``Committed`` message, from its ``logprobs``."""
    return tuple(
        TokenLogprob(token_id=token, logprob=value, rank=rank, top=tuple(zip(ids, values, strict=True)))
        for token, value, rank, ids, values in zip(tokens, *columns, strict=False)
    )
