"""The link over host memory: ZMQ, whose own thread sends while ours goes on."""

from __future__ import annotations

import time

import numpy as np
import torch.distributed as dist
import zmq
from zmq.utils.monitor import recv_monitor_message

from ....errors import LinkError
from .base import Link

_HELLO = b"ssd link"
_EVENTS, _POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)  # numbers, not members of enums: see control.py
_ENDPOINT = "endpoint"


class HostLink(Link):
    """Two ends that cannot or need not use NCCL or gloo: draft and verifier on one GPU, or GPUs
    without NCCL. Frames are host memory as they are made and read, so nothing is copied for the link.

    A peer that dies closes its connection, which is seen at once; one that falls silent is seen at the
    deadline. Args: of ``listen`` and ``connect`` as for ``GlooLink``.
    """

    def __init__(self, socket: zmq.Socket, timeout_s: float):
        super().__init__()
        self._incoming: np.ndarray | None = None
        self._socket: zmq.Socket | None = socket
        self._monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_MONITOR_STOPPED)
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._timeout_s = timeout_s

    @classmethod
    def listen(cls, store: dist.Store, endpoint: str, timeout_s: float, meet_s: float) -> HostLink:
        """The end that opens ``endpoint`` (``ipc://..``, ``tcp://host:*``) and says so in the store."""
        socket = _socket()
        socket.bind(endpoint)
        store.set(_ENDPOINT, socket.getsockopt_string(zmq.LAST_ENDPOINT))
        return cls(socket, meet_s)._greet(timeout_s, first=False)

    @classmethod
    def connect(cls, store: dist.Store, timeout_s: float, meet_s: float) -> HostLink:
        """The end that finds the endpoint in the store."""
        try:
            endpoint = store.get(_ENDPOINT).decode()
        except RuntimeError as error:
            raise LinkError("the verifier did not open its end of the link") from error
        socket = _socket()
        link = cls(socket, meet_s)
        socket.connect(endpoint)
        return link._greet(timeout_s, first=True)

    def _greet(self, timeout_s: float, *, first: bool) -> HostLink:
        """Wait for the other end, as long as it may take to come; from then on as long as it may be silent."""
        try:
            if first:
                self._post(_HELLO)
            if bytes(self._next()) != _HELLO:
                raise LinkError("what came to the link was not its other end")
            if not first:
                self._post(_HELLO)
        except LinkError:
            self.close()
            raise
        self._timeout_s = timeout_s
        return self

    def _begin(self, outgoing: np.ndarray | None, incoming: np.ndarray | None) -> None:
        if self._socket is None:
            raise LinkError("the link is closed")
        if outgoing is not None:
            self._post(outgoing.data)
        self._incoming = incoming

    def _end(self) -> None:
        incoming, self._incoming = self._incoming, None
        if incoming is None:
            return
        frame = np.frombuffer(self._next(), np.uint8)
        if frame.size != incoming.nbytes:
            self.close()
            raise LinkError(f"received a frame of {frame.size} bytes where {incoming.nbytes} were due")
        incoming.view(np.uint8)[:] = frame

    @property
    def arrived(self) -> bool | None:
        return self._socket is not None and bool(int(self._socket.get(_EVENTS)) & _POLLIN)

    def _post(self, frame: memoryview | bytes) -> None:
        if self._socket is None:
            raise LinkError("the link is closed")
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            self.close()
            raise LinkError("the other end closed the link") from None

    def _next(self) -> memoryview:
        if self._socket is None:
            raise LinkError("the link is closed")
        deadline = time.monotonic() + self._timeout_s
        try:
            while True:
                left_ms = max(0, int((deadline - time.monotonic()) * 1e3))
                ready = dict(self._poller.poll(left_ms))
                if self._socket in ready:
                    return self._socket.recv(copy=False).buffer
                if not ready:
                    self.close()
                    raise LinkError(f"the other end sent nothing for {self._timeout_s:g} s")
                recv_monitor_message(self._monitor)
                # What it sent before it left still counts.
                if not self._socket.poll(0):
                    self.close()
                    raise LinkError("the other end closed the link")
        except (zmq.ZMQError, AttributeError):  # closed by another thread of ours
            raise LinkError("the link is closed") from None

    def close(self) -> None:
        socket, self._socket = self._socket, None
        if socket is not None:
            socket.disable_monitor()
            self._monitor.close(linger=0)
            socket.close(linger=100)


def _socket() -> zmq.Socket:
    socket = zmq.Context.instance().socket(zmq.PAIR)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    # An end that leaves may be followed by another, which must find a new link, not this one.
    socket.setsockopt(zmq.RECONNECT_IVL, -1)
    return socket
