"""Where draft and verifier meet: a store of their own on a free port, and the lane between them.

No fixed ports: the verifier opens both and its ``Rendezvous`` is handed to the draft by
whoever launched them.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import zmq

from ...errors import ConfigError, LinkError
from ...models.tensor_group import TensorGroup
from .lanes import ZmqLane
from .links.base import Link
from .links.gloo import GlooLink
from .links.host import HostLink
from .links.nccl import NcclLink
from .links.shared import SharedLink
from .messages import Hello
from .rank_lanes import Ranks

MEET_S = 60.0
"""For both ends to link, once the draft has said that it comes."""
PUBLISHED_POLL_S = 0.05
_OVER_MEMORY = {"host": HostLink, "shared": SharedLink}
"""Links that torch.distributed has no part in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendezvous:
    """Plain data: safe to send."""

    host: str
    port: int
    lane: str
    kind: str
    """Of the link: ``shared``, ``gloo``, ``nccl`` or ``host``."""
    epoch: int = 0
    """How many drafts there were before."""
    rank_lanes: list[str] = field(default_factory=list)
    """Of the verifier's ranks 1, 2, ..: where the first one tells them what to run."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class VerifierSide:
    """Opens the store and the lane; ``link`` then waits for the draft.

    Args:
        host: address the draft can reach; loopback keeps everything on this machine.
        timeout_s: for the draft to come. link_timeout_s: of each exchange then; ``timeout_s`` by
            default. folder: where the lane's socket goes; somebody else removes it, too.
        ranks: among how many the verifier's model is divided.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        kind: str = "gloo",
        device: str = "cpu",
        timeout_s: float,
        link_timeout_s: float | None = None,
        folder: str | None = None,
        ranks: int = 1,
    ):
        self._timeout_s, self._link_timeout_s, self._device = timeout_s, link_timeout_s or timeout_s, device
        self._host = host
        self._folder = tempfile.TemporaryDirectory(prefix="ssd-lane-", dir=folder) if _is_loopback(host) else None
        self.lane, endpoint = ZmqLane.bind(self._endpoint("lane-0"))
        lanes = [ZmqLane.bind(self._endpoint(f"rank-{rank}")) for rank in range(1, ranks)]
        self._rank_lanes = [lane for lane, _ in lanes]
        # TCPStore("127.0.0.1") listens on every interface; a socket bound by ourselves does not.
        listener = socket.create_server((host, 0))
        port = listener.getsockname()[1]
        self._store: dist.TCPStore | None = dist.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
            timeout=datetime.timedelta(seconds=timeout_s),
        )
        self.rendezvous = Rendezvous(
            host=host, port=port, lane=endpoint, kind=kind, rank_lanes=[address for _, address in lanes]
        )

    def _endpoint(self, name: str) -> str:
        return f"ipc://{Path(self._folder.name) / name}" if self._folder else f"tcp://{self._host}:*"

    def ranks(self, *, ordered: bool) -> Ranks:
        """Waits for the other ranks. Raises: PipelineError if they do not come in time."""
        assert self._store is not None
        return _ranks(self._store, self.rendezvous, 0, self._rank_lanes, self._device, self._timeout_s, ordered)

    def link(self) -> Link:
        """Waits for the draft. Raises: LinkError if it does not come in time."""
        if not self.came(self._timeout_s):
            raise LinkError(f"the draft did not come in {self._timeout_s:g} s")
        return self.connect()

    def came(self, timeout_s: float) -> bool:
        """Whether the draft says within that time that it comes to the link."""
        return isinstance(self.lane.receive(timeout_s), Hello)

    def connect(self) -> Link:
        """Link with the draft that came. Raises: LinkError if it does not meet us there."""
        assert self._store is not None
        meet_s = min(self._timeout_s, MEET_S)
        if self.rendezvous.kind in _OVER_MEMORY:
            endpoint = self._endpoint(f"link-{self.rendezvous.epoch}")
            opened = _OVER_MEMORY[self.rendezvous.kind].listen
            return opened(_prefixed(self._store, self.rendezvous), endpoint, self._link_timeout_s, meet_s)
        return _link(
            self._store, self.rendezvous, 0, device=self._device, meet_s=meet_s, timeout_s=self._link_timeout_s
        )

    def reopen(self, epoch: int) -> None:
        """Another lane, another name for the link: a draft that knows the former ones finds nobody.

        Raises: LinkError if the lane cannot be opened.
        """
        self.lane.close()
        try:
            self.lane, endpoint = ZmqLane.bind(self._endpoint(f"lane-{epoch}"))
        except zmq.ZMQError as error:
            raise LinkError(f"no lane for another draft: {error}") from error
        self.rendezvous = replace(self.rendezvous, epoch=epoch, lane=endpoint)

    def close(self) -> None:
        for lane in (self.lane, *self._rank_lanes):
            lane.close()
        self._store = None
        if self._folder is not None:
            self._folder.cleanup()


