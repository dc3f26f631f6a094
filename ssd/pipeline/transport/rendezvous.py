"""Where draft and verifier meet: a store on a free port, and the control lane between them.

The verifier opens both. Whoever launched the workers hands its ``Rendezvous`` to the draft and to
the verifier's other ranks.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...config.machine import socket_folder
from ...errors import LinkError, PipelineError
from ...models.parallel.tensor_group import TensorGroup
from .lanes import ZmqLane
from .links.base import Link
from .links.kinds import LOOPBACK, LinkPlan, is_loopback
from .messages import Hello
from .rank_lanes import Ranks

MEET_S = 60.0
"""Longest time for both ends to make the link once the draft has said that it comes."""
PUBLISHED_POLL_S = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendezvous:
    """Where to meet the verifier. Plain data, safe to send."""

    host: str
    port: int
    """Of the store."""
    lane: str
    """Endpoint of the lane to the draft."""
    kind: str
    """Of the link: ``shared``, ``gloo``, ``nccl`` or ``host``."""
    epoch: int = 0
    """How many drafts there were before."""
    rank_lanes: list[str] = field(default_factory=list)
    """Endpoints of the lanes from the verifier's first rank to its ranks 1, 2, ..."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def listening_host(self) -> str | None:
        """Address that gloo listens on; None for the address of this machine's name."""
        return self.host if is_loopback(self.host) else None


class VerifierSide:
    """The verifier's end of the meeting: opens the store and the lanes, then waits for the others.

    Args:
        host: address at which the draft reaches this process. Loopback keeps everything on this machine.
        kind: of the link (``link_kind``).
        device: of the target.
        timeout_s: longest wait for the draft and for the other ranks to come.
        link_timeout_s: longest wait in the link once it is made; ``timeout_s`` by default.
        folder: where the sockets go, in a folder that ``close`` removes.
        ranks: number of ranks the target is divided among.

    Raises:
        OSError, RuntimeError: a lane, a socket or the store cannot be opened. Nothing stays open then.
    """

    def __init__(
        self,
        *,
        host: str = LOOPBACK,
        kind: str = "gloo",
        device: str = "cpu",
        timeout_s: float,
        link_timeout_s: float | None = None,
        folder: str | None = None,
        ranks: int = 1,
    ):
        self._timeout_s, self._link_timeout_s, self._device = timeout_s, link_timeout_s or timeout_s, device
        self._host, self._folder = host, None
        with contextlib.ExitStack() as opened:
            if is_loopback(host):
                self._folder = Path(opened.enter_context(socket_folder("ssd-lane-", folder)))
            self.lane, endpoint = ZmqLane.bind(self._endpoint("lane-0"))
            opened.callback(lambda: self.lane.close())  # whichever it is then
            self._rank_lanes: list[ZmqLane] = []
            endpoints: list[str] = []
            for rank in range(1, ranks):
                lane, address = ZmqLane.bind(self._endpoint(f"rank-{rank}"))
                opened.callback(lane.close)
                self._rank_lanes.append(lane)
                endpoints.append(address)
            store, port = _open_store(host, timeout_s)
            self._store: dist.Store | None = store
            self.rendezvous = Rendezvous(host=host, port=port, lane=endpoint, kind=kind, rank_lanes=endpoints)
            self._opened = opened.pop_all()

    def _endpoint(self, name: str) -> str:
        return f"ipc://{self._folder / name}" if self._folder else f"tcp://{self._host}:*"

    def ranks(self, *, ordered: bool) -> Ranks:
        """Waits for the other ranks of the verifier.

        Args:
            ordered: as for ``TensorGroup``.

        Raises:
            PipelineError: they did not come within ``timeout_s``.
        """
        return Ranks(
            group=_tensor_group(self._open(), self.rendezvous, 0, self._device, self._timeout_s, ordered),
            lanes=self._rank_lanes,
        )

    def link(self) -> Link:
        """Waits for the draft. Raises: LinkError: it did not come within ``timeout_s``."""
        if not self.came(self._timeout_s):
            raise LinkError(f"the draft did not come in {self._timeout_s:g} s")
        return self.connect()

    def came(self, timeout_s: float) -> bool:
        """Returns whether the draft says within that time that it comes to the link."""
        return isinstance(self.lane.receive(timeout_s), Hello)

    def connect(self) -> Link:
        """Makes the link with the draft that has said it comes.

        May run in another thread while ``reopen`` is called: the link is then the former draft's.

        Raises:
            LinkError: the draft did not come to the link within ``MEET_S``, or this side is closed.
        """
        rendezvous = self.rendezvous
        plan = LinkPlan(
            kind=rendezvous.kind,
            store=_link_store(self._open(), rendezvous),
            device=self._device,
            host=own_address(rendezvous),
            timeout_s=self._link_timeout_s,
            meet_s=min(self._timeout_s, MEET_S),
        )
        return plan.listen(self._endpoint(f"link-{rendezvous.epoch}"))

    def reopen(self, epoch: int) -> None:
        """Opens another lane and names another link. A draft of an earlier epoch finds nobody.

        Raises:
            LinkError: the lane cannot be opened.
        """
        try:
            lane, endpoint = ZmqLane.bind(self._endpoint(f"lane-{epoch}"))
        except PipelineError as error:
            raise LinkError(str(error)) from error
        former, self.lane = self.lane, lane
        former.close()
        self.rendezvous = replace(self.rendezvous, epoch=epoch, lane=endpoint)

    def close(self) -> None:
        """Closes lanes and store and removes the folder. Links and ranks are closed by their holders."""
        self._store = None  # dropping the store closes its sockets
        self._opened.close()

    def _open(self) -> dist.Store:
        if (store := self._store) is None:
            raise LinkError("the verifier's side is closed")
        return store


