"""The draft over several devices: the first rank leads, all prepare for their share of the outcomes.

To the verifier the first rank is the draft. Every rank holds the whole draft and the keys of every sequence. The
first rank passes on the messages it receives and the trees under verification. Each rank computes the same glue
forward and the same forecast from them, and makes the branches of its share (``ForecastShare``). The first rank joins
the shares to one speculation set. On a hit the branch is therefore known where the next trees are decided, whichever
rank it came from, and no keys move: every rank's glue computes those of an accepted path.

A rank that is gone or silent is left behind: its share of the set stays empty, and the others continue.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ...decoding.trees.shape import ABSENT
from ...decoding.verify.draft_probs import DraftProbs
from ...errors import PipelineError
from ..round.frames import Frames, OutcomeFrame, SpeculationSet
from ..sampling.walk import never
from ..transport.lanes import ControlLane, ZmqLane
from ..transport.links.base import Link, Pending
from ..transport.messages import Admit, Decided, Message, Prepare, Shutdown
from .worker import DraftedTrees, DraftWorker

IDLE_POLL_S = 0.5


class DraftRank:
    """Another rank, as the first one sees it.

    Args:
        frames: of a share of the speculation set.
    """

    def __init__(self, role: str, link: Link, lane: ZmqLane, frames: Frames):
        self.role, self._link, self._lane, self._frames = role, link, lane, frames
        self._share = frames.new(frames.speculation_size)

    def tell(self, message: Message) -> None:
        """Sends a message without waiting. Raises: PipelineError: the rank is gone."""
        self._lane.send(message, wait=False)

    def post(self) -> Pending:
        """Starts to receive the rank's share of a round's set. Raises: LinkError: the rank is gone."""
        return self._link.post(None, self._share)

    def take(self, pending: Pending, round: int) -> SpeculationSet:
        """Returns the share once it is there.

        Raises:
            LinkError: the rank is gone, out of step, or missed the link's deadline, counted from ``post``.
        """
        pending.wait()
        return self._frames.unpack_speculation(self._share, round)[0]

    def close(self) -> None:
        """Tells the rank to leave, if it is there, and closes the link."""
        with contextlib.suppress(PipelineError):
            self.tell(Shutdown())
        self._link.close()


class LeadingDraft:
    """The draft as the verifier sees it: the first rank's worker, whose sets include the shares of the others.

    Args:
        worker: the first rank's own.
        ranks: the others, in order.
        on_lost: called with the role of a rank that is lost and the reason.
    """

    def __init__(self, worker: DraftWorker, ranks: Sequence[DraftRank], on_lost: Callable[[str, str], None]):
        self._worker, self._on_lost, self._round = worker, on_lost, 0
        self._roles = [rank.role for rank in ranks]
        self._present = list(ranks)

    def admit(self, message: Admit) -> None:
        """Starts a sequence in every rank."""
        self._tell(message)
        self._worker.admit(message)

    def speculate(self, bell: Callable[[], bool] = never) -> SpeculationSet:
        """Returns the union of all ranks' shares. Shares of lost ranks are empty."""
        self._round += 1
        self._tell(Prepare(round=self._round, trees=self._worker.trees))
        own = self._worker.speculate(bell)
        # All shares are posted at once, so that several silent ranks cost no more than one deadline.
        pending: dict[DraftRank, Pending] = {}
        for rank in [*self._present]:
            with self._losing(rank):
                pending[rank] = rank.post()
        shares: dict[str, SpeculationSet] = {}
        for rank, transfer in pending.items():
            with self._losing(rank):
                shares[rank.role] = rank.take(transfer, self._round)
        return joined([own, *(shares.get(role) or _nothing_like(own) for role in self._roles)])

    def commit(self, frame: OutcomeFrame, speculation: SpeculationSet) -> list[bool]:
        """Takes in an outcome in every rank; as ``DraftWorker.commit``."""
        self._tell(Decided(outcome=frame))
        return self._worker.commit(frame, speculation)

    def waiting(self, states: Sequence[int], served: Sequence[bool], *, jit: bool) -> list[bool]:
        """As ``DraftWorker.waiting``."""
        return self._worker.waiting(states, served, jit=jit)

    def draft_now(self, missed: Sequence[bool]) -> DraftedTrees:
        """Drafts in the first rank alone; as ``DraftWorker.draft_now``."""
        return self._worker.draft_now(missed)

    def close(self) -> None:
        """Tells the other ranks to leave."""
        for rank in self._present:
            rank.close()
        self._present = []

    def _tell(self, message: Message) -> None:
        for rank in [*self._present]:
            with self._losing(rank):
                rank.tell(message)

    @contextlib.contextmanager
    def _losing(self, rank: DraftRank) -> Iterator[None]:
        """Leaves the rank behind if it fails inside."""
        try:
            yield
        except PipelineError as error:
            self._present.remove(rank)
            rank.close()
            self._on_lost(rank.role, str(error))


def joined(shares: Sequence[SpeculationSet]) -> SpeculationSet:
    """Returns the shares of all ranks, in order, as the one set that a single draft of the whole budget would make."""

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
    """Follows the first rank until it says stop, or nobody is alive to serve.

    Args:
        link, lane: to the first rank.
        frames: of a share.

    Raises:
        LinkError: the first rank is gone.
        PipelineError: a message came that no rank is sent.
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
            worker.commit(message.outcome, share)  # the first rank says what comes next
        elif isinstance(message, Admit):
            worker.admit(message)
        elif isinstance(message, Shutdown):
            return
        elif message is not None:
            raise PipelineError(f"a rank of the draft was sent {type(message).__name__}")
        elif not alive():
            return
