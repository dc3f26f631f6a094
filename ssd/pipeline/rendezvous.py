"""Where draft and verifier meet: a store of their own on a free port, and the lane between them.

No fixed ports: the verifier opens both and its ``Rendezvous`` is handed to the draft by
whoever launched them.
"""

from __future__ import annotations

import datetime
import socket
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..errors import LinkError
from .control import ZmqLane
from .link import GlooLink, Link, NcclLink


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendezvous:
    """Plain data: safe to send."""

    host: str
    port: int
    lane: str
    kind: str
    """``gloo`` or ``nccl``."""
    epoch: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class VerifierSide:
    """Opens the store and the lane; ``link`` then waits for the draft.

    Args:
        host: address the draft can reach; loopback keeps everything on this machine.
        timeout_s: for the draft to come. link_timeout_s: of each exchange then; ``timeout_s`` by
            default. folder: where the lane's socket goes; somebody else removes it, too.
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
    ):
        self._timeout_s, self._link_timeout_s, self._device = timeout_s, link_timeout_s or timeout_s, device
        self._folder = tempfile.TemporaryDirectory(prefix="ssd-lane-", dir=folder) if _is_loopback(host) else None
        endpoint = f"ipc://{Path(self._folder.name) / 'lane'}" if self._folder else f"tcp://{host}:*"
        self.lane, endpoint = ZmqLane.bind(endpoint)
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
        self.rendezvous = Rendezvous(host=host, port=port, lane=endpoint, kind=kind)

    def link(self) -> Link:
        """Raises: LinkError if the draft does not come in time."""
        assert self._store is not None
        return _link(
            self._store, self.rendezvous, 0, device=self._device, meet_s=self._timeout_s, timeout_s=self._link_timeout_s
        )

    def close(self) -> None:
        self.lane.close()
        self._store = None
        if self._folder is not None:
            self._folder.cleanup()


def draft_side(rendezvous: Rendezvous, *, timeout_s: float, device: str = "cpu") -> tuple[Link, ZmqLane]:
    """Raises: LinkError if the verifier cannot be reached in time."""
    try:
        store = dist.TCPStore(
            rendezvous.host, rendezvous.port, is_master=False, timeout=datetime.timedelta(seconds=timeout_s)
        )
    except RuntimeError as error:
        raise LinkError(f"the verifier's store at {rendezvous.host}:{rendezvous.port} does not answer") from error
    lane = ZmqLane.connect(rendezvous.lane)
    # Patient: the verifier may be at long prompts. Should it leave, the link breaks at once.
    return _link(store, rendezvous, 1, device=device, meet_s=timeout_s, timeout_s=timeout_s), lane


def link_kind(target_device: str, draft_device: str) -> str:
    """``nccl`` between two distinct GPUs, otherwise ``gloo`` over host memory (two ranks on one
    GPU are refused by NCCL before 2.30)."""
    one, other = torch.device(target_device), torch.device(draft_device)
    distinct_gpus = one.type == other.type == "cuda" and one != other
    return "nccl" if distinct_gpus and dist.is_nccl_available() else "gloo"


def _link(
    store: dist.Store, rendezvous: Rendezvous, rank: int, *, device: str, meet_s: float, timeout_s: float
) -> Link:
    prefixed = dist.PrefixStore(f"link/{rendezvous.epoch}", store)
    if rendezvous.kind == "nccl":
        return NcclLink(prefixed, rank, timeout_s, torch.device(device))
    return GlooLink(prefixed, rank, timeout_s, meet_s, _own_address(rendezvous))


def _own_address(rendezvous: Rendezvous) -> str:
    """This machine's address on the network by which it reaches the verifier: what its own name
    means may be loopback (Debian's ``127.0.1.1``) or another network."""
    if _is_loopback(rendezvous.host):
        return rendezvous.host
    family, *_, address = socket.getaddrinfo(rendezvous.host, rendezvous.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # chooses a route; nothing is sent
        return probe.getsockname()[0]


def _is_loopback(host: str) -> bool:
    return host in ("127.0.0.1", "localhost")
