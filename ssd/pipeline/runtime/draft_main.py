"""The life of a draft: of the one that the verifier talks to, and of the other ranks that prepare beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

from ...config.machine import usable_cores
from ...config.sections import rank_of
from ...errors import LinkError
from ...models.device import own_stream
from ..draft.proposing import Draft
from ..draft.ranks import DraftRank, LeadingDraft, share_loop
from ..draft.worker import DraftWorker
from ..transport.lanes import ControlLane
from ..transport.links.kinds import link_kind
from ..transport.messages import Failed, Ready, Shutdown
from ..transport.rendezvous import Rendezvous, VerifierSide, draft_side, own_address, publish, published
from .build_draft import any_draft
from .cores import set_threads, settle
from .draft_loop import draft_loop
from .plan import Plan
from .worker_main import LastWords, introduce

Build = Callable[[Plan], tuple[Draft, dict[str, Any]]]


def run_draft(
    plan: Plan,
    front: ControlLane,
    *,
    role: str = "draft",
    folder: str | None = None,
    alive: Callable[[], bool] = lambda: True,
    build: Build | None = None,
) -> None:
    """Learns where the verifier is, builds the model, links, serves, leaves.

    Args:
        role: ``draft`` for the rank that the verifier talks to, ``draft-1``, ... for the others.
        folder: where the first of several ranks opens its sockets.
        alive: whether there is still a front to serve.
        build: makes the warm draft and its description; by default ``any_draft``.
    """
    config, rank = plan.config, rank_of(role)
    assert config.draft is not None
    build = build or partial(any_draft, rank=rank)
    with (
        LastWords(role, front),
        own_stream(config.draft.device, config.draft.priority),
        contextlib.ExitStack() as opened,
    ):
        cores = usable_cores(config.draft.cores)
        set_threads(cores, len(plan.roles))
        rendezvous = introduce(role, front, alive)
        if rendezvous is None:
            return

        def wanted() -> bool:
            return alive() and not isinstance(front.receive(0), Shutdown)

        if rank:
            _share(plan, role, build, rendezvous, front, wanted, alive)
            return
        meeting = None
        if len(config.draft_roles) > 1:
            meeting = opened.enter_context(contextlib.closing(RankMeeting(plan, rendezvous, folder=folder)))
        worker: Draft | LeadingDraft
        worker, info = build(plan)
        if not wanted():  # building takes long: the front may have left
            return
        if meeting is not None:
            assert isinstance(worker, DraftWorker)

            def lost(other: str, why: str) -> None:
                front.send(Failed(role=other, message=why, degraded=True))

            worker = opened.enter_context(contextlib.closing(LeadingDraft(worker, meeting.link(), lost)))
        link, lane = draft_side(rendezvous, timeout_s=config.engine.start_timeout_s, device=config.draft.device)
        opened.callback(lane.close)
        opened.callback(link.close)
        settle(cores)
        front.send(Ready(role=role, info=info))
        with contextlib.suppress(LinkError):  # the verifier left in mid-round
            draft_loop(
                worker,
                link,
                lane,
                plan.frames(rendezvous.epoch),
                jit=plan.jit,
                timeout_s=config.engine.link_timeout_s,
                alive=alive,
            )


def _share(
    plan: Plan,
    role: str,
    build: Build,
    verifier: Rendezvous,
    front: ControlLane,
    wanted: Callable[[], bool],
    alive: Callable[[], bool],
) -> None:
    """The life of another rank once it knows the verifier, whose store says where the first rank is."""
    start_timeout_s = plan.config.engine.start_timeout_s
    worker, info = build(plan)
    if not wanted():
        return
    first = published(verifier, role, timeout_s=start_timeout_s, wanted=wanted)
    if first is None:
        return
    link, lane = draft_side(first, timeout_s=start_timeout_s)
    with contextlib.closing(lane), contextlib.closing(link):
        assert plan.config.draft is not None
        assert isinstance(worker, DraftWorker)
        settle(usable_cores(plan.config.draft.cores))
        front.send(Ready(role=role, info=info))
        with contextlib.suppress(LinkError):  # the first rank left in mid-round
            share_loop(worker, link, lane, plan.frames(first.epoch, share=True), alive=alive)


class RankMeeting:
    """Where the first rank of the draft meets the others: a store, a lane and a link for each.

    The verifier's store tells the others. Frames between ranks are small and in host memory, so no link between
    ranks is NCCL. Its deadline is half of the verifier's: after waiting for silent ranks, the first one still answers
    the verifier in time.

    Args:
        rendezvous: the verifier's.
        folder: as for ``VerifierSide``.

    Raises:
        LinkError: the verifier's store does not answer. Nothing stays open then.
    """

    def __init__(self, plan: Plan, rendezvous: Rendezvous, *, folder: str | None):
        self._plan, engine, host = plan, plan.config.engine, own_address(rendezvous)
        self._sides: dict[str, VerifierSide] = {}
        with contextlib.ExitStack() as opened:
            for role in plan.config.draft_roles[1:]:
                side = VerifierSide(
                    host=host,
                    kind=link_kind("cpu", "cpu", "auto" if engine.link == "nccl" else engine.link, host=host),
                    timeout_s=engine.start_timeout_s,
                    link_timeout_s=engine.link_timeout_s / 2,
                    folder=folder,
                )
                opened.callback(side.close)
                publish(rendezvous, role, side.rendezvous, timeout_s=engine.start_timeout_s)
                self._sides[role] = side
            self._opened = opened.pop_all()

    def link(self) -> list[DraftRank]:
        """Waits for all other ranks. Raises: LinkError: one did not come in time; no link stays open then."""
        frames = self._plan.frames(share=True)
        with contextlib.ExitStack() as linked:
            ranks = []
            for role, side in self._sides.items():
                ranks.append(DraftRank(role, side.link(), side.lane, frames))
                linked.callback(ranks[-1].close)
            linked.pop_all()
        return ranks

    def close(self) -> None:
        """Closes stores and lanes. The links are closed by their ranks."""
        self._opened.close()
