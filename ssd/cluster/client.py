"""A pipeline actor, called as if it were an ``LLM`` of this process."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalIterable=false
# (Ray's remote classes and exceptions are made at run time.)
from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray

from ..config.load import load_config
from ..config.sections import Config
from ..errors import PipelineError, UsageError, WorkerError
from ..pipeline.runtime.launch import LEAVE_S
from ..request.output import RequestOutput, SpeculationRecord, StreamEvent, TokenLogprob
from ..request.sampling_params import SamplingParams
from .actors import PipelineActor
from .placement import reason, release_abandoned

NAMESPACE = "ssd"
"""Where standing actors' names live."""


class PipelineClient:
    """Makes a ``PipelineActor`` in the cluster this process has joined, and speaks for it: the
    methods of ``LLM``, by actor calls.

    Args:
        config, overrides: as for ``LLM``; models are looked up where the actor runs.
        options: strategy and timeout_s of ``PipelineActor``.

    Raises:
        UsageError, WorkerError: as ``LLM`` and ``RayPipeline`` do.
    """

    def __init__(
        self,
        config: Config | str | Path | dict[str, Any] = "embedded",
        *,
        overrides: Sequence[str] = (),
        **options: Any,
    ):
        self.config = load_config(config, overrides)
        self._room: str | None = f"ssd-{uuid.uuid4().hex}"
        self.actor = PipelineActor.remote(self.config, name=self._room, **options)
        try:
            self._workers: dict[str, Any] = self._call("start")
        except BaseException:
            self.close()
            raise

    @classmethod
    def attach(cls, name: str) -> PipelineClient:
        """Speak for a standing actor (``stand``), which ``close`` then leaves as it is.

        Raises: UsageError: there is none of that name in the cluster.
        """
        client = cls.__new__(cls)
        client.actor, client._room = standing(name), None
        client.config = load_config(client._call("describe"))
        client._workers = client._call("start")
        return client

    def __enter__(self) -> PipelineClient:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """As ``LLM.generate``."""
        single = params is None or isinstance(params, SamplingParams)
        fields = dataclasses.asdict(params or SamplingParams()) if single else [dataclasses.asdict(p) for p in params]
        return [read_output(output) for output in self._call("generate", prompts, fields)]

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[StreamEvent]:
        """As ``LLM.stream``; closing the iterator early leaves the request to run to its end."""
        fields = dataclasses.asdict(params or SamplingParams())
        for ref in self._running().stream.remote(prompt, fields):
            event = _get(ref)
            output, logprobs = event["output"], read_logprobs(event["logprobs"])
            yield StreamEvent(**{**event, "output": output and read_output(output), "logprobs": logprobs})

    def timings(self, *, reset: bool = False) -> dict[str, float | None]:
        """As ``LLM.timings``."""
        return self._call("stats", reset=reset)["timings"]

    def info(self) -> dict[str, Any]:
        """What the workers said of themselves, by role."""
        return dict(self._workers)

    @property
    def degraded(self) -> str | None:
        """Why the draft is no longer there, if it is not."""
        return self._call("stats")["degraded"]

    def close(self) -> None:
        """Stop the workers and the actor, if they are this client's own. Safe to call twice."""
        actor, self.actor = self.actor, None
        if actor is not None and self._room is not None:
            end(actor, self._room)

    def _running(self) -> Any:
        if self.actor is None:
            raise PipelineError("this client is closed")
        return self.actor

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return _get(getattr(self._running(), method).remote(*args, **kwargs))


def stand(
    name: str,
    config: Config | str | Path | dict[str, Any] = "embedded",
    *,
    overrides: Sequence[str] = (),
    **options: Any,
) -> None:
    """Make a ``PipelineActor`` that outlives this process and its job, for ``PipelineClient.attach``.

    Args:
        name: by which it is found. Others: as for ``PipelineClient``.

    Raises:
        UsageError: the name is taken, or as ``PipelineClient``; WorkerError: as ``PipelineClient``.
    """
    settings = load_config(config, overrides)
    where = {"name": name, "namespace": NAMESPACE, "lifetime": "detached"}
    try:
        actor = PipelineActor.options(**where).remote(settings, name=_room(name), **options)
    except ValueError:
        raise UsageError(f"there is a pipeline named {name!r} already; stop it first, or choose another name") from None
    try:
        _get(actor.start.remote())
    except BaseException:
        end(actor, _room(name))
        raise


def standing(name: str) -> Any:
    """The actor of that name. Raises: UsageError: there is none."""
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        raise UsageError(f"there is no pipeline named {name!r} in this cluster; see ssd.cluster.stand") from None


def stop(name: str) -> None:
    """End a standing actor and its workers. Raises: UsageError: there is none of that name."""
    end(standing(name), _room(name))


def end(actor: Any, room: str) -> None:
    """Stop a pipeline actor and see that its workers leave."""
    # Three waits of the pipeline's own: for the runs, for their processes, for a slow round.
    ray.wait([actor.close.remote()], timeout=3 * LEAVE_S)
    ray.wait([actor.__ray_terminate__.remote()], timeout=LEAVE_S)
    ray.kill(actor)
    release_abandoned(room)


def _room(name: str) -> str:
    return f"ssd-standing-{name}"


def read_output(fields: dict[str, Any]) -> RequestOutput:
    """A ``RequestOutput`` from the plain data a ``PipelineActor`` answers with."""
    read = {
        "speculation": SpeculationRecord(**fields["speculation"]),
        "logprobs": read_logprobs(fields["logprobs"]),
        "others": tuple(read_output(other) for other in fields["others"]),
    }
    return RequestOutput(**{**fields, **read})


def read_logprobs(fields: Sequence[dict[str, Any]] | None) -> tuple[TokenLogprob, ...] | None:
    return None if fields is None else tuple(TokenLogprob(**token) for token in fields)


def _get(ref: ray.ObjectRef) -> Any:
    """Raises: what the actor's method raised, or WorkerError if the actor is gone."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        # Ray wraps what the method raised in a class derived from it.
        raise error.cause if isinstance(error.cause, Exception) else error from None
    except ray.exceptions.RayActorError as error:
        raise WorkerError(f"the pipeline's actor is gone: {reason(error)}") from error
