"""The link between draft and verifier: frames of fixed size, one grouped exchange per round.

Both sides post the exchange together, so neither waits for the other to have sent; nothing
stays pending between exchanges. Every wait has a deadline.
"""

# torch declares neither the methods of its process groups nor their options.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np


def nothing() -> None:
    """What is done meanwhile, by default."""


class Link(Protocol):
    """A private two-ended channel. Frames are flat int32 arrays in host memory: a call of torch costs a round several
    times what one of numpy does, once a forward has swept the caches.

    Raises (all methods but close):
        LinkError: the other end is gone or missed the deadline; the link is then dead.

    Beside the links here: ``link_shared.SharedLink``, ``link_host.HostLink`` and ``link_nccl.NcclLink``.
    """

    def exchange(self, outgoing: np.ndarray, incoming: np.ndarray, meanwhile: Callable[[], None] = nothing) -> None:
        """Send one frame and receive one, as one group; ``meanwhile`` runs once both are
        under way."""

    def send(self, outgoing: np.ndarray) -> None: ...

    def receive(self, incoming: np.ndarray) -> None: ...

    @property
    def arrived(self) -> bool | None:
        """Whether a frame is here that was not received yet; None where only receiving tells."""

    def close(self) -> None: ...