def draft_side(rendezvous: Rendezvous, *, timeout_s: float, device: str = "cpu") -> tuple[Link, ZmqLane]:
    """Meets the verifier, for a draft that is ready.

    Args:
        timeout_s: longest wait for the verifier, and in the link afterwards. The verifier may be busy
            with long prompts; if it leaves, the link breaks at once.
        device: of the draft.

    Raises:
        LinkError: the verifier cannot be reached in time. Nothing stays open then.
    """
    store = _reach(rendezvous, timeout_s)
    with contextlib.ExitStack() as opened:
        lane = ZmqLane.connect(rendezvous.lane)
        opened.callback(lane.close)
        lane.send(Hello(role="draft"))
        link = LinkPlan(
            kind=rendezvous.kind,
            store=_link_store(store, rendezvous),
            device=device,
            host=own_address(rendezvous),
            timeout_s=timeout_s,
            meet_s=timeout_s,
        ).connect()
        opened.pop_all()
    return link, lane


def rank_side(rendezvous: Rendezvous, rank: int, *, timeout_s: float, device: str, ordered: bool) -> Ranks:
    """Meets the other ranks, for rank 1, 2, ... of the verifier.

    Raises:
        PipelineError: not all ranks came within ``timeout_s``. Nothing stays open then.
    """
    store = _reach(rendezvous, timeout_s)
    with contextlib.ExitStack() as opened:
        lane = ZmqLane.connect(rendezvous.rank_lanes[rank - 1])
        opened.callback(lane.close)
        group = _tensor_group(store, rendezvous, rank, device, timeout_s, ordered)
        opened.pop_all()
    return Ranks(group=group, lanes=[lane])


def publish(rendezvous: Rendezvous, role: str, other: Rendezvous, *, timeout_s: float) -> None:
    """Tells a role, through the verifier's store, where it is awaited.

    Raises:
        LinkError: the store cannot be reached within ``timeout_s``.
    """
    _link_store(_reach(rendezvous, timeout_s), rendezvous).set(role, json.dumps(other.to_dict()))


def published(rendezvous: Rendezvous, role: str, *, timeout_s: float, wanted: Callable[[], bool]) -> Rendezvous | None:
    """Waits until it is published where a role is awaited.

    Args:
        wanted: asked while waiting; False ends the wait.

    Returns:
        Where the role is awaited, or None if it is no longer wanted.

    Raises:
        LinkError: nobody published it within ``timeout_s``, or the verifier left.
    """
    deadline = time.monotonic() + timeout_s
    try:
        store = _link_store(_reach(rendezvous, timeout_s), rendezvous)
        while not store.check([role]):
            if not wanted():
                return None
            if time.monotonic() > deadline:
                raise LinkError(f"nobody awaits the {role}")
            time.sleep(PUBLISHED_POLL_S)
        return Rendezvous(**json.loads(store.get(role)))
    except LinkError:
        raise
    except RuntimeError as error:
        raise LinkError(f"the verifier left before the {role} came: {error}") from error


def own_address(rendezvous: Rendezvous) -> str:
    """Returns this machine's address on the network by which it reaches the verifier.

    The address of the machine's own name may be loopback (Debian's ``127.0.1.1``) or on another network.
    """
    if is_loopback(rendezvous.host):
        return rendezvous.host
    family, *_, address = socket.getaddrinfo(rendezvous.host, rendezvous.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # chooses a route; sends nothing
        return probe.getsockname()[0]


def _open_store(host: str, timeout_s: float) -> tuple[dist.Store, int]:
    """Returns a store and its port."""
    # TCPStore("127.0.0.1") listens on every interface; a socket bound here does not.
    listener = socket.create_server((host, 0))
    try:
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.fileno(),
            timeout=datetime.timedelta(seconds=timeout_s),
        )
        listener.detach()  # the store closes it
    finally:
        with contextlib.suppress(OSError):  # a store that failed late has closed it already
            listener.close()
    return store, port


def _reach(rendezvous: Rendezvous, timeout_s: float) -> dist.Store:
    try:
        return dist.TCPStore(
            rendezvous.host, rendezvous.port, is_master=False, timeout=datetime.timedelta(seconds=timeout_s)
        )
    except RuntimeError as error:
        raise LinkError(f"the verifier's store at {rendezvous.host}:{rendezvous.port} does not answer") from error


def _link_store(store: dist.Store, rendezvous: Rendezvous) -> dist.Store:
    """The part of the store that belongs to one epoch."""
    return dist.PrefixStore(f"link/{rendezvous.epoch}", store)


def _tensor_group(
    store: dist.Store, rendezvous: Rendezvous, rank: int, device: str, timeout_s: float, ordered: bool
) -> TensorGroup:
    return TensorGroup(
        store,
        rank,
        1 + len(rendezvous.rank_lanes),
        device=torch.device(device),
        timeout_s=timeout_s,
        ordered=ordered,
        host=rendezvous.listening_host,
    )
