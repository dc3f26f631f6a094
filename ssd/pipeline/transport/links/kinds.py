"""Which link joins draft and verifier, and how each end makes it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ....errors import ConfigError
from .base import Link
from .gloo import GlooLink
from .host import HostLink
from .nccl import NcclLink
from .shared import SharedLink

LOOPBACK = "127.0.0.1"


def is_loopback(host: str) -> bool:
    return host in (LOOPBACK, "localhost")


def link_kind(target_device: str, draft_device: str, wanted: str = "auto", *, host: str = LOOPBACK) -> str:
    """Returns the kind of link between two devices: ``shared``, ``gloo``, ``host`` or ``nccl``.

    ``auto`` is ``shared`` on one machine. Between two machines it is ``gloo`` for CPUs and ``host`` if a GPU takes
    part. NCCL is used only if it is asked for: frames are a few kilobytes in host memory, which NCCL would copy to
    one GPU and from the other.

    Args:
        wanted: the configured kind.
        host: address of the verifier. A loopback address means that the draft is on the same machine.

    Raises:
        ConfigError: the wanted kind cannot join these devices.
    """
    one, other = _numbered(target_device), _numbered(draft_device)
    sharing = is_loopback(host) and hasattr(os, "memfd_create")
    if wanted == "nccl" and not (one.type == other.type == "cuda" and one != other and dist.is_nccl_available()):
        raise ConfigError(
            "engine.link=nccl needs target and draft on two GPUs and a torch built with NCCL; use engine.link=auto"
        )
    if wanted == "shared" and not sharing:
        raise ConfigError("engine.link=shared needs draft and verifier on one Linux machine; use engine.link=auto")
    if wanted != "auto":
        return wanted
    if sharing:
        return "shared"
    return "gloo" if one.type == other.type == "cpu" else "host"


def _numbered(device: str) -> torch.device:
    """``cuda`` is ``cuda:0``."""
    read = torch.device(device)
    return torch.device(read.type, read.index or 0) if read.type == "cuda" else read


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkPlan:
    """What both ends of a link know before they make it."""

    kind: str
    store: dist.Store
    """Shared by the two ends and used for this link only."""
    device: str
    """Of this end's model."""
    host: str
    """This machine's address on the network between the ends."""
    timeout_s: float
    """Longest wait for a transfer."""
    meet_s: float
    """Longest wait for the other end to come."""

    def listen(self, endpoint: str) -> Link:
        """Makes the verifier's end.

        Args:
            endpoint: ZMQ address where ``shared`` and ``host`` links wait for the draft.

        Raises:
            LinkError: the draft did not come within ``meet_s``.
        """
        if self.kind == "shared":
            return SharedLink.listen(self.store, endpoint, self.timeout_s, self.meet_s)
        if self.kind == "host":
            return HostLink.listen(self.store, endpoint, self.timeout_s, self.meet_s)
        return self._rank(0)

    def connect(self) -> Link:
        """Makes the draft's end. Raises: LinkError: the verifier did not come within ``meet_s``."""
        if self.kind == "shared":
            return SharedLink.connect(self.store, self.timeout_s, self.meet_s)
        if self.kind == "host":
            return HostLink.connect(self.store, self.timeout_s, self.meet_s)
        return self._rank(1)

    def _rank(self, rank: int) -> Link:
        if self.kind == "nccl":
            return NcclLink(self.store, rank, self.timeout_s, torch.device(self.device), self.meet_s)
        return GlooLink(self.store, rank, self.timeout_s, self.meet_s, self.host)
