"""Draft and verifier on different nodes: two raylets on this machine, told apart by their resources."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import psutil
import pytest

from ssd import LLM, SamplingParams, UsageError, WorkerError

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

APART = {"verifier": {"big": 1.0}, "draft": {"small": 1.0}}
PROMPTS = ["hello there", "a b c d"]


@pytest.fixture(scope="module")
def nodes(ray_environment: None) -> Iterator[dict[str, str]]:
    """Node ids by their resource."""
    from ray._private.authentication.authentication_token_setup import enable_token_auth_by_default
    from ray.cluster_utils import Cluster

    from ssd.cluster import connect

    enable_token_auth_by_default()  # as ray.init does
    cluster = Cluster()
    try:
        for name in APART["verifier"] | APART["draft"]:
            cluster.add_node(num_cpus=1, resources={name: 1}, include_dashboard=False)
        connect(cluster.address)
        yield {name: node["NodeID"] for node in ray.nodes() for name in ("big", "small") if name in node["Resources"]}
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def config(tiny_config: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return tiny_config(cores=True, engine={"max_batch": 2, "max_model_len": 200})


def test_apart(nodes: dict[str, str], config: dict[str, Any]) -> None:
    from ray._private import state

    from ssd.cluster import RayPipeline

    def params(method: str) -> SamplingParams:
        return SamplingParams(method=method, max_tokens=30, temperature=0.7, seed=5, ignore_eos=True)

    with LLM(config, launch=partial(RayPipeline, strategy="STRICT_SPREAD", timeout_s=60, resources=APART)) as llm:
        plain, ssd = (llm.generate(PROMPTS, params(method)) for method in ("none", "ssd"))
        assert [output.token_ids for output in ssd] == [output.token_ids for output in plain]
        assert any(output.speculation.hits for output in ssd) and llm.degraded is None
        # Workers are in their one call: Ray is asked, not they.
        found = {role: state.actors(actor._actor_id.hex()) for role, actor in llm._pipeline.actors.items()}
        assert {role: about["Address"]["NodeID"] for role, about in found.items()} == {
            "verifier": nodes["big"],
            "draft": nodes["small"],
        }
        ends = {
            role: {
                (connection.laddr, connection.raddr)
                for connection in psutil.Process(about["Pid"]).net_connections("tcp")
                if connection.status == psutil.CONN_ESTABLISHED
            }
            for role, about in found.items()
        }
        between = {(mine, theirs) for mine, theirs in ends["verifier"] if (theirs, mine) in ends["draft"]}
        assert len(between) >= 2  # the lane, the link
        assert not any(ipaddress.ip_address(mine.ip).is_loopback for mine, _ in between)


def test_not_on_one_node(nodes: dict[str, str], config: dict[str, Any]) -> None:
    from ssd.cluster import RayPipeline

    said = r"no room .* in 2 s: asked for verifier 1 CPU \+ 1 big, draft 1 CPU \+ 1 small on one node; available 2 CPU"
    with pytest.raises(WorkerError, match=said):
        LLM(config, launch=partial(RayPipeline, timeout_s=2, resources=APART))
    with pytest.raises(UsageError, match="'drfat'; the roles are verifier, draft"):
        LLM(config, launch=partial(RayPipeline, resources={"drfat": {"small": 1.0}}))
