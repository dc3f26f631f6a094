"""A worker's whole life, the same under every launch: build, meet, loop, leave."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable
from typing import Any

from ..config import ModelConfig
from ..errors import LinkError, PipelineError, UsageError
from ..models.device import own_stream
from .build import Plan, build_draft, build_verifier, pin, set_threads, usable_cores
from .control import ControlLane
from .draft import DraftWorker
from .loops import DraftSide, draft_loop, verifier_loop
from .messages import Failed, Hello, Ready, Shutdown, Welcome
from .rendezvous import Rendezvous, VerifierSide, draft_side, link_kind
from .verifier import VerifierWorker

WAIT_S = 0.5


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
        config, side, draft = plan.config, None, None
        cores = usable_cores(config.target.cores)
        set_threads(cores)
        try:
            if config.draft is not None:
                kind = link_kind(config.target.device, config.draft.device)
                side = VerifierSide(
                    host=host,
                    kind=kind,
                    device=config.target.device,
                    timeout_s=config.engine.start_timeout_s,
                    link_timeout_s=config.engine.link_timeout_s,
                    folder=folder,
                )
                front.send(Hello(role="verifier", rendezvous=side.rendezvous.to_dict()))
            worker, info = build(plan)
            if side is not None:
                draft = DraftSide(side.link(), side.lane, plan.frames())
            pin(cores)
            front.send(Ready(role="verifier", info=info))
            verifier_loop(worker, front, draft, alive=alive)
        finally:
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
        set_threads(cores)
        front.send(Hello(role="draft"))
        message = None
        while message is None:
            if not alive():
                return
            message = front.receive(WAIT_S)
        if isinstance(message, Shutdown):
            return
        if not isinstance(message, Welcome):
            raise PipelineError(f"the draft was sent {type(message).__name__} where Welcome was due")
        worker, info = build(plan)
        link, lane = draft_side(
            Rendezvous(**message.rendezvous), timeout_s=config.engine.start_timeout_s, device=config.draft.device
        )
        pin(cores)
        front.send(Ready(role="draft", info=info))
        try:
            draft_loop(worker, link, lane, jit=plan.jit, timeout_s=config.engine.link_timeout_s, alive=alive)
        except LinkError:
            # The verifier left: between rounds it says so, in mid-round the link breaks.
            return
        finally:
            link.close()
            lane.close()

    _report_failure("draft", front, body, plan.config.draft)


def _report_failure(role: str, front: ControlLane, body: Callable[[], None], wanted: ModelConfig | None) -> None:
    try:
        with own_stream(wanted.device, wanted.priority) if wanted else contextlib.nullcontext():
            body()
    except UsageError as error:
        front.send(Failed(role=role, message=str(error), usage=True))
    except KeyboardInterrupt:
        return
    except Exception as error:
        detail = traceback.format_exc(limit=-3)
        front.send(Failed(role=role, message=f"{type(error).__name__}: {error}\n{detail}"))
