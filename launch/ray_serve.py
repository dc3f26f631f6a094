"""Runs pipelines behind Ray Serve, until Ctrl-C.

::

    python launch/ray_serve.py --config embedded --replicas 2
    ray job submit --working-dir . --runtime-env launch/runtime_env.yaml -- python launch/ray_serve.py

Serve's proxies listen at ``server.host`` and ``server.port`` of the configuration. For a deployment that outlives its
creator and is updated in place, use ``serve deploy launch/serve.yaml``.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from launch.ray_env import join  # noqa: E402
from ssd.config.load import load_config  # noqa: E402
from ssd.config.sections import Config  # noqa: E402
from ssd.errors import PipelineError, UsageError, WorkerError  # noqa: E402
from ssd.serving.http.guard import read_keys  # noqa: E402

NAME = "ssd"
POLL_S = 0.5
EXIT_USAGE, EXIT_PIPELINE = 2, 3


def main() -> None:
    options = _parser().parse_args()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        config = load_config(options.config, options.overrides)
        read_keys(config.server)  # an address other than loopback requires keys; checked before anything is started
        join(more_cpus=options.max_replicas or options.replicas)
        run(config, options, stop)
    except UsageError as error:
        sys.exit(_say(error, EXIT_USAGE))
    except PipelineError as error:
        sys.exit(_say(error, EXIT_PIPELINE))
    finally:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()


def run(config: Config, options: argparse.Namespace, stop: threading.Event) -> None:
    from ray import serve

    from ssd.cluster.serve_app import app

    args = {"config": config.model_dump(), "min_replicas": options.replicas, "max_replicas": options.max_replicas}
    server = config.server
    serve.start(http_options={"host": server.host, "port": server.port})
    serve.run_many([serve.RunTarget(app(args), name=NAME)], wait_for_applications_running=False)
    try:
        if wait_until_running(options.timeout_s, stop):
            print(
                f"ready: {options.replicas} replicas at http://{server.host}:{server.port}", file=sys.stderr, flush=True
            )
            stop.wait()
    finally:
        serve.delete(NAME)  # replicas finish their requests


def wait_until_running(timeout_s: float, stop: threading.Event) -> bool:
    """Waits for the application. Returns False if ``stop`` was set first; raises WorkerError with Serve's message."""
    from ray import serve

    deadline = time.monotonic() + timeout_s
    while not stop.wait(POLL_S):
        found: Any = serve.status().applications.get(NAME)
        if found is not None and found.status == "RUNNING":
            return True
        said = "; ".join(one.message for one in found.deployments.values() if one.message) if found else ""
        if found is not None and found.status == "DEPLOY_FAILED":
            raise WorkerError(f"Serve could not deploy: {said or found.message}")
        if time.monotonic() > deadline:
            raise WorkerError(f"not ready after {timeout_s:g} s: {said or 'Serve gave no reason'}")
    return False


def _say(error: Exception, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launch/ray_serve.py", description="Pipelines behind Ray Serve.")
    parser.add_argument("--config", "-c", default="embedded", help="a YAML file, or the name of a shipped one")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--replicas", type=int, default=1, help="pipelines, at least")
    parser.add_argument("--max-replicas", type=int, help="pipelines, at most: as many as requests ask for")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="for the first replicas to be ready")
    return parser


if __name__ == "__main__":
    main()
