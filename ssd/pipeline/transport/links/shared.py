"""The link between two processes of one machine: memory both can see, and no system call while a frame is due."""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import struct
import time
import zlib
from collections.abc import Callable

import numpy as np
import torch.distributed as dist

from ....errors import LinkError
from .base import Link

MAX_FRAME_BYTES = 64 * 2**20
"""Room for one frame. Memory is taken only for what is used of it."""
SLOTS = 4
"""Frames of one direction that may be under way. A round has at most two."""
_HEAD, _HEADER = struct.Struct("<3q"), 64
"""A frame's number, size and checksum; the room kept for them."""
_ROOM = _HEADER + MAX_FRAME_BYTES
_ENDPOINT = "endpoint"
SPIN_S = 2e-3
"""How long to look without sleeping. The other half of a round that goes well ends within this."""
LONGEST_NAP_S = 1e-3


class SharedLink(Link):
    """Frames through a shared anonymous file; a connected Unix socket beside it, on which nothing is said,
    closes when the other end dies. Nothing can be left behind: the memory has no name.

    A frame's header is its number, its size and a checksum over it and its bytes. The reader takes it once all
    three are right, so that nothing depends on the order in which another core sees the writes.

    Whoever waits looks for ``SPIN_S`` without pause (an exchange costs 50 µs where gloo's costs 330 after a
    forward has swept the caches, see benchmarks/results), then naps for a twentieth of the time it has waited.

    Args: of ``listen`` and ``connect`` as for ``GlooLink``.
    """

    def __init__(self, peer: socket.socket, memory: mmap.mmap, end: int, timeout_s: float):
        super().__init__()
        self._unsent: np.ndarray | None = None
        self._landing: np.ndarray | None = None
        self._peer: socket.socket | None = peer
        self._gone = select.poll()
        self._gone.register(peer, select.POLLIN | select.POLLHUP)
        ways = [_Way(memory, 0), _Way(memory, 1)]
        self._out, self._in = ways[end], ways[1 - end]
        self._timeout_s = timeout_s

    @classmethod
    def listen(cls, store: dist.Store, endpoint: str, timeout_s: float, meet_s: float) -> SharedLink:
        """The end that opens ``ipc://path``, in a folder nobody else may enter, and says so in the store."""
        path = endpoint.removeprefix("ipc://")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            server.bind(path)
            server.listen(1)
            server.settimeout(meet_s)
            store.set(_ENDPOINT, path)
            try:
                peer, _ = server.accept()
            except TimeoutError:
                raise LinkError(f"the draft did not come to the link in {meet_s:g} s") from None
        descriptor = os.memfd_create("ssd-link")
        try:
            os.ftruncate(descriptor, 2 * _Way.size())
            socket.send_fds(peer, [b"\0"], [descriptor])
            return cls(peer, mmap.mmap(descriptor, 2 * _Way.size()), 0, timeout_s)
        except OSError as error:
            peer.close()
            raise LinkError(f"the draft came to the link and left: {error}") from error
        finally:
            os.close(descriptor)

    @classmethod
    def connect(cls, store: dist.Store, timeout_s: float, meet_s: float) -> SharedLink:
        """The end that finds the path in the store."""
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            path = store.get(_ENDPOINT).decode()
            peer.settimeout(meet_s)
            peer.connect(path)
            _, descriptors, _, _ = socket.recv_fds(peer, 1, 1)
            (descriptor,) = descriptors
        except (RuntimeError, OSError, ValueError) as error:
            peer.close()
            raise LinkError("the verifier did not open its end of the link") from error
        try:
            return cls(peer, mmap.mmap(descriptor, 2 * _Way.size()), 1, timeout_s)
        finally:
            os.close(descriptor)

    def _begin(self, outgoing: np.ndarray | None, incoming: np.ndarray | None) -> None:
        if self._peer is None:
            raise LinkError("the link is closed")
        self._unsent = None
        if outgoing is not None:
            frame = outgoing.view(np.uint8)
            if frame.size > MAX_FRAME_BYTES:
                raise LinkError(
                    f"a frame has {frame.size} bytes, this link carries {MAX_FRAME_BYTES}: engine.link=gloo"
                )
            if not self._out.put(frame):
                self._unsent = frame
        self._landing = None if incoming is None else incoming.view(np.uint8)

    def _end(self) -> None:
        unsent, landing = self._unsent, self._landing
        self._unsent = self._landing = None
        if unsent is not None:
            self._wait(self._out.put, unsent)
        if landing is not None:
            try:
                self._wait(self._in.take, landing)
            except ValueError as error:
                self.close()
                raise LinkError(str(error)) from None

    @property
    def arrived(self) -> bool | None:
        return self._peer is not None and self._in.ready

    def _wait(self, move: Callable[[np.ndarray], bool], frame: np.ndarray) -> None:
        """Repeats ``move(frame)`` until it returns True.

        Raises:
            LinkError: the other end is gone, or the deadline has passed.
        """
        if move(frame):
            return
        began = time.monotonic()
        while not move(frame):
            waited_s = time.monotonic() - began
            if waited_s < SPIN_S:
                time.sleep(0)  # lets other threads of this process run
                continue
            if self._peer is None:  # closed by another thread of this process
                raise LinkError("the link is closed")
            if self._gone.poll(0):
                if move(frame):  # frames sent before the other end left are still delivered
                    return
                self.close()
                raise LinkError("the other end closed the link")
            if waited_s > self._timeout_s:
                self.close()
                raise LinkError(f"the other end sent and took nothing for {self._timeout_s:g} s")
            time.sleep(min(waited_s / 20, LONGEST_NAP_S))

    def close(self) -> None:
        peer, self._peer = self._peer, None
        if peer is not None:
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
            peer.close()


class _Way:
    """One direction: a ring of frames, and how many of them the reader has taken."""

    def __init__(self, memory: mmap.mmap, number: int):
        start = number * self.size()
        self._taken = np.frombuffer(memory, np.int64, 1, start)
        at = [start + _HEADER + slot * _ROOM for slot in range(SLOTS)]
        self._memory, self._places = memory, at
        self._frames = [np.frombuffer(memory, np.uint8, MAX_FRAME_BYTES, offset + _HEADER) for offset in at]
        self._count = 0
        """Frames put, or taken, by this end."""

    @staticmethod
    def size() -> int:
        return _HEADER + SLOTS * _ROOM

    def put(self, frame: np.ndarray) -> bool:
        """False while there is no room: the reader is behind."""
        if self._count - self._taken[0] >= SLOTS:
            return False
        slot = self._count % SLOTS
        self._count += 1
        self._frames[slot][: frame.size] = frame
        _HEAD.pack_into(self._memory, self._places[slot], self._count, frame.size, zlib.crc32(frame.data, self._count))
        return True

    @property
    def ready(self) -> bool:
        """Whether the next frame is announced; taking it may still have to wait for the rest of it."""
        return _HEAD.unpack_from(self._memory, self._places[self._count % SLOTS])[0] == self._count + 1

    def take(self, into: np.ndarray) -> bool:
        """False while the next frame is not whole. Raises: ValueError: it has another size."""
        slot = self._count % SLOTS
        number, size, check = _HEAD.unpack_from(self._memory, self._places[slot])
        if number != self._count + 1:
            return False
        frame = self._frames[slot][:size]
        if zlib.crc32(frame.data, number) != check:
            return False
        if size != into.size:
            raise ValueError(f"received a frame of {size} bytes where {into.size} were due")
        into[:] = frame
        self._count = number
        self._taken[0] = number
        return True