def draft_side(rendezvous: Rendezvous, *, timeout_s: float, device: str = "cpu") -> tuple[Link, ZmqLane]:
    """For a draft that is ready. Raises: LinkError if the verifier cannot be reached in time."""
    store = _store(rendezvous, timeout_s)
    lane = ZmqLane.connect(rendezvous.lane)
    lane.send(Hello(role="draft"))
    # Patient: the verifier may be at long prompts. Should it leave, the link breaks at once.
    if rendezvous.kind in _OVER_MEMORY:
        return _OVER_MEMORY[rendezvous.kind].connect(_prefixed(store, rendezvous), timeout_s, timeout_s), lane
    return _link(store, rendezvous, 1, device=device, meet_s=timeout_s, timeout_s=timeout_s), lane


def rank_side(rendezvous: Rendezvous, rank: int, *, timeout_s: float, device: str, ordered: bool) -> Ranks:
    """For rank 1, 2, .. of the verifier. Raises: PipelineError if not all ranks come in time."""
    store = _store(rendezvous, timeout_s)
    lane = ZmqLane.connect(rendezvous.rank_lanes[rank - 1])
    return _ranks(store, rendezvous, rank, [lane], device, timeout_s, ordered)


def _store(rendezvous: Rendezvous, timeout_s: float) -> dist.TCPStore:
    try:
        return dist.TCPStore(
            rendezvous.host, rendezvous.port, is_master=False, timeout=datetime.timedelta(seconds=timeout_s)
        )
    except RuntimeError as error:
        raise LinkError(f"the verifier's store at {rendezvous.host}:{rendezvous.port} does not answer") from error


def publish(rendezvous: Rendezvous, role: str, other: Rendezvous, *, timeout_s: float) -> None:
    """Say in the verifier's store where this role is awaited. Raises: LinkError if the store cannot be reached."""
    _prefixed(_store(rendezvous, timeout_s), rendezvous).set(role, json.dumps(other.to_dict()))


def published(rendezvous: Rendezvous, role: str, *, timeout_s: float, wanted: Callable[[], bool]) -> Rendezvous | None:
    """What was said there, once it is; None if it is ``wanted`` no more. Raises: LinkError if that takes too long."""
    deadline = time.monotonic() + timeout_s
    try:
        store = _prefixed(_store(rendezvous, timeout_s), rendezvous)
        while not store.check([role]):
            if not wanted():
                return None
            if time.monotonic() > deadline:
                raise LinkError(f"nobody awaits the {role}")
            time.sleep(PUBLISHED_POLL_S)
        return Rendezvous(**json.loads(store.get(role)))
    except RuntimeError as error:
        raise LinkError(f"the verifier left before the {role} came: {error}") from error


def _ranks(
    store: dist.Store,
    rendezvous: Rendezvous,
    rank: int,
    lanes: Sequence[ZmqLane],
    device: str,
    timeout_s: float,
    ordered: bool,
) -> Ranks:
    group = TensorGroup(
        store,
        rank,
        1 + len(rendezvous.rank_lanes),
        device=torch.device(device),
        timeout_s=timeout_s,
        ordered=ordered,
        host=rendezvous.host if _is_loopback(rendezvous.host) else None,
    )
    return Ranks(group=group, lanes=list(lanes))


def link_kind(target_device: str, draft_device: str, wanted: str = "auto", *, host: str = "127.0.0.1") -> str:
    """``nccl`` between two distinct GPUs that have it; ``shared`` where draft and verifier otherwise share a
    machine; ``gloo`` between CPUs of two, ``host`` where a GPU of one cannot use NCCL; or what is wanted.

    Args: host: where the verifier can be reached; loopback: from its own machine only.

    Raises:
        ConfigError: ``nccl`` or ``shared`` is wanted where it cannot be.
    """
    one, other = torch.device(target_device), torch.device(draft_device)
    gpus = one.type == other.type == "cuda"
    sharing = _is_loopback(host) and hasattr(os, "memfd_create")
    if wanted == "nccl" and not (gpus and dist.is_nccl_available()):
        raise ConfigError(
            "engine.link=nccl needs target and draft on GPUs and a torch built with NCCL; use engine.link=auto"
        )
    if wanted == "shared" and not sharing:
        raise ConfigError("engine.link=shared needs draft and verifier on one Linux machine; use engine.link=auto")
    if wanted != "auto":
        return wanted
    if gpus and one != other and dist.is_nccl_available():
        return "nccl"
    if sharing:
        return "shared"
    return "gloo" if one.type == other.type == "cpu" else "host"


def _link(
    store: dist.Store, rendezvous: Rendezvous, rank: int, *, device: str, meet_s: float, timeout_s: float
) -> Link:
    prefixed = _prefixed(store, rendezvous)
    if rendezvous.kind == "nccl":
        return NcclLink(prefixed, rank, timeout_s, torch.device(device), meet_s)
    return GlooLink(prefixed, rank, timeout_s, meet_s, own_address(rendezvous))


def own_address(rendezvous: Rendezvous) -> str:
    """This machine's address on the network by which it reaches the verifier: what its own name
    means may be loopback (Debian's ``127.0.1.1``) or another network."""
    if _is_loopback(rendezvous.host):
        return rendezvous.host
    family, *_, address = socket.getaddrinfo(rendezvous.host, rendezvous.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # chooses a route; nothing is sent
        return probe.getsockname()[0]


def _prefixed(store: dist.Store, rendezvous: Rendezvous) -> dist.Store:
    return dist.PrefixStore(f"link/{rendezvous.epoch}", store)


def _is_loopback(host: str) -> bool:
    return host in ("127.0.0.1", "localhost")
