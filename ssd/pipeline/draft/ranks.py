"""The draft over several devices: the first rank leads, all prepare for their share of the outcomes.

To the verifier the first rank is the draft; it knows of no other. Every rank holds the whole draft and the keys of
every sequence. The first tells the others all that it is told itself, and the trees under verification; each computes
the same glue forward and the same forecast from them, and makes the branches of its share (``ForecastShare``). The
first joins the shares to one speculation set. So on a hit the branch is known where the next trees are decided,
whichever rank it came from, and no keys ever move: those of an accepted path are computed by every rank's glue.

A rank that is gone or silent is left behind: its share of the set stays empty, and the others go on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...decoding.trees.shape import ABSENT
from ...decoding.verify.draft_probs import DraftProbs
from ...errors import PipelineError
from ..round.frames import Frames, Next, OutcomeFrame, SpeculationSet
from ..sampling.walk import never
from ..transport.lanes import ControlLane, ZmqLane
from ..transport.links.base import Link
from ..transport.messages import Admit, Decided, Message, Prepare, Shutdown
from ..transport.rendezvous import Rendezvous, VerifierSide, link_kind, own_address, publish
from .worker import DraftWorker

if TYPE_CHECKING:
    from ..runtime.plan import Plan

IDLE_POLL_S = 0.5


class DraftRank:
    """The first rank's half of what lies between it and another one."""

    def __init__(self, role: str, link: Link, lane: ZmqLane, frames: Frames):
        self.role, self._link, self._lane, self._frames = role, link, lane, frames
        self._share = frames.new(frames.speculation_size)

    def tell(self, message: Message) -> None:
        """Raises: PipelineError: it is gone."""
        self._lane.send(message, wait=False)

    def take(self, round: int) -> SpeculationSet:
        """Its share of this round's set. Raises: LinkError: it is gone, or too late."""
        self._link.receive(self._share)
        return self._frames.unpack_speculation(self._share, round)[0]

    def close(self) -> None:
        with contextlib.suppress(PipelineError):  # it may be gone already
            self.tell(Shutdown())
        self._link.close()


class RankMeeting:
    """Where the first rank meets the others: a store, a lane and a link for each. The verifier's store tells them.

    Frames between ranks lie in host memory and are small, so no link between them is NCCL's. Its deadline is half
    of the verifier's for the first rank: who waits for a silent rank must still answer in time.

    Args: rendezvous: the verifier's. folder: as for ``VerifierSide``.
    """

    def __init__(self, plan: Plan, rendezvous: Rendezvous, *, folder: str | None):
        self._plan, engine, host = plan, plan.config.engine, own_address(rendezvous)
        self._sides: dict[str, VerifierSide] = {}
        for role in plan.config.draft_roles[1:]:
            self._sides[role] = VerifierSide(
                host=host,
                kind=link_kind("cpu", "cpu", "auto" if engine.link == "nccl" else engine.link, host=host),
                timeout_s=engine.start_timeout_s,
                link_timeout_s=engine.link_timeout_s / 2,
                folder=folder,
            )
            publish(rendezvous, role, self._sides[role].rendezvous, timeout_s=engine.start_timeout_s)

    def link(self) -> list[DraftRank | None]:
        """Waits for all of them. Raises: LinkError: one does not come in time."""
        frames = self._plan.frames(share=True)
        return [DraftRank(role, side.link(), side.lane, frames) for role, side in self._sides.items()]

    def close(self) -> None:
        for side in self._sides.values():
            side.close()


