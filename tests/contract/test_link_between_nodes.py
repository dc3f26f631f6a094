"""Link and lane between nodes go by the verifier's address, whatever the machines' own names mean."""

from __future__ import annotations

import ipaddress
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import psutil
import pytest

from ssd.pipeline.transport.rendezvous import VerifierSide, draft_side


def test_addresses() -> None:
    host = own_address()
    before = connections()
    side = VerifierSide(host=host, timeout_s=10.0)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(draft_side, side.rendezvous, timeout_s=10.0)
        verifier = side.link()
        draft, lane = coming.result(20.0)
        receiving = pool.submit(draft.receive, got := np.zeros(4, dtype=np.int32))
        verifier.send(np.arange(4, dtype=np.int32))
        receiving.result(20.0)
    assert got.tolist() == [0, 1, 2, 3]
    new = connections() - before
    assert len(new) >= 3  # the store, the lane, the link
    # Without addresses of their own the link's ends would both be at what this machine's name means.
    assert {(ends.laddr_ip, ends.raddr_ip) for ends in new} == {(host, host)}
    for end in (verifier, draft, lane, side):
        end.close()


class Ends(NamedTuple):
    """Of a connection of this process."""

    laddr_ip: str
    raddr_ip: str
    port: int


def connections() -> set[Ends]:
    return {
        Ends(one.laddr.ip.removeprefix("::ffff:"), one.raddr.ip.removeprefix("::ffff:"), one.laddr.port)
        for one in psutil.Process().net_connections("tcp")
        if one.status == psutil.CONN_ESTABLISHED
    }


def own_address() -> str:
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family == socket.AF_INET and not ipaddress.ip_address(address.address).is_loopback:
                return address.address
    pytest.skip("this machine has no network address")
