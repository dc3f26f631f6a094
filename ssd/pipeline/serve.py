"""A worker's whole life, the same under every launch: build, meet, loop, leave."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable
from typing import Any

from ..config import ModelConfig, rank_of
from ..errors import LinkError, PipelineError, UsageError, WorkerError
from ..models.device import own_stream
from .build import Plan, build_draft, build_rank, build_verifier, set_threads, settle, usable_cores
from .control import ControlLane
from .draft import DraftWorker
from .loops import draft_loop, verifier_loop
from .messages import Failed, Hello, Ready, Shutdown, Welcome
from .partner import DraftSide, Rejoin
from .rendezvous import Rendezvous, VerifierSide, draft_side, link_kind, rank_side
from .tensor import follow, naming_the_lost
from .verifier import VerifierWorker

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
        host, folder: where the verifier opens its side (``VerifierSide``).
        alive: whether there still is somebody to serve.
    """
    if role == "verifier":
        run_verifier(plan, front, host=host, folder=folder, alive=alive)
    elif role == "draft":
        run_draft(plan, front, alive=alive)
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
                    draft, rejoin = DraftSide(side.link(), side.lane, plan.frames()), Rejoin(side, plan.frames)
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
    alive: Callable[[], bool] = lambda: True,
    build: Callable[[Plan], tuple[DraftWorker, dict[str, Any]]] = build_draft,
) -> None:
    """Wait to be told where the verifier is, build the model, link, serve."""

    def body() -> None:
        config = plan.config
        assert config.draft is not None
        cores = usable_cores(config.draft.cores)
        set_threads(cores, len(plan.roles))
        rendezvous = _introduce("draft", front, alive)
        if rendezvous is None:
            return
        worker, info = build(plan)
        if isinstance(front.receive(0), Shutdown):  # meanwhile; nobody may be there to meet
            return
        link, lane = draft_side(rendezvous, timeout_s=config.engine.start_timeout_s, device=config.draft.device)
        settle(cores)
        front.send(Ready(role="draft", info=info))
        try:
            frames, timeout_s = plan.frames(rendezvous.epoch), config.engine.link_timeout_s
            draft_loop(worker, link, lane, frames, jit=plan.jit, timeout_s=timeout_s, alive=alive)
        except LinkError:
            # The verifier left: between rounds it says so, in mid-round the link breaks.
            return
        finally:
            link.close()
            lane.close()

    _report_failure("draft", front, body, plan.config.draft)


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
