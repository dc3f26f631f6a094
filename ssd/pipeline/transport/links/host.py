"""The link over ZMQ, whose own thread sends while the worker continues."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import numpy as np
import torch.distributed as dist
import zmq
from zmq.utils.monitor import recv_monitor_message

from ....errors import LinkError
from .base import Link

_HELLO = b"ssd link"
_EVENTS, _POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)  # plain numbers: see ``lanes``
_ENDPOINT = "endpoint"


class HostLink(Link):
    """Frames over a ZMQ PAIR socket, for ends that have neither shared memory nor two CPUs for gloo.

    When the other end dies its connection closes, which this end notices at once. A silent end is noticed at the
    deadline.

    ``listen`` and ``connect`` take the same arguments as those of ``SharedLink``.
    """

    def __init__(self, socket: zmq.Socket, timeout_s: float):
        super().__init__()
        self._incoming: np.ndarray | None = None
        self._deadline = 0.0
        self._socket: zmq.Socket | None = socket
        self._monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_MONITOR_STOPPED)
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._timeout_s = timeout_s

    @classmethod
    def listen(cls, store: dist.Store, endpoint: str, timeout_s: float, meet_s: float) -> HostLink:
        """Makes the end that opens ``endpoint`` (``ipc://path``, ``tcp://host:*``) and puts it in the store."""
        link = cls(_socket(), meet_s)
        with link._closing_on_failure() as socket:
            socket.bind(endpoint)
            store.set(_ENDPOINT, socket.getsockopt_string(zmq.LAST_ENDPOINT))
            link._check_greeting()
            link._post(_HELLO)
        link._timeout_s = timeout_s
        return link

    @classmethod
    def connect(cls, store: dist.Store, timeout_s: float, meet_s: float) -> HostLink:
        """Makes the end that finds the endpoint in the store."""
        link = cls(_socket(), meet_s)
        with link._closing_on_failure() as socket:
            try:
                endpoint = store.get(_ENDPOINT).decode()
            except RuntimeError as error:
                raise LinkError("the verifier did not open its end of the link") from error
            socket.connect(endpoint)
            link._post(_HELLO)
            link._check_greeting()
        link._timeout_s = timeout_s
        return link

    @contextlib.contextmanager
    def _closing_on_failure(self) -> Iterator[zmq.Socket]:
        with contextlib.ExitStack() as failed:
            failed.callback(self.close)
            assert self._socket is not None
            yield self._socket
            failed.pop_all()

    def _check_greeting(self) -> None:
        if bytes(self._next(time.monotonic() + self._timeout_s)) != _HELLO:
            raise LinkError("received a greeting that is not the other end's")

    def _begin(self, outgoing: np.ndarray | None, incoming: np.ndarray | None) -> None:
        if self._socket is None:
            raise LinkError("the link is closed")
        if outgoing is not None:
            self._post(outgoing.data)
        self._incoming, self._deadline = incoming, time.monotonic() + self._timeout_s

    def _end(self) -> None:
        incoming, self._incoming = self._incoming, None
        if incoming is None:
            return
        frame = np.frombuffer(self._next(self._deadline), np.uint8)
        if frame.size != incoming.nbytes:
            self.close()
            raise LinkError(f"received a frame of {frame.size} bytes where {incoming.nbytes} were due")
        incoming.view(np.uint8)[:] = frame

    @property
    def arrived(self) -> bool | None:
        return self._socket is not None and bool(int(self._socket.get(_EVENTS)) & _POLLIN)

    def _post(self, frame: memoryview | bytes) -> None:
        """Hands a copy of the frame to ZMQ. Raises: LinkError: the other end is gone."""
        if self._socket is None:
            raise LinkError("the link is closed")
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            self.close()
            raise LinkError("the other end closed the link") from None

    def _next(self, deadline: float) -> memoryview:
        """Returns the next frame. Raises: LinkError: the other end is gone, or the deadline has passed."""
        if self._socket is None:
            raise LinkError("the link is closed")
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
                # Frames sent before the other end left are still delivered.
                if not self._socket.poll(0):
                    self.close()
                    raise LinkError("the other end closed the link")
        except (zmq.ZMQError, AttributeError):  # closed by another thread
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
    # A draft that replaces one that left must find a new link, not this one.
    socket.setsockopt(zmq.RECONNECT_IVL, -1)
    return socket
