"""The life of a worker, the same however it was launched: build, meet the others, serve, leave."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from types import TracebackType

from ...config.sections import section_of
from ...errors import PipelineError, UsageError, WorkerError
from ..transport.lanes import ControlLane
from ..transport.messages import Failed, Hello, Shutdown, Welcome
from ..transport.rendezvous import Rendezvous
from .plan import Plan

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
    """Lives the life of one worker. Whatever ends it early is reported to the front as ``Failed``.

    Args:
        role: one of ``plan.roles``.
        plan: as that role reads it (``Plan.for_role``).
        host: address at which the other workers reach this one.
        folder: where sockets go.
        alive: whether there is still a front to serve.
    """
    # The two import the workers' whole code; each process needs one of them.
    from .draft_main import run_draft
    from .verifier_main import run_rank, run_verifier

    if role == "verifier":
        run_verifier(plan, front, host=host, folder=folder, alive=alive)
    elif section_of(role) == "draft":
        run_draft(plan, front, role=role, folder=folder, alive=alive)
    else:
        run_rank(role, plan, front, alive=alive)


class LastWords:
    """Tells the front what ended a worker's life, and ends the exception there."""

    def __init__(self, role: str, front: ControlLane):
        self._role, self._front = role, front

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, UsageError):
            self._front.send(Failed(role=self._role, message=str(error), usage=True))
        elif isinstance(error, WorkerError):  # another worker's failure: this one's traceback explains nothing
            self._front.send(Failed(role=self._role, message=str(error)))
        elif isinstance(error, Exception):
            detail = "".join(traceback.format_exception(kind, error, trace, limit=-3))
            self._front.send(Failed(role=self._role, message=f"{type(error).__name__}: {error}\n{detail}"))
        return isinstance(error, Exception | KeyboardInterrupt)


def introduce(role: str, front: ControlLane, alive: Callable[[], bool]) -> Rendezvous | None:
    """Tells the front that this worker is up, and waits for the verifier's rendezvous.

    Returns:
        The rendezvous, or None if the front is gone or says shut down.

    Raises:
        PipelineError: another message came instead.
    """
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
