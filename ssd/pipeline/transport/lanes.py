"""The control lane: messages in order, both ways, outside the rounds."""

from __future__ import annotations

import queue
import select
from typing import Protocol

import zmq

from ...errors import PipelineError
from .messages import MAX_MESSAGE_BYTES, Message, decode, encode

SEND_S = 5.0
"""How long ``send`` waits for the other end to appear."""
_EVENTS, _POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)  # plain numbers: every round looks, and enums are slow


class ControlLane(Protocol):
    """One end of an ordered two-way lane."""

    def send(self, message: Message, *, more: bool = False, wait: bool = True) -> None:
        """Sends a message.

        Args:
            more: other messages follow at once, so the reader need not wake for this one.
            wait: give the other end up to ``SEND_S`` to appear. False fails at once if it is not there.

        Raises:
            PipelineError: nobody is at the other end.
            RequestError: a value of the message is out of the wire's range.
        """

    def receive(self, timeout_s: float) -> Message | None:
        """Returns the next message, or None if none comes in time. A timeout of 0 only looks.

        Raises:
            PipelineError: something else than a message arrived.
        """

    def close(self) -> None:
        """Closes this end. Messages sent before are still delivered for half a second."""


class InprocLane:
    """Both ends in one process: the twin of ``ZmqLane``. Its other end is always there."""

    def __init__(self, outbox: queue.Queue, inbox: queue.Queue):
        self._outbox, self._inbox = outbox, inbox

    @classmethod
    def pair(cls) -> tuple[InprocLane, InprocLane]:
        """Returns the two ends of a new lane."""
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
    """A ZMQ PAIR socket that carries msgpack.

    Both ends know each other. The socket is in a private folder, or on a loopback or cluster-internal tcp port.
    """

    def __init__(self, socket: zmq.Socket):
        self._socket = socket
        self._signal = select.poll()
        self._signal.register(self.fileno(), select.POLLIN)
        self._settled = False
        """Whether ZMQ said that nothing is here, and has not been used since."""

    @classmethod
    def bind(cls, endpoint: str) -> tuple[ZmqLane, str]:
        """Opens a lane for the other end to connect to.

        Returns:
            The lane, and the endpoint to connect to: ``tcp://host:*`` gets a port.

        Raises:
            PipelineError: the endpoint cannot be opened.
        """
        socket = _socket()
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            socket.close(linger=0)
            raise PipelineError(f"no lane can be opened at {endpoint}: {error}") from error
        return cls(socket), socket.getsockopt_string(zmq.LAST_ENDPOINT)

    @classmethod
    def connect(cls, endpoint: str) -> ZmqLane:
        """Returns the other end of a lane. Messages may be sent before the first end is there."""
        socket = _socket()
        socket.connect(endpoint)
        return cls(socket)

    def fileno(self) -> int:
        """Returns a descriptor that becomes readable when something may have changed.

        It is edge-triggered: call ``receive`` until it returns None.
        """
        return int(self._socket.getsockopt(zmq.FD))

    def send(self, message: Message, *, more: bool = False, wait: bool = True) -> None:
        self._settled = False
        try:
            # Parts of one ZMQ message wake the reader once. It reads them one by one.
            self._socket.send(encode(message), (0 if wait else zmq.NOBLOCK) | (zmq.SNDMORE if more else 0))
        except zmq.Again:
            waited = f" after {SEND_S:g} s" if wait else ""
            raise PipelineError(f"nobody is at the other end of the control lane{waited}") from None

    def receive(self, timeout_s: float) -> Message | None:
        if timeout_s:
            here = self._socket.poll(int(timeout_s * 1000))
        elif self._settled and not self._signal.poll(0):
            return None  # a look is part of every round, and asking ZMQ costs several times this
        else:
            here = int(self._socket.get(_EVENTS)) & _POLLIN
        # Once ZMQ has said that nothing is here, its descriptor signals the next message. Sending may use that up.
        self._settled = not here
        return decode(self._socket.recv()) if here else None

    def close(self) -> None:
        self._socket.close(linger=500)


def _socket() -> zmq.Socket:
    socket = zmq.Context.instance().socket(zmq.PAIR)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.LINGER, 500)
    # A slow reader never blocks the sender. Without a reader, sending has a deadline.
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.SNDTIMEO, int(SEND_S * 1000))
    return socket
