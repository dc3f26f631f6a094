"""Entry of a local worker process: ``python -m ssd.pipeline.process``.

Its orders come as one JSON line on standard input. The pipe then stays open as a lifeline: when
it closes, whoever launched the worker is gone, and the worker leaves too.
"""

from __future__ import annotations

import json
import select
import signal
import sys

from .build import Plan
from .control import ZmqLane
from .serve import run_draft, run_verifier


def main() -> None:
    # Ctrl-C reaches the whole foreground group; only the front acts on it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    orders = json.loads(sys.stdin.buffer.readline())
    plan = Plan.from_dict(orders["plan"])
    front = ZmqLane.connect(orders["front"])
    descriptor = sys.stdin.fileno()

    def alive() -> bool:
        readable, _, _ = select.select([descriptor], [], [], 0)
        return not readable  # nothing is ever written: readable means closed

    try:
        {"verifier": run_verifier, "draft": run_draft}[orders["role"]](plan, front, alive=alive)
    finally:
        front.close()


if __name__ == "__main__":
    main()
