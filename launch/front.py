"""The front of a torchrun launch. Rank 0 starts it as its child (see ``torchrun.py``)."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from launch.commands import run  # noqa: E402
from launch.torchrun import LOOPBACK  # noqa: E402
from ssd.cli.options import Makers  # noqa: E402
from ssd.config.machine import socket_folder  # noqa: E402
from ssd.errors import PipelineError, UsageError  # noqa: E402
from ssd.pipeline.runtime.plan import Plan  # noqa: E402
from ssd.pipeline.transport.lanes import ControlLane, ZmqLane  # noqa: E402
from ssd.pipeline.transport.messages import Shutdown  # noqa: E402


class TorchrunPipeline:
    """A pipeline whose workers are torchrun's ranks. The parent of this process is the verifier, rank 0.

    Args:
        orders_fd: a pipe on which the parent waits for the ranks' orders.
        host: this node's address; loopback if all ranks are on this node.
        world: the number of ranks that torchrun started.

    Raises:
        UsageError: the numbers of ranks and workers differ.
    """

    def __init__(self, plan: Plan, *, orders_fd: int, host: str, world: int):
        needed = len(plan.roles)
        if world != needed:
            raise UsageError(
                f"torchrun started {world} processes and this configuration has {needed} workers; "
                f"start it with --nproc-per-node {needed}"
            )
        self._parent = os.getppid()
        # The sockets are in a private folder, unless the ranks are on several nodes.
        self._folder = socket_folder("ssd-front-")
        local = host == LOOPBACK
        self.lanes: dict[str, ControlLane] = {}
        endpoints: dict[str, str] = {}
        for role in plan.roles:
            wanted = f"ipc://{Path(self._folder.name) / role}" if local or role == "verifier" else f"tcp://{host}:*"
            self.lanes[role], endpoints[role] = ZmqLane.bind(wanted)
        # Nobody accepts connections: the kernel completes them, and breaks them when this process ends.
        self._lifeline = socket.socket(socket.AF_UNIX if local else socket.AF_INET)
        self._lifeline.bind(str(Path(self._folder.name) / "lifeline") if local else (host, 0))
        self._lifeline.listen(needed)
        orders = {
            "plan": plan.to_dict(),
            "lanes": endpoints,
            "lifeline": self._lifeline.getsockname(),
            "folder": self._folder.name,
        }
        with os.fdopen(orders_fd, "wb") as pipe:
            pipe.write(json.dumps(orders).encode() + b"\n")

    def check(self) -> list[str]:
        """Returns the roles that ended: the verifier or none. A draft reports its end itself, or torchrun ends all."""
        return [] if os.getppid() == self._parent else ["verifier"]

    def close(self) -> None:
        """Asks the workers to end. torchrun waits for them."""
        if not self.check():
            for lane in self.lanes.values():
                with suppress(PipelineError):  # the worker may end at any moment
                    lane.send(Shutdown())
        for lane in self.lanes.values():
            lane.close()
        self._lifeline.close()
        self._folder.cleanup()


def main() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    orders_fd, host, world, *arguments = sys.argv[1:]
    launch = partial(TorchrunPipeline, orders_fd=int(orders_fd), host=host, world=int(world))

    from ssd.engine.llm import LLM

    commands = ("generate", "compare", "certify", "info")
    run(arguments, program="launch/torchrun.py", commands=commands, makers=Makers(llm=partial(LLM, launch=launch)))


if __name__ == "__main__":
    main()
