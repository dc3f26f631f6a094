"""Batch files through Ray Data: the same results, whichever process is killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from ssd import LLM, SamplingParams
from ssd.config.load import load_config
from ssd.errors import WorkerError
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.serving.batch.run import Batch
from ssd.testing.twins.pipeline import ScriptedPipeline

pytest.importorskip("ray.data")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

CPUS = 4
SOON_S = 300.0
ROOT = Path(__file__).resolve().parents[2]
SCRIPTED = ["engine.max_batch=3", "target.cores=null", "draft.cores=null"]
RUN = f"""
import asyncio, sys
from functools import partial
from pathlib import Path
from ssd.cluster import connect
from ssd.cluster.batch import RayBatch
from ssd.config.load import load_config
from ssd.testing.twins.pipeline import ScriptedPipeline
connect("auto")
config = load_config("embedded", {SCRIPTED!r})
launch = partial(ScriptedPipeline, round_s=0.1)
asyncio.run(RayBatch(config, Path(sys.argv[1]), Path(sys.argv[2]), replicas=2, launch=launch).run())
"""


def write(path: Path, count: int) -> Path:
    lines = [
        {"id": f"r{n}", "prompt": f"prompt {n}", "max_tokens": 5 + n % 9, "temperature": 0.5} for n in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "broken\n")
    return path


def told(path: Path) -> list[tuple[str, str]]:
    return [(record["id"], record["text"]) for record in map(json.loads, path.read_text().splitlines())]


def records(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("out.jsonl.parts/shard-*"))


def replicas() -> list[int]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "BatchReplica" in " ".join(process.cmdline()[:1]):
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def test_killed_drivers_and_replicas(cluster: None, tmp_path: Path) -> None:
    import ray

    source, calm, out = write(tmp_path / "in.jsonl", 120), tmp_path / "calm.jsonl", tmp_path / "out.jsonl"
    launch = partial(ScriptedPipeline, round_s=0.001)
    asyncio.run(Batch(load_config("embedded", SCRIPTED), source, calm, launch=launch).run())
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    killed = {"driver": 0, "replica": 0}
    for victim in ("driver", "replica", "driver", None):
        seen = records(tmp_path)
        driver = subprocess.Popen([sys.executable, "-c", RUN, str(source), str(out)], cwd=ROOT, env=environment)
        try:
            deadline = time.monotonic() + SOON_S
            while driver.poll() is None and records(tmp_path) == seen:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            if victim is not None and driver.poll() is None:
                pid = driver.pid if victim == "driver" else (replicas() or [driver.pid])[0]
                os.kill(pid, signal.SIGKILL)
                killed["driver" if pid == driver.pid else "replica"] += 1
            assert driver.wait(SOON_S) in (0, -signal.SIGKILL)
        finally:
            driver.kill()
            driver.wait()
        if out.exists():
            break
    assert killed["driver"] >= 1 and killed["replica"] >= 1
    assert told(out) == told(calm)
    assert len(told(out)) == 120
    assert (tmp_path / "out.jsonl.errors").read_text() == (tmp_path / "calm.jsonl.errors").read_text()
    assert not (tmp_path / "out.jsonl.parts").exists()


def test_tokens_are_plain_decodings(cluster: None, tmp_path: Path, tiny_config: Callable[..., dict[str, Any]]) -> None:
    from ssd.cluster.batch import RayBatch

    config = load_config(tiny_config(cores=True, engine={"max_batch": 2, "max_model_len": 200}))
    prompts = [f"hello {word}" for word in ("there", "a", "b c", "you")]
    with LLM(config, launch=InprocPipeline) as llm:
        plain = SamplingParams(method="none", max_tokens=20, temperature=0.7, seed=5, ignore_eos=True)
        expected = [output.text for output in llm.generate(prompts, plain)]
    fields = {"max_tokens": 20, "temperature": 0.7, "seed": 5, "ignore_eos": True}
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt, **fields}) + "\n" for prompt in prompts))
    progress = asyncio.run(RayBatch(config, source, out).run())
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == expected
    assert (progress.done, progress.failed, progress.tokens) == (4, 0, 80)


def test_no_room(cluster: None, tmp_path: Path, tiny_config: Callable[..., dict[str, Any]]) -> None:
    from ssd.cluster.batch import RayBatch

    given = tiny_config()
    given["target"]["cores"] = list(range(CPUS))
    job = RayBatch(load_config(given), write(tmp_path / "in.jsonl", 1), tmp_path / "out.jsonl", timeout_s=2)
    with pytest.raises(WorkerError, match=r"no room .* in 2 s: asked for pipeline 5 CPU on one node; available 4 CPU"):
        asyncio.run(job.run())
