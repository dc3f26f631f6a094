"""Workers as Ray actors, a pipeline of such workers, and the actor that owns a whole pipeline."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
# (Ray creates remote classes and exceptions at run time.)
from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray

from ..config.load import load_config
from ..config.sections import Config, section_of
from ..engine.llm import LLM
from ..errors import PipelineError, RequestError, WorkerError
from ..pipeline.runtime.launch import LEAVE_S
from ..pipeline.runtime.plan import Plan
from ..pipeline.transport.lanes import ControlLane, ZmqLane
from ..pipeline.transport.messages import Shutdown
from ..request.sampling_params import SamplingParams
from .cores import CoreLease
from .placement import (
    LOOPBACK,
    Bundle,
    Placement,
    Strategy,
    bundles,
    front_address,
    node_address,
    reason,
    with_visible_gpu,
)

PLACEMENT_TIMEOUT_S = 60.0


@ray.remote(max_restarts=0)
class WorkerActor:
    """The process of one worker. Ray ends it when its owner is gone."""

    def pid(self) -> int:
        return os.getpid()

    def run(self, role: str, plan: dict[str, Any], front: str, *, one_node: bool, replica: bool) -> None:
        """Runs the worker until it ends. Whether this call has returned tells whether the worker has ended.

        Args:
            role: for example ``verifier`` or ``draft-1``.
            plan: as ``Plan.to_dict`` gives it.
            front: endpoint of the front's end of the control lane.
            one_node: draft and verifier share a node, so they listen on loopback only.
            replica: other pipelines of this configuration may share the node. The worker then takes as many
                free cores as are configured, not necessarily the configured ones.
        """
        from ..pipeline.runtime.worker_main import run_worker  # imports models, which clients and fronts do not need

        read = Plan.from_dict(plan).for_role(role)
        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        config = with_visible_gpu(read.config, role, gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
        lease = CoreLease()
        if replica:
            config = lease.leased(config, section_of(role))
        read = dataclasses.replace(read, config=config)
        lane = ZmqLane.connect(front)
        try:
            run_worker(role, read, lane, host=LOOPBACK if one_node else node_address())
        finally:
            lane.close()
            lease.close()


class RayPipeline:
    """Workers as actors in a placement group of the cluster this process has joined.

    Args:
        address: of this process, for the workers to connect to; detected if None.
        strategy: ``STRICT_PACK`` puts draft and verifier on one node.
        timeout_s: how long to wait for room in the cluster.
        name: of the placement group; see ``release_abandoned``.
        resources: custom resources that a role needs beside its cores and GPU, by role:
            ``{"draft": {"small": 1}}``.
        placement: reserved bundles to use. Strategy, timeout, name and resources are ignored then.

    Raises:
        WorkerError: the cluster had no room in time, or a worker's process did not start.
        UsageError: this process has not joined a cluster, or the address means every interface.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        address: str | None = None,
        strategy: Strategy = "STRICT_PACK",
        timeout_s: float = PLACEMENT_TIMEOUT_S,
        name: str = "",
        resources: Mapping[str, Bundle] | None = None,
        placement: Placement | None = None,
    ):
        self.lanes: dict[str, ControlLane] = {}
        self.actors: dict[str, Any] = {}
        """Actor handles by role."""
        self._runs: dict[str, ray.ObjectRef] = {}
        self._plan, self._replica = plan, placement is not None
        wanted = bundles(plan.config, resources)
        self._placement = placement or Placement.reserve(wanted, strategy=strategy, timeout_s=timeout_s, name=name)
        try:
            self._host = front_address(self._placement, address)
            for role in wanted:
                self._make(role)
            self._wait_for_processes(plan.config.engine.start_timeout_s)
            for role in wanted:
                self._run(role)
        except BaseException:
            self._dismantle()
            raise

    def _make(self, role: str) -> None:
        self.actors[role] = WorkerActor.options(**self._placement.options(role)).remote()

    def _run(self, role: str) -> None:
        self.lanes[role], endpoint = ZmqLane.bind(f"tcp://{self._host}:*")
        self._runs[role] = self.actors[role].run.remote(
            role, self._plan.to_dict(), endpoint, one_node=self._placement.one_node, replica=self._replica
        )

    def restart(self, role: str) -> None:
        """Starts a new actor in the same bundle. Does not wait for its worker.

        Raises:
            WorkerError: Ray could not start it.
        """
        try:
            ray.kill(self.actors[role])
            self.lanes[role].close()
            self._make(role)
            self._run(role)
        except ray.exceptions.RayError as error:
            raise WorkerError(f"could not start the {role}'s actor again: {reason(error)}") from error

    def _wait_for_processes(self, timeout_s: float) -> None:
        for role, actor in self.actors.items():
            try:
                ray.get(actor.pid.remote(), timeout=timeout_s)
            except ray.exceptions.GetTimeoutError:
                raise WorkerError(f"the {role}'s actor did not start in {timeout_s:g} s") from None
            except ray.exceptions.RayError as error:
                raise WorkerError(f"the {role}'s actor did not start: {reason(error)}") from error

    def check(self) -> list[str]:
        """Returns the roles whose worker has ended.

        Raises:
            WorkerError: the verifier has ended and Ray knows why.
        """
        gone = self._ended()
        if "verifier" in gone:
            try:
                ray.get(self._runs["verifier"])
            except ray.exceptions.RayError as error:
                raise WorkerError(f"the verifier's actor is gone: {reason(error)}") from error
        return gone

    def close(self) -> None:
        """Stops the workers, waits until they have ended, and releases their resources."""
        for role in set(self._runs) - set(self._ended()):
            with suppress(PipelineError):  # it ended just now
                self.lanes[role].send(Shutdown())
        ray.wait(list(self._runs.values()), num_returns=len(self._runs), timeout=LEAVE_S)
        self._dismantle()

    def _ended(self) -> list[str]:
        ended, _ = ray.wait(list(self._runs.values()), num_returns=len(self._runs), timeout=0)
        return [role for role, run in self._runs.items() if run in ended]

    def _dismantle(self) -> None:
        ended = self._ended() if self._runs else []
        leaving = [self.actors[role].__ray_terminate__.remote() for role in ended]
        if leaving:
            ray.wait(leaving, num_returns=len(leaving), timeout=LEAVE_S)
        for actor in self.actors.values():
            ray.kill(actor)
        self._placement.release()
        for lane in self.lanes.values():
            lane.close()


