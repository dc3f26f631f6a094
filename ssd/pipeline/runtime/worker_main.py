"""A worker's whole life, the same under every launch: build, meet, loop, leave."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable
from typing import Any

from ...config.sections import ModelConfig, rank_of, section_of
from ...errors import LinkError, PipelineError, UsageError, WorkerError
from ...models.device import own_stream
from ..draft.ranks import LeadingDraft, RankMeeting, share_loop
from ..draft.worker import DraftWorker
from ..transport.lanes import ControlLane
from ..transport.messages import Failed, Hello, Ready, Shutdown, Welcome
from ..transport.rendezvous import Rendezvous, VerifierSide, draft_side, link_kind, published, rank_side
from ..verifier.draft_side import DraftSide
from ..verifier.ranks import follow, naming_the_lost
from ..verifier.rejoin import Rejoin
from ..verifier.worker import VerifierWorker
from .build_draft import build_draft
from .build_verifier import build_rank, build_verifier
from .cores import set_threads, settle, usable_cores
from .draft_loop import draft_loop
from .plan import Plan
from .verifier_loop import verifier_loop

WAIT_S = 0.5


def run_worker(
    role: str,
    plan: Plan,
    front: ControlLane,
    *,
    host: str = "127.0.0.1",
    folder: str | None = None,
    alive: Callable[[], bool] = lambda: True,
) -> None:
    """Be the worker of that role (``Plan.roles``), from its start to its end.

    Args:
        plan: as the role reads it (``Plan.for_role``).
        host, folder: where the verifier, or the first of several drafts, opens its side (``VerifierSide``).
        alive: whether there still is somebody to serve.
    """
    if role == "verifier":
        run_verifier(plan, front, host=host, folder=folder, alive=alive)
    elif section_of(role) == "draft":
        run_draft(plan, front, role=role, folder=folder, alive=alive)
    else:
        run_rank(role, plan, front, alive=alive)


def run_verifier(
    plan: Plan,
    front: ControlLane,
    *,
    host: str = "127.0.0.1",
    folder: str | None = None,
    alive: Callable[[], bool] = lambda: True,
    build: Callable[[Plan], tuple[VerifierWorker, dict[str, Any]]] = build_verifier,
) -> None:
    """Open the meeting place, say where it is, build the model, link, serve."""

    def body() -> None:
        config, side, ranks, draft, rejoin = plan.config, None, None, None, None
        cores = usable_cores(config.target.cores)
        set_threads(cores, len(plan.roles))
        try:
            if len(plan.roles) > 1:
                drafting = config.draft.device if config.draft is not None else "cpu"
                side = VerifierSide(
                    host=host,
                    kind=link_kind(config.target.device, drafting, config.engine.link, host=host),
                    device=config.target.device,
                    timeout_s=config.engine.start_timeout_s,
                    link_timeout_s=config.engine.link_timeout_s,
                    folder=folder,
                    ranks=config.target.tensor_parallel,
                )
                front.send(Hello(role="verifier", rendezvous=side.rendezvous.to_dict()))
                if config.target.tensor_parallel > 1:
                    ranks = side.ranks(ordered=config.numerics == "strict")
            with naming_the_lost():
                worker, info = build(plan) if ranks is None else build_verifier(plan, ranks=ranks)
                if side is not None and config.draft is not None:
                    bell = config.speculation.anytime
                    draft = DraftSide(side.link(), side.lane, plan.frames(), bell=bell)
                    rejoin = Rejoin(side, plan.frames, bell=bell)
                if ranks is not None:
                    ranks.group.limit(config.engine.link_timeout_s)
                settle(cores)
                front.send(Ready(role="verifier", info=info))
                verifier_loop(worker, front, draft, rejoin, alive=alive)
        finally:
            if ranks is not None:
                ranks.close()
            if side is not None:
                side.close()

    _report_failure("verifier", front, body, plan.config.target)


def run_draft(
    plan: Plan,
    front: ControlLane,
    *,
    role: str = "draft",
    folder: str | None = None,
    alive: Callable[[], bool] = lambda: True,
    build: Callable[[Plan], tuple[DraftWorker, dict[str, Any]]] | None = None,
) -> None:
    """Wait to be told where the verifier is, build the model, link, serve. Of several drafts the first meets the
    others, too, which link with it."""

    def body() -> None:
        config, rank, meeting, link, lane, worker = plan.config, rank_of(role), None, None, None, None
        assert config.draft is not None
        cores = usable_cores(config.draft.cores)
        set_threads(cores, len(plan.roles))
        rendezvous = _introduce(role, front, alive)
        if rendezvous is None:
            return
        start_s, device = config.engine.start_timeout_s, config.draft.device

        def wanted() -> bool:
            return alive() and not isinstance(front.receive(0), Shutdown)

        def lost(other: str, why: str) -> None:
            front.send(Failed(role=other, message=why, degraded=True))

        try:
            if len(config.draft_roles) > 1 and rank == 0:
                meeting = RankMeeting(plan, rendezvous, folder=folder)
            worker, info = build(plan) if build is not None else build_draft(plan, rank=rank)
            if not wanted():  # meanwhile; nobody may be there to meet
                return
            if rank:
                rendezvous, device = published(rendezvous, role, timeout_s=start_s, wanted=wanted), "cpu"
                if rendezvous is None:
                    return
            if meeting is not None and isinstance(worker, LeadingDraft):
                worker.ranks, worker.on_lost = meeting.link(), lost
            link, lane = draft_side(rendezvous, timeout_s=start_s, device=device)
            settle(cores)
            front.send(Ready(role=role, info=info))
            frames = plan.frames(rendezvous.epoch, share=rank > 0)
            if rank:
                share_loop(worker, link, lane, frames, alive=alive)
            else:
                timeout_s = config.engine.link_timeout_s
                draft_loop(worker, link, lane, frames, jit=plan.jit, timeout_s=timeout_s, alive=alive)
        except LinkError:
            if link is None:  # it never came about
                raise
            # Whoever leads us left: between rounds it says so, in mid-round the link breaks.
        finally:
            if link is not None and lane is not None:
                link.close()
                lane.close()
            if isinstance(worker, LeadingDraft):
                worker.close()
            if meeting is not None:
                meeting.close()

    _report_failure(role, front, body, plan.config.draft)


def run_rank(role: str, plan: Plan, front: ControlLane, *, alive: Callable[[], bool] = lambda: True) -> None:
    """One of the verifier's other ranks: build its share of the model, follow the first rank."""

    def body() -> None:
        config, target = plan.config, plan.config.target
        cores = usable_cores(target.cores)
        set_threads(cores, len(plan.roles))
        rendezvous = _introduce(role, front, alive)
        if rendezvous is None:
            return
        ranks = rank_side(
            rendezvous,
            rank_of(role),
            timeout_s=config.engine.start_timeout_s,
            device=target.device,
            ordered=config.numerics == "strict",
        )
        try:
            runner, plans, info = build_rank(plan, ranks)
            front.send(Ready(role=role, info=info))
            follow(runner, ranks.lanes[0], plans, alive=alive)
        finally:
            ranks.close()

    _report_failure(role, front, body, plan.config.target)


def _introduce(role: str, front: ControlLane, alive: Callable[[], bool]) -> Rendezvous | None:
    """Say that we are up, and wait to be told where the verifier is. None: there is nothing to do."""
    front.send(Hello(role=role))
    message = None
    while message is None:
        if not alive():
            return None
        message = front.receive(WAIT_S)
    if isinstance(message, Shutdown):
        return None
    if not isinstance(message, Welcome):
        raise PipelineError(f"{role} was sent {type(message).__name__} where Welcome was due")
    return Rendezvous(**message.rendezvous)


def _report_failure(role: str, front: ControlLane, body: Callable[[], None], wanted: ModelConfig | None) -> None:
    try:
        with own_stream(wanted.device, wanted.priority) if wanted else contextlib.nullcontext():
            body()
    except UsageError as error:
        front.send(Failed(role=role, message=str(error), usage=True))
    except WorkerError as error:  # of another worker: our own traceback says nothing
        front.send(Failed(role=role, message=str(error)))
    except KeyboardInterrupt:
        return
    except Exception as error:
        detail = traceback.format_exc(limit=-3)
        front.send(Failed(role=role, message=f"{type(error).__name__}: {error}\n{detail}"))
