"""Launching a pipeline: in this process (threads) or as local processes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import PipelineError, WorkerError
from .build import Plan
from .control import ControlLane, InprocLane, ZmqLane
from .messages import Shutdown

if TYPE_CHECKING:
    from ..models.loading import PreTrainedModel

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


class InprocPipeline:
    """Workers as threads: for tests and debugging, and for two models on one GPU, where kernels of two
    processes would take turns and those of two streams overlap. Pinning is ignored.

    Args: models: by role, already loaded ones (on their devices); the others are loaded.
    """

    def __init__(self, plan: Plan, models: Mapping[str, PreTrainedModel] | None = None):
        from .build import build_draft, build_verifier
        from .serve import run_draft, run_verifier, run_worker

        # One after the other: compilers and captures of CUDA graphs do not bear company.
        building, models = threading.Lock(), models or {}

        def alone(build: Callable[..., Any], role: str, plan: Plan) -> Any:
            with building:
                return build(plan, models.get(role))

        lives: dict[str, Callable[..., None]] = {
            "verifier": partial(run_verifier, build=partial(alone, build_verifier, "verifier")),
            "draft": partial(run_draft, build=partial(alone, build_draft, "draft")),
        }
        config = plan.config
        loose: dict[str, Any] = {"target": config.target.model_copy(update={"cores": None})}
        if config.engine.link == "auto":  # threads share one interpreter: who waits must sleep
            loose["engine"] = config.engine.model_copy(update={"link": "host"})
        if config.draft is not None:
            loose["draft"] = config.draft.model_copy(update={"cores": None})
        plan = Plan(config=config.model_copy(update=loose), vocabulary=plan.vocabulary, ends=plan.ends)
        self.lanes: dict[str, ControlLane] = {}
        self._threads: dict[str, threading.Thread] = {}
        for role in plan.roles:
            self.lanes[role], theirs = InprocLane.pair()
            thread = threading.Thread(
                target=lives.get(role, partial(run_worker, role)),
                args=(plan.for_role(role), theirs),
                name=f"ssd-{role}",
                daemon=True,
            )
            self._threads[role] = thread
            thread.start()

    def check(self) -> list[str]:
        return [role for role, thread in self._threads.items() if not thread.is_alive()]

    def close(self) -> None:
        for lane in self.lanes.values():
            lane.send(Shutdown())
        for thread in self._threads.values():
            thread.join(LEAVE_S)


class LocalPipeline:
    """Workers as processes of this machine. They leave when this process does, however it ends."""

    def __init__(self, plan: Plan):
        # A folder only we can enter holds the sockets.
        self._folder = tempfile.TemporaryDirectory(prefix="ssd-front-")
        self.lanes: dict[str, ControlLane] = {}
        self._processes: dict[str, subprocess.Popen] = {}
        try:
            for role in plan.roles:
                lane, endpoint = ZmqLane.bind(f"ipc://{Path(self._folder.name) / role}")
                self.lanes[role] = lane
                process = subprocess.Popen(
                    [sys.executable, "-m", "ssd.pipeline.process"], stdin=subprocess.PIPE, start_new_session=True
                )
                self._processes[role] = process
                orders = {"role": role, "front": endpoint, "folder": self._folder.name, "plan": plan.to_dict()}
                assert process.stdin is not None
                process.stdin.write(json.dumps(orders).encode() + b"\n")
                process.stdin.flush()
        except OSError as error:
            self.close()
            raise WorkerError(f"could not start the workers: {error}") from error

    @property
    def pids(self) -> dict[str, int]:
        return {role: process.pid for role, process in self._processes.items()}

    def check(self) -> list[str]:
        return [role for role, process in self._processes.items() if process.poll() is not None]

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
    shared = shared and target.tensor_parallel == 1
    threads = shared if wanted == "auto" else wanted == "threads"
    return InprocPipeline(plan) if threads else LocalPipeline(plan)