class LeadingDraft(DraftWorker):
    """The first rank's worker: the others are told of everything, their shares are joined."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.ranks: list[DraftRank | None] = []
        """The others, in order; None in the place of one that is lost."""
        self.on_lost: Callable[[str, str], None] = lambda _role, _why: None
        """Is told which rank is lost, and why."""
        self._round = 0

    def admit(self, message: Admit) -> None:
        self._tell(message)
        super().admit(message)

    def speculate(self, bell: Callable[[], bool] = never) -> SpeculationSet:
        self._round += 1
        self._tell(Prepare(round=self._round, trees=self.trees))
        own = super().speculate(bell)
        return joined([own, *(self._take(rank) or _nothing_like(own) for rank in self.ranks)])

    def commit(self, frame: OutcomeFrame, speculation: SpeculationSet) -> list[bool]:
        self._tell(Decided(states=frame.states, nodes=frame.nodes, bonus=frame.bonus, lookahead=frame.lookahead))
        return super().commit(frame, speculation)

    def close(self) -> None:
        """Send the others home."""
        for rank in filter(None, self.ranks):
            rank.close()
        self.ranks = []

    def _tell(self, message: Message) -> None:
        for rank in filter(None, self.ranks):
            try:
                rank.tell(message)
            except PipelineError as error:
                self._lose(rank, error)

    def _take(self, rank: DraftRank | None) -> SpeculationSet | None:
        """The share of a rank that is there, and sends it."""
        if rank is None:
            return None
        try:
            return rank.take(self._round)
        except PipelineError as error:
            self._lose(rank, error)
            return None

    def _lose(self, rank: DraftRank, error: PipelineError) -> None:
        """Go on without it."""
        self.ranks[self.ranks.index(rank)] = None
        rank.close()
        self.on_lost(rank.role, str(error))


def joined(shares: Sequence[SpeculationSet]) -> SpeculationSet:
    """The shares of all ranks, in order, as the one set that a draft of the whole budget would make."""

    def join(parts: Sequence[np.ndarray]) -> np.ndarray:
        found = np.stack(parts, axis=2)
        return found.reshape(len(found), -1, *found.shape[3:])

    def join_drawn(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(parts), dim=2).flatten(1, 2)

    drawn = [share.draft for share in shares if share.draft is not None]
    probs = [join_drawn([d.tokens for d in drawn]), join_drawn([d.probs for d in drawn])] if drawn else None
    return SpeculationSet(
        nodes=join([share.nodes for share in shares]),
        guesses=join([share.guesses for share in shares]),
        trees=join([share.trees for share in shares]),
        draft=DraftProbs(*probs) if probs else None,
    )


def _nothing_like(share: SpeculationSet) -> SpeculationSet:
    draft = None if share.draft is None else DraftProbs.nothing(*share.draft.tokens.shape)
    return SpeculationSet(
        nodes=np.zeros_like(share.nodes),
        guesses=np.full_like(share.guesses, ABSENT),
        trees=np.full_like(share.trees, ABSENT),
        draft=draft,
    )


def share_loop(
    worker: DraftWorker, link: Link, lane: ControlLane, frames: Frames, *, alive: Callable[[], bool] = lambda: True
) -> None:
    """Be another rank: do what the first one says until it says stop, or nobody is alive to serve.

    Args: lane: from the first rank. frames: of a share.

    Raises:
        LinkError: the first rank is gone. PipelineError: a message no rank is sent.
    """
    share: SpeculationSet | None = None
    while True:
        message = lane.receive(IDLE_POLL_S)
        if isinstance(message, Prepare):
            began, worker.trees = time.perf_counter(), message.trees
            share = worker.speculate()
            spent_us = int((time.perf_counter() - began) * 1e6)
            link.send(frames.pack_speculation(share, message.round, spent_us))
        elif isinstance(message, Decided) and share is not None:
            outcome = OutcomeFrame(
                round=0,
                control_count=0,
                next=Next.ROUND,
                lookahead=message.lookahead,
                states=message.states,
                nodes=message.nodes,
                bonus=message.bonus,
            )
            worker.commit(outcome, share)  # what comes next is the first rank's to say
        elif isinstance(message, Admit):
            worker.admit(message)
        elif isinstance(message, Shutdown):
            return
        elif message is not None:
            raise PipelineError(f"a rank of the draft was sent {type(message).__name__}")
        elif not alive():
            return
