"""The control lane: messages in order, both ways, beside the rounds."""

from __future__ import annotations

import queue
from typing import Protocol

import zmq

from ...errors import PipelineError
from .messages import MAX_MESSAGE_BYTES, Message, decode, encode

SEND_S = 5.0
"""How long a message waits for somebody to be at the other end."""
_EVENTS, _POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)  # numbers, not members of enums: looking is part of every round


class ControlLane(Protocol):
    """One end of an ordered two-way lane."""

    def send(self, message: Message, *, more: bool = False, wait: bool = True) -> None:
        """Sends a message.

        Args:
            more: others follow at once, and need not arrive before these.
            wait: give the other end ``SEND_S`` to appear, if it is not there; False fails at once.

        Raises:
            PipelineError: nobody is at the other end.
        """

    def receive(self, timeout_s: float) -> Message | None:
        """The next message, or None if none comes in time (0: only look)."""

    def close(self) -> None: ...


class InprocLane:
    """Both ends in one process."""

    def __init__(self, outbox: queue.Queue, inbox: queue.Queue):
        self._outbox, self._inbox = outbox, inbox

    @classmethod
    def pair(cls) -> tuple[InprocLane, InprocLane]:
        one: queue.Queue = queue.Queue()
        other: queue.Queue = queue.Queue()
        return cls(one, other), cls(other, one)

    def send(self, message: Message, *, more: bool = False, wait: bool = True) -> None:
        self._outbox.put(encode(message))

    def receive(self, timeout_s: float) -> Message | None:
        try:
            return decode(self._inbox.get(block=timeout_s > 0, timeout=timeout_s or None))
        except queue.Empty:
            return None

    def close(self) -> None:
        return


class ZmqLane:
    """A PAIR socket; msgpack inside. The two ends know each other: ipc in a private folder, or
    loopback or cluster-internal tcp."""

    def __init__(self, socket: zmq.Socket):
        self._socket = socket

    @classmethod
    def bind(cls, endpoint: str) -> tuple[ZmqLane, str]:
        """A lane and the endpoint the other end connects to (``tcp://host:*`` gets a port)."""
        socket = _socket()
        socket.bind(endpoint)
        return cls(socket), socket.getsockopt_string(zmq.LAST_ENDPOINT)

    @classmethod
    def connect(cls, endpoint: str) -> ZmqLane:
        socket = _socket()
        socket.connect(endpoint)
        return cls(socket)

    def fileno(self) -> int:
        """Becomes readable when something may have changed (edge-triggered): ``receive`` until None then."""
        return int(self._socket.getsockopt(zmq.FD))

    def send(self, message: Message, *, more: bool = False, wait: bool = True) -> None:
        try:
            # Parts of one ZMQ message wake the reader once, and are read one by one like others.
            self._socket.send(encode(message), (0 if wait else zmq.NOBLOCK) | (zmq.SNDMORE if more else 0))
        except zmq.Again:
            raise PipelineError("nobody is at the other end of the control lane") from None

    def receive(self, timeout_s: float) -> Message | None:
        # A poll would make a poller, to look once.
        here = self._socket.poll(int(timeout_s * 1000)) if timeout_s else int(self._socket.get(_EVENTS)) & _POLLIN
        if not here:
            return None
        return decode(self._socket.recv())

    def close(self) -> None:
        self._socket.close(linger=500)


def _socket() -> zmq.Socket:
    socket = zmq.Context.instance().socket(zmq.PAIR)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.LINGER, 500)
    # A slow reader never holds up the sender; without any reader a send must not wait for ever.
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.SNDTIMEO, int(SEND_S * 1000))
    return socket
