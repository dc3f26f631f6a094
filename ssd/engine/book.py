"""The book of requests: where each request stands, as a state machine without I/O.

Requests and the verifier's messages go in; events for the requests' owners and messages for the verifier come out.
Every request gets exactly one last event: at once if the front finds a stop string, otherwise when the verifier has
released it.

::

    QUEUED ──send──► SENT ──commit──► DECODING ──stop──► STOPPED
       │              │                  │                  │
       │            cancel             cancel             finish
       │              ▼                  ▼                  ▼
       └──cancel──► (DONE)          CANCELLED ──finish──► DONE
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ..errors import OverloadedError, RequestError
from ..pipeline.transport.messages import Cancel, Committed, Finished, Message, Scored
from ..request.output import FinishReason, SpeculationRecord, StreamEvent
from .fair_queue import FairQueue
from .request import Input, Request, State

VERIFIER = "verifier"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Most that may be in flight at once. None is no limit."""

    queue: int | None = None
    """Requests that wait."""
    tokens: int | None = None
    """Prompt tokens and ``max_tokens`` of all requests, waiting or running."""
    sent: int | None = None
    """Requests the verifier has. The others wait here, where clients take turns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What follows from an input."""

    events: list[tuple[Request, StreamEvent]] = field(default_factory=list)
    send: list[tuple[str, Message]] = field(default_factory=list)
    """Messages and the role each is for, in order."""


class RequestBook:
    """All requests from submission to their last event.

    Args:
        clock: Returns monotonic seconds.
    """

    def __init__(self, limits: Limits | None = None, clock: Callable[[], float] = time.perf_counter):
        self.limits, self._clock = limits or Limits(), clock
        self.live: dict[int, Request] = {}
        """Requests that wait or that the verifier has."""
        self._queue = FairQueue()
        self.tokens = 0
        """What ``limits.tokens`` bounds."""

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def sent(self) -> int:
        """Requests the verifier has."""
        return len(self.live) - len(self._queue)

    def add(self, requests: Sequence[Request]) -> Step:
        """Adds all completions of a prompt, or none.

        Raises:
            RequestError: They exceed a limit even with nothing else in flight.
            OverloadedError: They exceed a limit now. The same requests may be added later.
        """
        self._check_room(len(requests), sum(request.cost for request in requests))
        for request in requests:
            request.added_s = self._clock()
            self.live[request.number] = request
            self.tokens += request.cost
            self._queue.push(request.client, request.number, request.priority)
        return Step(send=self._dispatch())

    def _check_room(self, count: int, cost: int) -> None:
        limits = self.limits
        if limits.tokens is not None and cost > limits.tokens:
            raise RequestError(
                f"the request may need {cost} tokens (prompt and max_tokens of {count} completions); "
                f"server.max_tokens_in_flight={limits.tokens} can never hold them, lower max_tokens or n"
            )
        if limits.sent is not None and limits.queue is not None:
            if count > limits.sent + limits.queue:
                raise RequestError(
                    f"the request has {count} completions; at most {limits.sent + limits.queue} can be in flight "
                    f"(server.max_queue={limits.queue}), lower n"
                )
            waiting = count - max(0, limits.sent - self.sent)
            if waiting > 0 and self.queued + waiting > limits.queue:
                raise OverloadedError(f"{self.queued} requests wait already (server.max_queue); try again later")
        if limits.tokens is not None and self.tokens + cost > limits.tokens:
            raise OverloadedError(
                f"{self.tokens} tokens are in flight and this request may need {cost} more than "
                f"server.max_tokens_in_flight={limits.tokens} allows; try again later or lower max_tokens"
            )

    def cancel(self, numbers: Iterable[int]) -> Step:
        """Cancels requests. Those that are over already are left alone. The last event of a waiting request comes at
        once, that of a running one when the verifier has released it: within a round."""
        step = Step()
        for number in numbers:
            if (request := self.live.get(number)) is None:
                continue
            before = request.state
            request.move(Input.CANCEL)
            if request.state is State.DONE:
                self._queue.remove(request.client, number, request.priority)
                step.events.extend(self._close(request, "cancelled", SpeculationRecord(), 0.0))
            elif before in (State.SENT, State.DECODING):
                step.send.append((VERIFIER, Cancel(request=number)))
        return step

    def handle(self, message: Scored | Committed | Finished) -> Step:
        """Takes in a message about a request. Messages that crossed with the cancel of a request that was over then
        are dropped.

        Raises: PipelineError: The message is out of turn.
        """
        request = self.live.get(message.request)
        if request is None:
            return Step()
        if isinstance(message, Scored):
            request.move(Input.SCORE)
            request.score(message)
            return Step()
        if isinstance(message, Committed):
            return self._commit(request, message)
        reason = "cancelled" if request.state is State.CANCELLED else message.reason
        request.move(Input.FINISH)
        closed = self._close(request, reason, message.record, message.decode_s, message.error)
        return Step(events=closed, send=self._dispatch())

    def fail(self) -> list[Request]:
        """Forgets all requests, because the pipeline is gone. None gets another event. Returns them."""
        lost, self.live, self._queue, self.tokens = list(self.live.values()), {}, FairQueue(), 0
        for request in lost:
            request.state = State.DONE
        return lost

    def _dispatch(self) -> list[tuple[str, Message]]:
        """Returns the messages that send waiting requests to the verifier, as far as the limit allows."""
        send: list[tuple[str, Message]] = []
        while self._queue and (self.limits.sent is None or self.sent < self.limits.sent):
            request = self.live[self._queue.pop()]
            request.move(Input.SEND)
            request.sent_s = self._clock()
            send.append((VERIFIER, request.message))
        return send

    def _commit(self, request: Request, message: Committed) -> Step:
        request.move(Input.COMMIT)
        if request.state is not State.DECODING:
            return Step()
        request.last_s = self._clock()
        if request.first_s is None:
            request.first_s = request.last_s
        event = request.commit(message)
        if request.detokenizer.stopped:
            # The rest of the block, and what the verifier decodes until it reads the cancel, does not count.
            request.move(Input.STOP)
            last = request.end("stop", request.record, message.decode_s)
            return Step(events=[(request, event), (request, last)], send=[(VERIFIER, Cancel(request=request.number))])
        return Step(events=[(request, event)])

    def _close(
        self,
        request: Request,
        reason: FinishReason,
        record: SpeculationRecord,
        decode_s: float,
        error: str | None = None,
    ) -> list[tuple[Request, StreamEvent]]:
        """Removes a request that nobody holds any more. Returns its last event, unless that is out already."""
        del self.live[request.number]
        self.tokens -= request.cost
        if request.output is not None:
            return []
        decode_s = decode_s or self._clock() - (request.first_s or request.added_s)
        return [(request, request.end(reason, record, decode_s, error))]
