"""Launching a pipeline: in this process (threads) or as local processes."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ...errors import PipelineError, WorkerError
from ..transport.lanes import ControlLane, InprocLane, ZmqLane
from ..transport.messages import Shutdown
from .plan import Plan

if TYPE_CHECKING:
    from ...models.loading import PreTrainedModel

LEAVE_S = 10.0


class Pipeline(Protocol):
    """A launched pipeline, seen from the front."""

    lanes: dict[str, ControlLane]
    """By role (``Plan.roles``)."""

    def check(self) -> list[str]:
        """Roles whose worker is gone."""
        ...

    def close(self) -> None:
        """Ask the workers to leave, and see that they do."""


@runtime_checkable
class Restartable(Pipeline, Protocol):
    """A pipeline whose launcher can start a worker once more."""

    def restart(self, role: str) -> None:
        """End what is left of this worker and start another, with another lane.

        Raises: WorkerError: it could not be started.
        """
        ...


class InprocPipeline:
    """Workers as threads: for tests and debugging, and for two models on one GPU, where kernels of two
    processes would take turns and those of two streams overlap. Pinning is ignored.

    Args: models: by role, already loaded ones (on their devices); the others are loaded.
    """

    def __init__(self, plan: Plan, models: Mapping[str, PreTrainedModel] | None = None):
        from .build_draft import build_draft
        from .build_verifier import build_verifier
        from .worker_main import run_draft, run_verifier, run_worker

        # One after the other: compilers and captures of CUDA graphs do not bear company.
        building, self._models = threading.Lock(), dict(models or {})

        def alone(build: Callable[..., Any], role: str, plan: Plan, *more: Any) -> Any:
            with building:
                return build(plan, self._models.get(role), *more)

        lives: dict[str, Callable[..., None]] = {role: partial(run_worker, role) for role in plan.roles}
        lives["verifier"] = partial(run_verifier, build=partial(alone, build_verifier, "verifier"))
        for rank, role in enumerate(plan.config.draft_roles):

            def draft(plan: Plan, role: str = role, rank: int = rank) -> Any:
                return alone(build_draft, role, plan, rank)

            lives[role] = partial(run_draft, role=role, build=draft)
        self._lives = lives
        config = plan.config
        loose: dict[str, Any] = {"target": config.target.model_copy(update={"cores": None})}
        if config.engine.link == "auto":  # threads share one interpreter: who waits must sleep
            loose["engine"] = config.engine.model_copy(update={"link": "host"})
        if config.draft is not None:
            loose["draft"] = config.draft.model_copy(update={"cores": None})
        self._plan = Plan(config=config.model_copy(update=loose), vocabulary=plan.vocabulary, ends=plan.ends)
        self.lanes: dict[str, ControlLane] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._left: list[threading.Thread] = []
        """Of workers that others have taken the place of: they end when they see that their link is dead."""
        for role in plan.roles:
            self._start(role)

    def _start(self, role: str) -> None:
        self.lanes[role], theirs = InprocLane.pair()
        thread = threading.Thread(
            target=self._lives[role], args=(self._plan.for_role(role), theirs), name=f"ssd-{role}", daemon=True
        )
        self._threads[role] = thread
        thread.start()

    def check(self) -> list[str]:
        return [role for role, thread in self._threads.items() if not thread.is_alive()]

    def restart(self, role: str) -> None:
        if role in self._models:
            raise WorkerError(f"the {role} was given an already loaded model, which cannot be loaded again")
        self.lanes[role].send(Shutdown())
        self._left.append(self._threads[role])
        self._start(role)

    def close(self) -> None:
        for lane in self.lanes.values():
            lane.send(Shutdown())
        for thread in (*self._threads.values(), *self._left):
            thread.join(LEAVE_S)


class LocalPipeline:
    """Workers as processes of this machine. They leave when this process does, however it ends."""

    def __init__(self, plan: Plan):
        # A folder only we can enter holds the sockets.
        self._folder = tempfile.TemporaryDirectory(prefix="ssd-front-")
        self._plan, self._starts = plan, itertools.count()
        self.lanes: dict[str, ControlLane] = {}
        self._processes: dict[str, subprocess.Popen] = {}
        try:
            for role in plan.roles:
                self._start(role)
        except OSError as error:
            self.close()
            raise WorkerError(f"could not start the workers: {error}") from error

    def _start(self, role: str) -> None:
        lane, endpoint = ZmqLane.bind(f"ipc://{Path(self._folder.name) / role}-{next(self._starts)}")
        self.lanes[role] = lane
        process = subprocess.Popen(
            [sys.executable, "-m", "ssd.pipeline.runtime.process"], stdin=subprocess.PIPE, start_new_session=True
        )
        self._processes[role] = process
        orders = {"role": role, "front": endpoint, "folder": self._folder.name, "plan": self._plan.to_dict()}
        assert process.stdin is not None
        process.stdin.write(json.dumps(orders).encode() + b"\n")
        process.stdin.flush()

    @property
    def pids(self) -> dict[str, int]:
        return {role: process.pid for role, process in self._processes.items()}

    def check(self) -> list[str]:
        return [role for role, process in self._processes.items() if process.poll() is not None]

    def restart(self, role: str) -> None:
        try:
            if (process := self._processes.get(role)) is not None:
                process.kill()
                process.wait(LEAVE_S)
                if process.stdin is not None:
                    process.stdin.close()
            if (lane := self.lanes.pop(role, None)) is not None:
                lane.close()
            self._start(role)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise WorkerError(f"could not start the {role} again: {error}") from error

    def close(self) -> None:
        for role, lane in self.lanes.items():
            if role in self._processes and self._processes[role].poll() is None:
                with contextlib.suppress(PipelineError):  # the closing pipe below says the same
                    lane.send(Shutdown())
        for process in self._processes.values():
            if process.stdin is not None:
                process.stdin.close()
        for process in self._processes.values():
            for end in (lambda: None, process.terminate, process.kill):
                end()
                try:
                    process.wait(LEAVE_S)
                    break
                except subprocess.TimeoutExpired:
                    continue
        for lane in self.lanes.values():
            lane.close()
        self._folder.cleanup()


def launch_here(plan: Plan) -> Pipeline:
    """Workers on this machine: processes, but for two models on one GPU."""
    target, draft = plan.config.target, plan.config.draft
    wanted = plan.config.engine.workers
    shared = draft is not None and "cuda" in target.device and draft.device == target.device
    shared = shared and len(plan.roles) == 2
    threads = shared if wanted == "auto" else wanted == "threads"
    return InprocPipeline(plan) if threads else LocalPipeline(plan)
