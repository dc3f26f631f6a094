"""The verifier's end of the link and the lane to its draft, and how another draft takes the place of a lost one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future

from ...decoding.verify.draft_probs import DraftProbs
from ...errors import LinkError, PipelineError
from ..round.frames import Frames, Next, SpeculationSet
from ..round.roles import Arm
from ..round.verdict import Verdict
from ..transport.lanes import ControlLane
from ..transport.links.base import Link, Pending
from ..transport.messages import Admit, Bell, Shutdown
from ..transport.rendezvous import Rendezvous, VerifierSide


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
        if self._rings:
            self.lane.send(Bell(round=self._round), wait=False)
        frame = self.frames.pack_outcome(verdict.outcome(self._round, self._told))
        return self.link.post(frame, self._speculation)

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


class Rejoin:
    """Lets another draft in while rounds go on. Nothing here waits.

    Args:
        side: the verifier's meeting place.
        frames: makes the frames of an epoch.
        bell: as for ``DraftSide``.
    """

    def __init__(self, side: VerifierSide, frames: Callable[[int], Frames], *, bell: bool = False):
        self._side, self._frames, self._bell = side, frames, bell
        self._awaited = False
        self._linking: Future[Link] | None = None

    @property
    def epoch(self) -> int:
        """The epoch of the draft that is linked or awaited."""
        return self._side.rendezvous.epoch

    def reopen(self, epoch: int) -> Rendezvous:
        """Await the draft of this epoch. A draft of an earlier epoch is not let in any more.

        Returns:
            where the draft meets the verifier.

        Raises:
            LinkError: the lane could not be opened.
        """
        self.close()
        self._side.reopen(epoch)
        self._awaited = True
        return self._side.rendezvous

    def arrived(self) -> DraftSide | None:
        """The awaited draft, once it is linked; None before.

        Raises:
            LinkError: it came and could not be linked. It is not awaited any more.
        """
        if not self._awaited:
            return None
        if self._linking is None:
            if self._side.came(0):
                self._linking = _in_background(self._side.connect)
            return None
        if not self._linking.done():
            return None
        linking, self._linking, self._awaited = self._linking, None, False
        return DraftSide(linking.result(), self._side.lane, self._frames(self.epoch), bell=self._bell)

    def close(self) -> None:
        """Stop waiting. A link that is still being made is closed once it is there."""
        linking, self._linking, self._awaited = self._linking, None, False
        if linking is not None:
            linking.add_done_callback(lambda done: None if done.exception() else done.result().close())


def _in_background(connect: Callable[[], Link]) -> Future[Link]:
    """Connect in a daemon thread, so that a peer that does not come holds up nothing, not even the process's end."""
    linking: Future[Link] = Future()

    def work() -> None:
        try:
            linking.set_result(connect())
        except (PipelineError, OSError, RuntimeError) as error:
            linking.set_exception(LinkError(f"the draft came and could not be linked: {error}"))

    threading.Thread(target=work, name="ssd-rejoin", daemon=True).start()
    return linking
