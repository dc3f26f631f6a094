"""Launching a pipeline on this machine: as threads of this process, or as processes."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ...config.machine import socket_folder, worker_environment
from ...config.sections import rank_of, section_of
from ...errors import PipelineError, WorkerError
from ..transport.lanes import ControlLane, InprocLane, ZmqLane
from ..transport.messages import Shutdown
from .plan import Plan

if TYPE_CHECKING:
    from ...models.checkpoints.loading import PreTrainedModel
    from ..draft.proposing import Draft
    from ..transport.rank_lanes import Ranks
    from ..verifier.worker import VerifierWorker

LEAVE_S = 10.0
"""Longest wait for a worker to leave, before it is made to."""


class Pipeline(Protocol):
    """A launched pipeline, as the front sees it."""

    lanes: dict[str, ControlLane]
    """To each worker, by role (``Plan.roles``)."""

    def check(self) -> list[str]:
        """Returns the roles whose worker is gone."""
        ...

    def close(self) -> None:
        """Asks the workers to leave, and makes sure that they do."""


@runtime_checkable
class Restartable(Pipeline, Protocol):
    """A pipeline whose launcher can start a worker again."""

    def restart(self, role: str) -> None:
        """Ends what is left of this worker and starts another, with another lane.

        Raises:
            WorkerError: it could not be started.
        """
        ...


class InprocPipeline:
    """Workers as threads of this process; cores are not pinned.

    For tests and debugging, and for two models on one GPU: kernels of two processes take turns, those of two streams
    overlap.

    Args:
        plan: of the pairing.
        models: models loaded already, on their devices, by role. The others are loaded.
    """

    def __init__(self, plan: Plan, models: Mapping[str, PreTrainedModel] | None = None):
        self._models, self._building = dict(models or {}), threading.Lock()
        self._plan = _unpinned(plan)
        self.lanes: dict[str, ControlLane] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._replaced: list[threading.Thread] = []
        """Threads of workers that were restarted. They end when they find their link dead."""
        for role in plan.roles:
            self._start(role)

    def _start(self, role: str) -> None:
        self.lanes[role], theirs = InprocLane.pair()
        thread = threading.Thread(
            target=self._life(role), args=(self._plan.for_role(role), theirs), name=f"ssd-{role}", daemon=True
        )
        self._threads[role] = thread
        thread.start()

    def _life(self, role: str) -> Callable[[Plan, ControlLane], None]:
        from .draft_main import run_draft  # models' code, which a front of processes goes without
        from .verifier_main import run_rank, run_verifier

        if role == "verifier":
            return partial(run_verifier, build=self._build_verifier)
        if section_of(role) == "draft":
            return partial(run_draft, role=role, build=partial(self._build_draft, role))
        return partial(run_rank, role)

    # One worker is built at a time: compilation and graph capture must not run concurrently.

    def _build_verifier(self, plan: Plan, ranks: Ranks | None) -> tuple[VerifierWorker, dict[str, Any]]:
        from .build_verifier import build_verifier

        with self._building:
            return build_verifier(plan, self._models.get("verifier"), ranks)

    def _build_draft(self, role: str, plan: Plan) -> tuple[Draft, dict[str, Any]]:
        from .build_draft import any_draft

        with self._building:
            return any_draft(plan, self._models.get(role), rank_of(role))

    def check(self) -> list[str]:
        return [role for role, thread in self._threads.items() if not thread.is_alive()]

    def restart(self, role: str) -> None:
        if role in self._models:
            raise WorkerError(f"the {role} was given an already loaded model, which cannot be loaded again")
        self.lanes[role].send(Shutdown())
        self._replaced.append(self._threads[role])
        self._start(role)

    def close(self) -> None:
        for lane in self.lanes.values():
            lane.send(Shutdown())
        for thread in (*self._threads.values(), *self._replaced):
            thread.join(LEAVE_S)


def _unpinned(plan: Plan) -> Plan:
    """The plan for threads of one process: no cores, and a link whose waiting end sleeps."""
    config = plan.config
    changed: dict[str, Any] = {"target": config.target.model_copy(update={"cores": None})}
    if config.engine.link == "auto":
        changed["engine"] = config.engine.model_copy(update={"link": "host"})
    if config.draft is not None:
        changed["draft"] = config.draft.model_copy(update={"cores": None})
    return replace(plan, config=config.model_copy(update=changed))


class LocalPipeline:
    """Workers as processes of this machine. They leave when this process ends, however it ends.

    Raises:
        WorkerError: a worker could not be started. None stays then.
    """

    def __init__(self, plan: Plan):
        try:
            self._folder = socket_folder("ssd-front-")
        except PipelineError as error:
            raise WorkerError(f"could not start the workers: {error}") from error
        self._plan, self._starts = plan, itertools.count()
        self.lanes: dict[str, ControlLane] = {}
        self._processes: dict[str, subprocess.Popen] = {}
        with contextlib.ExitStack() as failed:
            failed.callback(self.close)
            try:
                for role in plan.roles:
                    self._start(role)
            except (OSError, PipelineError) as error:
                raise WorkerError(f"could not start the workers: {error}") from error
            failed.pop_all()

    def _start(self, role: str) -> None:
        lane, endpoint = ZmqLane.bind(f"ipc://{Path(self._folder.name) / role}-{next(self._starts)}")
        self.lanes[role] = lane
        process = subprocess.Popen(
            [sys.executable, "-m", "ssd.pipeline.runtime.process"],
            stdin=subprocess.PIPE,
            start_new_session=True,
            env=worker_environment(),
        )
        self._processes[role] = process
        orders = {"role": role, "front": endpoint, "folder": self._folder.name, "plan": self._plan.to_dict()}
        assert process.stdin is not None
        process.stdin.write(json.dumps(orders).encode() + b"\n")
        process.stdin.flush()

    @property
    def pids(self) -> dict[str, int]:
        """Process ids, by role."""
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
        except (OSError, PipelineError, subprocess.TimeoutExpired) as error:
            raise WorkerError(f"could not start the {role} again: {error}") from error

    def close(self) -> None:
        for role, lane in self.lanes.items():
            if role in self._processes and self._processes[role].poll() is None:
                with contextlib.suppress(PipelineError):  # closing the pipe below says the same
                    lane.send(Shutdown(), wait=False)
        for process in self._processes.values():
            if process.stdin is not None:
                with contextlib.suppress(OSError):  # the worker is gone, and orders were still to be written
                    process.stdin.close()
        for process in self._processes.values():
            try:
                process.wait(LEAVE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LEAVE_S)
        for lane in self.lanes.values():
            lane.close()
        self._folder.cleanup()


def launch_here(plan: Plan) -> Pipeline:
    """Launches the workers on this machine: as processes, or as threads where two models share one GPU."""
    target, draft = plan.config.target, plan.config.draft
    wanted = plan.config.engine.workers
    shared = draft is not None and target.device.startswith("cuda") and draft.device == target.device
    threads = shared and len(plan.roles) == 2 if wanted == "auto" else wanted == "threads"
    return InprocPipeline(plan) if threads else LocalPipeline(plan)
