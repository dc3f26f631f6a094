"""Entry of a local worker process: ``python -m ssd.pipeline.runtime.process``.

The orders arrive as one JSON line on standard input. The pipe then stays open: when it closes,
whoever launched the worker is gone, and the worker leaves too.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import sys
import threading
import time

from ..transport.lanes import ZmqLane
from .plan import Plan
from .worker_main import run_worker

GRACE_S = 4.0
"""How long a worker may take to leave by itself once its launcher is gone."""


def main() -> None:
    """Lives the life of the worker that the orders name."""
    # Ctrl-C reaches the whole foreground process group, and service managers send SIGTERM to every process of a
    # service. Only the front acts on them: it may still have requests to finish.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    orders = json.loads(sys.stdin.buffer.readline())
    plan = Plan.from_dict(orders["plan"])
    front = ZmqLane.connect(orders["front"])
    descriptor = sys.stdin.fileno()

    def alive() -> bool:
        readable, _, _ = select.select([descriptor], [], [], 0)
        return not readable  # nothing is written any more, so readable means closed

    def leave() -> None:
        """Ends the process some time after its launcher, whatever it is blocked in."""
        select.select([descriptor], [], [])
        time.sleep(GRACE_S)
        shutil.rmtree(orders["folder"], ignore_errors=True)
        os._exit(1)

    threading.Thread(target=leave, name="ssd-lifeline", daemon=True).start()
    try:
        role = orders["role"]
        run_worker(role, plan.for_role(role), front, folder=orders["folder"], alive=alive)
    finally:
        if not alive():
            shutil.rmtree(orders["folder"], ignore_errors=True)
        front.close()


if __name__ == "__main__":
    main()
