"""A client of a pipeline actor with the methods of ``LLM``."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalIterable=false
# (Ray creates remote classes and exceptions at run time.)
from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import ray

from ..config.load import load_config
from ..config.sections import Config
from ..errors import PipelineError, UsageError, WorkerError
from ..pipeline.runtime.launch import LEAVE_S
from ..request import prompts as asked
from ..request.output import RequestOutput, StreamEvent
from ..request.prompts import Prompt, Prompts
from ..request.sampling_params import SamplingParams
from .actors import PipelineActor
from .placement import reason, release_abandoned

NAMESPACE = "ssd"
"""Ray namespace of standing actors."""


class ActorClient:
    """Offers the methods of ``LLM`` by calling a ``PipelineActor``, whose pipeline is started if it does not run.
    Closing the client leaves the actor running.

    Args:
        actor: A handle of the actor.

    Raises:
        UsageError, WorkerError: The pipeline could not be started.
    """

    def __init__(self, actor: Any):
        self.actor = actor
        self.config = load_config(self._call("describe"))
        self._workers: dict[str, Any] = self._call("start")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """As ``LLM.generate``."""
        pairs = asked.pair(prompts, params)
        fields = [dataclasses.asdict(one.params) for one in pairs]
        outputs = self._call("generate", [one.prompt for one in pairs], fields)
        return [RequestOutput.from_dict(output) for output in outputs]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[StreamEvent]:
        """As ``LLM.stream``; closing the iterator early leaves the request to run to its end."""
        one = asked.one(prompt, params)
        for ref in self._running().stream.remote(one.prompt, dataclasses.asdict(one.params)):
            yield StreamEvent.from_dict(_get(ref))

    def timings(self, *, reset: bool = False) -> dict[str, float | None]:
        """As ``LLM.timings``."""
        return self._call("stats", reset=reset)["timings"]

    def info(self) -> dict[str, Any]:
        """Returns what each worker reported when it was ready, by role."""
        return dict(self._workers)

    @property
    def degraded(self) -> str | None:
        """Why the draft is gone; None while it is there."""
        return self._call("stats")["degraded"]

    def close(self) -> None:
        """Refuses further calls. Safe to call twice."""
        self.actor = None

    def _running(self) -> Any:
        if self.actor is None:
            raise PipelineError("this client is closed")
        return self.actor

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return _get(getattr(self._running(), method).remote(*args, **kwargs))


class PipelineClient(ActorClient):
    """Starts a ``PipelineActor`` in the cluster this process has joined. Closing the client stops the actor.

    Args:
        config, overrides: As for ``LLM``. Models are looked up where the actor runs.
        options: ``strategy``, ``timeout_s`` and ``resources`` of ``PipelineActor``.

    Raises:
        UsageError, WorkerError: As ``LLM`` and ``RayPipeline`` do.
    """

    def __init__(
        self,
        config: Config | str | Path | dict[str, Any] = "embedded",
        *,
        overrides: Sequence[str] = (),
        **options: Any,
    ):
        self._group = f"ssd-{uuid.uuid4().hex}"
        actor = PipelineActor.remote(load_config(config, overrides), name=self._group, **options)
        try:
            super().__init__(actor)
        except BaseException:
            end(actor, self._group)
            raise

    @staticmethod
    def attach(name: str) -> ActorClient:
        """Returns a client of a standing actor (``stand``). Closing the client leaves the actor running.

        Raises:
            UsageError: The cluster has no actor of that name.
        """
        return ActorClient(standing(name))

    def close(self) -> None:
        """Stops the actor and its workers. Safe to call twice."""
        actor = self.actor
        super().close()
        if actor is not None:
            end(actor, self._group)


def stand(
    name: str,
    config: Config | str | Path | dict[str, Any] = "embedded",
    *,
    overrides: Sequence[str] = (),
    **options: Any,
) -> None:
    """Starts a ``PipelineActor`` that outlives this process and its job, for ``PipelineClient.attach``.

    Args:
        name: the name for ``attach`` and ``stop``.
        config, overrides, options: as for ``PipelineClient``.

    Raises:
        UsageError: the name is taken, or as ``PipelineClient``.
        WorkerError: as ``PipelineClient``.
    """
    settings = load_config(config, overrides)
    where = {"name": name, "namespace": NAMESPACE, "lifetime": "detached"}
    try:
        actor = PipelineActor.options(**where).remote(settings, name=_standing_group(name), **options)
    except ValueError:
        raise UsageError(f"a pipeline named {name!r} exists already; stop it first, or choose another name") from None
    try:
        _get(actor.start.remote())
    except BaseException:
        end(actor, _standing_group(name))
        raise


def standing(name: str) -> Any:
    """Returns the standing actor of that name. Raises: UsageError: there is none."""
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        raise UsageError(f"there is no pipeline named {name!r} in this cluster; see ssd.cluster.stand") from None


def stop(name: str) -> None:
    """Stops a standing actor and its workers. Raises: UsageError: there is none of that name."""
    end(standing(name), _standing_group(name))


def end(actor: Any, group: str) -> None:
    """Stops a pipeline actor and its workers, and releases their resources.

    Args:
        group: Name of the workers' placement group.
    """
    # The pipeline itself waits up to three times: for the runs, for their processes, for a slow round.
    ray.wait([actor.close.remote()], timeout=3 * LEAVE_S)
    ray.wait([actor.__ray_terminate__.remote()], timeout=LEAVE_S)
    ray.kill(actor)
    release_abandoned(group)


def _standing_group(name: str) -> str:
    """Returns the name of a standing actor's placement group."""
    return f"ssd-standing-{name}"


def _get(ref: ray.ObjectRef) -> Any:
    """Waits for a call's result. Raises: what the actor's method raised; WorkerError: the actor is gone."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        # Ray raises a subclass of the method's exception, with the original as its cause.
        raise error.cause if isinstance(error.cause, Exception) else error from None
    except ray.exceptions.RayActorError as error:
        raise WorkerError(f"the pipeline's actor is gone: {reason(error)}") from error
