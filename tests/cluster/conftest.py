"""A Ray cluster for the tests of a module."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

START_TRIES = 4
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ray_environment() -> Iterator[None]:
    """The environment of the module's cluster; none of its processes survives the module."""
    import ray

    set_here = {
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    # Ray reads RAY_AUTH_MODE when it is imported; for a new cluster it turns tokens on by itself, and says so there.
    before = {name: os.environ.get(name) for name in (*set_here, "RAY_AUTH_MODE")}
    os.environ.update(set_here)
    children = set(psutil.Process().children(recursive=True))
    try:
        yield
    finally:
        started = set(psutil.Process().children(recursive=True)) - children
        ray.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive, [process.cmdline() for process in alive]


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, ray_environment: None) -> None:
    """A Ray cluster of this machine with the module's ``CPUS``."""
    from ssd.cluster import connect
    from ssd.errors import PipelineError

    before = set(psutil.Process().children(recursive=True))
    for left in reversed(range(START_TRIES)):
        try:
            connect(cpus=request.module.CPUS)
            return
        except PipelineError:
            # Ray gives its own processes 15 and 30 s to start; on a crowded machine a later try finds them cached.
            if not left:
                raise
            for process in set(psutil.Process().children(recursive=True)) - before:
                process.kill()