@ray.remote(num_cpus=0, max_restarts=0)
class PipelineActor:
    """An ``LLM`` over a ``RayPipeline`` that any process of the cluster can call.

    The actor itself needs no resources, because it only waits for its workers. One call runs at a time. The
    first call starts the pipeline, so that its caller gets any error. A call during which the pipeline breaks
    raises, and the next call starts a new pipeline.

    Args:
        config, overrides: as for ``LLM``; files and models are looked up where the actor runs.
        strategy, timeout_s, name, resources: as for ``RayPipeline``.

    Raises:
        UsageError, WorkerError, PipelineError: every method, as ``LLM`` does.
    """

    def __init__(
        self,
        config: Config | str | Path | dict[str, Any] = "embedded",
        *,
        overrides: Sequence[str] = (),
        strategy: Strategy = "STRICT_PACK",
        timeout_s: float = PLACEMENT_TIMEOUT_S,
        name: str = "",
        resources: Mapping[str, Bundle] | None = None,
    ):
        # The front needs no GPU and must not touch one that Ray did not assign.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        launch = partial(RayPipeline, strategy=strategy, timeout_s=timeout_s, name=name, resources=resources)
        self._config = load_config(config, overrides)
        self._make = partial(LLM, self._config, launch=launch)
        self._llm: LLM | None = None

    def describe(self) -> dict[str, Any]:
        """Returns the configuration as plain data."""
        return self._config.model_dump()

    def start(self) -> dict[str, Any]:
        """Starts the workers unless they run. Returns what each reported when it was ready, by role."""
        with self._running() as llm:
            return llm.info()

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    ) -> list[dict[str, Any]]:
        """Completes every prompt.

        Args:
            prompts: one text, or texts or token ids.
            params: fields of ``SamplingParams``, for all prompts or one mapping for each.

        Returns:
            The fields of a ``RequestOutput`` for each prompt, in order, as plain data.
        """
        given = params if params is None or isinstance(params, Mapping) else list(params)
        read = [_params(one) for one in given] if isinstance(given, list) else _params(given)
        with self._running() as llm:
            return [dataclasses.asdict(output) for output in llm.generate(prompts, read)]

    def stream(self, prompt: str | Sequence[int], params: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """Yields the fields of each ``StreamEvent`` as tokens commit."""
        with self._running() as llm:
            for event in llm.stream(prompt, _params(params)):
                yield dataclasses.asdict(event)

    def stats(self, *, reset: bool = False) -> dict[str, Any]:
        """Returns ``workers`` (what each reported when it was ready, by role), ``timings`` (medians in ms) and
        ``degraded`` (why the draft is gone, or None).

        Args:
            reset: start a new window for the timings.
        """
        with self._running() as llm:
            return {"workers": llm.info(), "timings": llm.timings(reset=reset), "degraded": llm.degraded}

    def close(self) -> None:
        """Stops the workers. The next call starts new ones."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.close()

    @contextmanager
    def _running(self) -> Iterator[LLM]:
        """Yields the running pipeline. If it breaks it is closed, so that the next call starts a new one."""
        if self._llm is None:
            self._llm = self._make()
        try:
            yield self._llm
        except PipelineError:
            self.close()
            raise


def _params(fields: Mapping[str, Any] | None) -> SamplingParams:
    """Raises: RequestError: a parameter is unknown or out of range."""
    fields = dict(fields or {})
    known = [field.name for field in dataclasses.fields(SamplingParams)]
    for name in fields:
        if name not in known:
            raise RequestError(f"unknown sampling parameter {name!r}; one of {', '.join(known)}")
    return SamplingParams(**fields)
