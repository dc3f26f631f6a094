"""Starts or stops a pipeline actor that outlives its job; any process in the cluster may call it.

::

    ray job submit --working-dir . --runtime-env launch/runtime_env.yaml -- python launch/ray_actor.py start NAME
    ray job submit ... -- python launch/ray_actor.py stop NAME

While it runs, from a process on any node::

    from ssd.cluster import PipelineClient, connect

    connect("auto")
    with PipelineClient.attach("NAME") as client:
        print(client.generate("def main():")[0].text)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from launch.ray_env import join  # noqa: E402
from ssd.errors import PipelineError, UsageError  # noqa: E402

EXIT_USAGE, EXIT_PIPELINE = 2, 3


def main() -> None:
    parser = argparse.ArgumentParser(prog="launch/ray_actor.py", description="A standing pipeline actor.")
    parser.add_argument("action", choices=["start", "stop"])
    parser.add_argument("name")
    parser.add_argument("--config", "-c", default="embedded", help="a YAML file, or the name of a shipped one")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    try:
        join(alone=False)
        from ssd.cluster import stand, stop

        if options.action == "start":
            stand(options.name, options.config, overrides=options.overrides)
            print(f"pipeline {options.name!r} is ready: PipelineClient.attach({options.name!r})")
        else:
            stop(options.name)
            print(f"pipeline {options.name!r} is stopped")
    except UsageError as error:
        sys.exit(_say(error, EXIT_USAGE))
    except PipelineError as error:
        sys.exit(_say(error, EXIT_PIPELINE))


def _say(error: Exception, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
