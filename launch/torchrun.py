"""Runs a pipeline under torchrun.

Rank 0 is the verifier and starts the front as its child; the last rank is the draft. Ranks between them hold parts of
the verifier's model (``target.tensor_parallel``). With ``draft.data_parallel`` the last ranks are the draft's.

::

    torchrun --standalone --nproc-per-node 2 launch/torchrun.py --config embedded generate "PROMPT"
    torchrun --standalone --nproc-per-node 2 launch/torchrun.py compare --prompts prompts.jsonl
    torchrun --standalone --nproc-per-node 3 launch/torchrun.py --set target.tensor_parallel=2 generate "PROMPT"
    torchrun --standalone --nproc-per-node 3 launch/torchrun.py --set draft.data_parallel=2 generate "PROMPT"

The arguments are those of the ``ssd`` command; ``generate``, ``compare``, ``certify`` and ``info`` run here. The
verifier runs in the main thread of rank 0, as in every launch. The front is a separate process, because two threads
would compete for the interpreter during rounds.

torchrun's store only carries the orders to the other ranks, as JSON text. Workers meet at the verifier's own store, as
in every launch; there is no WORLD. If a rank is killed, torchrun ends the others.

Exit codes are those of the ``ssd`` command; torchrun itself turns every code but 0 into 1.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch.distributed as dist  # noqa: E402

from ssd.pipeline.runtime.launch import LEAVE_S  # noqa: E402
from ssd.pipeline.runtime.plan import Plan  # noqa: E402
from ssd.pipeline.runtime.worker_main import run_worker  # noqa: E402
from ssd.pipeline.transport.lanes import ZmqLane  # noqa: E402

LOOPBACK = "127.0.0.1"
ORDERS = "ssd/orders"
MEET_S = 300.0
POLL_S = 0.1
EXIT_USAGE, EXIT_INTERRUPTED, EXIT_TERMINATED = 2, 130, 128 + signal.SIGTERM


def main() -> None:
    if "RANK" not in os.environ:
        _refuse("start this with torchrun: torchrun --standalone --nproc-per-node 2 launch/torchrun.py ...")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=MEET_S)))
        sys.exit(lead(store, world) if rank == 0 else follow(store, rank))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def lead(store: dist.Store, world: int) -> int:
    """Runs rank 0: starts the front, passes its orders on, runs the verifier. Returns the front's exit code."""
    host = own_address()
    orders_fd, theirs = os.pipe()
    front = subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "front.py"), str(theirs), host, str(world), *sys.argv[1:]],
        pass_fds=[theirs],
    )
    os.close(theirs)
    folder = None
    try:
        with os.fdopen(orders_fd, "rb") as pipe:
            line = pipe.readline()
        # The line is empty if the front ends without a pipeline; then the draft must not wait for one.
        store.set(ORDERS, line.decode() or "{}")
        if line:
            orders = json.loads(line)
            folder = orders["folder"]
            _work(orders, 0, lambda: front.poll() is None, host=host, folder=folder)
        return front.wait()
    except BaseException:
        front.terminate()
        raise
    finally:
        try:
            front.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            front.kill()
        if folder is not None:  # a front that was killed did not
            shutil.rmtree(folder, ignore_errors=True)


def follow(store: dist.Store, rank: int) -> int:
    """Runs another rank. Returns 0 even if its worker failed, which the front has been told.

    For any other code torchrun would end the verifier, which can continue without its draft, and otherwise reports
    the missing rank itself.
    """
    while not store.check([ORDERS]):
        time.sleep(POLL_S)
    orders = json.loads(store.get(ORDERS))
    if orders:
        with lifeline(orders["lifeline"]) as line:
            _work(orders, rank, lambda: not select.select([line], [], [], 0)[0])
    return 0


def own_address() -> str:
    """Returns the address of rank 0: loopback if all ranks are on its node, otherwise that of MASTER_ADDR."""
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        return LOOPBACK
    name = os.environ["MASTER_ADDR"]
    try:
        address = ipaddress.ip_address(socket.gethostbyname(name))
    except OSError as error:
        _refuse(f"MASTER_ADDR {name!r} has no address: {error}")
    if address.is_loopback or address.is_unspecified:
        _refuse(f"MASTER_ADDR {name!r} is {address}, which other nodes cannot reach; give torchrun --local-addr")
    return str(address)


def lifeline(address: str | list) -> socket.socket:
    """Opens a connection to the front that carries no data and closes when the front ends, for whatever reason."""
    if isinstance(address, str):
        line = socket.socket(socket.AF_UNIX)
        line.connect(address)
        return line
    line = socket.create_connection((address[0], address[1]), timeout=MEET_S)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return line


def _work(orders: dict[str, Any], rank: int, alive: Callable[[], bool], **where: Any) -> None:
    # Ctrl-C reaches every rank. From here on only the front acts on it, and this rank ends with the front.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    plan = Plan.from_dict(orders["plan"])
    role = plan.roles[rank]
    front = ZmqLane.connect(orders["lanes"][role])
    try:
        run_worker(role, plan.for_role(role), front, alive=alive, **where)
    finally:
        front.close()


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_USAGE)


if __name__ == "__main__":
    main()
