"""Ray Serve: replicas of a pipeline behind the OpenAI server.

A replica is the server of ``ssd serve`` with its pipeline, in one placement group: the replica's process runs in
the first bundle, verifier and draft in the others. Serve's proxy sends each request to the replica with the fewest
ongoing requests.

::

    serve run ssd.cluster.serve_app:app config=embedded max_replicas=2
    serve deploy launch/serve.yaml
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# (Serve creates deployments at run time.)
from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve

from ..config.load import load_config
from ..config.sections import Config
from ..engine.async_engine import AsyncEngine
from ..engine.observing import Observers
from ..errors import UsageError, WorkerError
from ..pipeline.runtime.launch import Pipeline
from ..pipeline.runtime.plan import Plan
from ..serving.app import build_app
from ..serving.heap import keep_trim, own_heap
from ..serving.metrics import Metrics
from ..serving.openai.jobs import model_name
from ..serving.run import traces
from .actors import RayPipeline
from .placement import Placement, Strategy, bundles
from .serve_metrics import publish

DEPLOYMENT = "Pipeline"
OWN_CPUS = 1.0
"""CPUs of a replica's own process: HTTP, tokenizing and detokenizing."""
DRAIN_S = 600.0
"""Seconds that a replica being removed has to finish its requests."""
LAST_WORDS_S = 1.0
"""Seconds between the end of a pipeline and that of its replica, for the error answers."""


class ServeArgs(BaseModel):
    """Arguments of ``app``."""

    model_config = ConfigDict(extra="forbid")

    config: str | dict[str, Any] = "embedded"
    """As for ``LLM``. Files are looked up where the application is built, models where replicas run."""
    overrides: list[str] = []
    """``a.b=c`` each."""
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int | None = Field(default=None, ge=1)
    """If above ``min_replicas``, the number of replicas follows the ongoing requests."""
    strategy: Strategy = "STRICT_PACK"
    resources: dict[str, dict[str, float]] = {}
    """As for ``RayPipeline``."""


@serve.ingress()
class Replica:
    """The OpenAI server with its pipeline.

    A replica whose pipeline breaks ends, and Serve starts another. One that has lost its draft for good decodes
    without speculation but is unhealthy: Serve lets it finish its requests and replaces it.
    """

    def __init__(self, config: dict[str, Any], launch: Callable[[Plan], Pipeline]):
        # The server's process needs no GPU and must not touch one that Ray did not assign.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        read = load_config(config)
        self.metrics = Metrics(devices=read.devices)
        self.tracing = traces(read.server.otlp_traces_endpoint, model_name(read))
        self.engine = AsyncEngine(read, launch=launch, observer=Observers(self.metrics, *self.tracing))
        self.tasks: list[asyncio.Task[None]] = []

    async def __serve_build_asgi_app__(self) -> Any:
        """Returns the application once the pipeline can decode. Raises: UsageError, WorkerError."""
        await self.engine.start()
        running = (self._end_with_pipeline(), publish(self.metrics), keep_trim(own_heap()))
        self.tasks = [asyncio.create_task(one) for one in running]
        config = self.engine.config
        model = model_name(config)
        return build_app(self.engine, self.metrics, model=model)

    def check_health(self) -> None:
        """Raises: WorkerError: this replica should be replaced."""
        if self.engine.failure is not None:
            raise WorkerError(str(self.engine.failure))
        if self.engine.degraded is not None and not self.engine.restarting:
            raise WorkerError(f"the draft is gone: {self.engine.degraded}")

    async def _end_with_pipeline(self) -> None:
        await self.engine.failed()
        await asyncio.sleep(LAST_WORDS_S)
        # Serve notices at once and sends nothing more. Failing health checks would take three periods.
        os._exit(1)

    async def __del__(self) -> None:
        for task in self.tasks:
            task.cancel()
        await self.engine.close()
        for tracer in self.tracing:
            await asyncio.to_thread(tracer.close)


def app(args: Mapping[str, Any]) -> serve.Application:
    """Builds the Serve application.

    Args:
        args: fields of ``ServeArgs``.

    Raises:
        UsageError: an argument or the configuration cannot work.
    """
    try:
        read = ServeArgs.model_validate(dict(args))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UsageError(f"argument {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if read.max_replicas is not None and read.max_replicas < read.min_replicas:
        raise UsageError(f"max_replicas={read.max_replicas} is below min_replicas={read.min_replicas}")
    config = load_config(read.config, read.overrides)
    wanted = bundles(config, read.resources)
    return deployment(
        config,
        in_replicas_group(read.resources),
        min_replicas=read.min_replicas,
        max_replicas=read.max_replicas or read.min_replicas,
        ray_actor_options={"num_cpus": OWN_CPUS},
        placement_group_bundles=[{"CPU": OWN_CPUS}, *wanted.values()],
        placement_group_strategy=read.strategy,
    )


def in_replicas_group(resources: Mapping[str, Mapping[str, float]]) -> Callable[[Plan], Pipeline]:
    """Returns a launch function that puts workers into the bundles that follow the replica's own."""

    def launch(plan: Plan) -> Pipeline:
        placement = Placement.around(bundles(plan.config, {role: dict(more) for role, more in resources.items()}))
        return RayPipeline(plan, placement=placement)

    return launch


def deployment(
    config: Config,
    launch: Callable[[Plan], Pipeline],
    *,
    min_replicas: int,
    max_replicas: int,
    **where: Any,
) -> serve.Application:
    """Returns the Serve deployment of a configuration.

    Serve sends a replica at most enough requests to fill its slots twice and keeps the rest. So no request waits at
    one replica while another is free, and a replica being removed has little to finish.

    Args:
        launch: makes a running pipeline from a plan.
        where: resources and placement, as ``serve.deployment`` takes them.
    """
    slots = config.engine.max_batch
    replicas: dict[str, Any] = {"num_replicas": min_replicas}
    if max_replicas > min_replicas:
        scaling = {"min_replicas": min_replicas, "max_replicas": max_replicas, "target_ongoing_requests": slots}
        replicas = {"autoscaling_config": scaling}
    made = serve.deployment(
        Replica,
        name=DEPLOYMENT,
        max_ongoing_requests=2 * slots + 1,
        max_queued_requests=config.server.max_queue,
        graceful_shutdown_timeout_s=DRAIN_S,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5.0,
        health_check_timeout_s=30.0,
        max_constructor_retry_count=3,
        **replicas,
        **where,
    )
    return made.bind(config.model_dump(), launch)
