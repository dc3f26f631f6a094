"""The life of the verifier, and of the other ranks that share its model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from ...config.machine import usable_cores
from ...config.sections import rank_of
from ...models.device import own_stream
from ..transport.lanes import ControlLane
from ..transport.links.kinds import link_kind
from ..transport.messages import Hello, Ready
from ..transport.rank_lanes import Ranks
from ..transport.rendezvous import VerifierSide, rank_side
from ..verifier.draft_side import DraftSide, Rejoin
from ..verifier.ranks import follow, naming_the_lost
from ..verifier.worker import VerifierWorker
from .build_verifier import build_rank, build_verifier
from .cores import set_threads, settle
from .plan import Plan
from .verifier_loop import VerifierLoop
from .worker_main import LastWords, introduce

Build = Callable[[Plan, Ranks | None], tuple[VerifierWorker, dict[str, Any]]]


def build_loaded(plan: Plan, ranks: Ranks | None) -> tuple[VerifierWorker, dict[str, Any]]:
    """Loads the target and builds the verifier."""
    return build_verifier(plan, None, ranks)


def run_verifier(
    plan: Plan,
    front: ControlLane,
    *,
    host: str = "127.0.0.1",
    folder: str | None = None,
    alive: Callable[[], bool] = lambda: True,
    build: Build = build_loaded,
) -> None:
    """Opens the meeting place, builds the model, lets draft and ranks come, serves, leaves.

    Args:
        host, folder: as for ``VerifierSide``.
        alive: whether there is still a front to serve.
        build: makes the warm verifier and its description.
    """
    config, target = plan.config, plan.config.target
    with (
        LastWords("verifier", front),
        own_stream(target.device, target.priority),
        contextlib.ExitStack() as opened,
    ):
        cores = usable_cores(config.target.cores)
        set_threads(cores, len(plan.roles))
        if len(plan.roles) == 1:
            worker, info = build(plan, None)
            settle(cores)
            front.send(Ready(role="verifier", info=info))
            VerifierLoop(worker, front, alive=alive).run()
            return
        side = _open_side(plan, host, folder)
        opened.callback(side.close)
        front.send(Hello(role="verifier", rendezvous=side.rendezvous.to_dict()))
        ranks = None
        if config.target.tensor_parallel > 1:
            ranks = opened.enter_context(contextlib.closing(side.ranks(ordered=config.numerics == "strict")))
        with naming_the_lost():
            worker, info = build(plan, ranks)
            draft, rejoin = None, None
            if config.draft is not None:
                bell = config.speculation.anytime
                draft = DraftSide(side.link(), side.lane, plan.frames(), bell=bell)
                opened.callback(draft.link.close)
                rejoin = Rejoin(side, plan.frames, bell=bell)
                opened.callback(rejoin.close)
            if ranks is not None:
                ranks.group.limit(config.engine.link_timeout_s)
            settle(cores)
            front.send(Ready(role="verifier", info=info))
            VerifierLoop(worker, front, draft, rejoin, alive=alive).run()


def _open_side(plan: Plan, host: str, folder: str | None) -> VerifierSide:
    config = plan.config
    draft_device = config.draft.device if config.draft is not None else "cpu"
    return VerifierSide(
        host=host,
        kind=link_kind(config.target.device, draft_device, config.engine.link, host=host),
        device=config.target.device,
        timeout_s=config.engine.start_timeout_s,
        link_timeout_s=config.engine.link_timeout_s,
        folder=folder,
        ranks=config.target.tensor_parallel,
    )


def run_rank(role: str, plan: Plan, front: ControlLane, *, alive: Callable[[], bool] = lambda: True) -> None:
    """Builds one rank's share of the target and follows the first rank.

    Args:
        role: ``verifier-1``, ``verifier-2``, ...
        alive: whether there is still a front to serve.
    """
    config, target = plan.config, plan.config.target
    with LastWords(role, front), own_stream(target.device, target.priority):
        set_threads(usable_cores(target.cores), len(plan.roles))
        rendezvous = introduce(role, front, alive)
        if rendezvous is None:
            return
        ranks = rank_side(
            rendezvous,
            rank_of(role),
            timeout_s=config.engine.start_timeout_s,
            device=target.device,
            ordered=config.numerics == "strict",
        )
        with contextlib.closing(ranks):
            runner, plans, info = build_rank(plan, ranks)
            front.send(Ready(role=role, info=info))
            follow(runner, ranks.lanes[0], plans, alive=alive)
