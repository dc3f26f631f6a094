"""The verifier's end of the link and the lane to its draft."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

from ...decoding.verify.draft_probs import DraftProbs
from ...errors import PipelineError
from ..round.frames import Frames, Next, OutcomeFrame, SpeculationSet
from ..round.roles import Arm
from ..round.verdict import Verdict
from ..transport.lanes import ControlLane
from ..transport.links.base import Link, Pending
from ..transport.messages import Admit, Bell, Shutdown


class DraftSide:
    """One draft, as the verifier sees it. A draft that takes its place is another object.

    No call waits for a draft that is dead: sending on the lane fails at once, and the link has deadlines.

    Args:
        link: to the draft.
        lane: to the same draft.
        frames: of the link's epoch.
        bell: whether the draft ends its tree when the forward is done, and so has to know when.
    """

    def __init__(self, link: Link, lane: ControlLane, frames: Frames, *, bell: bool = False):
        self.link, self.lane, self.frames = link, lane, frames
        self._rings = bell and link.arrived is None
        self.known: Mapping[int, Arm] = {}
        """Requests that the draft knows, and their roles there."""
        self.in_round = False
        """Whether the draft takes part in the next exchange."""
        self._round = self._told = 0
        self._next = Next.ROUND
        self._speculation = frames.new(frames.speculation_size)
        self._trees = frames.new(frames.tree_size)

    def introduce(self, messages: Iterable[Admit], known: Mapping[int, Arm]) -> None:
        """Make sequences known to the draft.

        Args:
            messages: of new sequences, and of those that speculate in another way from now on.
            known: all that the draft knows then.

        Raises:
            PipelineError: the draft is gone.
        """
        for message in messages:
            self.lane.send(message, wait=False)
            self._told += 1
            self.in_round = True
        self.known = known

    def post(self, verdict: Verdict) -> Pending:
        """Start the exchange: send the outcomes, receive the speculation set. ``finish`` ends it.

        Raises:
            PipelineError: the draft is gone.
        """
        self._next = verdict.next
        frame = OutcomeFrame(
            round=self._round,
            control_count=self._told,
            next=verdict.next,
            ngram=verdict.ngram,
            lookahead=verdict.lookahead,
            states=verdict.states,
            nodes=verdict.nodes,
            bonus=verdict.bonus,
        )
        if self._rings:
            self.lane.send(Bell(round=self._round), wait=False)
        return self.link.post(self.frames.pack_outcome(frame), self._speculation)

    def finish(self, pending: Pending) -> tuple[SpeculationSet, float]:
        """End the exchange. Returns the speculation set and the seconds that the draft took for it.

        Raises:
            LinkError: the draft is gone, late or out of step.
        """
        pending.wait()
        speculation, spent_us = self.frames.unpack_speculation(self._speculation, self._round)
        self.in_round = self._next is Next.ROUND
        self._round += 1
        return speculation, spent_us / 1e6

    def receive_trees(self) -> tuple[list[list[int]], DraftProbs | None]:
        """The candidates drafted for rows that missed: trees ``[B][W - 1]``, and under rules that need it what they
        were drawn from ``[B, I, m]``. They belong to the exchange before.

        Raises:
            LinkError: the draft is gone, late or out of step.
        """
        self.link.receive(self._trees)
        trees, _ = self.frames.unpack_trees(self._trees, self._round - 1)
        return trees, self.frames.unpack_tree_probs(self._trees)

    def stop(self) -> None:
        """Send the draft home."""
        with contextlib.suppress(PipelineError):  # it may be gone already
            self.lane.send(Shutdown(), wait=False)
        self.link.close()
