"""Ray: workers as actors decode the same tokens, failing placement is explained, and nothing is left behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import psutil
import pytest

from ssd import LLM, PipelineError, RequestError, SamplingParams, UsageError, WorkerError
from ssd.config.sections import Config

ray = pytest.importorskip("ray")

PROMPTS = ["hello there", "a b c d"]
CPUS = 4
"""CPUs of the module's cluster."""


@pytest.fixture
def launch(cluster: None) -> Callable[..., Any]:
    from ssd.cluster import RayPipeline

    return partial(RayPipeline, timeout_s=30)


@pytest.fixture
def config(tiny_config: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return tiny_config(cores=True, engine={"max_batch": 2, "max_model_len": 400})


def params(method: str, temperature: float = 0.0, **more: Any) -> SamplingParams:
    given = {"max_tokens": 40, "ignore_eos": True, **more}
    return SamplingParams(method=method, temperature=temperature, seed=5, **given)


def assert_nothing_left(pids: list[int]) -> None:
    from ray.util.placement_group import placement_group_table

    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        rooms = [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
        if not rooms and not any(map(psutil.pid_exists, pids)) and ray.available_resources().get("CPU") == CPUS:
            return
        time.sleep(0.1)
    raise AssertionError((rooms, [pid for pid in pids if psutil.pid_exists(pid)], ray.available_resources()))


def worker_pids() -> list[int]:
    """Returns the process ids of worker and pipeline actors."""
    return [
        process.pid
        for process in psutil.Process().children(recursive=True)
        if process.cmdline()[:1] and process.cmdline()[0].startswith(("ray::WorkerActor", "ray::PipelineActor"))
    ]


def test_methods_agree(launch: Callable[..., Any], config: dict[str, Any]) -> None:
    with LLM(config, launch=launch) as llm:
        pids = worker_pids()
        assert len(pids) == 2
        for temperature in (0.0, 0.8):
            plain, sd, ssd = (llm.generate(PROMPTS, params(method, temperature)) for method in ("none", "sd", "ssd"))
            expected = [output.token_ids for output in plain]
            assert [output.token_ids for output in sd] == expected
            assert [output.token_ids for output in ssd] == expected
            assert all(len(tokens) == 40 for tokens in expected)
            assert any(output.speculation.hits for output in ssd)
        assert llm.degraded is None
    assert_nothing_left(pids)


def test_killed_draft(launch: Callable[..., Any], config: dict[str, Any]) -> None:
    config["engine"]["draft_restart_delay_s"] = 0.2
    with LLM(config, launch=launch) as llm:
        pids = worker_pids()
        expected = llm.generate(PROMPTS[0], params("none", max_tokens=300))[0].token_ids
        events = llm.stream(PROMPTS[0], params("ssd", max_tokens=300))
        next(events)
        ray.kill(llm._pipeline.actors["draft"])
        output = [event.output for event in events][-1]
        assert output is not None and output.token_ids == expected
        deadline = time.monotonic() + 60
        while llm.degraded:
            assert time.monotonic() < deadline, llm.degraded
            assert llm.generate(PROMPTS[0], params("ssd", max_tokens=20))[0].token_ids == expected[:20]
        pids += worker_pids()
        assert len(set(pids)) == 3
        again = llm.generate(PROMPTS[0], params("ssd", max_tokens=40))[0]
        assert again.token_ids == expected[:40] and again.speculation.hits
    assert_nothing_left(pids)


@pytest.mark.slow
def test_two_ranks_of_the_draft(launch: Callable[..., Any], config: dict[str, Any]) -> None:
    config["draft"]["data_parallel"] = 2
    with LLM(config, launch=launch) as llm:
        expected = [output.token_ids for output in llm.generate(PROMPTS, params("none"))]
        outputs = llm.generate(PROMPTS, params("ssd"))
        assert [output.token_ids for output in outputs] == expected
        assert llm.degraded is None and set(llm.info()) == {"verifier", "draft", "draft-1"}
        pids = worker_pids()
        assert len(pids) == 3
    assert_nothing_left(pids)


def test_no_room(launch: Callable[..., Any], config: dict[str, Any]) -> None:
    config["target"]["cores"] = list(range(CPUS))
    began = time.monotonic()
    with pytest.raises(WorkerError, match=r"no room .* in 2 s: asked for verifier 4 CPU, draft 1 CPU.*available 4 CPU"):
        LLM(config, launch=partial(launch, timeout_s=2))
    assert time.monotonic() - began < 10
    assert_nothing_left([])


def test_every_interface_is_refused(launch: Callable[..., Any], config: dict[str, Any]) -> None:
    for address in ("0.0.0.0", "::", "*"):
        with pytest.raises(UsageError):
            LLM(config, launch=partial(launch, address=address))
    assert_nothing_left([])


def test_a_worker_says_what_is_wrong(launch: Callable[..., Any], config: dict[str, Any]) -> None:
    config["target"]["cores"] = [4095]
    with pytest.raises(UsageError, match="4095"):
        LLM(config, launch=launch)
    assert_nothing_left([])


def test_pipeline_actor(cluster: None, config: dict[str, Any]) -> None:
    from ssd.cluster import PipelineActor

    actor = PipelineActor.remote(config)
    wanted = {"max_tokens": 20, "seed": 5, "temperature": 0.8, "ignore_eos": True}
    plain, ssd = (ray.get(actor.generate.remote(PROMPTS, {**wanted, "method": method})) for method in ("none", "ssd"))
    pids = worker_pids()
    assert len(pids) == 3
    assert [output["token_ids"] for output in ssd] == [output["token_ids"] for output in plain]
    assert ssd[0]["speculation"]["rounds"] < 20
    each = ray.get(actor.generate.remote(PROMPTS, [{"max_tokens": 3}, {"max_tokens": 5}]))
    assert [len(output["token_ids"]) for output in each] == [3, 5]
    stats = ray.get(actor.stats.remote())
    assert set(stats["workers"]) == {"verifier", "draft"} and stats["degraded"] is None
    assert stats["timings"]["round_ms"] > 0
    with pytest.raises(RequestError, match="unknown sampling parameter 'max_token'"):
        ray.get(actor.generate.remote(PROMPTS, {"max_token": 3}))
    for pid in worker_pids():  # both workers: the call says so, the next one has others
        if psutil.Process(pid).cmdline()[0].startswith("ray::WorkerActor"):
            psutil.Process(pid).kill()
    with pytest.raises(PipelineError):
        ray.get(actor.generate.remote(PROMPTS, wanted))
    again = ray.get(actor.generate.remote(PROMPTS, wanted))
    assert [output["token_ids"] for output in again] == [output["token_ids"] for output in plain]
    ray.get(actor.close.remote())
    ray.kill(actor)
    assert_nothing_left(pids)


def test_client(cluster: None, config: dict[str, Any]) -> None:
    from ssd.cluster import PipelineClient

    with PipelineClient(config) as client:
        pids = worker_pids()
        whole = client.generate(PROMPTS[0], params("none"))[0]
        events = list(client.stream(PROMPTS[0], params("ssd")))
        assert "".join(event.text for event in events) == whole.text
        assert events[-1].output is not None and events[-1].output.token_ids == whole.token_ids
        assert client.degraded is None
        with pytest.raises(RequestError, match="empty"):
            client.generate("", params("none"))
    assert_nothing_left(pids)


def test_standing_actor(cluster: None, config: dict[str, Any]) -> None:
    """A standing actor outlives its creator, is found by name, survives its clients, and can be stopped."""
    from ssd.cluster import PipelineClient, stand, stop

    stand("here", config)
    pids = worker_pids()
    assert len(pids) == 3
    with pytest.raises(UsageError, match="named 'here' exists already"):
        stand("here", config)
    answers = []
    for method in ("none", "ssd"):
        with PipelineClient.attach("here") as client:
            assert client.config.engine.max_batch == 2 and set(client.info()) == {"verifier", "draft"}
            answers.append(client.generate(PROMPTS[0], params(method))[0].token_ids)
    assert answers[0] == answers[1]
    assert worker_pids() == pids
    stop("here")
    with pytest.raises(UsageError, match="no pipeline named 'here'"):
        PipelineClient.attach("here")
    assert_nothing_left(pids)


def test_killed_pipeline_actor(cluster: None, config: dict[str, Any]) -> None:
    """Its workers end with it, and closing the client releases their resources."""
    from ssd.cluster import PipelineClient

    with PipelineClient(config) as client:
        pids = worker_pids()
        assert len(pids) == 3
        ray.kill(client.actor)
        with pytest.raises(WorkerError, match="the pipeline's actor is gone"):
            client.generate(PROMPTS[0])
    assert_nothing_left(pids)


def test_gpu_numbers() -> None:
    from ssd.cluster.placement import with_visible_gpu

    config = Config.model_validate(
        {"target": {"model": "t", "device": "cuda:2"}, "draft": {"model": "d", "device": "cuda:2"}}
    )

    def devices(role: str, gpus: list[str], visible: str | None) -> tuple[str, str]:
        seen = with_visible_gpu(config, role, gpus, visible)
        assert seen.draft is not None
        return seen.target.device, seen.draft.device

    assert devices("verifier", ["3"], "3") == ("cuda:0", "cuda:1")  # masked: one GPU, which is number 0
    assert devices("draft", ["1"], "1") == ("cuda:1", "cuda:0")
    assert devices("verifier", ["3"], "0,1,3") == ("cuda:2", "cuda:3")  # not masked by Ray
    assert devices("verifier", ["3"], None) == ("cuda:3", "cuda:4")
    assert devices("verifier", [], "") == ("cuda:2", "cuda:2")  # a CPU worker: left alone
    mixed = config.model_copy(update={"draft": config.draft.model_copy(update={"device": "cpu"})})
    assert with_visible_gpu(mixed, "verifier", ["3"], "3").draft.device == "cpu"


def test_a_bundle_for_each_rank_of_the_verifier() -> None:
    from ssd.cluster.placement import bundles

    target = {"model": "t", "device": "cuda", "cores": [0, 1, 2, 3], "tensor_parallel": 2}
    config = Config.model_validate({"target": target, "draft": {"model": "d"}})
    rank = {"CPU": 2.0, "GPU": 1.0}
    wanted = bundles(config)
    assert wanted == {"verifier": rank, "verifier-1": rank, "draft": {"CPU": 1.0}}
    drafts = {"model": "d", "cores": [4, 5], "device": "cuda", "data_parallel": 2}
    wanted = bundles(config.model_validate({"target": {"model": "t"}, "draft": drafts}))
    own = {"CPU": 1.0, "GPU": 1.0}
    assert wanted == {"verifier": {"CPU": 1.0}, "draft": own, "draft-1": own}
