"""What of the cluster needs no cluster: what is asked for, cores, GPUs, arguments, a replica's health."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ssd.config.load import load_config
from ssd.config.sections import Config
from ssd.errors import PipelineError, UsageError, WorkerError
from ssd.pipeline.runtime.plan import Plan
from ssd.testing.twins.pipeline import ScriptedPipeline

pytest.importorskip("ray.serve")
pytest.importorskip("ray.data")


def gpus() -> Config:
    return Config.model_validate(
        {"target": {"model": "t", "device": "cuda:3", "cores": [4, 5]}, "draft": {"model": "d", "device": "cuda"}}
    )


def test_bundles() -> None:
    from ssd.cluster.batch import one_bundle, with_own_gpus
    from ssd.cluster.placement import bundles

    wanted = bundles(gpus(), {"draft": {"small": 0.5}})
    assert wanted == {"verifier": {"CPU": 2, "GPU": 1}, "draft": {"CPU": 1, "GPU": 1, "small": 0.5}}
    assert one_bundle(gpus()) == {"CPU": 3, "GPU": 2}
    seen = with_own_gpus(gpus())
    assert seen.draft is not None
    assert (seen.target.device, seen.draft.device) == ("cuda:0", "cuda:1")
    for wrong in ({"drfat": {"small": 1.0}}, {"draft": {"small": 0.0}}):
        with pytest.raises(UsageError):
            bundles(gpus(), wrong)


def test_cores_are_leased_once(tmp_path: Path) -> None:
    from ssd.cluster.cores import CoreLease

    cores = sorted(os.sched_getaffinity(0))
    leases = [CoreLease(tmp_path) for _ in range(len(cores) + 1)]
    taken = [lease.take([cores[0]]) for lease in leases]
    assert Counter(core for [core] in taken[:-1]) == Counter(cores)  # each once, the wanted one first
    assert taken[0] == [cores[0]] and taken[-1] == [cores[0]]  # none was free: shared
    leases[0].close()
    assert CoreLease(tmp_path).take([cores[0]]) == [cores[0]]
    assert CoreLease(tmp_path).take(None) is None


def test_serve_arguments() -> None:
    from ssd.cluster.serve_app import app

    for args, said in (
        ({"replicas": 2}, "replicas"),
        ({"min_replicas": 0}, "min_replicas"),
        ({"min_replicas": 3, "max_replicas": 2}, "below"),
        ({"overrides": ["engine.max_bath=2"]}, "engine.max_batch"),
        ({"resources": {"drfat": {"x": 1}}}, "drfat"),
    ):
        with pytest.raises(UsageError, match=said):
            app(args)
    made = app({"overrides": ["engine.max_batch=4"], "max_replicas": 3})
    deployment: Any = made._bound_deployment
    assert deployment.max_ongoing_requests == 9
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 3, 4)
    assert deployment._replica_config.placement_group_bundles == [{"CPU": 1.0}] * 3
    assert deployment._replica_config.placement_group_strategy == "STRICT_PACK"


def test_a_replicas_health(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssd.cluster import serve_app

    pipelines: list[ScriptedPipeline] = []
    exits: list[int] = []

    def launch(plan: Plan) -> ScriptedPipeline:
        pipelines.append(ScriptedPipeline(plan))
        return pipelines[-1]

    async def nothing(_metrics: object) -> None:
        return

    monkeypatch.setattr(serve_app, "publish", nothing)
    monkeypatch.setattr(serve_app, "LAST_WORDS_S", 0.0)
    monkeypatch.setattr(serve_app.os, "_exit", exits.append)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # restored afterwards
    plain_class: Any = serve_app.Replica.__mro__[1]  # without what needs Serve

    async def run() -> None:
        replica = plain_class(load_config("embedded").model_dump(), launch)
        assert callable(await replica.__serve_build_asgi_app__())
        replica.check_health()
        pipelines[0].lose_draft()
        await until(lambda: replica.engine.degraded is not None)
        with pytest.raises(WorkerError, match="the draft is gone: scripted loss"):
            replica.check_health()
        assert not exits
        pipelines[0].killed.set()
        await until(lambda: bool(exits))
        with pytest.raises(WorkerError, match="verifier"):
            replica.check_health()
        await replica.__del__()
        monkeypatch.delattr(plain_class, "__del__")  # Serve awaits it; nobody else does

    asyncio.run(run())
    assert exits == [1]


async def until(condition: Any) -> None:
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError


@pytest.mark.parametrize(
    "error", [Exception("The current node timed out during startup"), ConnectionError("refused"), ValueError("x")]
)
def test_a_cluster_that_cannot_be_joined(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssd.cluster import placement

    left: list[None] = []

    def refuse(**_: Any) -> None:
        raise error

    monkeypatch.setattr(placement.ray, "init", refuse)
    monkeypatch.setattr(placement.ray, "shutdown", lambda: left.append(None))
    with pytest.raises(PipelineError, match=rf"cannot join the Ray cluster at this machine: {error}"):
        placement.connect()
    with pytest.raises(PipelineError, match=r"at 10\.0\.0\.5:6379"):
        placement.connect("10.0.0.5:6379")
    assert len(left) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_joining_may_be_interrupted(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssd.cluster import placement

    def interrupt(**_: Any) -> None:
        raise error

    monkeypatch.setattr(placement.ray, "init", interrupt)
    with pytest.raises(type(error)):
        placement.connect()


class Method:
    """A remote method whose reference is a call to make."""

    def __init__(self, answer: Any):
        self._answer = answer

    def remote(self, *_: Any, **__: Any) -> Any:
        return self._answer


class StandIn:
    """A handle of a pipeline actor."""

    def __init__(self, **answers: Any):
        config = load_config("embedded").model_dump()
        for name, answer in {"describe": config, "start": {"verifier": {}}, **answers}.items():
            setattr(self, name, Method(answer))


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, str]]:
    """Actors that were ended, with the names of their groups."""
    from ssd.cluster import client

    def get(answer: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    found: list[tuple[Any, str]] = []
    monkeypatch.setattr(client.ray, "get", get)
    monkeypatch.setattr(client, "end", lambda actor, group: found.append((actor, group)))
    return found


def test_a_client_ends_the_actor_it_started(ended: list[tuple[Any, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    from ssd.cluster import client

    actor, given = StandIn(), {}

    class Starting:
        @staticmethod
        def remote(_config: Config, **options: Any) -> StandIn:
            given.update(options)
            return actor

    monkeypatch.setattr(client, "PipelineActor", Starting)
    with client.PipelineClient("embedded", strategy="PACK") as one:
        assert one.config == load_config("embedded") and one.info() == {"verifier": {}}
    one.close()
    assert ended == [(actor, given["name"])] and given["strategy"] == "PACK"
    with pytest.raises(PipelineError, match="closed"):
        one.timings()
    actor.start = Method(WorkerError("no room"))  # type: ignore[attr-defined]
    with pytest.raises(WorkerError, match="no room"):
        client.PipelineClient("embedded")
    assert ended[1] == (actor, given["name"]) and len(ended) == 2


def test_a_client_of_a_standing_actor_leaves_it_running(
    ended: list[tuple[Any, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssd.cluster import client

    monkeypatch.setattr(client, "standing", lambda name: {"here": StandIn()}[name])
    with client.PipelineClient.attach("here") as one:
        assert one.config == load_config("embedded") and one.info() == {"verifier": {}}
    one.close()
    with pytest.raises(PipelineError, match="closed"):
        one.generate("x")
    assert not ended
