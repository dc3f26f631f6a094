"""A pipeline in a Ray cluster, as a job of it or from any machine in it.

::

    ray job submit --working-dir . -- python launch/ray_job.py --config embedded generate "PROMPT"
    python launch/ray_job.py compare --prompts prompts.jsonl

The arguments are those of the ``ssd`` command, and so are the exit codes. A pipeline actor owns the
pipeline; this process only calls it. Without a cluster (``RAY_ADDRESS``) one of this machine
alone is started, and ends with the command.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from launch.commands import run  # noqa: E402
from launch.ray_env import join  # noqa: E402


def client(*args: Any, **kwargs: Any) -> Any:
    """Join the cluster, or start one, and make the pipeline actor in it."""
    join()
    from ssd.cluster import PipelineClient

    return PipelineClient(*args, **kwargs)


def main() -> None:
    try:
        run(sys.argv[1:], program="launch/ray_job.py", llm=client)
    finally:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()


if __name__ == "__main__":
    main()
