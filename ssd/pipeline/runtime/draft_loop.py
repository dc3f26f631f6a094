"""The draft's half of every round: it moves frames and messages, the worker decides."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from ...errors import PipelineError
from ..draft.proposing import Draft
from ..draft.ranks import LeadingDraft
from ..round.frames import Frames, Next
from ..transport.inbox import Inbox
from ..transport.lanes import ControlLane
from ..transport.links.base import Link
from ..transport.messages import (
    Admit,
    Shutdown,
)

IDLE_POLL_S = 0.5
TIMED_ROUNDS = 4096


def draft_loop(
    worker: Draft | LeadingDraft,
    link: Link,
    lane: ControlLane,
    frames: Frames,
    *,
    jit: bool,
    timeout_s: float,
    alive: Callable[[], bool] = lambda: True,
) -> None:
    """Serve the verifier until it says stop, the link breaks or nobody is alive to serve.

    Args:
        lane: from the verifier. frames: of the link's epoch. jit: draft at once for ``ssd`` rows that missed.
        timeout_s: how long an announced control message may take to arrive.

    Raises:
        LinkError: the verifier vanished in mid-round.
        PipelineError: an announced message did not come.
    """
    incoming, inbox = frames.new(frames.outcome_size), Inbox(lane, link)
    applied = round_number = 0

    def apply(message: object) -> bool:
        """False: shut down."""
        nonlocal applied
        if isinstance(message, Admit):
            worker.admit(message)
            applied += 1
        return not isinstance(message, Shutdown)

    idle = True
    while True:
        if idle:
            message = inbox.receive(IDLE_POLL_S)
            if message is None:
                if not alive():
                    return
                continue
            if not apply(message):
                return
            idle = False
        began = time.perf_counter()
        speculation = worker.speculate(bell=partial(inbox.rung, round_number))
        spent_us = int((time.perf_counter() - began) * 1e6)
        link.exchange(frames.pack_speculation(speculation, round_number, spent_us), incoming)
        frame = frames.unpack_outcome(incoming, round_number)
        while applied < frame.control_count:
            message = inbox.receive(timeout_s)
            if message is None:
                raise PipelineError(f"a control message announced by the verifier did not come in {timeout_s:g} s")
            if not apply(message):
                return
        served = worker.commit(frame, speculation)
        idle = frame.next is Next.IDLE
        if not idle:
            missed = worker.waiting(frame.states, served, jit=jit)
            if any(missed):
                began = time.perf_counter()
                drafted = worker.draft_now(missed)
                spent_us = int((time.perf_counter() - began) * 1e6)
                link.send(frames.pack_trees(drafted.trees, round_number, spent_us, drafted.draft))
        round_number += 1
