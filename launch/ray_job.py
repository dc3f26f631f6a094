"""Runs the ``ssd`` command with pipelines in a Ray cluster, as a job of it or from any machine in it.

::

    ray job submit --working-dir . --runtime-env launch/runtime_env.yaml -- \\
        python launch/ray_job.py --config embedded generate "PROMPT"
    python launch/ray_job.py compare --prompts prompts.jsonl
    python launch/ray_job.py --replicas 4 batch IN.jsonl OUT.jsonl

Arguments and exit codes are those of the ``ssd`` command; ``generate``, ``compare``, ``certify``, ``info`` and
``batch`` run here. A pipeline actor owns the pipeline, and this process calls it. ``batch`` starts ``--replicas``
pipelines, which get their lines from Ray Data. If ``RAY_ADDRESS`` names no cluster, one of this machine alone is
started, which ends with the command. Servers are started by ``launch/ray_serve.py``.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from launch.commands import run  # noqa: E402
from launch.ray_env import join  # noqa: E402
from ssd.cli.options import Makers  # noqa: E402

COMMANDS = ("generate", "compare", "certify", "info", "batch")


def client(*args: Any, **kwargs: Any) -> Any:
    """Joins the cluster, or starts one, and makes a pipeline actor in it."""
    join()
    from ssd.cluster import PipelineClient

    return PipelineClient(*args, **kwargs)


def batch(*args: Any, replicas: int, **kwargs: Any) -> Any:
    """Joins the cluster, or starts one, and prepares a batch that runs in it."""
    join()
    from ssd.cluster.batch import RayBatch

    return RayBatch(*args, replicas=replicas, **kwargs)


def main() -> None:
    own = argparse.ArgumentParser(prog="launch/ray_job.py", add_help=False, allow_abbrev=False)
    own.add_argument("--replicas", type=int, default=1)
    options, arguments = own.parse_known_args(sys.argv[1:])
    if options.replicas < 1:
        own.error(f"--replicas must be at least 1, not {options.replicas}")
    if "serve" in arguments[:1]:
        own.error("servers in a cluster are started by launch/ray_serve.py")
    makers = Makers(llm=client, batch=partial(batch, replicas=options.replicas))
    try:
        run(arguments, program="launch/ray_job.py", commands=COMMANDS, makers=makers)
    finally:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()


if __name__ == "__main__":
    main()
