"""A request in flight on the client's side of the lane: what its reader has received, and what to skip."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

from ...errors import SSDError
from ...request.output import StreamEvent
from ...request.sampling_params import SamplingParams
from . import wire


class Asked:
    """One request in flight. A request that is asked again repeats its tokens; those its reader has are skipped."""

    def __init__(self, number: int, prompt: str | list[int], params: SamplingParams, priority: int = 0):
        self.number, self.prompt, self.params, self.priority = number, prompt, params, priority
        self.events: asyncio.Queue[StreamEvent | SSDError] = asyncio.Queue()
        self.received: Counter[int] = Counter()
        """Tokens given to the reader, by completion."""
        self.skip: Counter[int] = Counter()
        """Tokens to skip after asking again, by completion."""
        self.ended: set[int] = set()
        """Completions whose last event was given to the reader."""
        self.over = False

    @property
    def message(self) -> wire.Ask:
        """The message that asks for it."""
        return wire.Ask(
            number=self.number,
            prompt=self.prompt,
            params=self.params,
            credit=wire.CREDIT,
            priority=self.priority,
        )

    def put(self, event: StreamEvent) -> None:
        """Gives the reader the new part of an event."""
        index = event.index
        known = min(self.skip[index], len(event.token_ids))
        self.skip[index] -= known
        if index in self.ended or (known and known == len(event.token_ids) and event.output is None):
            return
        if known:
            event = replace(
                event,
                text="".join(event.pieces[known:]),
                token_ids=event.token_ids[known:],
                accepted=max(0, event.accepted - known),
                pieces=event.pieces[known:],
                provenance=event.provenance[known:],
                logprobs=None if event.logprobs is None else event.logprobs[known:],
            )
        self.received[index] += len(event.token_ids)
        if event.output is not None:
            self.ended.add(index)
        self.over = self.over or len(self.ended) == self.params.n
        self.events.put_nowait(event)

    def fail(self, error: SSDError) -> None:
        """Gives the reader an error as the end, unless the request is over."""
        if not self.over:
            self.over = True
            self.events.put_nowait(error)
