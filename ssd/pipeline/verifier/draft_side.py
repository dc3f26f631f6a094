"""The verifier's half of what lies between it and its draft; and how another draft takes that place."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from ...decoding.verify.draft_probs import DraftProbs
from ...errors import LinkError, PipelineError
from ..round.frames import Frames, Next, OutcomeFrame, SpeculationSet
from ..round.verdict import Verdict
from ..transport.lanes import ControlLane
from ..transport.links.base import Link
from ..transport.messages import Admit, Bell, Shutdown
from ..transport.rendezvous import Rendezvous, VerifierSide


class DraftSide:
    """The verifier's half of link and lane to the draft, and whether the draft is in a round.

    Args: bell: whether the draft ends its tree when the forward is done, and so must be told.
    """

    def __init__(self, link: Link, lane: ControlLane, frames: Frames, *, bell: bool = False):
        self.link, self.lane, self.frames = link, lane, frames
        self._rings = bell and link.arrived is None
        self.in_round = False
        self.round = self.told = 0
        self._waited_s = self.drafted_s = 0.0
        self._speculation = frames.new(frames.speculation_size)
        self._trees = frames.new(frames.tree_size)

    def tell(self, message: Admit) -> None:
        self.lane.send(message)
        self.told += 1
        self.in_round = True

    def exchange(
        self, verdict: Verdict, next_: Next, meanwhile: Callable[[], None] = lambda: None
    ) -> tuple[SpeculationSet, int]:
        frame = OutcomeFrame(
            round=self.round,
            control_count=self.told,
            next=next_,
            ngram=verdict.ngram,
            lookahead=verdict.lookahead,
            states=verdict.states,
            nodes=verdict.nodes,
            bonus=verdict.bonus,
        )
        busy_s = 0.0

        def timed() -> None:
            nonlocal busy_s
            began = time.perf_counter()
            meanwhile()
            busy_s = time.perf_counter() - began

        began = time.perf_counter()
        if self._rings:
            self.lane.send(Bell(round=self.round))
        pending = self.link.post(self.frames.pack_outcome(frame), self._speculation)
        timed()
        pending.wait()
        self._waited_s += time.perf_counter() - began - busy_s
        speculation, spent_us = self.frames.unpack_speculation(self._speculation, self.round)
        self.drafted_s = spent_us / 1e6
        return speculation, spent_us

    def receive_trees(self) -> tuple[list[list[int]], DraftProbs | None]:
        began = time.perf_counter()
        self.link.receive(self._trees)
        self._waited_s += time.perf_counter() - began
        trees, _ = self.frames.unpack_trees(self._trees, self.round)
        return trees, self.frames.unpack_tree_probs(self._trees)

    def take_waited_s(self) -> float:
        """Seconds spent waiting for the draft since the last call."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def stop(self) -> None:
        with contextlib.suppress(PipelineError):  # it may be gone already
            self.lane.send(Shutdown())
        self.link.close()


class Rejoin:
    """Lets another draft in while rounds go on: nothing here waits.

    Args: frames: of an epoch. bell: as for ``DraftSide``.
    """

    def __init__(self, side: VerifierSide, frames: Callable[[int], Frames], *, bell: bool = False):
        self._side, self._frames, self._bell = side, frames, bell
        self._awaited = False
        self._linking: Future[Link] | None = None

    @property
    def epoch(self) -> int:
        return self._side.rendezvous.epoch

    def reopen(self, epoch: int) -> Rendezvous:
        """Where the draft of this epoch shall come; one of an earlier epoch is let in no more.

        Raises: LinkError: there is no room for another lane.
        """
        self.close()
        self._side.reopen(epoch)
        self._awaited = True
        return self._side.rendezvous

    def arrived(self) -> DraftSide | None:
        """The draft, once it is linked.

        Raises: LinkError: it came, and could not be linked; it is awaited no more.
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
        """Await nobody. A link still being made is closed when it is there."""
        linking, self._linking, self._awaited = self._linking, None, False
        if linking is not None:
            linking.add_done_callback(lambda done: None if done.exception() else done.result().close())


def _in_background(connect: Callable[[], Link]) -> Future[Link]:
    """A daemon: nobody waits for a peer that does not come, not even the end of the process."""
    linking: Future[Link] = Future()

    def work() -> None:
        try:
            linking.set_result(connect())
        except (PipelineError, OSError, RuntimeError) as error:
            linking.set_exception(LinkError(f"the draft came and could not be linked: {error}"))

    threading.Thread(target=work, name="ssd-rejoin", daemon=True).start()
    return linking
