"""Workers as Ray actors, the pipeline made of them, and the actor that owns a whole pipeline."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
# (Ray's remote classes and exceptions are made at run time.)
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
    """A process for one worker. Ray ends it when whoever made it is gone."""

    def pid(self) -> int:
        return os.getpid()

    def run(self, role: str, plan: dict[str, Any], front: str, *, one_node: bool, replica: bool) -> None:
        """The worker's whole life; that this call returns, however it does, is the sign of its end.

        Args:
            front: endpoint of the front's end of the control lane.
            one_node: draft and verifier share a node: what they open stays on it.
            replica: other pipelines of this configuration may share the node: its cores are only
                a number of cores.
        """
        from ..pipeline.runtime.worker_main import run_worker  # models' code, which clients and fronts go without

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
        address: of this process, for the workers to connect to; found by itself if None.
        strategy: ``STRICT_PACK`` puts draft and verifier on one node.
        timeout_s: how long to wait for the cluster to have room.
        name: of the placement group; see ``release_abandoned``.
        resources: what a role asks for beside its cores and GPU, by role: ``{"draft": {"small": 1}}``.
        placement: bundles reserved by somebody else, instead of those four.

    Raises:
        WorkerError: there was no room in time, or a worker's process did not come up in it.
        UsageError: no cluster was joined, or the address means every interface.
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
        """Handles by role."""
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
        """Another actor in the same bundle. That it may not come up is for whoever waits for its worker."""
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
        """Roles whose worker is gone.

        Raises:
            WorkerError: the verifier is, and Ray knows why.
        """
        gone = self._ended()
        if "verifier" in gone:
            try:
                ray.get(self._runs["verifier"])
            except ray.exceptions.RayError as error:
                raise WorkerError(f"the verifier's actor is gone: {reason(error)}") from error
        return gone

    def close(self) -> None:
        """Ask the workers to leave, see that they do, and give their room back."""
        for role in set(self._runs) - set(self._ended()):
            with suppress(PipelineError):  # gone in this moment
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
    """An ``LLM`` over a ``RayPipeline``, for any process of the cluster to call. It asks for no
    resources itself: it only waits for its workers. One call runs at a time.

    The pipeline is started by the first call, so that the caller sees why it cannot be. A call that
    breaks it raises; the next one starts another.

    Args:
        config, overrides: as for ``LLM``; files and models are looked up where the actor runs.
        strategy, timeout_s, name, resources: as for ``RayPipeline``.

    Raises (every method): UsageError, WorkerError, PipelineError as ``LLM`` does.
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
        # The front needs no GPU, and one that Ray did not give must not be touched.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        launch = partial(RayPipeline, strategy=strategy, timeout_s=timeout_s, name=name, resources=resources)
        self._config = load_config(config, overrides)
        self._make = partial(LLM, self._config, launch=launch)
        self._llm: LLM | None = None

    def describe(self) -> dict[str, Any]:
        """The configuration, as plain data."""
        return self._config.model_dump()

    def start(self) -> dict[str, Any]:
        """Bring the workers up if they are not yet; what they say of themselves, by role."""
        with self._running() as llm:
            return llm.info()

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    ) -> list[dict[str, Any]]:
        """Complete every prompt, in order.

        Args:
            params: fields of ``SamplingParams``, for all prompts or for each.

        Returns:
            The fields of a ``RequestOutput`` for each prompt, as plain data.
        """
        given = params if params is None or isinstance(params, Mapping) else list(params)
        read = [_params(one) for one in given] if isinstance(given, list) else _params(given)
        with self._running() as llm:
            return [dataclasses.asdict(output) for output in llm.generate(prompts, read)]

    def stream(self, prompt: str | Sequence[int], params: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """The fields of each ``StreamEvent``, as tokens commit."""
        with self._running() as llm:
            for event in llm.stream(prompt, _params(params)):
                yield dataclasses.asdict(event)

    def stats(self, *, reset: bool = False) -> dict[str, Any]:
        """``workers`` (what they say of themselves, by role), ``timings`` (medians in ms; ``reset``
        starts a new window) and ``degraded`` (why the draft is gone, or None)."""
        with self._running() as llm:
            return {"workers": llm.info(), "timings": llm.timings(reset=reset), "degraded": llm.degraded}

    def close(self) -> None:
        """Stop the workers. Another call would start new ones."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.close()

    @contextmanager
    def _running(self) -> Iterator[LLM]:
        """The pipeline. One that breaks is taken down, so that the next call starts another."""
        if self._llm is None:
            self._llm = self._make()
        try:
            yield self._llm
        except PipelineError:
            self.close()
            raise


def _params(fields: Mapping[str, Any] | None) -> SamplingParams:
    """Raises: RequestError if one is unknown or out of range."""
    fields = dict(fields or {})
    known = [field.name for field in dataclasses.fields(SamplingParams)]
    for name in fields:
        if name not in known:
            raise RequestError(f"unknown sampling parameter {name!r}; one of {', '.join(known)}")
    return SamplingParams(**fields)
